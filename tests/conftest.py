"""Set-up of every test: no network, few threads, one seed, Ctrl-C heard, no limit of time for an example."""

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

# Before torch and transformers are imported: tests must not reach for a hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Triton reads this when a kernel is defined, which importing the kernels does: without a GPU its interpreter runs them.
os.environ.setdefault("TRITON_INTERPRET", "1")
# Processes that share the cores: two threads each would wait for one another.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from chat_tokenizers import llama_tokenizer, spanning_tokenizer, tokenizer  # noqa: F401 - fixtures

from minipeft_kernels import native

# What else runs on the machine decides how long an example takes: no test fails by it. Smoke tests need none.
with contextlib.suppress(ImportError):
    from hypothesis import HealthCheck, settings

    free = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
    settings.register_profile("whatever the load", settings(), **free)
    settings.load_profile("whatever the load")

# What a CPU takes by itself, in spite of the interpreter.
os.environ.setdefault("MINIPEFT_BACKEND", "reference" if native.obstacle() else "native")

SLOW = {line for line in Path(__file__).with_name("slow.txt").read_text().splitlines() if not line.startswith("#")}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that tests/slow.txt names, so that `.ci/check` can leave them out by `-m "not slow"`."""
    for item in items:
        if item.nodeid.split("[")[0] in SLOW:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _interruptible() -> Iterator[None]:
    """Ctrl-C raises, here and in what a test starts: in a script's background, pytest inherits SIGINT as ignored."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    if before is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
