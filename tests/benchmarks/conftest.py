"""The benchmarks lie outside the package: make them importable as `benchmarks`."""

import pytest

from minipeft.commands.bench import load_benchmarks

load_benchmarks()

from benchmarks.options import HUGE_PAGES  # noqa: E402


@pytest.fixture(autouse=True)
def _small_pages(monkeypatch):
    """Other tests of this process measure memory: leave PyTorch's allocator as it is."""
    monkeypatch.setenv(HUGE_PAGES, "0")
