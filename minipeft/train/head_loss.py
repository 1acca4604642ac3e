"""The loss from the last hidden states, a few rows of logits at a time.

Logits are by far the largest tensor of a small model's training step: 1024 tokens by a vocabulary of 49,152 are 201 MB
in float32, and autograd through a softmax has three more of that size at once. Here the logits of a few rows, their
softmax and its gradient are made together and forgotten; what is kept for backward is the gradient of the hidden
states, which are as wide as the model.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from minipeft.nf4.dense import DenseLinear
from minipeft.kernels import frozen_linear

# Logits made at a time: 17 MB in float32.
CHUNK = 1 << 22

# Models that were tried: whether their logits are the head's of the body's, and nothing else.
_tried: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


def split_model(model: Any) -> tuple[nn.Module, nn.Module] | None:
    """The body of a causal language model, which gives hidden states, and the head that makes its logits of them.

    None where something else happens to the logits (Gemma 2 caps them, Cohere scales them), which is tried on the
    model itself, once; and where hooks on the model or its head wait to be called with all of them.
    """
    body: Any = getattr(model, getattr(model, "base_model_prefix", None) or "", None)
    head: Any = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if not isinstance(body, nn.Module) or body is model or not isinstance(head, nn.Module):
        return None
    if _has_hooks(model) or _has_hooks(head):
        return None
    if model not in _tried:
        _tried[model] = _is_body_and_head(model, body, head)
    return (body, head) if _tried[model] else None


def _has_hooks(module: nn.Module) -> bool:
    held = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(held) or hasattr(module, "_hf_hook")


@torch.no_grad()
def _is_body_and_head(model: Any, body: nn.Module, head: nn.Module) -> bool:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        inputs = {"input_ids": torch.tensor([[1, 2, 3]], device=next(model.parameters()).device), "use_cache": False}
        return torch.equal(model(**inputs).logits, head(body(**inputs)[0]))
    finally:
        for module, mode in modes:
            module.training = mode


def head_loss_sum(head: nn.Module, hidden: Tensor, labels: Tensor) -> Tensor:
    """Sum of -log softmax(head(hidden))[label], differentiable in `hidden` and the head's parameters.

    Args:
        head: (rows, hidden) -> (rows, vocabulary), each row by itself.
        hidden: (N, hidden). labels: (N,) int64.

    Returns:
        Scalar, float32 (float64 for float64 logits).
    """
    trained = [p for p in head.parameters() if p.requires_grad]
    total: Tensor
    if torch.is_grad_enabled() and (hidden.requires_grad or trained):
        total = _HeadLoss.apply(hidden, labels, head, *trained)
        return total
    logits_of, total = _logits_of(head), _zero(hidden)
    for start, stop in _parts(head, len(hidden)):
        log_p = at_least_float32(logits_of(hidden[start:stop])).log_softmax(-1)
        total = total - _picked(log_p, labels[start:stop]).sum()
    return total


class _HeadLoss(torch.autograd.Function):
    """The gradients are made in the forward, of a loss whose own gradient is 1, and scaled in the backward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, labels: Tensor, head: nn.Module, *trained: Tensor) -> Tensor:
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grads = [torch.zeros_like(t) for t in trained]
        logits_of, total = _logits_of(head), _zero(hidden)
        for start, stop in _parts(head, len(hidden)):
            with torch.enable_grad():
                rows = hidden[start:stop].detach().requires_grad_(grad_hidden is not None)
                logits = logits_of(rows)
            loss, grad = _loss_and_gradient(logits.detach(), labels[start:stop], overwrite=logits_of is not head)
            total = total + loss
            leaves = [rows, *trained] if grad_hidden is not None else list(trained)
            with torch.autocast(hidden.device.type, enabled=False):
                made = list(torch.autograd.grad(logits, leaves, grad))
            if grad_hidden is not None:
                grad_hidden[start:stop] = made.pop(0)
            for whole, part in zip(grads, made, strict=True):
                whole += part
        ctx.save_for_backward(grad_hidden, *grads)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        first, *others = (None if t is None else t * grad.to(t.dtype) for t in ctx.saved_tensors)
        return (first, None, None, *others)


def _loss_and_gradient(logits: Tensor, labels: Tensor, overwrite: bool) -> tuple[Tensor, Tensor]:
    """The sum of the rows' cross-entropies, and its gradient: softmax(logits), less 1 at the labels.

    Args:
        overwrite: put the gradient in the logits' place: not where the head's own backward may need them.
    """
    wide = at_least_float32(logits)
    largest, picked = wide.amax(-1), _picked(wide, labels)
    # 85 x 49,152 in their own place 1.5 ms, into fresh memory 6.5.
    p = torch.softmax(wide, -1, out=wide) if overwrite or wide is not logits else wide.softmax(-1)
    # log sum exp(logits), by the largest of them: of 4 million logits 0.3 ms, `logsumexp` takes 13.
    normalizer = largest - p.amax(-1).log()
    loss = (normalizer - picked).sum()
    p[torch.arange(len(labels), device=labels.device), labels] -= 1
    return loss, p.to(logits.dtype)


def _picked(rows: Tensor, labels: Tensor) -> Tensor:
    return rows.gather(1, labels[:, None])[:, 0]


def _zero(hidden: Tensor) -> Tensor:
    return torch.zeros((), device=hidden.device, dtype=torch.promote_types(hidden.dtype, torch.float32))


def _parts(head: Any, rows: int) -> list[tuple[int, int]]:
    vocabulary = getattr(head, "out_features", None) or head.weight.shape[0]
    step = max(1, CHUNK // vocabulary)
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def _logits_of(head: nn.Module) -> Callable[[Tensor], Tensor]:
    weight = head._parameters.get("weight")
    if type(head) in (nn.Linear, DenseLinear) and weight is not None and not weight.requires_grad:
        # Faster in float32, and in 16 bits where the CPU would emulate them (see `arithmetic_dtype`).
        return lambda rows: frozen_linear(rows, weight, head.bias)
    return head


def at_least_float32(logits: Tensor) -> Tensor:
    """16-bit logits in float32, wider ones as they are."""
    return logits.float() if logits.dtype.itemsize < 4 else logits
