"""Products with NF4 weights in compiled CPU code: against float64, and what they allocate, keep and call."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from largest_tensor import LargestTensor
from native_weights import LEVELS, become, by_reference, count_calls, needs_library
from torch import Tensor

from minipeft.nf4 import NF4Linear, NF4Weight
from minipeft_kernels import native
from minipeft_kernels.linear import cpu

# Of the terms' magnitudes: float32's rounding of some sums, and terms and results rounded to bfloat16.
TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
pytestmark = [needs_library, pytest.mark.usefixtures("compiled")]


def error_of_product(ours: Tensor, a: Tensor, b: Tensor) -> float:
    """The largest distance from a b, in units of the largest sum of the terms' magnitudes."""
    a, b = a.double(), b.double()
    return float((ours.double() - a @ b).abs().max() / (a.abs() @ b.abs()).max()) if ours.numel() else 0.0


@given(
    n=st.integers(1, 150),
    blocks=st.integers(1, 12),
    blocksize=st.sampled_from([32, 64, 256]),
    cut=st.sampled_from([0, 0, 0, 1, 10, 16]),
    m=st.sampled_from([0, 1, 2, 5, 6, 7, 16, 300]),
    double=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    which=st.sampled_from(LEVELS),
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
        become(which, patch)
        y = cpu.multiply(x, w.packed(), dtype)
        dx = cpu.multiply_back(dy, w.packed(), torch.float32)
    assert y.dtype == dtype and dx.dtype == torch.float32
    assert error_of_product(y, x, dense.T) < TOLERANCES[dtype]
    assert error_of_product(dx, dy, dense) < TOLERANCES[dtype]


@given(
    n=st.integers(1, 150),
    blocks=st.integers(1, 7),
    m=st.sampled_from([1, 5, 6, 16, 300]),
    rank=st.sampled_from([0, 1, 4, 7, 16, 150]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    adapter=st.sampled_from([torch.float32, torch.bfloat16]),
    which=st.sampled_from(LEVELS),
)
@settings(max_examples=100, deadline=None)
def test_products_with_an_update_equal_float64(
    n: int, blocks: int, m: int, rank: int, dtype: torch.dtype, adapter: torch.dtype, which: int
) -> None:
    k = 32 * blocks
    w = NF4Weight.quantize(torch.randn(n, k), 32)
    dense = by_reference(w, torch.float32).double()
    x, dy, low = torch.randn(m, k).to(dtype), torch.randn(m, n).to(dtype), torch.randn(m, rank)
    lora_A, lora_B = torch.randn(rank, k).to(adapter), torch.randn(n, rank).to(adapter)
    with pytest.MonkeyPatch.context() as patch:
        become(which, patch)
        y = cpu.forward(x, w.packed(), None, (low, lora_B), dtype)
        dx = cpu.input_gradient(dy, w.packed(), (low, lora_A), dtype)
        calls = count_calls(patch)
        cpu.input_gradient(dy, w.packed(), (low, lora_A), dtype)
    assert set(calls) == ({"minipeft_decode"} if which == native.SCALAR else {"minipeft_product"})
    assert error_of_product(y, torch.cat([x, low], 1), torch.cat([dense, lora_B.double()], 1).T) < TOLERANCES[dtype]
    assert error_of_product(dx, torch.cat([dy, low], 1), torch.cat([dense, lora_A.double()])) < TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(64, 64), (70, 96), (2, 32), (576, 576)])
def test_a_fitting_product_is_compiled_code_and_one_call(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], dtype: torch.dtype, level: int
) -> None:
    # Without bfloat16 instructions the arithmetic is float32's.
    compiled = level != native.SCALAR
    calls = count_calls(monkeypatch)
    w = NF4Weight.quantize(torch.randn(shape), 32)
    layer = NF4Linear(shape[1], shape[0], bias=False, device="meta")
    layer.set_weight(w)
    for rows, forward in ((3, "minipeft_thin"), (7, "minipeft_product")):
        calls.clear()
        layer(torch.randn(rows, shape[1], dtype=dtype, requires_grad=True)).sum().backward()
        assert calls == ([forward, "minipeft_product"] if compiled else ["minipeft_decode"] * 2)


@pytest.mark.parametrize("m", [1, 40])
def test_nothing_is_allocated_but_the_result(m: int, level: int) -> None:
    if level == native.SCALAR:
        pytest.skip("a lesser processor decodes a chunk of the weight")
    w = NF4Weight.quantize(torch.randn(256, 1024))
    x, dy = torch.randn(m, 1024), torch.randn(m, 256)
    with LargestTensor() as largest:
        cpu.multiply(x, w.packed(), torch.float32)
    assert largest.nbytes == 4 * m * 256
    with LargestTensor() as largest:
        cpu.multiply_back(dy, w.packed(), torch.float32)
    assert largest.nbytes == 4 * m * 1024


def test_the_packed_weight_alone_is_kept_for_backward() -> None:
    layer = NF4Linear.from_linear(torch.nn.Linear(128, 64))
    x = torch.randn(50, 128, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    assert [t.data_ptr() for t in kept] == [t.data_ptr() for t in layer.packed().tensors()]


def test_threads_and_rows_beside_change_no_bit(level: int) -> None:
    w = NF4Weight.quantize(torch.randn(640, 576))
    x = torch.randn(300, 576)
    before = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append((cpu.multiply(x, w.packed(), torch.float32), w.dequantize()))
    finally:
        torch.set_num_threads(before)
    for y, dense in results[1:]:
        assert torch.equal(y, results[0][0]) and torch.equal(dense, results[0][1])
    if level != native.SCALAR:
        assert torch.equal(cpu.multiply(x[7:20], w.packed(), torch.float32), results[0][0][7:20])


def test_compiled_graphs_hold_the_operation(level: int) -> None:
    layer = NF4Linear.from_linear(torch.nn.Linear(128, 64))
    x = torch.randn(6, 128).T.contiguous().T.requires_grad_()  # strided
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results = [torch.autograd.grad(call(x).sum(), x)[0] for call in (layer, compiled)]
    assert torch.equal(*results)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        (
            "codes",
            torch.zeros(10, 1, dtype=torch.uint8),
            r"codes of the NF4 weight must be 4096 of torch.uint8 .* got 10 of torch.uint8",
        ),
        ("absmax", torch.zeros(128), r"absmax of .* must be 128 of torch.uint8 .* got 128 of torch.float32"),
        ("quant_map", torch.zeros(16).double(), "quant_map of .* must be 16 of torch.float32"),
        ("nested_absmax", torch.zeros(0), "nested_absmax of .* must be 1 of"),
        ("nested_map", None, "nested_map of .* must be 256 of .* got None"),
    ],
)
def test_a_weight_that_is_not_whole_is_refused(name: str, tensor: Tensor | None, message: str) -> None:
    w = NF4Weight.quantize(torch.randn(64, 128))
    packed = w.packed()._replace(**{name: tensor})
    with pytest.raises(ValueError, match=message):
        cpu.multiply(torch.randn(2, 128), packed, torch.float32)


@pytest.mark.parametrize(("blocksize", "nested"), [(-64, 256), (0, 256), (64, -1), (64, 0)])
@pytest.mark.parametrize("rows", [2, 6])
def test_empty_blocks_are_refused(rows: int, blocksize: int, nested: int) -> None:
    packed = NF4Weight.quantize(torch.randn(64, 128)).packed()
    with pytest.raises(ValueError, match=rf"blocksize \({blocksize}\) .* \({nested}\) must be at least 1"):
        cpu.multiply(
            torch.randn(rows, 128), packed._replace(blocksize=blocksize, nested_blocksize=nested), torch.float32
        )


@pytest.mark.parametrize("rows", [1, 4, 6])
def test_the_roundings_of_bfloat16_levels_cancel(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """Of an x of one sign they would add up to some times those of W, which is rounded weight by weight."""
    if native.level() < native.AVX512_BF16:
        pytest.skip("no bfloat16 instructions")
    linear = torch.nn.Linear(4096, 256, bias=False)
    torch.nn.init.normal_(linear.weight, std=0.02)
    layer = NF4Linear.from_linear(linear)
    x = (torch.rand(rows, 4096) + 0.5).bfloat16()
    right, errors = x.double() @ layer.dequantize(torch.float32).double().T, []
    for backend in ("native", "reference"):
        monkeypatch.setenv("MINIPEFT_BACKEND", backend)
        with torch.no_grad():
            errors.append(float((layer(x).double() - right).square().mean()))
    assert errors[0] < errors[1]
