"""The kernels' tests run in Triton's interpreter, which a machine without a GPU has too.

The tests beside this file stay with the PyTorch references: a test that means the kernels takes the fixture `kernels`,
one that means the compiled CPU code `compiled`. The rest of the suite, in the same process, takes what a CPU takes.
"""

import pytest
from native_weights import LEVELS, become

from minipeft_kernels import native

HAVE_COMPILED = not native.obstacle()


@pytest.fixture(autouse=True)
def _reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINIPEFT_BACKEND", "reference")


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Operations run as Triton kernels; a kernel that cannot run is an error."""
    monkeypatch.setenv("MINIPEFT_BACKEND", "triton")


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Operations run as compiled CPU code, where there is any."""
    if HAVE_COMPILED:
        monkeypatch.setenv("MINIPEFT_BACKEND", "native")


@pytest.fixture(params=LEVELS, ids=[native.LEVELS[i] for i in LEVELS])
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """A processor of each level that this one has the instructions for."""
    become(request.param, monkeypatch)
    return int(request.param)
