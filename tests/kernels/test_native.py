"""The compiled CPU code as a library: when it is there and when not, in threads, forks and beside torch's OpenMP."""

import importlib
import os
import platform
import shutil
import sys
import threading
from collections.abc import Iterator

import pytest
import torch
from native_weights import LEVELS, by_reference, needs_library, random_state
from processes import run_process

from minipeft.nf4 import NF4Linear
from minipeft_kernels import arithmetic, native

pytestmark = pytest.mark.usefixtures("compiled")


def test_the_library_is_there_where_it_can_be_built() -> None:
    if sys.platform != "linux" or platform.machine() != "x86_64" or not (shutil.which("gcc") or shutil.which("cc")):
        pytest.skip("no C compiler on x86-64 Linux: the compiled part is optional here")
    assert not native.obstacle()
    assert native.library().minipeft_level() > native.SCALAR


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
        thread.join(timeout=60)
    assert all(torch.equal(a, b) for a, b in zip(got, right, strict=True))


FORK = """
import os, signal, torch
torch.set_grad_enabled(False)
from minipeft.nf4 import NF4Linear
from minipeft_kernels import native
torch.set_num_threads(2)
torch.manual_seed(0)
layer, x = NF4Linear.from_linear(torch.nn.Linear(1024, 1024)), torch.randn(32, 1024)
def decoded(): return layer.dequantize().numpy().tobytes()
weight, right = decoded(), layer(x)
child = os.fork()
if child == 0:
    signal.alarm(60)
    same = decoded() == weight
    if native.level() == native.SCALAR:
        # Below, weights are decoded by compiled code and multiplied by torch, whose OpenMP hangs in a forked process
        # that computes with more than one thread, nn.Linear's products too.
        torch.set_num_threads(1)
        # A product of one thread may add in another order than one of two.
        os._exit(0 if same and torch.allclose(layer(x), right, rtol=1e-5, atol=1e-5) else 1)
    os._exit(0 if same and torch.equal(layer(x), right) else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""


@needs_library
@pytest.mark.parametrize("name", [native.LEVEL_NAMES[i] for i in LEVELS])
def test_a_forked_process_computes_the_same(name: str) -> None:
    environment = {**os.environ, "MINIPEFT_BACKEND": "native", "MINIPEFT_CPU": name, "OMP_NUM_THREADS": "2"}
    run_process([sys.executable, "-W", "ignore", "-c", FORK], check=True, env=environment)


@pytest.fixture
def _level_unread() -> Iterator[None]:
    for cached in (native.level, native.level_limit):
        cached.cache_clear()
    yield
    for cached in (native.level, native.level_limit):
        cached.cache_clear()


@needs_library
@pytest.mark.usefixtures("_level_unread")
@pytest.mark.parametrize("level", LEVELS)
def test_a_variable_forces_a_level(monkeypatch: pytest.MonkeyPatch, level: int) -> None:
    monkeypatch.setenv("MINIPEFT_CPU", native.LEVEL_NAMES[level])
    assert native.level() == level and native.describe() == f"native ({native.LEVELS[level]})"
    assert arithmetic._find_onednn() == (arithmetic.HAS_ONEDNN and level >= native.AVX512)
    assert arithmetic._native_cpu_dtypes() <= arithmetic.CPU_DTYPES
    assert level == native.AVX512_BF16 or arithmetic._native_cpu_dtypes() == {torch.float32}


@pytest.mark.usefixtures("_level_unread")
def test_an_unknown_level_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINIPEFT_CPU", "sse9")
    with pytest.raises(ValueError, match=r"MINIPEFT_CPU must be one of scalar, avx2, .* or unset, got 'sse9'"):
        native.level_limit()


@needs_library
@pytest.mark.usefixtures("_level_unread")
def test_a_level_that_the_processor_lacks_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Older:
        def minipeft_level(self) -> int:
            return native.AVX2

    monkeypatch.setenv("MINIPEFT_CPU", "avx512")
    monkeypatch.setattr(native, "library", Older)
    message = "MINIPEFT_CPU=avx512, but this processor has no AVX-512: it has scalar, avx2"
    with pytest.raises(ValueError, match=message):
        native.level()


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
