"""The experts' product against float64, gradients included, and what it allocates."""

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from largest_tensor import LargestTensor
from stacks import stack_of
from tolerances import TOLERANCES
from torch import Tensor

from minipeft_kernels.experts.op import experts_linear, experts_reference
from minipeft_kernels.experts.stack import NF4Stack
from minipeft_kernels.nf4.dequantize import nf4_dequantize

# The interpreter computes in numpy, which warns where a GPU says nothing.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


def by_rows(x: Tensor, owners: list[int], w: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """Row by row in float64, the merged weight of its expert: what splitting must equal."""
    rows = [
        (w[e] + scaling * lora_B[e] @ lora_A[e]) @ row if e < len(w) else 0 * (w[0] @ row)
        for row, e in zip(x, owners, strict=True)
    ]
    return torch.stack(rows) if rows else x @ w[0].T


def offsets_of(owners: list[int], experts: int) -> Tensor:
    counts = torch.bincount(torch.tensor(owners, dtype=torch.int64), minlength=experts)[:experts]
    return counts.cumsum(0).int()


def decoded(weight: Any) -> Tensor:
    if isinstance(weight, Tensor):
        return weight.double()
    each = [nf4_dequantize(weight.expert(e), torch.float32) for e in range(weight.experts)]
    return torch.stack(each).view(weight.experts, weight.rows, weight.columns).double()


@settings(deadline=None, max_examples=60)
@given(
    owners=st.lists(st.integers(0, 4), max_size=12).map(sorted),  # 4: nobody's rows
    kind=st.sampled_from(["dense", "transposed", "nf4", "nf4 single"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    sizes=st.sampled_from([(48, 64, 3), (30, 128, 8), (7, 32, 1)]),
    peft_layout=st.booleans(),
)
def test_equals_each_rows_own_expert_in_float64(
    owners: list[int], kind: str, dtype: torch.dtype, sizes: Any, peft_layout: bool
) -> None:
    out_features, in_features, r = sizes
    torch.manual_seed(len(owners))
    w = torch.randn(4, out_features, in_features) / in_features**0.5
    x = torch.randn(len(owners), in_features).to(dtype)
    lora_A = torch.randn(4, r, in_features) / in_features**0.5
    flat_B = torch.randn(out_features, r * 4) / r**0.5
    # As the parameter lies in a file, whose view strides over the experts; or each expert's by itself.
    lora_B = flat_B.unflatten(1, (r, 4)).permute(2, 0, 1)
    lora_B = lora_B if peft_layout else lora_B.contiguous()
    weight: Any = {
        "dense": w.to(dtype),
        "transposed": w.to(dtype).transpose(1, 2).contiguous().transpose(1, 2),
    }.get(kind)
    weight = stack_of(w, kind == "nf4", 32) if weight is None else weight
    offsets, dy = offsets_of(owners, 4), torch.randn(len(owners), out_features).to(dtype)

    given_ = [t.detach().clone().requires_grad_() for t in (x, lora_A)] + [lora_B.detach().requires_grad_()]
    y = experts_linear(given_[0], offsets, weight, (*given_[1:], 0.7))
    assert y.dtype == dtype
    exact = [t.detach().double().requires_grad_() for t in given_]
    expected = by_rows(exact[0], owners, decoded(weight), *exact[1:], 0.7)
    torch.testing.assert_close(y.double(), expected, **TOLERANCES[dtype])
    y.backward(dy)
    expected.backward(dy.double())
    for got, wanted in zip(given_, exact, strict=True):
        grad = torch.zeros_like(wanted) if wanted.grad is None else wanted.grad
        assert got.grad is not None
        scale = max([1.0, *grad.abs().flatten().tolist()])
        torch.testing.assert_close(got.grad.double() / scale, grad / scale, **TOLERANCES[dtype])
    with torch.no_grad():
        alone = experts_linear(given_[0], offsets, None, (*given_[1:], 0.7)).to(dtype)
        base = experts_linear(given_[0], offsets, weight)
        torch.testing.assert_close((base + alone).double(), expected, **TOLERANCES[dtype])


def test_the_reference_differentiates_to_the_same() -> None:
    owners = [0, 0, 2, 2, 2, 3]
    x = torch.randn(6, 64, dtype=torch.float64)
    w, lora_A, lora_B = torch.randn(3, 8, 64).double(), torch.randn(3, 2, 64).double(), torch.randn(3, 8, 2).double()
    y = experts_reference(x, offsets_of(owners, 3), w, (lora_A, lora_B, 0.5))
    torch.testing.assert_close(y, by_rows(x, owners, w, lora_A, lora_B, 0.5))


@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_second_derivatives(kind: str) -> None:
    owners, w = [0, 0, 2], torch.randn(3, 4, 32)
    weight: Any = w.double() if kind == "dense" else stack_of(w, True, 32)
    dtype = torch.float64 if kind == "dense" else torch.float32
    x, lora_A, lora_B = (torch.randn(*s, dtype=dtype, requires_grad=True) for s in ((3, 32), (3, 2, 32), (3, 4, 2)))

    def penalty(x: Tensor, lora_A: Tensor, lora_B: Tensor, linear: Any) -> Tensor:
        y = linear(x, offsets_of(owners, 3), weight, (lora_A, lora_B, 0.5)).square().sum()
        return sum(g.square().sum() for g in torch.autograd.grad(y, (x, lora_A, lora_B), create_graph=True))  # type: ignore[return-value]

    got = torch.autograd.grad(penalty(x, lora_A, lora_B, experts_linear), (x, lora_A, lora_B))
    wanted = torch.autograd.grad(penalty(x, lora_A, lora_B, experts_reference), (x, lora_A, lora_B))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_no_tensor_is_as_large_as_the_experts(kind: str) -> None:
    experts, out_features, in_features, r = 32, 64, 128, 2
    w = torch.randn(experts, out_features, in_features)
    weight: Any = stack_of(w) if kind == "nf4" else w
    x = torch.randn(8, in_features, requires_grad=True)
    lora_A = torch.randn(experts, r, in_features, requires_grad=True)
    lora_B = torch.randn(experts, out_features, r, requires_grad=True)
    with LargestTensor() as largest:
        experts_linear(
            x, offsets_of([0, 0, 3, 3, 3, 9, 30, 31], experts), weight, (lora_A, lora_B, 1.0)
        ).sum().backward()
    assert largest.nbytes <= 4 * max(lora_A.numel(), out_features * in_features)


BAD = {
    "x narrower": ({"x": (5, 32)}, ValueError, "expected"),
    "x of three dimensions": ({"x": (1, 5, 64)}, ValueError, "must be"),
    "fewer offsets": ({"offsets": [5]}, ValueError, "expected"),
    "offsets past the rows": ({"offsets": [2, 2, 9]}, ValueError, "row 9"),
    "offsets that decrease": ({"offsets": [4, 2, 5]}, ValueError, "decrease"),
    "negative offsets": ({"offsets": [-1, 2, 5]}, ValueError, "decrease"),
    "A of other experts": ({"A": (2, 4, 64)}, ValueError, "expected"),
    "B of another rank": ({"B": (3, 48, 5)}, ValueError, "expected"),
    "B of other rows": ({"B": (3, 40, 4)}, ValueError, "expected"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("raw", [False, True])
def test_refuses_what_does_not_fit(case: str, raw: bool) -> None:
    changed, error, words = BAD[case]
    sizes: dict[str, Any] = {"x": (5, 64), "offsets": [2, 2, 5], "A": (3, 4, 64), "B": (3, 48, 4)} | changed
    x, lora_A, lora_B = (torch.randn(sizes[name]) for name in ("x", "A", "B"))
    offsets, stack = torch.tensor(sizes["offsets"], dtype=torch.int32), stack_of(torch.randn(3, 48, 64))
    with pytest.raises(error, match=words):
        if raw:
            numbers = (0.5, torch.float32, torch.float32)
            torch.ops.minipeft.experts_linear(x, offsets, lora_A, lora_B, *numbers, *stack)
        else:
            experts_linear(x, offsets, stack, (lora_A, lora_B, 0.5))


@pytest.mark.parametrize("chosen", [[5], [0, 0, 5, 21], list(range(32))], ids=["one", "few", "all"])
def test_gradient_of_B_lies_as_B_does(chosen: list[int]) -> None:
    """So that the parameter of a file, of which B is a view, takes it without a copy."""
    x, w, lora_A = torch.randn(len(chosen), 64), torch.randn(32, 48, 64), torch.randn(32, 4, 64)
    lora_B = torch.randn(48, 4 * 32).unflatten(1, (4, 32)).permute(2, 0, 1).requires_grad_()
    dy, offsets = torch.randn(len(chosen), 48), offsets_of(chosen, 32)
    experts_linear(x, offsets, w, (lora_A, lora_B, 0.7)).backward(dy)
    exact = torch.zeros(32, 48, 4, dtype=torch.float64)
    for row, d, e in zip(x.double(), dy.double(), chosen, strict=True):
        exact[e] += torch.outer(d, 0.7 * lora_A[e].double() @ row)
    assert lora_B.grad is not None and lora_B.grad.stride() == lora_B.stride()
    torch.testing.assert_close(lora_B.grad.double(), exact, rtol=1e-5, atol=1e-5)


def test_one_token_reads_the_bytes_of_the_experts_that_were_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    experts, chosen = 32, [3, 9, 30]
    stack, read = stack_of(torch.randn(experts, 48, 64)), dict[int, int]()
    whole = NF4Stack.expert

    def counted(self: NF4Stack, e: int) -> Any:
        matrix = whole(self, e)
        read[e] = sum(t.nbytes for t in (matrix.codes, matrix.absmax, matrix.nested_absmax) if t is not None)
        return matrix

    monkeypatch.setattr(NF4Stack, "expert", counted)
    with torch.no_grad():
        experts_linear(torch.randn(3, 64), offsets_of(chosen, experts), stack)
    assert sorted(read) == chosen
    held = sum(t.nbytes for t in (stack.codes, stack.absmax, stack.nested_absmax) if t is not None)
    assert sum(read.values()) * experts == held * len(chosen)


@pytest.mark.usefixtures("compiled", "level")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("peft_layout", [True, False])
def test_compiled_products_equal_each_rows_own_expert_in_float64(dtype: torch.dtype, peft_layout: bool) -> None:
    """Of every processor's level, and of as many rows as each of its forms takes: none, up to four, more, many."""
    counts, out_features, in_features, r = [1, 0, 4, 5, 9, 300], 70, 128, 5
    experts, owners = len(counts), [e for e, count in enumerate(counts) for _ in range(count)] + [6, 6]
    stack = stack_of(torch.randn(experts, out_features, in_features) / in_features**0.5)
    lora_A = torch.randn(experts, r, in_features) / in_features**0.5
    lora_B = torch.randn(out_features, r * experts).unflatten(1, (r, experts)).permute(2, 0, 1)
    lora_B = lora_B if peft_layout else lora_B.contiguous()
    x, dy = torch.randn(len(owners), in_features).to(dtype), torch.randn(len(owners), out_features).to(dtype)
    inputs = [t.requires_grad_() for t in (x, lora_A, lora_B)]
    y = experts_linear(x, offsets_of(owners, experts), stack, (lora_A, lora_B, 0.7))
    exact = [t.detach().double().requires_grad_() for t in inputs]
    expected = by_rows(exact[0], owners, decoded(stack), *exact[1:], 0.7)
    gradients = torch.autograd.grad(y, inputs, dy), torch.autograd.grad(expected, exact, dy.double())
    for got, wanted in zip((y, *gradients[0]), (expected, *gradients[1]), strict=True):
        size = max(1.0, float(wanted.detach().abs().max()))
        torch.testing.assert_close(got.double() / size, wanted / size, **TOLERANCES[dtype])


@settings(deadline=None, max_examples=300)
@given(st.integers(0, 2**32 - 1))
def test_raw_calls_with_misfitting_arguments_are_refused_or_computed(seed: int) -> None:
    """Sizes, dtypes and parts of weights at random: an error of ours, or finite results of the right shape."""
    draw = random.Random(seed)
    rows, experts, out, columns, rank = (
        draw.choice(sizes) for sizes in ((0, 1, 5), (3, 3, 2), (48, 48, 40), (64, 64, 32), (2, 4))
    )
    offsets = torch.tensor(
        sorted(draw.randint(-1, rows + 1) for _ in range(experts)), dtype=draw.choice([torch.int32, torch.int64])
    )
    weight: list[Any] = list(stack_of(torch.randn(3, 48, 64)))
    if draw.random() < 0.5:
        place = draw.randrange(10)
        part = weight[place]
        if isinstance(part, int):
            weight[place] = draw.choice([0, 1, -5, 10**6, 128])
        else:
            weight[place] = draw.choice([part[:1] if part.dim() else part, part.double(), torch.empty(0), None])
    if draw.random() < 0.3:
        weight = [torch.randn(3, 48, 64, dtype=draw.choice([torch.float32, torch.float64]))]
    lora_A, lora_B = torch.randn(experts, rank, columns), torch.randn(3, out, draw.choice([rank, 3]))
    x, dy, low = torch.randn(rows, columns), torch.randn(rows, out), torch.randn(draw.choice([rows, 2]), rank)
    numbers = (0.5, torch.float32, torch.float32)
    try:
        if draw.random() < 0.5:
            results = torch.ops.minipeft.experts_linear(x, offsets, lora_A, lora_B, *numbers, *weight)
            shapes = [(rows, out), (rows, rank)]
        else:
            given_ = (dy, offsets, x, lora_A, lora_B, low, *numbers, [True, True, True])
            results = torch.ops.minipeft.experts_linear_backward(*given_, *weight)
            shapes = [(rows, columns), lora_A.shape, lora_B.shape]
    except (ValueError, TypeError) as error:
        assert str(error)
    else:
        assert [tuple(result.shape) for result in results] == [tuple(shape) for shape in shapes]
        assert all(bool(torch.isfinite(result).all()) for result in results)
