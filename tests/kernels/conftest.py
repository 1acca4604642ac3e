"""The kernels' tests run in Triton's interpreter, which a machine without a GPU has too.

Triton reads TRITON_INTERPRET when a kernel is defined, so it is set before any is. The tests beside this file stay with
the PyTorch references: a test that means the kernels takes the fixture `kernels`, one that means the compiled CPU code
is in `test_native.py`. The rest of the suite, in the same process, takes what a CPU takes.
"""

import os

import pytest

os.environ.setdefault("TRITON_INTERPRET", "1")

from minipeft.kernels import native

os.environ.setdefault("MINIPEFT_BACKEND", "reference" if native.obstacle() else "native")


@pytest.fixture(autouse=True)
def _reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINIPEFT_BACKEND", "reference")


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Operations run as Triton kernels; a kernel that cannot run is an error."""
    monkeypatch.setenv("MINIPEFT_BACKEND", "triton")
