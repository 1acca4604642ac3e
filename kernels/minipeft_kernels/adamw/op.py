"""AdamW's update of many tensors at once, in place: the operations; `reference` has their arithmetic.

`adamw_8bit_` keeps m and v in 8 bits (Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization"): 2 bytes of
state a parameter, not 8.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..dispatch import use_triton
from ..registration import below_autograd, define_op, is_plain_call
from .eight_bit import STATE_BLOCKSIZE
from .reference import Hyper, adamw_8bit_reference, adamw_reference

PARAMETER_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    *,
    step: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    maximize: bool = False,
) -> None:
    """Update `params`, and the two moments of each, in place. On a GPU: one launch for each pair of dtypes.

    Args:
        params: any shapes, float32, bfloat16 or float16, all on one device.
        grads: of the same shapes; their dtypes may be others of the three.
        exp_avgs, exp_avg_sqs: m and v, float32, of the same shapes.
        step: t, from 1, common to all.
        lr, betas, eps, weight_decay, maximize: as in torch.optim.AdamW.

    Raises:
        ValueError, TypeError: the lists do not fit each other; names the position.
    """
    lists = (params, grads, exp_avgs, exp_avg_sqs)
    _call(_adamw_op, _check_adamw, _run_adamw, lists, (step, lr, *betas, eps, weight_decay, maximize))


def adamw_8bit_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avg_codes: Sequence[Tensor],
    exp_avg_absmax: Sequence[Tensor],
    exp_avg_sq_codes: Sequence[Tensor],
    exp_avg_sq_absmax: Sequence[Tensor],
    *,
    step: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    maximize: bool = False,
) -> None:
    """`adamw_` with the moments in blocks of 256 8-bit codes.

    Args:
        exp_avg_codes, exp_avg_sq_codes: uint8, of the parameters' shapes: entries of the signed and of the unsigned
            dynamic map, as `eight_bit.initial_state` makes them.
        exp_avg_absmax, exp_avg_sq_absmax: float32 (ceil(numel/256),), the scale of each block.
        The rest as `adamw_`.
    """
    lists = (params, grads, exp_avg_codes, exp_avg_absmax, exp_avg_sq_codes, exp_avg_sq_absmax)
    _call(_adamw_8bit_op, _check_adamw_8bit, _run_adamw_8bit, lists, (step, lr, *betas, eps, weight_decay, maximize))


def _call(
    op: Callable[..., None],
    check: Callable[..., None],
    run: Callable[..., None],
    lists: tuple[Sequence[Tensor], ...],
    numbers: tuple[Any, ...],
) -> None:
    """The operation, past the dispatcher where nothing but itself would happen: of hundreds of tensors that halves it.

    (The dispatcher takes the lists apart and puts them together again, twice.)
    """
    params = lists[0]
    types = set().union(*(map(type, tensors) for tensors in lists))
    if params and types <= _PLAIN and is_plain_call(params[0]) and not any(any(map(Tensor.is_neg, t)) for t in lists):
        with below_autograd():
            check(*lists, *numbers)
            run(*lists, *numbers)
    else:
        op(*lists, *numbers)


_PLAIN = {Tensor, torch.nn.Parameter}


def launched_at_once(
    params: Sequence[Tensor], grads: Sequence[Tensor], states: Sequence[Sequence[Tensor]], step: int, hyper: Hyper
) -> bool:
    """`adamw_`, or of four states `adamw_8bit_`, of what is known to fit: contiguous, of equal lengths, of any shapes.

    The checks and views of hundreds of small tensors take longer than all else that a step does on the host.

    Returns:
        False where no kernel would run, or not the kernel alone: call the operation then.
    """
    plain = set(map(type, params)) <= _PLAIN and set(map(type, grads)) <= _PLAIN and is_plain_call(params[0])
    if not plain or not use_triton(params[0]):
        return False
    from .triton import launch_adamw, launch_adamw_8bit

    launch: Callable[..., None] = launch_adamw if len(states) == 2 else launch_adamw_8bit
    launch(params, grads, *states, step=step, hyper=hyper)
    _mark_changed(params, *states)
    return True


def _check_adamw(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    step: int,
    *hyper: Any,
) -> None:
    _check(params, grads, step, hyper)
    shapes = [p.shape for p in params]
    for name, states in (("exp_avgs", exp_avgs), ("exp_avg_sqs", exp_avg_sqs)):
        _check_state(name, params, states, torch.float32, shapes)


def _check_adamw_8bit(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avg_codes: list[Tensor],
    exp_avg_absmax: list[Tensor],
    exp_avg_sq_codes: list[Tensor],
    exp_avg_sq_absmax: list[Tensor],
    step: int,
    *hyper: Any,
) -> None:
    _check(params, grads, step, hyper)
    for name, codes in (("exp_avg_codes", exp_avg_codes), ("exp_avg_sq_codes", exp_avg_sq_codes)):
        _check_state(name, params, codes, torch.uint8, [p.shape for p in params])
    for name, scales in (("exp_avg_absmax", exp_avg_absmax), ("exp_avg_sq_absmax", exp_avg_sq_absmax)):
        _check_state(name, params, scales, torch.float32, [(-(-p.numel() // STATE_BLOCKSIZE),) for p in params])


def _check(params: Sequence[Tensor], grads: Sequence[Tensor], step: int, hyper: Sequence[Any]) -> None:
    if step < 1:
        raise ValueError(f"step counts from 1, got {step}")
    _, beta1, beta2, *_ = hyper
    if not (0 <= beta1 < 1 and 0 <= beta2 < 1):
        raise ValueError(f"betas must be from 0 up to 1, 1 left out, got {(beta1, beta2)}")
    if len(grads) != len(params):
        raise ValueError(f"{len(params)} params and {len(grads)} grads: one for each is needed")
    if not params or (
        _are_alike(grads, [p.shape for p in params], PARAMETER_DTYPES, params[0].device)
        and _are_alike(params, None, PARAMETER_DTYPES, params[0].device)
    ):
        return
    for i, (p, g) in enumerate(zip(params, grads, strict=True)):
        for name, t in (("params", p), ("grads", g)):
            if t is None:
                raise TypeError(f"{name}[{i}] must be a tensor, got None")
            if t.dtype not in PARAMETER_DTYPES or t.layout != torch.strided:
                raise TypeError(f"{name}[{i}] must be dense float32, bfloat16 or float16, got {t.dtype}, {t.layout}")
        if g.shape != p.shape or g.device != p.device or p.device != params[0].device:
            raise ValueError(
                f"grads[{i}] {tuple(g.shape)} on {g.device} does not fit params[{i}] {tuple(p.shape)} on {p.device}, "
                f"or the params are not all on {params[0].device}"
            )


def _are_alike(
    tensors: Sequence[Tensor],
    shapes: Sequence[tuple[int, ...]] | None,
    dtypes: Sequence[torch.dtype],
    device: torch.device,
) -> bool:
    """True if these are dense tensors of the shapes (None: of any), of some of the dtypes and on the device.

    Attribute by attribute: tensor by tensor, as is looked for the one that does not fit, takes three times as long.
    """
    if type(None) in map(type, tensors):
        return False
    return (
        {t.device for t in tensors} == {device}
        and {t.layout for t in tensors} == {torch.strided}
        and {t.dtype for t in tensors}.issubset(dtypes)
        and (shapes is None or [t.shape for t in tensors] == shapes)
    )


def _check_state(
    name: str, params: Sequence[Tensor], states: Sequence[Tensor], dtype: torch.dtype, shapes: Sequence[tuple[int, ...]]
) -> None:
    if len(states) != len(params):
        raise ValueError(f"{len(params)} params and {len(states)} {name}: one for each is needed")
    if not params or _are_alike(states, shapes, (dtype,), params[0].device):
        return
    for i, (p, s, shape) in enumerate(zip(params, states, shapes, strict=True)):
        if s is None:
            raise TypeError(f"{name}[{i}] must be a tensor, got None")
        if s.dtype != dtype or s.shape != shape or s.device != p.device or s.layout != torch.strided:
            raise ValueError(
                f"{name}[{i}] should be {dtype} {tuple(shape)} on {p.device}, and is {s.dtype} {tuple(s.shape)} on "
                f"{s.device}, {s.layout}"
            )


def _run_adamw(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    step: int,
    *hyper: Any,
) -> None:
    if not params:
        return
    if use_triton(params[0]):
        from .triton import launch_adamw as update
    else:
        update = adamw_reference
    update(params, grads, exp_avgs, exp_avg_sqs, step, Hyper(*hyper))
    _mark_changed(params, exp_avgs, exp_avg_sqs)


def _run_adamw_8bit(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avg_codes: list[Tensor],
    exp_avg_absmax: list[Tensor],
    exp_avg_sq_codes: list[Tensor],
    exp_avg_sq_absmax: list[Tensor],
    step: int,
    *hyper: Any,
) -> None:
    if not params:
        return
    if use_triton(params[0]):
        from .triton import launch_adamw_8bit as update
    else:
        update = adamw_8bit_reference
    states = (exp_avg_codes, exp_avg_absmax, exp_avg_sq_codes, exp_avg_sq_absmax)
    update(params, grads, *states, step, Hyper(*hyper))
    _mark_changed(params, *states)


def _mark_changed(*written: Sequence[Tensor]) -> None:
    """Let autograd know: neither a kernel, which writes by address, nor torch's fused loop tells it."""
    torch.autograd.graph.increment_version([t for tensors in written for t in tensors if not t.is_inference()])


_HYPERPARAMETERS = "SymInt step, float lr, float beta1, float beta2, float eps, float weight_decay, bool maximize"

_adamw_op = define_op(
    f"adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, {_HYPERPARAMETERS})"
    " -> ()",
    _run_adamw,
    fake=lambda *args: None,
    check=_check_adamw,
)
_adamw_8bit_op = define_op(
    "adamw_8bit_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avg_codes, Tensor(c!)[] exp_avg_absmax, "
    f"Tensor(d!)[] exp_avg_sq_codes, Tensor(e!)[] exp_avg_sq_absmax, {_HYPERPARAMETERS}) -> ()",
    _run_adamw_8bit,
    fake=lambda *args: None,
    check=_check_adamw_8bit,
)
