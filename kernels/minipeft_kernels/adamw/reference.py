"""AdamW's update (Loshchilov and Hutter 2019, algorithm 2) in PyTorch, in place: the reference of `op`.

    m <- beta1 m + (1 - beta1) g                       first moment
    v <- beta2 v + (1 - beta2) g^2                     second moment
    p <- (1 - lr weight_decay) p - lr (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

The arithmetic is float32 whatever the parameter's dtype, and the parameter is rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .eight_bit import STATE_BLOCKSIZE, dequantize_state, quantize_state

# Elements updated at a time by the reference, so that its passes over them stay in the cache.
CHUNK = 1 << 16


class Hyper(NamedTuple):
    """The numbers that a parameter group of an optimizer asks for: all of a step's but t.

    What follows from them is computed in double precision.
    """

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    maximize: bool

    @classmethod
    def of_group(cls, group: dict[str, Any]) -> Hyper:
        """The numbers of an entry of a `torch.optim.Optimizer`'s `param_groups`."""
        beta1, beta2 = map(float, group["betas"])
        lr, eps, weight_decay = float(group["lr"]), float(group["eps"]), float(group["weight_decay"])
        return cls(lr, beta1, beta2, eps, weight_decay, bool(group["maximize"]))

    @property
    def decay(self) -> float:
        """1 - lr weight_decay."""
        return 1 - self.lr * self.weight_decay

    def step_size(self, step: int) -> float:
        """lr / (1 - beta1^t), t = `step`."""
        return self.lr / (1 - self.beta1**step)

    def bias2_sqrt(self, step: int) -> float:
        """sqrt(1 - beta2^t), t = `step`."""
        return float((1 - self.beta2**step) ** 0.5)


def adamw_update(p: Tensor, g: Tensor, m: Tensor, v: Tensor, step: int, hyper: Hyper) -> None:
    """The update itself, of float32 tensors of one shape, in place on all but g: torch.optim.AdamW's operations."""
    if hyper.maximize:
        g = -g
    p.mul_(hyper.decay)
    m.lerp_(g, 1 - hyper.beta1)
    v.mul_(hyper.beta2).addcmul_(g, g, value=1 - hyper.beta2)
    denominator = v.sqrt().div_(hyper.bias2_sqrt(step)).add_(hyper.eps)
    p.addcdiv_(m, denominator, value=-hyper.step_size(step))


def adamw_reference(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    step: int,
    hyper: Hyper,
) -> None:
    """`adamw_` in PyTorch: float32 tensors in one pass, others chunk by chunk in float32."""
    ready = []
    for p, g, m, v in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True):
        if p.dtype == g.dtype == torch.float32 and all(t.is_contiguous() for t in (p, g, m, v)):
            ready.append((p, g, m, v))
            continue
        for g_piece, p_piece, m_piece, v_piece in _chunks(g, p, m, v):
            wide = p_piece.float()
            _update_at_once([(wide, g_piece.float(), m_piece, v_piece)], step, hyper)
            if wide is not p_piece:
                p_piece.copy_(wide)
    if ready:
        _update_at_once(ready, step, hyper)


def _update_at_once(tensors: list[tuple[Tensor, Tensor, Tensor, Tensor]], step: int, hyper: Hyper) -> None:
    """`adamw_update` of many (p, g, m, v), as torch.optim.AdamW does it with fused=True.

    One pass over memory instead of seven: 2.2 ms against 9.6 for 4 million float32 parameters, one thread.
    """
    params, grads, exp_avgs, exp_avg_sqs = (list(column) for column in zip(*tensors, strict=True))
    fused_update(params, grads, exp_avgs, exp_avg_sqs, [step] * len(tensors), hyper)


def fused_update(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: Sequence[int],
    hyper: Hyper,
) -> None:
    """torch's fused update of float32 tensors, in place, each at its step. Autograd is not told that they changed."""
    counts = {step: torch.tensor(float(step), device=params[0].device) for step in set(steps)}
    torch._fused_adamw_(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        [],
        [counts[step] for step in steps],
        amsgrad=False,
        **hyper._asdict(),
    )


def adamw_8bit_reference(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avg_codes: Sequence[Tensor],
    exp_avg_absmax: Sequence[Tensor],
    exp_avg_sq_codes: Sequence[Tensor],
    exp_avg_sq_absmax: Sequence[Tensor],
    step: int,
    hyper: Hyper,
) -> None:
    """`adamw_8bit_` in PyTorch: decode a chunk, update it, encode it."""
    scales = zip(exp_avg_absmax, exp_avg_sq_absmax, strict=True)
    for *tensors, (m_scales, v_scales) in zip(grads, params, exp_avg_codes, exp_avg_sq_codes, scales, strict=True):
        for i, (g, p, m_codes, v_codes) in enumerate(_chunks(*tensors)):
            blocks = slice(i * CHUNK // STATE_BLOCKSIZE, (i + 1) * CHUNK // STATE_BLOCKSIZE)
            m = dequantize_state(m_codes, m_scales[blocks], signed=True)
            v = dequantize_state(v_codes, v_scales[blocks], signed=False)
            wide = p.float()
            # The parameter moves by the moments before they are rounded to 8 bits.
            adamw_update(wide, g.float(), m, v, step, hyper)
            if wide is not p:
                p.copy_(wide)
            quantize_state(m, m_codes, m_scales[blocks], signed=True)
            quantize_state(v, v_codes, v_scales[blocks], signed=False)


def _chunks(read: Tensor, *written: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Flat pieces of tensors of one shape, together; what is not contiguous is copied, and written back at the end."""
    flat = [t.contiguous().view(-1) for t in (read, *written)]
    for start in range(0, read.numel(), CHUNK):
        yield tuple(t[start : start + CHUNK] for t in flat)
    for t, copy in zip(written, flat[1:], strict=True):
        if not t.is_contiguous():
            t.copy_(copy.view(t.shape))
