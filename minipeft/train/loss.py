"""The loss of a batch as a sum over tokens, so that batches of any size add up exactly.

A mean per micro-batch would weight a token by the length of its neighbours; sums divided once by the number
of tokens of the whole optimizer step give the gradient of the one big batch.

Logits are by far the largest tensor of a small model's training step: 1024 tokens by a vocabulary of 49,152 are 201 MB
in float32, and autograd through a softmax has three more of that size at once. So the second half of this file computes
the loss from the last hidden states: the logits of a few rows, their softmax and its gradient are made together and
forgotten; only the gradient of the hidden states, which are as wide as the model, is kept for backward.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from minipeft.kernels import frozen_linear
from minipeft.nf4.dense import DenseLinear
from minipeft.train.batches import Batch
from minipeft.train.encoding import IGNORE

# Logits made at a time, tokens by vocabulary: 17 MB in float32.
CHUNK = 1 << 22

# Models that were tried, with True where the head, run on the hidden states, gives exactly the model's logits.
_tried: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


def training_loss_sum(model: Any, batch: Batch) -> Tensor:
    """`token_loss_sum`, and the loss that balances a mixture's experts where the model's config asks for it.

    That is transformers' loss: `output_router_logits` adds `router_aux_loss_coef` times the balancing loss (Fedus et
    al. 2021, equation 4) to the mean over tokens. Here it counts once a learned token, so that after the division by
    the tokens of all micro-batches their balancing losses are averaged by their tokens.
    """
    config: Any = model.config.get_text_config() if hasattr(model, "config") else None
    if not getattr(config, "output_router_logits", False):
        return token_loss_sum(model, batch)
    positions, labels = learned_positions(batch)
    out = model(**batch.inputs, use_cache=False)
    logits = at_least_float32(out.logits[:, -positions.shape[1] :][positions])
    loss = F.cross_entropy(logits, labels, reduction="sum")
    balance = getattr(out, "aux_loss", None)
    # Some configs have another name for it, and some none.
    share = getattr(config, "router_aux_loss_coef", getattr(config, "aux_loss_coef", None))
    return loss if balance is None or share is None else loss + share * balance * len(labels)


def token_loss_sum(model: Any, batch: Batch) -> Tensor:
    """Sum of -log p(label) over the batch's learned tokens; scalar, float32 (float64 for a float64 model)."""
    positions, labels = learned_positions(batch)
    split = split_model(model) if _keeps_logits(model) else None
    if split is not None:
        body, head = split
        hidden = body(**batch.inputs, use_cache=False)[0]
        return head_loss_sum(head, hidden[positions], labels)
    return F.cross_entropy(logits_at(model, batch.inputs, positions), labels, reduction="sum")


def learned_positions(batch: Batch) -> tuple[Tensor, Tensor]:
    """The positions that predict a learned label, and these labels.

    Returns:
        positions: (B, T) bool, true at t where label t + 1 is learned.
        labels: (N,) int64, the labels of the N true positions, row by row.
    """
    following = batch.labels[:, 1:]
    learned = following != IGNORE
    # Position t predicts label t + 1: (B, T - 1) -> (B, T)
    return F.pad(learned, (0, 1)), following[learned]


def logits_at(model: Any, inputs: dict[str, Tensor], positions: Tensor) -> Tensor:
    """Logits (N, vocabulary) at the N true entries of `positions` (B, T), row by row, in at least float32.

    The cache is off: it is useless here, and with it transformers would let packed documents see each other.
    """
    if _keeps_logits(model):
        # The head then runs on these positions only: with short completions it is most of the cost.
        return at_least_float32(model(**inputs, use_cache=False, logits_to_keep=positions).logits)
    logits = model(**inputs, use_cache=False).logits
    # Virtual tokens put in front make more logits than there are inputs; the last T are the inputs' own.
    return at_least_float32(logits[:, -positions.shape[1] :][positions])


def _keeps_logits(model: Any) -> bool:
    """True if the model takes a (B, T) mask of the positions to compute logits for."""
    configs = getattr(model, "peft_config", {}).values()
    if any(getattr(config, "is_prompt_learning", False) for config in configs):
        return False
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "logits_to_keep" in inspect.signature(base.forward).parameters


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The forward pass's autocast context for the setting `precision` ("none" or "bf16")."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def split_model(model: Any) -> tuple[nn.Module, nn.Module] | None:
    """The body of a causal language model, which gives hidden states, and the head that turns these into logits.

    Returns:
        None where something else happens to the logits (Gemma 2 caps them, Cohere scales them), which is found by
        running the model once on three tokens; and where the model or its head has hooks, which expect all logits.
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
    """Sum of -log softmax(head(hidden))[label] over the rows, differentiable in `hidden` and all that the head reads.

    Args:
        head: (rows, hidden) -> (rows, vocabulary), each row by itself.
        hidden: (N, hidden). labels: (N,) int64.

    Returns:
        Scalar, float32 (float64 for float64 logits).
    """
    trained = _trained_in(head, hidden) if torch.is_grad_enabled() else []
    total: Tensor
    if torch.is_grad_enabled() and (hidden.requires_grad or trained):
        total = _HeadLoss.apply(hidden, labels, head, *trained)
        return total
    logits_of, total = _logits_of(head), _zero(hidden)
    for start, stop in _parts(head, len(hidden)):
        log_p = at_least_float32(logits_of(hidden[start:stop])).log_softmax(-1)
        total = total - _picked(log_p, labels[start:stop]).sum()
    return total


def _trained_in(head: nn.Module, hidden: Tensor) -> list[Tensor]:
    """The tensors that need a gradient through the head, other modules' among them.

    A head that is tied to the input embeddings may read factors, rows or a network of theirs, which are none of its own
    parameters: only the graph of its logits, here of one row, tells.
    """
    if _logits_of(head) is not head:
        return []  # frozen
    modes = [(module, module.training) for module in head.modules()]
    head.eval()  # what dropout draws is for the rows of the loss
    try:
        first = head(hidden[:1].detach()).grad_fn
    finally:
        for module, mode in modes:
            module.training = mode
    leaves: dict[int, Tensor] = {}
    ahead, seen = [first], {first, None}
    while ahead:
        node: Any = ahead.pop()
        if hasattr(node, "variable"):
            leaves[id(node.variable)] = node.variable
        new = {other for other, _ in getattr(node, "next_functions", ())} - seen
        seen |= new
        ahead += new
    return list(leaves.values())


class _HeadLoss(torch.autograd.Function):
    """Cross-entropy whose forward also computes the gradients, for a loss gradient of 1; the backward scales them."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, labels: Tensor, head: nn.Module, *trained: Tensor) -> Tensor:
        """(N, hidden), (N,) int64 -> scalar. `trained` are the tensors that need a gradient through the head."""
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
        """The gradients of `hidden` (N, hidden) and of `trained`, which the forward computed, times `grad`."""
        first, *others = (None if t is None else t * grad.to(t.dtype) for t in ctx.saved_tensors)
        return (first, None, None, *others)


def _loss_and_gradient(logits: Tensor, labels: Tensor, overwrite: bool) -> tuple[Tensor, Tensor]:
    """The sum of the rows' cross-entropies, and its gradient: softmax(logits), less 1 at the labels.

    Args:
        overwrite: write the gradient over the logits; False where the head's own backward may need the logits.
    """
    wide = at_least_float32(logits)
    largest, picked = wide.amax(-1), _picked(wide, labels)
    # For 85 x 49,152 logits, softmax takes 1.5 ms in place and 6.5 ms into fresh memory.
    p = torch.softmax(wide, -1, out=wide) if overwrite or wide is not logits else wide.softmax(-1)
    # log sum exp(logits) from the largest logit and its probability: 0.3 ms for 4 million logits; `logsumexp` takes 13.
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
    # A class of somebody else's may compute its logits in another way.
    plain = type(head) in (nn.Linear, DenseLinear)
    if not isinstance(head, nn.Linear) or not plain or weight is None or weight.requires_grad:
        return head
    # Faster in float32, and in 16 bits where the CPU would emulate them (see `arithmetic_dtype`).
    bias = head.bias
    return lambda rows: frozen_linear(rows, weight, bias)


def at_least_float32(logits: Tensor) -> Tensor:
    """16-bit logits in float32, wider ones as they are."""
    return logits.float() if logits.dtype.itemsize < 4 else logits
