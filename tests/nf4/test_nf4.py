"""NF4Weight is bitsandbytes 0.50.2's: its golden file, the installed library, and its checkpoints.

Bit by bit, but for the codes of nested scales, of which ours are the nearer.
"""

import json
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nf4_golden import CASES, KEYS, golden
from torch import Tensor

from minipeft.nf4 import NF4Weight
from minipeft_kernels.nf4.checks import BLOCKSIZES
from minipeft_kernels.nf4.codebooks import NF4_BOUNDARIES, NF4_LEVELS, dynamic_map

# "nonfinite" is what we refuse; the others are not of a weight alone.
QUANTIZED = [name for name in CASES if f"{name}.packed" in KEYS and f"{name}.in" in KEYS and name != "nonfinite"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def table_codes(absmax: Tensor, offset: Tensor) -> Tensor:
    """The 8-bit scale codes of bitsandbytes' CPU path: the nearest entry to the middle of one of 65,536 bins."""
    entries = dynamic_map().double()
    middles = torch.linspace(-1, 1, 65536, dtype=torch.float64)
    table = torch.bucketize(middles, (entries[1:] + entries[:-1]) / 2)
    codes = []
    for block in (absmax - offset).split(256):
        scaled = block * (1 / block.abs().max())
        bins = ((scaled + 1) * 0.5 * 65535 + 0.5).floor()
        codes.append(table[bins.nan_to_num(0).clamp(0, 65535).long()])
    return torch.cat(codes).to(torch.uint8)


def assert_is_bitsandbytes(w: Tensor, blocksize: int, double_quant: bool) -> None:
    """Quantized alike, and either's state decoded alike by both."""
    ours = NF4Weight.quantize(w, blocksize, double_quant)
    codes, theirs = bnb.quantize_4bit(w, blocksize=blocksize, quant_type="nf4", compress_statistics=double_quant)
    assert torch.equal(ours.codes, codes)
    assert torch.equal(ours.quant_map, theirs.code)
    if not double_quant:
        assert torch.equal(ours.absmax, theirs.absmax)
    else:
        assert torch.equal(ours.offset, theirs.offset)
        assert torch.equal(ours.nested_absmax, theirs.state2.absmax)
        assert torch.equal(ours.nested_quant_map, theirs.state2.code)
        single = NF4Weight.quantize(w, blocksize, double_quant=False)
        assert torch.equal(theirs.absmax, table_codes(single.absmax, ours.offset))
        # Neighbours, or near zero, where the entries lie closer than the bins, entries within a bin.
        entries = dynamic_map()
        apart = (ours.absmax.int() - theirs.absmax.int()).abs()
        distance = (entries[ours.absmax.long()] - entries[theirs.absmax.long()]).abs()
        assert ((apart <= 1) | (distance <= 2 / 65535)).all()
    read = NF4Weight.from_state({"weight": codes, **with_prefix(theirs.as_dict(packed=True))})
    same_bits(read.dequantize(), decoded_by_bitsandbytes(codes, theirs))
    state = {key.removeprefix("weight."): t for key, t in ours.state().items() if key != "weight"}
    written = bnb.QuantState.from_dict(state, device=torch.device("cpu"))
    same_bits(ours.dequantize(), decoded_by_bitsandbytes(ours.codes, written))


def decoded_by_bitsandbytes(codes: Tensor, state: bnb.QuantState) -> Tensor:
    """Decoded as one row: bitsandbytes' AVX-512 path takes scales of the wrong blocks where rows have a multiple of
    16 weights but not of the blocksize, and differs from its own generic path there."""
    shape, state.shape = state.shape, torch.Size((state.shape.numel(),))
    out = bnb.dequantize_4bit(codes, state).view(shape)
    state.shape = shape
    return out


def with_prefix(state: dict[str, Any]) -> dict[str, Any]:
    return {f"weight.{key}": t for key, t in state.items()}


def same_bits(a: Tensor, b: Tensor) -> None:
    assert a.dtype == b.dtype
    integers = torch.int32 if a.dtype == torch.float32 else torch.int16
    assert torch.equal(a.view(integers), b.view(integers))


@pytest.mark.parametrize("name", QUANTIZED)
def test_golden_case_is_reproduced(name: str) -> None:
    case = CASES[name]
    w = golden(f"{name}.in").to(getattr(torch, case["dtype"]))
    q = NF4Weight.quantize(w, case["blocksize"], case["nested"])
    assert torch.equal(q.codes.view(-1), golden(f"{name}.packed"))
    assert torch.equal(q.absmax, golden(f"{name}.absmax"))
    if case["nested"]:
        assert torch.equal(q.nested_absmax, golden(f"{name}.nested_absmax"))
        assert torch.equal(q.offset, golden(f"{name}.offset"))
    assert torch.equal(q.dequantize().float(), golden(f"{name}.out"))


shapes = st.one_of(
    st.just((1,)),
    st.tuples(st.integers(1, 5000)),
    st.tuples(st.integers(1, 70), st.integers(1, 70)),
    st.tuples(st.integers(1, 8), st.integers(1, 8), st.integers(1, 70)),
    st.tuples(st.integers(1, 40), st.just(64)),
)


def weights(shape: tuple[int, ...], kind: str, exponent: float, dtype: torch.dtype, seed: int) -> Tensor:
    """A weight of one of the kinds that go wrong, scaled by 10^exponent as far as the dtype goes."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(shape, generator=generator)
    flat = w.view(-1)
    if kind == "zero blocks":
        flat *= torch.rand(flat.numel() // 32 + 1, generator=generator).round().repeat_interleave(32)[: flat.numel()]
    if kind == "ties":
        ties = torch.cat([NF4_BOUNDARIES, NF4_LEVELS, torch.tensor([1.0, -1.0, 0.0])])
        w = ties[torch.randint(len(ties), shape, generator=generator)]
        exponent = round(exponent) * torch.log10(torch.tensor(2.0)).item()
    scale = 1e-40 if kind == "subnormal" else 2.0 ** round(exponent / 0.30103) if kind == "ties" else 10.0**exponent
    limit = torch.finfo(dtype).max
    return (w.double() * scale).clamp(-limit, limit).to(dtype)


@settings(max_examples=150, deadline=None)
@given(
    shapes,
    st.sampled_from(["normal", "zero blocks", "ties", "subnormal"]),
    st.floats(-30, 30),
    st.sampled_from(DTYPES),
    st.sampled_from(BLOCKSIZES),
    st.booleans(),
    st.integers(0, 1 << 30),
)
def test_any_weight_is_quantized_as_the_installed_bitsandbytes_does(
    shape: tuple[int, ...],
    kind: str,
    exponent: float,
    dtype: torch.dtype,
    blocksize: int,
    double_quant: bool,
    seed: int,
) -> None:
    w = weights(shape, kind, exponent, dtype, seed)
    # bitsandbytes compiles its decoding of odd rows, anew for each shape: that would take a second each.
    with torch.compiler.set_stance("force_eager"):
        assert_is_bitsandbytes(w, blocksize, double_quant)


def near_boundaries(blocks: int, size: int) -> Tensor:
    """(blocks, size) whose first column is the scale and the rest lie within 3 ulps of a boundary of it."""
    scale = 1 + torch.rand(blocks, 1)
    near = NF4_BOUNDARIES[torch.randint(15, (blocks, size - 1))] * scale
    near = (near.view(torch.int32) + torch.randint(-3, 4, near.shape, dtype=torch.int32)).view(torch.float32)
    return torch.cat([scale, near], dim=1)


def test_the_last_bit_of_a_full_block_is_that_of_a_product_with_the_reciprocal() -> None:
    w = near_boundaries(500, 64)
    product = torch.bucketize(w * (1 / w[:, :1]), NF4_BOUNDARIES)
    assert not torch.equal(product, torch.bucketize(w / w[:, :1], NF4_BOUNDARIES))  # the cases tell the two apart
    assert_is_bitsandbytes(w, 64, double_quant=False)


def test_the_last_bit_of_a_short_block_is_that_of_a_quotient() -> None:
    w = near_boundaries(100, 62)
    quotient = torch.bucketize(w / w[:, :1], NF4_BOUNDARIES)
    assert not torch.equal(quotient, torch.bucketize(w * (1 / w[:, :1]), NF4_BOUNDARIES))
    for row in w:
        assert_is_bitsandbytes(row, 64, double_quant=False)


@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_matrix_of_many_blocks_is_bitsandbytes(dtype: torch.dtype, blocksize: int) -> None:
    assert_is_bitsandbytes((torch.randn(512, 1024) * 0.02).to(dtype), blocksize, double_quant=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_nested_scale_that_is_another_is_the_nearer_one(dtype: torch.dtype) -> None:
    differing = scales = 0
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        w = (torch.randn(1024, 1024, generator=generator) * 0.02).to(dtype)
        ours = NF4Weight.quantize(w, 64, double_quant=True)
        _, theirs = bnb.quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=True)
        plain = NF4Weight.quantize(w, 64, double_quant=False).absmax
        assert torch.equal(ours.offset, theirs.offset) and torch.equal(ours.nested_absmax, theirs.state2.absmax)
        exact = (plain - ours.offset).double() / ours.nested_absmax.double().repeat_interleave(256)
        entries = dynamic_map().double()
        # (scales, 256): the nearest of all entries, but for the last bit of the quotient in float32
        error = (entries[ours.absmax.long()] - exact).abs()
        assert (error <= (entries - exact[:, None]).abs().amin(1) + 2**-23).all()
        other = ours.absmax != theirs.absmax
        assert (error[other] < (entries[theirs.absmax.long()] - exact).abs()[other] + 2**-23).all()
        differing, scales = differing + int(other.sum()), scales + other.numel()
    assert scales == 8 * 16384 and scales / 800 < differing < scales / 400  # docs/checks.md: one of 600


@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_every_dtype_decodes_as_bitsandbytes(blocksize: int) -> None:
    q = NF4Weight.quantize(torch.randn(64, 256) * 3000, blocksize, double_quant=False)
    for dtype in DTYPES:
        state = bnb.QuantState(q.absmax, q.shape, q.quant_map, blocksize, "nf4", dtype)
        same_bits(q.dequantize(dtype), decoded_by_bitsandbytes(q.codes, state))


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("shape", [(0,), (0, 5), (3, 0)])
def test_an_empty_weight_comes_back(shape: tuple[int, ...], double_quant: bool) -> None:
    q = NF4Weight.quantize(torch.empty(shape, dtype=torch.bfloat16), double_quant=double_quant)
    assert q.codes.shape == (0, 1)
    assert q.dequantize().shape == shape and q.dequantize().dtype == torch.bfloat16
    assert NF4Weight.from_state(q.state()).shape == shape


@pytest.mark.parametrize(
    ("blocksize", "double_quant", "error"),
    [(64, False, 0.072807), (64, True, 0.072881), (32, False, 0.067758), (128, False, 0.076850)],
)
def test_mean_error_on_normal_weights(blocksize: int, double_quant: bool, error: float) -> None:
    w = torch.randn(2048, 2048, generator=torch.Generator().manual_seed(0))
    q = NF4Weight.quantize(w, blocksize, double_quant)
    # Known at 4096x4096; the mean over a quarter of it has a standard error of 3e-5.
    assert (q.dequantize() - w).abs().mean().item() == pytest.approx(error, abs=1e-4)


@pytest.mark.parametrize(("double_quant", "error"), [(False, 0.091977), (True, 0.092001)])
def test_relative_error_on_normal_weights(double_quant: bool, error: float) -> None:
    w = torch.randn(2048, 2048, generator=torch.Generator().manual_seed(0))
    q = NF4Weight.quantize(w, double_quant=double_quant)
    assert ((q.dequantize() - w).norm() / w.norm()).item() == pytest.approx(error, abs=1e-4)


def test_bits_a_weight() -> None:
    w = torch.randn(1024, 1024)
    maps = 4 * 16 + 4 * 256
    assert 8 * (NF4Weight.quantize(w).nbytes - maps - 4) / w.numel() == 4 + 8 / 64 + 32 / (64 * 256)
    assert 8 * (NF4Weight.quantize(w, double_quant=False).nbytes - 4 * 16) / w.numel() == 4.5


def test_quantizing_what_was_dequantized_changes_nothing() -> None:
    q = NF4Weight.quantize(torch.randn(64, 64), double_quant=False)
    again = NF4Weight.quantize(q.dequantize(), double_quant=False)
    assert torch.equal(again.codes, q.codes) and torch.equal(again.absmax, q.absmax)


def test_a_clone_shares_nothing_and_to_keeps_all() -> None:
    q = NF4Weight.quantize(torch.randn(64, 64))
    for name, tensor in q.clone().tensors().items():
        assert torch.equal(tensor, q.tensors()[name])
        assert tensor.data_ptr() != q.tensors()[name].data_ptr()
    moved = q.to("meta")
    assert {t.device.type for t in moved.tensors().values()} == {"meta"}
    assert (moved.blocksize, moved.shape, moved.dtype) == (q.blocksize, q.shape, q.dtype)


def test_two_weights_share_no_map() -> None:
    """safetensors refuses tensors that share memory."""
    a, b = (NF4Weight.quantize(torch.ones(64)) for _ in range(2))
    assert a.quant_map.data_ptr() != b.quant_map.data_ptr()
    assert a.nested_quant_map.data_ptr() != b.nested_quant_map.data_ptr()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double_quant", [True, False])
def test_the_written_state_is_bitsandbytes_to_the_byte(double_quant: bool, dtype: torch.dtype) -> None:
    w = torch.randn(32, 64).to(dtype)
    ours = NF4Weight.quantize(w, double_quant=double_quant).state("model.q_proj.")
    codes, state = bnb.quantize_4bit(w, quant_type="nf4", compress_statistics=double_quant)
    theirs = {"model.q_proj.weight": codes}
    theirs |= {f"model.q_proj.weight.{key}": t for key, t in state.as_dict(packed=True).items()}
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        if not (key.endswith(".absmax") and double_quant):
            assert torch.equal(ours[key], tensor), key


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16, torch.float32, torch.int8])
def test_another_storage_dtype_is_the_same_bytes(storage: torch.dtype) -> None:
    w = torch.randn(32, 64)
    codes, state = bnb.quantize_4bit(w, quant_type="nf4", compress_statistics=True, quant_storage=storage)
    assert codes.dtype == storage
    q = NF4Weight.from_state({"weight": codes, **with_prefix(state.as_dict(packed=True))})
    assert torch.equal(q.codes, NF4Weight.quantize(w).codes)


def test_stored_maps_are_trusted() -> None:
    q = NF4Weight.quantize(torch.randn(64, 64))
    state = q.state()
    doubled = NF4Weight.from_state(state | {"weight.quant_map": state["weight.quant_map"] * 2})
    assert torch.equal(doubled.dequantize(), q.dequantize() * 2)
    shifted = NF4Weight.from_state(state | {"weight.nested_quant_map": torch.zeros(256)})
    assert torch.equal(shifted.scales(), q.offset.expand(64))


def packed_json(**changes: Any) -> Tensor:
    """The JSON of a (64, 64) weight, changed; None takes an entry away."""
    state = NF4Weight.quantize(torch.ones(64, 64)).state()
    entries = json.loads(bytes(state["weight.quant_state.bitsandbytes__nf4"].tolist()))
    entries = {k: v for k, v in (entries | changes).items() if v is not ...}
    return torch.tensor(list(json.dumps(entries).encode()), dtype=torch.uint8)


JSON = "weight.quant_state.bitsandbytes__nf4"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("weight", None, "weight is missing"),
        ("weight", torch.zeros(64, 64), r"weight \(as bytes\) should be uint8 \(2048, 1\), and is uint8 \(16384, 1\)"),
        ("weight.absmax", None, "weight.absmax is missing"),
        ("weight.absmax", torch.zeros(64), r"weight.absmax should be uint8 \(64,\), and is float32 \(64,\)"),
        ("weight.absmax", torch.zeros(63, dtype=torch.uint8), r"weight.absmax should be uint8 \(64,\)"),
        ("weight.quant_map", torch.zeros(15), r"weight.quant_map should be float32 \(16,\)"),
        ("weight.quant_map", torch.zeros(16).half(), "weight.quant_map should be float32"),
        ("weight.nested_absmax", None, "weight.nested_absmax is missing"),
        ("weight.nested_absmax", torch.zeros(2), r"weight.nested_absmax should be float32 \(1,\)"),
        ("weight.nested_quant_map", torch.zeros(255), r"weight.nested_quant_map should be float32 \(256,\)"),
        (JSON, None, "bitsandbytes__nf4 is missing"),
        (JSON, torch.zeros(4, dtype=torch.uint8), "should hold JSON as uint8"),
        (JSON, torch.tensor([200, 201], dtype=torch.uint8), "should hold JSON as uint8"),
        (JSON, torch.tensor([0.5]), "should hold JSON as uint8"),
        (JSON, torch.tensor(list(b"[1]"), dtype=torch.uint8), r"should hold a JSON object, and holds \[1\]"),
        (JSON, torch.empty(10, dtype=torch.uint8, device="meta"), "has no data"),
        (JSON, packed_json(shape=...), "lacks shape"),
        (JSON, packed_json(nested_offset=...), "lacks nested_offset"),
        (JSON, packed_json(quant_type="fp4"), "quant_type = 'fp4'"),
        (JSON, packed_json(dtype="int64"), "dtype = 'int64'"),
        (JSON, packed_json(dtype=["float32"]), "dtype = "),
        (JSON, packed_json(shape=[64, -64]), r"shape = \[64, -64\]"),
        (JSON, packed_json(shape=[64, 64, 2]), "should be uint8"),
        (JSON, packed_json(blocksize=48), "power of two from 32 to 4096, got 48"),
        (JSON, packed_json(blocksize="64"), "blocksize = '64'"),
        (JSON, packed_json(nested_blocksize=0), "nested_blocksize = 0"),
        (JSON, packed_json(nested_dtype="float16"), "nested_dtype = 'float16'"),
        (JSON, packed_json(nested_offset=float("nan")), "NaN is no JSON number"),
        (JSON, packed_json(rotation="hadamard"), "rotation = 'hadamard'"),
        ("weight.quant_state.bitsandbytes__fp4", packed_json(quant_type="fp4"), "is in FP4"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_by_name(key: str, value: Tensor | None, message: str) -> None:
    state = NF4Weight.quantize(torch.randn(64, 64)).state("layer.")
    if value is None:
        del state[f"layer.{key}"]
    else:
        state[f"layer.{key}"] = value
    with pytest.raises(ValueError, match=message) as error:
        NF4Weight.from_state(state, "layer.")
    assert "layer.weight" in str(error.value) or "blocksize" in str(error.value)


def test_an_unknown_entry_that_asks_for_nothing_passes() -> None:
    state = NF4Weight.quantize(torch.ones(64, 64)).state()
    state[JSON] = packed_json(rotation=None)
    assert NF4Weight.from_state(state).double_quant
