"""Grouped NF4 products against float64, by the code of the kernels: portable, and with byte permutes simulated."""

from typing import Any

import inline_asm
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stacks import stack_of
from tolerances import TOLERANCES
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder

from minipeft_kernels.experts import gpu, loop
from minipeft_kernels.experts.op import experts_linear
from minipeft_kernels.experts.stack import NF4Stack
from minipeft_kernels.linear import gpu as launcher
from minipeft_kernels.linear.tiles import rows_each
from minipeft_kernels.nf4.dequantize import nf4_dequantize_reference

pytestmark = [
    pytest.mark.usefixtures("kernels"),
    # The interpreter computes in numpy, which warns where a GPU says nothing.
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def permutes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of NVIDIA hardware: inline assembly, run by `inline_asm.py`."""
    monkeypatch.setattr(InterpreterBuilder, "create_inline_asm", inline_asm.create_inline_asm)
    monkeypatch.setattr(launcher, "can_permute", lambda x: x.element_size() == 2)


def dense_of(stack: NF4Stack) -> Tensor:
    each = [nf4_dequantize_reference(stack.expert(e), torch.float64) for e in range(stack.experts)]
    return torch.stack(each).view(stack.experts, stack.rows, stack.columns)


def check(counts: list[int], stack: NF4Stack, dtype: torch.dtype, rank: int = 0, nobodys: int = 0) -> None:
    """y and dx against float64 row by row, each operand as the kernel rounds it; outputs start as NaN."""
    experts, n, k = len(counts), stack.rows, stack.columns
    owners = [e for e, count in enumerate(counts) for _ in range(count)]
    offsets, rows = torch.tensor(counts).cumsum(0).int(), sum(counts) + nobodys
    x, dy = torch.randn(rows, k).to(dtype), torch.randn(rows, n).to(dtype)
    low, down = torch.randn(rows, rank) * 0.3, torch.randn(experts, rank, k) * 0.3
    # B as a file has it: a view that strides over the experts.
    up = (torch.randn(n, rank * experts) * 0.3).unflatten(1, (rank, experts)).permute(2, 0, 1)
    low, up, down = (t.to(dtype).float() for t in (low, up, down))
    empty = torch.empty

    def of_nan(*shape: Any, **options: Any) -> Tensor:
        made = empty(*shape, **options)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launcher.torch, "empty", of_nan)
        y = launcher.launch(x, stack, None, (low, up) if rank else None, grad=False, offsets=offsets)
        dx = launcher.launch(dy, stack, None, (low, down) if rank else None, grad=True, offsets=offsets)
    w = dense_of(stack)
    right_y, right_dx = torch.zeros(rows, n, dtype=torch.float64), torch.zeros(rows, k, dtype=torch.float64)
    for i, e in enumerate(owners):
        right_y[i] = w[e] @ x[i].double() + up[e].double() @ low[i].double()
        right_dx[i] = dy[i].double() @ w[e] + low[i].double() @ down[e].double()
    for ours, right in ((y, right_y), (dx, right_dx)):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), right, **TOLERANCES[dtype])
    assert not y[len(owners) :].any() and not dx[len(owners) :].any()


COUNTS = {
    "all have some": [3, 1, 2],
    "some have none": [0, 5, 0, 0, 9, 0],
    "one has all": [0, 40, 0],
    "the last has all": [0, 0, 17],
    "many rows, a few": [70, 1, 0, 9],
    "nobody has any": [0, 0],
    "one expert": [4],
}


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("nobodys", [0, 11])
@pytest.mark.parametrize("dtype", DTYPES)
def test_each_row_is_multiplied_by_its_own_expert(counts: list[int], nobodys: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    check(counts, stack_of(torch.randn(len(counts), 70, 192) / 14), dtype, rank=3, nobodys=nobodys)


@pytest.mark.usefixtures("permutes")
@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("rows", [1, 9, 20, 70])
def test_by_byte_permutes_in_each_shipped_tile(dtype: torch.dtype, rows: int) -> None:
    check([rows, 0, rows + 1, rows], stack_of(torch.randn(4, 65, 320) / 18), dtype, rank=5, nobodys=2)


@pytest.mark.parametrize("processors", [16, 500])
@pytest.mark.parametrize("double", [True, False])
def test_programs_that_share_a_tile_add_up(processors: int, double: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "multiprocessors", lambda device: processors)
    check([2, 0, 7, 1], stack_of(torch.randn(4, 130, 1024) / 32, double), torch.float32, rank=2, nobodys=3)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_division_of_rows_equals_float64(data: st.DataObject) -> None:
    blocksize = data.draw(st.sampled_from([64, 128]))
    k, n = blocksize * data.draw(st.integers(1, 384 // blocksize)), data.draw(st.integers(1, 100))
    counts = data.draw(st.lists(st.integers(0, 20), min_size=1, max_size=9))
    stack = stack_of(torch.randn(len(counts), n, k) / k**0.5, data.draw(st.booleans()), blocksize)
    rank, nobodys = data.draw(st.integers(0, 18)), data.draw(st.integers(0, 9))
    check(counts, stack, data.draw(st.sampled_from(DTYPES)), rank, nobodys)


def test_offsets_that_mean_nothing_reach_no_row_outside_x() -> None:
    """Nobody can look at them without waiting for the GPU: the result is then undefined, and nothing else happens."""
    stack, x = stack_of(torch.randn(3, 65, 64)), torch.randn(7, 64)
    buffer = torch.full((65 * 9,), 7.0)
    for wrong in ([9, 2, 30], [-4, 3, 5], [5, 4, 3]):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(launcher.torch, "empty", lambda *shape, **options: buffer[65:-65].view(7, 65))
            offsets = torch.tensor(wrong, dtype=torch.int32)
            launcher.launch(x, stack, None, None, grad=False, offsets=offsets)
        assert (buffer[:65] == 7).all() and (buffer[-65:] == 7).all()


def test_the_launch_has_a_program_for_each_tile_there_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """With few rows as many as rows, whatever the number of experts: those that were not chosen have none."""
    grids: list[tuple[int, int]] = []

    class Noted:
        def __getitem__(self, grid: tuple[int, int]) -> Any:
            grids.append(grid)
            return lambda *arguments, **options: None

    monkeypatch.setattr(launcher, "_nf4_matmul_direct_kernel", Noted())
    stack = stack_of(torch.randn(1, 32, 64))
    many = NF4Stack(*(t.expand(128, *t.shape[1:]) if i in (0, 1, 3, 5) else t for i, t in enumerate(stack)))  # type: ignore[union-attr, arg-type]
    for rows in (1, 8, 1024):
        launcher.launch(torch.randn(rows, 64), many, None, None, False, torch.zeros(128, dtype=torch.int32))
    # Of 1024 rows each expert and nobody may have an unfinished tile of 16, and the rest are full ones.
    assert [tiles for tiles, _ in grids] == [1, 8, 129 + (1024 - 129) // 16]


def test_tiles_fit_what_most_experts_get() -> None:
    assert [rows_each(rows, 128) for rows in (1, 8, 128, 256, 1024, 4096)] == [1, 1, 1, 4, 13, 43]


@pytest.mark.parametrize("kind", ["nf4", "nf4 of blocks of 32", "dense", "none"])
@pytest.mark.parametrize("grouped_mm", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operation_equals_the_loop(
    kind: str, grouped_mm: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop, which other tests hold against float64, in all that a GPU may take: torch's grouped product too."""
    experts, n, k, r = 5, 48, 64, 8
    w = torch.randn(experts, n, k) / 8
    weight: Any = {"dense": w.to(dtype), "none": None}.get(kind, stack_of(w, blocksize=32 if "32" in kind else 64))
    lora_A = (torch.randn(experts, r, k) / 8).to(dtype)
    lora_B = torch.randn(n, r * experts).to(dtype).unflatten(1, (r, experts)).permute(2, 0, 1)
    offsets = torch.tensor([3, 3, 4, 9, 9], dtype=torch.int32)
    x, dy = torch.randn(12, k).to(dtype), torch.randn(12, n).to(dtype)
    taken = []
    monkeypatch.setattr(gpu, "_has_grouped_mm", lambda device: taken.append(device) or grouped_mm)
    results = []
    for form in ("triton", "reference"):
        monkeypatch.setenv("MINIPEFT_BACKEND", form)
        inputs = [t.detach().requires_grad_() for t in (x, lora_A, lora_B)]
        y = experts_linear(inputs[0], offsets, weight, (*inputs[1:], 0.5))
        results.append([y, *torch.autograd.grad(y, inputs, dy)])
    assert taken or kind == "nf4 of blocks of 32"
    assert results[0][3].stride() == lora_B.stride()
    for ours, right in zip(*results, strict=True):
        assert ours.dtype == right.dtype and ours.shape == right.shape
        size = float(right.detach().abs().max())
        torch.testing.assert_close(ours / size, right / size, **TOLERANCES[dtype])


def test_nothing_waits_for_the_offsets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch has the grouped product: the loop, which reads them, is never entered."""
    monkeypatch.setattr(gpu, "_has_grouped_mm", lambda device: True)
    monkeypatch.setattr(loop, "groups", lambda offsets: pytest.fail("the offsets were read"))
    lora_A, lora_B = torch.randn(3, 8, 64).bfloat16(), torch.randn(3, 48, 8).bfloat16()
    inputs = [t.requires_grad_() for t in (torch.randn(6, 64).bfloat16(), lora_A, lora_B)]
    offsets = torch.tensor([2, 2, 5], dtype=torch.int32)
    for weight in (stack_of(torch.randn(3, 48, 64)), torch.randn(3, 48, 64).bfloat16(), None):
        experts_linear(inputs[0], offsets, weight, (*inputs[1:], 0.5)).sum().backward()


def test_many_rows_an_expert_are_left_to_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    stack, entered = stack_of(torch.randn(2, 48, 64)), []
    groups = loop.groups
    monkeypatch.setattr(loop, "groups", lambda offsets: entered.append(1) or groups(offsets))
    for rows in (256, 258):
        offsets = torch.tensor([rows // 2, rows], dtype=torch.int32)
        experts_linear(torch.randn(rows, 64).bfloat16(), offsets, stack)
        assert len(entered) == (rows > 256)


MISFITS = {
    "offsets of other experts": ({"offsets": torch.tensor([1, 2], dtype=torch.int32)}, "offsets must be int32"),
    "offsets of another dtype": ({"offsets": torch.tensor([1, 2, 4])}, "offsets must be int32"),
    "no offsets": ({"offsets": None}, "offsets must be int32"),
    "fewer scales": ({"absmax": 2}, "absmax of 3 experts"),
    "fewer nested scales": ({"nested_absmax": 2}, "nested_absmax of 3 experts"),
    "fewer of B": ({"up": torch.randn(2, 65, 4)}, "one matrix for each of 3"),
    "B of other rows": ({"up": torch.randn(3, 64, 4)}, "must be"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_what_a_kernel_would_read_past_the_end_of_is_refused(case: str) -> None:
    changed, words = MISFITS[case]
    sizes: dict[str, Any] = dict(changed)
    stack = stack_of(torch.randn(3, 65, 64))
    for name in ("absmax", "nested_absmax"):
        if name in sizes:
            stack = stack._replace(**{name: getattr(stack, name)[: sizes[name]]})
    offsets = sizes.get("offsets", torch.tensor([1, 2, 4], dtype=torch.int32))
    update = torch.randn(4, 4), sizes.get("up", torch.randn(3, 65, 4))
    with pytest.raises(ValueError, match=words):
        launcher.launch(torch.randn(4, 64), stack, None, update, False, offsets)
