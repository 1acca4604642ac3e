"""LoRA's start values, and PiSSA, which starts from the base weight's own principal components.

PiSSA (Meng et al. 2024): with W = U S V^T, the factors start as B0 = U_r sqrt(S_r / s) and A0 = sqrt(S_r / s) V_r^T
(equations 2 and 3), and the frozen weight is the residual W - s B0 A0 (equation 4). PEFT writes the residual into the
base weight, which no other adapter can use then. Here the base weight stays W, and the adapter keeps A0 and B0 to
subtract s B0 A0 by: the same function of A and B, exact in any dtype, at the cost of one more low-rank product. So
disabling, deleting and unloading give the base model back, and a PiSSA adapter acts beside others.
"""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor, nn

from minipeft_kernels.linear.shorthands import lora_update

# More directions than are wanted make the approximate decomposition sharp (Halko et al. 2011, section 4.2: 5 or 10).
_OVERSAMPLING = 8


def init_factors(lora_A: Tensor, lora_B: Tensor, kind: bool | str) -> None:
    """A random; B zero, so that the start is the identity, or random too when `kind` is False."""
    if kind == "gaussian":
        nn.init.normal_(lora_A, std=1 / len(lora_A))
    else:
        nn.init.kaiming_uniform_(lora_A, a=math.sqrt(5))
    if kind is False:
        nn.init.kaiming_uniform_(lora_B, a=math.sqrt(5))
    else:
        nn.init.zeros_(lora_B)


class PissaStart(nn.Module):
    """A0 (r, in_features) and B0 (out_features, r): what a PiSSA adapter started from, frozen.

    They follow from the base weight, so no file holds them: whoever attaches or loads the adapter makes them anew.
    """

    lora_A: Tensor
    lora_B: Tensor

    def __init__(self, lora_A: Tensor, lora_B: Tensor) -> None:
        super().__init__()
        self.register_buffer("lora_A", lora_A, persistent=False)
        self.register_buffer("lora_B", lora_B, persistent=False)

    def update(self, x: Tensor, scaling: float) -> Tensor:
        """s B0 A0 x: (..., in_features) -> (..., out_features)."""
        return lora_update(x, self.lora_A, self.lora_B, scaling)

    def product(self) -> Tensor:
        """B0 A0 (out_features, in_features), in float32 at least."""
        wide = torch.promote_types(self.lora_A.dtype, torch.float32)
        return self.lora_B.to(wide) @ self.lora_A.to(wide)


@torch.no_grad()
def pissa_start(weight: Tensor, r: int, scaling: float, kind: str, dtype: torch.dtype) -> PissaStart:
    """The principal components of `weight` (out_features, in_features) as the factors of an adapter.

    Args:
        kind: "pissa" decomposes the weight exactly; "pissa_niter_N" by N rounds of the randomized method, much faster.
        dtype: Of the factors.

    Raises ValueError when the weight has fewer than r components.
    """
    if r > min(weight.shape):
        raise ValueError(f"init_lora_weights={kind!r}: r is {r}, but the weight {tuple(weight.shape)} has no such rank")
    rounds = re.fullmatch(r"pissa_niter_(\d+)", kind)
    parts = torch.linalg.svd(weight, full_matrices=False) if rounds is None else _randomized(weight, r, int(rounds[1]))
    left, values, right = parts
    root = (values[:r] / scaling).sqrt()
    return PissaStart((root[:, None] * right[:r]).to(dtype), (left[:, :r] * root).to(dtype))


def _randomized(weight: Tensor, r: int, rounds: int) -> tuple[Tensor, Tensor, Tensor]:
    """U, S, V^T of the leading components of `weight` (Halko et al. 2011, algorithms 4.4 and 5.1).

    Always drawn from the same seed: a saved adapter must find the start that it was trained from.
    """
    wanted = min(r + _OVERSAMPLING, *weight.shape)
    noise = torch.randn(weight.shape[1], wanted, generator=torch.Generator().manual_seed(0))
    basis = torch.linalg.qr(weight @ noise.to(weight)).Q  # (out_features, wanted)
    for _ in range(rounds):
        basis = torch.linalg.qr(weight @ torch.linalg.qr(weight.T @ basis).Q).Q
    left, values, right = torch.linalg.svd(basis.T @ weight, full_matrices=False)
    return basis @ left, values, right
