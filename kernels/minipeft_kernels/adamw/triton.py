"""AdamW on a GPU: every tensor of a model in one launch, each number read once and written once.

LoRA trains hundreds of small tensors; a launch for each would take longer than their arithmetic. So one grid covers
them all, and finds its data by two tables:

    chunks    int32 (chunks, 2)      tensor, chunk within it         made once for a list of sizes
    table     int64 (tensors, 5+)    numel, then the addresses       made at every step: gradients move
              of g, p, m, v (and in 8 bits of the scales of m and of v)

The hyperparameters are arguments, not constants: a schedule changes them at every step.
"""
# Device code has no Python types.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import functools
import operator
from array import array
from collections.abc import Iterable, Sequence
from itertools import chain

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import on_device
from ..nf4.quantize_triton import _magnitude, _nearest_entry
from ..rounding_triton import _round_to
from .eight_bit import STATE_BLOCKSIZE, state_map
from .reference import Hyper

# Elements a program: 16 a thread at 4 warps, and 8 where the search for codes takes registers.
CHUNK = 2048
CHUNK_8BIT = 1024
NUM_WARPS = 4
ALIGNMENT = 16

_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_NAMES = ("g", "p", "m", "v", "m_absmax", "v_absmax")


@triton.jit
def _numel(row, ALIGNED: tl.constexpr):
    """The number of elements of a row's tensor."""
    numel = tl.load(row)
    if ALIGNED:
        # A mask must be known to be the same for the elements of one access.
        numel = tl.multiple_of(numel, 16)
    return numel


@triton.jit
def _pointer(row, i: tl.constexpr, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    """The address in column i of a row of the table, as a pointer to dtype."""
    pointer = tl.load(row + i).to(tl.pointer_type(dtype))
    if ALIGNED:
        # Lets the compiler use accesses of 16 bytes; the launcher checked the addresses.
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _adamw_step(p, g, m, v, beta1, rest1, beta2, rest2, eps, decay, step_size, bias2_sqrt):
    """`adamw_update` of float32 numbers: -> p, m, v."""
    m = m * beta1 + g * rest1
    v = v * beta2 + g * g * rest2
    denominator = tl.div_rn(tl.sqrt_rn(v), bias2_sqrt) + eps
    return p * decay - step_size * tl.div_rn(m, denominator), m, v


@triton.jit
def _adamw_kernel(
    table,
    chunks,
    beta1,
    rest1,
    beta2,
    rest2,
    eps,
    decay,
    step_size,
    bias2_sqrt,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One chunk of one tensor.

        table   row of a tensor: [ numel | &g | &p | &m | &v ]
        g, p    float32 or 16 bits, flat        m, v   float32, flat

    Bytes a parameter: reads g, p, m, v and writes p, m, v: 28 in float32, 22 with bfloat16 parameters and gradients.
    Operations: 11, of them one root and two quotients. So bytes decide: 0.5 parameters a clock for each multiprocessor
    of an H100, whose 128 lanes could do some 250 operations for each.
    """
    chunk = chunks + tl.program_id(0).to(tl.int64) * 2
    row = table + tl.load(chunk) * 5
    place = tl.load(chunk + 1).to(tl.int64) * CHUNK + tl.arange(0, CHUNK)
    inside = place < _numel(row, ALIGNED)
    g = _pointer(row, 1, GRAD, ALIGNED) + place
    p = _pointer(row, 2, PARAM, ALIGNED) + place
    m = _pointer(row, 3, tl.float32, ALIGNED) + place
    v = _pointer(row, 4, tl.float32, ALIGNED) + place
    new_p, new_m, new_v = _adamw_step(
        tl.load(p, mask=inside, other=0.0).to(tl.float32),
        tl.load(g, mask=inside, other=0.0).to(tl.float32),
        tl.load(m, mask=inside, other=0.0),
        tl.load(v, mask=inside, other=0.0),
        beta1,
        rest1,
        beta2,
        rest2,
        eps,
        decay,
        step_size,
        bias2_sqrt,
    )
    tl.store(p, _round_to(new_p, PARAM), mask=inside)
    tl.store(m, new_m, mask=inside)
    tl.store(v, new_v, mask=inside)


@triton.jit
def _block_absmax(x):
    """(R, 256) float32 -> (R,): the largest magnitude of each row."""
    return tl.max(_magnitude(x), axis=1).to(tl.float32, bitcast=True)


@triton.jit
def _scaled(x, absmax):
    """x / absmax of its row, 0 in a row of zeros."""
    absmax = tl.broadcast_to(absmax[:, None], x.shape)
    return tl.where(absmax == 0.0, 0.0, tl.div_rn(x, tl.where(absmax == 0.0, 1.0, absmax)))


@triton.jit
def _adamw_8bit_kernel(
    table,
    chunks,
    m_map,
    m_thresholds,
    v_map,
    v_thresholds,
    beta1,
    rest1,
    beta2,
    rest2,
    eps,
    decay,
    step_size,
    bias2_sqrt,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One chunk of one tensor: CHUNK/BLOCK rows, each a block of BLOCK numbers with one scale a moment.

        table       row of a tensor: [ numel | &g | &p | &m codes | &v codes | &m absmax | &v absmax ]
        m, v codes  uint8, flat             m, v absmax   float32, one a block

    Bytes a parameter: 16 in float32, 10 with bfloat16 parameters and gradients, and 16/256 for the scales.
    Operations: 11 for the update, 2 look-ups to decode, and for each moment 8 look-ups and 16 operations to find its
    code. The tables are 1 KB each and stay in the first-level cache; the look-ups, not the bytes, are the limit where
    their addresses collide.
    """
    ROWS: tl.constexpr = CHUNK // BLOCK
    chunk = chunks + tl.program_id(0).to(tl.int64) * 2
    row = table + tl.load(chunk) * 7
    first = tl.load(chunk + 1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    place = first[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    numel = _numel(row, ALIGNED)
    inside = place < numel
    has_row = first * BLOCK < numel
    g = _pointer(row, 1, GRAD, ALIGNED) + place
    p = _pointer(row, 2, PARAM, ALIGNED) + place
    m_codes = _pointer(row, 3, tl.uint8, ALIGNED) + place
    v_codes = _pointer(row, 4, tl.uint8, ALIGNED) + place
    m_absmax = _pointer(row, 5, tl.float32, ALIGNED) + first
    v_absmax = _pointer(row, 6, tl.float32, ALIGNED) + first

    m = tl.load(m_map + tl.load(m_codes, mask=inside, other=0).to(tl.int32))
    v = tl.load(v_map + tl.load(v_codes, mask=inside, other=0).to(tl.int32))
    new_p, m, v = _adamw_step(
        tl.load(p, mask=inside, other=0.0).to(tl.float32),
        tl.load(g, mask=inside, other=0.0).to(tl.float32),
        m * tl.load(m_absmax, mask=has_row, other=0.0)[:, None],
        v * tl.load(v_absmax, mask=has_row, other=0.0)[:, None],
        beta1,
        rest1,
        beta2,
        rest2,
        eps,
        decay,
        step_size,
        bias2_sqrt,
    )
    tl.store(p, _round_to(new_p, PARAM), mask=inside)

    # Elements beyond the end were decoded, too: they must not count in the last block's scale.
    m, v = tl.where(inside, m, 0.0), tl.where(inside, v, 0.0)
    m_largest, v_largest = _block_absmax(m), _block_absmax(v)
    m_code = _nearest_entry(_scaled(m, m_largest), m_thresholds)
    v_code = _nearest_entry(_scaled(v, v_largest), v_thresholds)
    v_code = tl.where((v > 0.0) & (v_code == 0), 1, v_code)
    tl.store(m_codes, m_code.to(tl.uint8), mask=inside)
    tl.store(v_codes, v_code.to(tl.uint8), mask=inside)
    tl.store(m_absmax, m_largest, mask=has_row)
    tl.store(v_absmax, v_largest, mask=has_row)


def launch_adamw(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    step: int,
    hyper: Hyper,
) -> None:
    """`adamw_`: one launch for each pair of dtypes, aligned tensors apart from others."""
    _launch(_adamw_kernel, (), {"CHUNK": CHUNK}, grads, (params, exp_avgs, exp_avg_sqs), step, hyper)


def launch_adamw_8bit(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avg_codes: Sequence[Tensor],
    exp_avg_absmax: Sequence[Tensor],
    exp_avg_sq_codes: Sequence[Tensor],
    exp_avg_sq_absmax: Sequence[Tensor],
    step: int,
    hyper: Hyper,
) -> None:
    """`adamw_8bit_`, likewise."""
    device = params[0].device
    maps = (*state_map(True, device), *state_map(False, device))
    states = (params, exp_avg_codes, exp_avg_sq_codes, exp_avg_absmax, exp_avg_sq_absmax)
    constants = {"CHUNK": CHUNK_8BIT, "BLOCK": STATE_BLOCKSIZE}
    _launch(_adamw_8bit_kernel, maps, constants, grads, states, step, hyper)


def _launch(
    kernel: triton.JITFunction,
    maps: tuple[Tensor, ...],
    constants: dict[str, int],
    grads: Sequence[Tensor],
    written: Sequence[Sequence[Tensor]],
    step: int,
    hyper: Hyper,
) -> None:
    flat = [_contiguous(tensors) for tensors in (grads, *written)]
    rows = list(zip(map(Tensor.numel, grads), *(map(Tensor.data_ptr, tensors) for tensors in flat), strict=True))
    groups = _groups(rows, [p.dtype for p in written[0]], [g.dtype for g in grads])
    device = grads[0].device
    # The gradient's sign goes with its weight in the first moment; the second is of its square.
    rest1 = (hyper.beta1 - 1) if hyper.maximize else (1 - hyper.beta1)
    scalars = [hyper.beta1, rest1, hyper.beta2, 1 - hyper.beta2]
    scalars += [hyper.eps, hyper.decay, hyper.step_size(step), hyper.bias2_sqrt(step)]
    for (param_dtype, grad_dtype, aligned), group in groups.items():
        chosen = [rows[i] for i in group]
        numbers = array("q", chain.from_iterable(chosen))
        table = _to_device(torch.frombuffer(numbers, dtype=torch.int64).view(len(group), -1), device)
        chunks = _chunk_table(tuple([row[0] for row in chosen]), constants["CHUNK"], device)
        dtypes = {"PARAM": _DTYPES[param_dtype], "GRAD": _DTYPES[grad_dtype]}
        with on_device(table, functools.partial(_by_name, flat, group)):
            kernel[(len(chunks),)](
                *(table, chunks, *maps, *scalars),
                **dtypes,
                **constants,
                ALIGNED=aligned,
                num_warps=NUM_WARPS,
                enable_fp_fusion=False,
            )
    for tensors, copies in zip(written, flat[1:], strict=True):
        if copies is not tensors:
            for tensor, copy in zip(tensors, copies, strict=True):
                if copy is not tensor:
                    tensor.copy_(copy)


def _contiguous(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """The tensors, copies of those that are not contiguous among them."""
    return tensors if all(map(Tensor.is_contiguous, tensors)) else [t.contiguous() for t in tensors]


def _groups(
    rows: list[tuple[int, ...]], params: list[torch.dtype], grads: list[torch.dtype]
) -> dict[tuple[torch.dtype, torch.dtype, bool], Sequence[int]]:
    """The rows of each launch: of one dtype of parameters and one of gradients, all of them aligned or none."""
    # Hundreds of tensors that are alike take one look, not one each.
    alike = len(set(params)) == 1 and len(set(grads)) == 1 and 0 not in [row[0] for row in rows]
    if alike and _is_aligned(chain.from_iterable(rows)):
        return {(params[0], grads[0], True): range(len(rows))}
    groups: dict[tuple[torch.dtype, torch.dtype, bool], list[int]] = {}
    for i, row in enumerate(rows):
        if row[0]:
            groups.setdefault((params[i], grads[i], _is_aligned(row)), []).append(i)
    return dict(groups)


def _by_name(lists: Sequence[Sequence[Tensor]], group: Sequence[int]) -> dict[str, Tensor]:
    """The tensors of a group's table by the names that an emulator's errors give them, such as "p[0]"."""
    return {f"{n}[{row}]": t[i] for n, t in zip(_NAMES, lists, strict=False) for row, i in enumerate(group)}


def _is_aligned(numbers: Iterable[int]) -> bool:
    """True if all accesses can be of 16 bytes: of tensors of these sizes at these addresses."""
    return not functools.reduce(operator.or_, numbers) % ALIGNMENT


@functools.lru_cache(maxsize=8)
def _chunk_table(numels: tuple[int, ...], size: int, device: torch.device) -> Tensor:
    """(chunks, 2) int32: the tensor that each chunk is of, and its number within that tensor."""
    counts = torch.tensor([-(-numel // size) for numel in numels], device="cpu")
    tensor = torch.repeat_interleave(torch.arange(len(numels), device="cpu"), counts)
    first = counts.cumsum(0) - counts
    within = torch.arange(len(tensor), device="cpu") - first[tensor]
    return torch.stack([tensor, within], dim=1).to(device, torch.int32)


def _to_device(table: Tensor, device: torch.device) -> Tensor:
    """The table on `device`; to a GPU it goes from pinned memory, so that nobody waits for the copy."""
    if device.type == "cuda":
        return table.pin_memory().to(device, non_blocking=True)
    return table.to(device)
