"""The fused products against float64, by the code of the kernels: portable, and with the byte permutes simulated."""

from typing import Any

import inline_asm
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import TOLERANCES
from triton.runtime.interpreter import InterpreterBuilder

from minipeft.nf4 import NF4Weight
from minipeft_kernels.linear import gpu as module
from minipeft_kernels.linear import tiles as configs
from minipeft_kernels.packed import NF4, TENSORS

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GUARD = 64


class Weight:
    """A random (n, k) weight, packed, and the dense float64 matrix that it stands for."""

    def __init__(self, n: int, k: int, blocksize: int = 64, double: bool = True) -> None:
        w = NF4Weight.quantize(torch.randn(n, k) / max(k, 1) ** 0.5, blocksize, double)
        self.packed, self.dense = w.packed(), w.dequantize(torch.float64)


@pytest.fixture
def few_processors(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets how many multiprocessors there seem to be, and so how many programs share a tile."""
    return lambda count: monkeypatch.setattr(module, "multiprocessors", lambda device: count)


@pytest.fixture
def permutes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of NVIDIA hardware: inline assembly, run by `inline_asm.py`."""
    monkeypatch.setattr(InterpreterBuilder, "create_inline_asm", inline_asm.create_inline_asm)
    monkeypatch.setattr(module, "can_permute", lambda x: x.element_size() == 2)


def check(m: int, weight: Weight, dtype: torch.dtype, bias: bool = False, rank: int = 0) -> None:
    """y and dx against float64, each operand as the kernel rounds it."""
    n, k = weight.dense.shape
    x, dy = torch.randn(m, k).to(dtype), torch.randn(m, n).to(dtype)
    b = torch.randn(n).to(dtype) if bias else None
    low, up, down = torch.randn(m, rank) * 0.3, torch.randn(n, rank) * 0.3, torch.randn(rank, k) * 0.3
    low, up, down = (t.to(dtype).float() for t in (low, up, down))
    y = module.launch_forward(x, weight.packed, bias=b, update=(low, up) if rank else None)
    dx = module.launch_input_gradient(dy, weight.packed, update=(low, down) if rank else None)
    right_y = x.double() @ weight.dense.t() + low.double() @ up.t().double() + (0 if b is None else b.double())
    right_dx = dy.double() @ weight.dense + low.double() @ down.double()
    for ours, right in ((y, right_y), (dx, right_dx)):
        assert ours.dtype == dtype and ours.shape == right.shape
        torch.testing.assert_close(ours.double(), right, **TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("blocksize", [64, 128])
def test_products_equal_float64(dtype: torch.dtype, double: bool, blocksize: int) -> None:
    check(5, Weight(70, 384, blocksize, double), dtype, bias=True, rank=4)


@pytest.mark.usefixtures("permutes")
@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 64, 256), (9, 65, 320), (20, 130, 128), (70, 33, 192)])
def test_products_by_byte_permutes_equal_float64(dtype: torch.dtype, m: int, n: int, k: int) -> None:
    """One row count for each shipped tile, forward and backward."""
    check(m, Weight(n, k), dtype, bias=True, rank=3)


@pytest.mark.parametrize("m", [1, 8, 9, 16, 17, 33, 65, 300])
def test_each_tile_takes_ragged_rows(m: int) -> None:
    check(m, Weight(131, 192), torch.bfloat16)


@pytest.mark.parametrize("processors", [4, 64])
@pytest.mark.parametrize("m", [1, 33])
def test_shared_tiles_add_up(m: int, processors: int, few_processors: Any) -> None:
    few_processors(processors)
    check(m, Weight(70, 1024), torch.float32, bias=True, rank=5)
    check(m, Weight(520, 128), torch.bfloat16, bias=True, rank=5)


def test_the_order_of_programs_does_not_change_a_bit(few_processors: Any) -> None:
    weight = Weight(64, 2048)
    x = torch.randn(2, 2048)
    few_processors(64)
    first = module.launch_forward(x, weight.packed)
    assert torch.equal(first, module.launch_forward(x, weight.packed))


def test_counters_are_zero_again_after_a_launch(few_processors: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the next launch finds them as this one leaves them."""
    few_processors(64)
    made, workspace = [], module.workspace
    monkeypatch.setattr(module, "workspace", lambda *sizes: made.append(workspace(*sizes)) or made[-1])
    check(1, Weight(140, 512), torch.float32)
    assert len(made) == 2
    for partial, counters in made:
        assert partial.numel() and counters.numel() and not counters.any()


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_shape_equals_float64(data: st.DataObject) -> None:
    blocksize = data.draw(st.sampled_from([64, 128, 256]))
    k = blocksize * data.draw(st.integers(1, 512 // blocksize))
    n, m = data.draw(st.integers(1, 140)), data.draw(st.integers(1, 70))
    weight = Weight(n, k, blocksize, data.draw(st.booleans()))
    check(m, weight, data.draw(st.sampled_from(DTYPES)), data.draw(st.booleans()), data.draw(st.integers(0, 20)))


@pytest.mark.parametrize(("m", "n", "k"), [(0, 3, 64), (2, 0, 64), (0, 0, 128)])
def test_empty_products_have_the_right_shape(m: int, n: int, k: int) -> None:
    weight = Weight(n, k)
    assert module.launch_forward(torch.randn(m, k), weight.packed).shape == (m, n)
    assert module.launch_input_gradient(torch.randn(m, n), weight.packed).shape == (m, k)


def test_a_sum_of_nothing_is_the_bias() -> None:
    """No columns at all forward, no rows of W backward."""
    bias = torch.randn(5)
    empty = Weight(5, 0)
    assert torch.equal(module.launch_forward(torch.randn(3, 0), empty.packed, bias=bias), bias.expand(3, 5))
    empty = Weight(0, 64)
    assert not module.launch_input_gradient(torch.randn(3, 0), empty.packed).any()


def guarded(t: torch.Tensor, offset: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A copy of t inside a larger buffer whose other elements show if they are read or written, and the buffer."""
    poison = float("nan") if t.is_floating_point() else 0xA5 if t.dtype == torch.uint8 else 0
    buffer = torch.full((GUARD + offset + t.numel() + GUARD,), poison, dtype=t.dtype)
    view = buffer[GUARD + offset : GUARD + offset + t.numel()].view(t.shape)
    view.copy_(t)
    return view, buffer


@pytest.mark.parametrize("m", [3, 40])
@pytest.mark.parametrize("offset", [0, 1, 4])
def test_nothing_outside_the_tensors_is_read_or_written(
    m: int, offset: int, few_processors: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outputs and workspace start as NaN, all tensors stand between guards, at addresses of any alignment."""
    few_processors(32)
    weight = Weight(67, 320)
    pairs = [guarded(t, offset) for t in weight.packed.tensors() if t is not None]
    x, x_buffer = guarded(torch.randn(m, 320).bfloat16(), offset)
    dy, dy_buffer = guarded(torch.randn(m, 67).bfloat16(), offset)
    buffers = [b for _, b in pairs] + [x_buffer, dy_buffer]
    before = [b.clone() for b in buffers]
    made: list[torch.Tensor] = []

    def nan_empty(*shape: Any, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        view, buffer = guarded(torch.full(shape, float("nan"), dtype=dtype))
        made.append(buffer)
        return view

    with monkeypatch.context() as patch:
        patch.setattr(module.torch, "empty", nan_empty)
        packed = NF4(*(view for view, _ in pairs), *weight.packed[TENSORS:])
        y = module.launch_forward(x, packed)
        dx = module.launch_input_gradient(dy, packed)
    torch.testing.assert_close(y.double(), x.double() @ weight.dense.t(), **TOLERANCES[torch.bfloat16])
    torch.testing.assert_close(dx.double(), dy.double() @ weight.dense, **TOLERANCES[torch.bfloat16])
    for now, then in zip(buffers, before, strict=True):
        torch.testing.assert_close(now, then, rtol=0, atol=0, equal_nan=True)
    for buffer in made:
        assert buffer[:GUARD].isnan().all() and buffer[-GUARD:].isnan().all()


def test_rows_may_lie_anywhere() -> None:
    """A slice of a wider matrix (row stride), a transposed one (column stride), a view that starts late."""
    weight = Weight(66, 128)
    wide = torch.randn(6, 200)
    right = weight.dense.t()
    for x in (wide[:, 40:168], torch.randn(128, 6).t(), wide.flatten()[7 : 7 + 3 * 128].view(3, 128), wide[::2, :128]):
        y = module.launch_forward(x, weight.packed)
        torch.testing.assert_close(y.double(), x.double() @ right, **TOLERANCES[torch.float32])


@pytest.mark.parametrize(
    ("dtype", "k", "blocksize", "nested", "says"),
    [
        (torch.float64, 64, 64, 256, "float64"),
        (torch.float32, 64, 32, 256, "blocksize \\(32\\)"),
        (torch.float32, 100, 64, 256, "in_features \\(100\\)"),
        (torch.float32, 64, 64, 128, "nested_blocksize \\(128\\)"),
    ],
)
def test_what_cannot_be_fused_is_named(dtype: torch.dtype, k: int, blocksize: int, nested: int, says: str) -> None:
    obstacle = module.fused_obstacle(dtype, k, blocksize, nested)
    with pytest.raises(ValueError, match=says):
        raise ValueError(obstacle)
    assert module.fused_obstacle(torch.bfloat16, 128, 128) == ""


def test_a_product_that_cannot_be_fused_raises() -> None:
    weight = Weight(3, 96, 32)
    with pytest.raises(ValueError, match=r"blocksize \(32\) must be at least 64"):
        module.launch_forward(torch.randn(2, 96), weight.packed)


def test_tiles_are_shared_until_the_gpu_is_full_and_no_further() -> None:
    tile = configs.Tile("direct", rows=8, bn=64, nb=4, warps=2, stages=2, fill=8)
    assert configs.split_for(tiles=64, steps=16, rows=1, depth=4096, tile=tile, multiprocessors=108) == 8
    assert configs.split_for(tiles=1000, steps=16, rows=1, depth=4096, tile=tile, multiprocessors=108) == 1
    assert configs.split_for(tiles=1, steps=3, rows=1, depth=4096, tile=tile, multiprocessors=108) == 1
    # 64 rows: with more than 16 programs the partial sums would move more than four times the weight's bytes.
    assert configs.split_for(tiles=32, steps=64, rows=64, depth=4096, tile=tile, multiprocessors=1000) == 16
    assert configs.split_for(tiles=32, steps=64, rows=256, depth=4096, tile=tile, multiprocessors=1000) == 4


# (out, in), rows, gradient: the division that a sweep on an H200 found best, or within a twentieth of it.
MEASURED = [
    ((4096, 4096), 1, False, (8,)),
    ((4096, 14336), 1, False, (8,)),
    ((14336, 4096), 1, False, (2, 4, 8)),
    ((4096, 4096), 16, False, (8,)),
    ((14336, 4096), 16, False, (2, 4)),
    ((4096, 4096), 32, False, (4, 8)),
    ((14336, 4096), 32, False, (2,)),
    ((4096, 4096), 64, False, (4, 8)),
    ((4096, 14336), 64, False, (8,)),
    ((14336, 4096), 64, False, (2, 4)),
    ((4096, 4096), 128, False, (4,)),
    ((4096, 14336), 128, False, (4,)),
    ((14336, 4096), 128, False, (2, 4)),
    ((4096, 4096), 1, True, (16,)),
    ((14336, 4096), 1, True, (16,)),
    ((4096, 14336), 1, True, (4, 8)),
    ((4096, 4096), 16, True, (8,)),
    ((4096, 14336), 16, True, (2, 4, 8)),
    ((4096, 4096), 64, True, (8,)),
    ((4096, 14336), 64, True, (2, 4)),
    ((14336, 4096), 64, True, (8,)),
    ((4096, 4096), 128, True, (4,)),
    ((14336, 4096), 128, True, (4,)),
]


@pytest.mark.parametrize(("shape", "rows", "grad", "best"), MEASURED)
def test_the_division_on_hopper_is_the_measured_one(
    shape: tuple[int, int], rows: int, grad: bool, best: tuple[int, ...]
) -> None:
    n, k = shape
    tile = configs.tile_for(rows, grad, capability=90, wide=False)
    assert tile.rows == max(8, rows)
    tiles, steps = module.grid_of(tile, 1, n, k // configs.CHUNK, grad)
    assert configs.split_for(tiles, steps, rows, n if grad else k, tile, multiprocessors=132) in best


def test_gpus_of_other_makers_take_fewer_chunks_at_a_time() -> None:
    tile = configs.tile_for(16, grad=False, capability=80, wide=False)
    assert tile.nb == 4 and configs.portable(tile).nb == 2
    assert configs.portable(configs.tile_for(64, grad=True, capability=80, wide=False)).nb == 1


def test_an_older_triton_takes_sixteen_rows_at_least(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before 3.5 it multiplies no eight."""
    for version, rows in (((3, 4), 16), ((3, 5), 8)):
        monkeypatch.setattr(module, "triton_version", lambda version=version: version)
        module._planned.cache_clear()
        shape = (1, 256, 512, 64, 0, torch.bfloat16, False, True, False, False, 90, 132, True, False)
        plan = module._planned(configs.tile_for, configs.split_for, None, *shape)
        assert plan.launch is not None and plan.launch.constants["BM"] == rows
    module._planned.cache_clear()
