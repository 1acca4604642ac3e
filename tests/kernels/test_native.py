"""The compiled CPU code as a library: when it is there and when not, in threads, forks and beside torch's OpenMP."""

import importlib
import os
import platform
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import torch
from native_weights import by_reference, needs_library, random_state

from minipeft.nf4 import NF4Linear
from minipeft_kernels import native

pytestmark = pytest.mark.usefixtures("compiled")


def test_the_library_is_there_where_it_can_be_built() -> None:
    if sys.platform != "linux" or platform.machine() != "x86_64" or not (shutil.which("gcc") or shutil.which("cc")):
        pytest.skip("no C compiler on x86-64 Linux: the compiled part is optional here")
    assert not native.obstacle()
    assert native.level() > native.SCALAR


@needs_library
def test_python_threads_share_a_weight() -> None:
    layer = NF4Linear.from_linear(torch.nn.Linear(256, 512))
    xs = [torch.randn(4, 256) for _ in range(8)]
    right, got = [layer(x) for x in xs], [torch.empty(0)] * 8

    def work(i: int) -> None:
        for _ in range(20):
            got[i] = layer(xs[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(got, right, strict=True))


@needs_library
def test_a_forked_process_computes_the_same() -> None:
    program = """
import os, torch
from minipeft.nf4 import NF4Linear
torch.set_num_threads(2)
torch.manual_seed(0)
layer, x = NF4Linear.from_linear(torch.nn.Linear(1024, 1024)), torch.randn(32, 1024)
right = layer(x)
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(layer(x), right) else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""
    environment = {**os.environ, "MINIPEFT_BACKEND": "native", "OMP_NUM_THREADS": "2"}
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True, env=environment, timeout=120)


@needs_library
def test_openmp_is_torchs_own() -> None:
    if not os.path.exists("/proc/self/maps"):
        pytest.skip("no /proc")
    with open("/proc/self/maps") as file:
        loaded = {line.split()[-1] for line in file if "libgomp" in line}
    assert len(loaded) == 1


@pytest.fixture
def _unloaded() -> Iterator[None]:
    caches = (native._load, native.obstacle, importlib.import_module("minipeft_kernels.dispatch").native_obstacle)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


@needs_library
@pytest.mark.usefixtures("_unloaded")
def test_a_library_of_older_sources_is_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "ABI", native.ABI + 1)
    assert f"other sources (version {native.ABI - 1}, not {native.ABI}): reinstall minipeft" in native.obstacle()


@pytest.mark.usefixtures("_unloaded")
def test_without_the_library_the_reference_runs_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(native, "MODULE", "minipeft_kernels._nothing")
    monkeypatch.setenv("MINIPEFT_BACKEND", "")
    monkeypatch.setattr("minipeft_kernels.dispatch.interpreting", lambda: False)
    importlib.import_module("minipeft_kernels.dispatch").triton_obstacle.cache_clear()
    w = random_state(256, 64, True)
    with caplog.at_level("WARNING", logger="minipeft"):
        assert torch.equal(w.dequantize(), by_reference(w, torch.float32))
        w.dequantize()
    assert ["compiled part is not there: reinstall" in record.message for record in caplog.records] == [True]
    monkeypatch.setenv("MINIPEFT_BACKEND", "native")
    with pytest.raises(RuntimeError, match="MINIPEFT_BACKEND=native, but minipeft's compiled part is not there"):
        w.dequantize()
    importlib.import_module("minipeft_kernels.dispatch").triton_obstacle.cache_clear()
