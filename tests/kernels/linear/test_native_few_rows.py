"""Products of a few rows in compiled code, alone and with LoRA's update, against float64; and what does not fit."""

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from guarded import Guarded
from hypothesis import given, settings
from hypothesis import strategies as st
from native_weights import LEVELS, become, by_reference, count_calls, needs_library, random_state
from torch import Tensor

from minipeft import LoraConfig, get_peft_model
from minipeft.nf4 import NF4Linear, NF4Weight
from minipeft_kernels import native
from minipeft_kernels.linear import cpu
from minipeft_kernels.linear.op import linear_reference

pytestmark = needs_library
# Of the terms' magnitudes: float32's rounding of some sums, and weights and results rounded to bfloat16.
TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}


@pytest.fixture(autouse=True)
def _native(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINIPEFT_BACKEND", "native")


@pytest.fixture
def _products(level: int) -> None:
    """A processor of each level that has compiled products."""
    if level == native.SCALAR:
        pytest.skip("the compiled products want AVX2 or NEON")


def weight(n: int, k: int, blocksize: int = 32, double: bool = True, nested: int = 256) -> NF4Weight:
    w = random_state(n * k, blocksize, double)
    w.shape = torch.Size((n, k))
    if double:
        w.nested_blocksize, w.nested_absmax = nested, torch.rand(-(-n * k // blocksize // nested) + 1) + 0.5
    return w


def factors(n: int, k: int, rank: int) -> tuple[Tensor, Tensor]:
    return torch.randn(rank, k), torch.randn(n, rank)


def error(y: Tensor, x: Tensor, w: NF4Weight, lora_A: Tensor, lora_B: Tensor, scaling: float) -> float:
    """The largest distance from the float64 result, in units of the largest sum of the terms' magnitudes."""
    x, dense, a, b = (t.double() for t in (x, by_reference(w, torch.float32), lora_A, lora_B))
    right = linear_reference(x, dense, lora=(a, b, scaling))
    size = x.abs() @ dense.abs().T + abs(scaling) * (x.abs() @ a.abs().T) @ b.abs().T
    return float((y.double() - right).abs().max() / size.max())


@given(
    m=st.integers(1, 4),
    n=st.integers(1, 150),
    blocks=st.integers(1, 40),
    blocksize=st.sampled_from([32, 64, 256]),
    nested=st.sampled_from([None, 256, 40, 5]),
    rank=st.sampled_from([0, 1, 7, 16, 40]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    to=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    which=st.sampled_from(LEVELS),
)
@settings(max_examples=150, deadline=None)
def test_products_with_an_update_equal_float64(
    m: int,
    n: int,
    blocks: int,
    blocksize: int,
    nested: int | None,
    rank: int,
    dtype: torch.dtype,
    to: torch.dtype,
    which: int,
) -> None:
    w = weight(n, blocks * blocksize, blocksize, nested is not None, nested or 256)
    lora_A, lora_B = factors(*w.shape, rank)
    x = torch.randn(m, w.shape[1]).to(dtype)
    with pytest.MonkeyPatch.context() as patch:
        become(which, patch)
        y = cpu.adapted_product(x, w.packed(), to, lora_A, lora_B, -0.7)
        plain = cpu.product(x, w.packed(), to)
    if which == native.SCALAR:
        assert y is None and plain is None
        return
    assert y is not None and y.dtype == to and y.shape == (m, n)
    tolerance = max(TOLERANCES[dtype], TOLERANCES[to])
    assert error(y, x, w, lora_A, lora_B, -0.7) < tolerance
    assert plain is not None
    assert error(plain, x, w, lora_A[:0], lora_B[:, :0], 0.0) < tolerance


@pytest.mark.usefixtures("_products")
@pytest.mark.parametrize("rank", [16, 70])
def test_threads_change_no_bit(rank: int) -> None:
    # The larger A is multiplied by all threads, the smaller by one.
    w = weight(330, 2048)
    lora_A, lora_B = factors(330, 2048, rank)
    x = torch.randn(2, 2048)
    before = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            y = cpu.adapted_product(x, w.packed(), torch.float32, lora_A, lora_B, 2.0)
            assert y is not None
            results.append(y)
    finally:
        torch.set_num_threads(before)
    assert error(results[0], x, w, lora_A, lora_B, 2.0) < TOLERANCES[torch.float32]
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.usefixtures("_products")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_and_a_scale_that_are_no_numbers_stay_where_they_are(dtype: torch.dtype) -> None:
    # 96 columns fill three quarters of a register of codes: what the other lanes would meet is the next row's.
    w = weight(10, 96, double=False)
    w.absmax[3 * 7 + 1] = float("nan")
    lora_A, lora_B = factors(10, 96, 4)
    x = torch.randn(3, 96).to(dtype)
    x[1, 5] = float("inf")
    y = cpu.adapted_product(x, w.packed(), torch.float32, lora_A, lora_B, 1.0)
    assert y is not None
    finite = y.isfinite()
    assert not finite[:, 7].any() and not finite[1].any()
    assert finite[[0, 2]][:, [i for i in range(10) if i != 7]].all()


@pytest.mark.usefixtures("_products")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 63, 66])
def test_nothing_is_written_beside_the_result(monkeypatch: pytest.MonkeyPatch, n: int, dtype: torch.dtype) -> None:
    w = weight(n, 160)
    lora_A, lora_B = factors(n, 160, 5)
    x = torch.randn(3, 160).to(dtype)
    buffer = Guarded(3 * n, dtype=dtype)
    monkeypatch.setattr(torch, "empty", lambda shape, dtype: buffer.out.view(shape))
    y = cpu.adapted_product(x, w.packed(), dtype, lora_A, lora_B, 1.0)
    monkeypatch.undo()
    assert y is not None and y.data_ptr() == buffer.out.data_ptr()
    assert error(buffer.check().view(3, n), x, w, lora_A, lora_B, 1.0) < TOLERANCES[dtype]


def adapted_layer(bias: bool = False) -> Any:
    model = torch.nn.Sequential()
    model.add_module("layer", NF4Linear.from_linear(torch.nn.Linear(192, 70, bias=bias)))
    get_peft_model(model, LoraConfig(r=8, target_modules=["layer"], init_lora_weights=False))
    return model.get_submodule("layer")


@torch.no_grad()
def test_an_adapted_layer_is_one_call(monkeypatch: pytest.MonkeyPatch, level: int) -> None:
    calls = count_calls(monkeypatch)
    adapted_layer()(torch.randn(2, 1, 192))
    assert calls == ["minipeft_thin" if level != native.SCALAR else "minipeft_decode"]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_rows_without_a_gradient_equal_those_with_one(dtype: torch.dtype, bias: bool, level: int) -> None:
    layer = adapted_layer(bias).to(dtype)
    for rows in (1, 4, 5):
        x = torch.randn(rows, 192).to(dtype)
        with torch.no_grad():
            got = layer(x)
        right = layer(x)  # a gradient is recorded
        assert right.requires_grad and got.dtype == right.dtype == dtype
        torch.testing.assert_close(got, right.detach(), rtol=TOLERANCES[dtype], atol=10 * TOLERANCES[dtype])


@torch.no_grad()
def test_what_does_not_fit_is_multiplied_otherwise(level: int) -> None:
    layer = adapted_layer()
    x = torch.randn(2, 192)
    right = layer(x)
    arguments = (layer.packed(), torch.float32)
    lora_A, lora_B = layer.factors("default")
    odd: list[tuple[Tensor, Tensor]] = [
        (lora_A.T.contiguous().T, lora_B),
        (lora_A, lora_B.bfloat16()),
        (lora_A[:, :-1].contiguous(), lora_B),
    ]
    for pair in odd:
        assert cpu.adapted_product(x, *arguments, *pair, 1.0) is None
    assert cpu.adapted_product(torch.randn(5, 192), *arguments, lora_A, lora_B, 1.0) is None
    assert cpu.adapted_product(x.double(), *arguments, lora_A, lora_B, 1.0) is None
    layer.lora_A["default"].weight.data = lora_A.T.contiguous().T
    torch.testing.assert_close(layer(x), right)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


@pytest.mark.parametrize("rows", [2, 6])
@pytest.mark.parametrize("freed", ["x", "codes", "lora_A"])
def test_freed_memory_is_not_read(rows: int, freed: str, level: int) -> None:
    layer = NF4Linear.from_linear(torch.nn.Linear(64, 32, bias=False))
    model = get_peft_model(torch.nn.Sequential(layer), LoraConfig(r=4, target_modules=["0"]))
    x = torch.randn(rows, 64)
    tensor = {"x": x, "codes": layer.weight, "lora_A": model[0].lora_A["default"].weight}[freed]
    tensor.untyped_storage().resize_(0)
    with torch.no_grad(), pytest.raises((RuntimeError, ValueError), match=r"storage|not allocated"):
        model(x)


def python_calls(run: Callable[[], object]) -> int:
    """How many Python functions a call of `run` enters, itself left out."""
    names: list[str] = []
    sys.setprofile(lambda frame, event, _: names.append(frame.f_code.co_name) if event == "call" else None)
    try:
        run()
    finally:
        sys.setprofile(None)
    return len(names) - 1


@pytest.mark.parametrize("kind", ["nf4", "dense"])
@torch.no_grad()
def test_a_token_takes_few_python_calls_a_layer(monkeypatch: pytest.MonkeyPatch, kind: str, level: int) -> None:
    """Of a generated token a third was Python: what is asked at every layer and token is counted, not timed."""
    if level == native.SCALAR:
        pytest.skip("torch multiplies")
    linear = torch.nn.Linear(192, 256, bias=False)
    model = torch.nn.Sequential(NF4Linear.from_linear(linear) if kind == "nf4" else linear)
    get_peft_model(model, LoraConfig(r=8, target_modules=["0"], init_lora_weights=False))
    # As a user's process is: no form of the operation is forced, and kernels are not interpreted.
    monkeypatch.delenv("MINIPEFT_BACKEND")
    monkeypatch.setattr("minipeft_kernels.dispatch.interpreting", lambda: False)
    layer, x = model[0], torch.randn(1, 1, 192)
    layer(x)  # what is asked once
    assert python_calls(lambda: layer(x)) <= 42
