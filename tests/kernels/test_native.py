"""The compiled CPU code against the reference, bit by bit, and float64; at every level that this processor has."""

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
from guarded import Guarded
from hypothesis import given, settings
from hypothesis import strategies as st
from largest_tensor import LargestTensor
from nf4_golden import golden
from torch import Tensor

from minipeft.kernels import native, nf4_native
from minipeft.kernels.codebooks import NF4_LEVELS, dynamic_map
from minipeft.kernels.nf4_dequantize import dequantize_absmax, nf4_dequantize_reference
from minipeft.quantization import NF4Linear, NF4Weight

module = importlib.import_module("minipeft.kernels.nf4_matmul")
HAVE = not native.obstacle()
needs_library = pytest.mark.skipif(not HAVE, reason=native.obstacle())
LEVELS = range(native.level() + 1) if HAVE else [native.SCALAR]
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
# Of the terms' magnitudes: float32's rounding of some sums, and terms and results rounded to bfloat16.
TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 2**-7}


@pytest.fixture(autouse=True)
def _native(monkeypatch: pytest.MonkeyPatch) -> None:
    if HAVE:
        monkeypatch.setenv("MINIPEFT_BACKEND", "native")


@pytest.fixture(params=LEVELS, ids=[native.LEVELS[i] for i in LEVELS])
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(native, "level", lambda: request.param)
    return int(request.param)


def packed_of(w: NF4Weight) -> module.Packed:
    return w.codes, w.absmax, w.quant_map, w.nested_absmax, w.nested_quant_map, w.offset


def sizes_of(w: NF4Weight) -> module.Sizes:
    rows, columns = w.shape if len(w.shape) == 2 else (w.shape.numel(), 1)
    return rows, columns, w.blocksize, w.nested_blocksize


def random_state(n: int, blocksize: int, double: bool, exponents: tuple[float, float] = (-3, 3)) -> NF4Weight:
    """Any codes and scales: n weights whose scales have exponents from a range, which quantizing may not give."""
    blocks = -(-n // blocksize)
    scales = torch.exp2(torch.empty(blocks).uniform_(*exponents))
    codes = torch.randint(0, 256, ((n + 1) // 2, 1), dtype=torch.uint8)
    w = NF4Weight(codes, scales, NF4_LEVELS.clone(), blocksize, torch.Size((n,)), torch.float32)
    if double:
        w.absmax = torch.randint(0, 256, (blocks,), dtype=torch.uint8)
        w.nested_absmax = torch.rand(-(-blocks // 256)) * 2.0 ** exponents[1]
        w.nested_quant_map, w.offset = dynamic_map().clone(), torch.tensor(2.0 ** exponents[0])
    return w


def by_reference(w: NF4Weight, dtype: torch.dtype) -> Tensor:
    scales = w.absmax
    if w.nested_absmax is not None:
        scales = dequantize_absmax(w.absmax, w.nested_absmax, w.nested_quant_map, w.offset, w.nested_blocksize)
    return nf4_dequantize_reference(w.codes, scales, w.quant_map, w.shape.numel(), w.blocksize, dtype).view(w.shape)


def test_the_library_is_there_where_it_can_be_built() -> None:
    if sys.platform != "linux" or platform.machine() != "x86_64" or not (shutil.which("gcc") or shutil.which("cc")):
        pytest.skip("no C compiler on x86-64 Linux: the compiled part is optional here")
    assert not native.obstacle()
    assert native.level() > native.SCALAR


@needs_library
@given(
    n=st.integers(1, 3000),
    blocksize=st.sampled_from([32, 64, 128, 4096]),
    double=st.booleans(),
    dtype=st.sampled_from(FLOATS),
    part=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    which=st.sampled_from(list(LEVELS)),
)
@settings(max_examples=150, deadline=None)
def test_any_part_decodes_to_the_references_bits(
    n: int, blocksize: int, double: bool, dtype: torch.dtype, part: tuple[float, float], which: int
) -> None:
    w = random_state(n, blocksize, double)
    first, last = sorted(round(x * n) for x in part)
    buffer = Guarded(last - first, dtype=dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "level", lambda: which)
        nf4_native.decode_into(buffer.out, packed_of(w), sizes_of(w), first, last)
    assert torch.equal(buffer.check(), by_reference(w, dtype)[first:last])


@needs_library
@pytest.mark.parametrize("dtype", FLOATS)
def test_numbers_out_of_the_usual_range_are_rounded_as_torch_rounds_them(level: int, dtype: torch.dtype) -> None:
    # float16 becomes subnormal, zero and infinite; bfloat16 and float32 subnormal.
    w = random_state(1 << 17, 32, False, exponents=(-149, 127))
    assert torch.equal(w.dequantize(dtype), by_reference(w, dtype))
    w.absmax[0], w.absmax[1] = float("nan"), float("inf")
    odd = w.dequantize(dtype)
    assert odd[:32].isnan().all()
    assert torch.equal(odd[32:64].isinf(), by_reference(w, dtype)[32:64].isinf())


@needs_library
def test_every_byte_decodes_as_bitsandbytes(level: int) -> None:
    for name in ("decode_all_1", "decode_all_pi"):
        codes, absmax = golden(f"{name}.packed").view(-1, 1), golden(f"{name}.absmax")
        w = NF4Weight(codes, absmax, NF4_LEVELS, 64, torch.Size((8, 64)), torch.float32)
        assert torch.equal(w.dequantize(), golden(f"{name}.out"))


@needs_library
def test_a_result_too_large_for_the_caches_has_the_same_bits(level: int) -> None:
    w = random_state(5 << 20, 64, True)
    assert torch.equal(w.dequantize(), by_reference(w, torch.float32))


def error_of_product(ours: Tensor, a: Tensor, b: Tensor) -> float:
    """The largest distance from a b, in units of the largest sum of the terms' magnitudes."""
    a, b = a.double(), b.double()
    return float((ours.double() - a @ b).abs().max() / (a.abs() @ b.abs()).max()) if ours.numel() else 0.0


@needs_library
@given(
    n=st.integers(1, 150),
    blocks=st.integers(1, 12),
    blocksize=st.sampled_from([32, 64, 256]),
    cut=st.sampled_from([0, 0, 0, 1, 10, 16]),
    m=st.sampled_from([0, 1, 2, 5, 6, 7, 16, 300]),
    double=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    which=st.sampled_from(list(LEVELS)),
)
@settings(max_examples=150, deadline=None)
def test_products_equal_float64(
    n: int, blocks: int, blocksize: int, cut: int, m: int, double: bool, dtype: torch.dtype, which: int
) -> None:
    # `cut` makes rows that end within a block, which the compiled product leaves to torch.
    k = blocks * blocksize - cut
    w = NF4Weight.quantize(torch.randn(n, k), blocksize, double)
    dense = by_reference(w, torch.float32).double()
    x, dy = torch.randn(m, k).to(dtype), torch.randn(m, n).to(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "level", lambda: which)
        y = module.multiply(x, packed_of(w), sizes_of(w), dtype)
        dx = module.multiply_back(dy, packed_of(w), sizes_of(w), torch.float32)
    assert y.dtype == dtype and dx.dtype == torch.float32
    assert error_of_product(y, x, dense.T) < TOLERANCES[dtype]
    assert error_of_product(dx, dy, dense) < TOLERANCES[dtype]


needs_products = pytest.mark.skipif(not HAVE or native.level() < native.AVX512, reason="the products want AVX-512")


@needs_products
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(64, 64), (70, 96), (2, 32), (576, 576)])
def test_a_fitting_product_is_compiled_code_and_one_call(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    if dtype == torch.bfloat16 and native.level() < native.AVX512_BF16:
        pytest.skip("no bfloat16 instructions")
    calls: list[str] = []

    class Counted:
        def __getattr__(self, name: str) -> object:
            calls.append(name)
            return getattr(real, name)

    real = native.library()
    monkeypatch.setattr(native, "library", Counted)
    w = NF4Weight.quantize(torch.randn(shape), 32)
    layer = NF4Linear(shape[1], shape[0], bias=False, device="meta")
    layer.set_weight(w)
    x = torch.randn(3, shape[1], dtype=dtype, requires_grad=True)
    layer(x).sum().backward()
    assert calls == ["minipeft_product", "minipeft_product"]


@needs_products
@pytest.mark.parametrize("m", [1, 40])
def test_nothing_is_allocated_but_the_result(m: int) -> None:
    w = NF4Weight.quantize(torch.randn(256, 1024))
    x, dy = torch.randn(m, 1024), torch.randn(m, 256)
    with LargestTensor() as largest:
        module.multiply(x, packed_of(w), sizes_of(w), torch.float32)
    assert largest.nbytes == 4 * m * 256
    with LargestTensor() as largest:
        module.multiply_back(dy, packed_of(w), sizes_of(w), torch.float32)
    assert largest.nbytes == 4 * m * 1024


@needs_library
def test_the_packed_weight_alone_is_kept_for_backward() -> None:
    layer = NF4Linear.from_linear(torch.nn.Linear(128, 64))
    x = torch.randn(50, 128, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    assert [t.data_ptr() for t in kept] == [t.data_ptr() for t in layer.packed()]


@needs_library
def test_threads_and_rows_beside_change_no_bit() -> None:
    w = NF4Weight.quantize(torch.randn(640, 576))
    x = torch.randn(300, 576)
    before = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append((module.multiply(x, packed_of(w), sizes_of(w), torch.float32), w.dequantize()))
    finally:
        torch.set_num_threads(before)
    for y, dense in results[1:]:
        assert torch.equal(y, results[0][0]) and torch.equal(dense, results[0][1])
    if native.level() >= native.AVX512:
        assert torch.equal(module.multiply(x[7:20], packed_of(w), sizes_of(w), torch.float32), results[0][0][7:20])


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
from minipeft.quantization import NF4Linear
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


@needs_library
def test_compiled_graphs_hold_the_operation(level: int) -> None:
    layer = NF4Linear.from_linear(torch.nn.Linear(128, 64))
    x = torch.randn(6, 128).T.contiguous().T.requires_grad_()  # strided
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results = [torch.autograd.grad(call(x).sum(), x)[0] for call in (layer, compiled)]
    assert torch.equal(*results)


@needs_library
@pytest.mark.parametrize(
    ("index", "tensor", "message"),
    [
        (
            0,
            torch.zeros(10, 1, dtype=torch.uint8),
            r"codes of the NF4 weight must be 4096 of torch.uint8 .* got 10 of torch.uint8",
        ),
        (1, torch.zeros(128), r"absmax of .* must be 128 of torch.uint8 .* got 128 of torch.float32"),
        (2, torch.zeros(16).double(), "quant_map of .* must be 16 of torch.float32"),
        (3, torch.zeros(0), "nested_absmax of .* must be 1 of"),
        (4, None, "nested_map of .* must be 256 of .* got None"),
    ],
)
def test_a_weight_that_is_not_whole_is_refused(index: int, tensor: Tensor | None, message: str) -> None:
    w = NF4Weight.quantize(torch.randn(64, 128))
    packed = list(packed_of(w))
    packed[index] = tensor
    with pytest.raises(ValueError, match=message):
        module.multiply(torch.randn(2, 128), packed, sizes_of(w), torch.float32)


@pytest.fixture
def _unloaded() -> Iterator[None]:
    caches = (native._load, native.obstacle, importlib.import_module("minipeft.kernels.dispatch").native_obstacle)
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
    monkeypatch.setattr(native, "MODULE", "minipeft.kernels._nothing")
    monkeypatch.setenv("MINIPEFT_BACKEND", "")
    monkeypatch.setattr("minipeft.kernels.dispatch.interpreting", lambda: False)
    importlib.import_module("minipeft.kernels.dispatch").triton_obstacle.cache_clear()
    w = random_state(256, 64, True)
    with caplog.at_level("WARNING", logger="minipeft"):
        assert torch.equal(w.dequantize(), by_reference(w, torch.float32))
        w.dequantize()
    assert ["compiled part is not there: reinstall" in record.message for record in caplog.records] == [True]
    monkeypatch.setenv("MINIPEFT_BACKEND", "native")
    with pytest.raises(RuntimeError, match="MINIPEFT_BACKEND=native, but minipeft's compiled part is not there"):
        w.dequantize()
    importlib.import_module("minipeft.kernels.dispatch").triton_obstacle.cache_clear()
