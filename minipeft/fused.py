"""nn.TransformerEncoderLayer calls its parts while adapters act in them.

In inference torch's layer hands its parts' weights to one fused operation and calls none of them, so that an adapter
would be passed by in silence. It does so only for activations that the operation knows.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from minipeft.adapter import AdapterModule


class CallsItsParts(AdapterModule):
    """An `nn.TransformerEncoderLayer` with adapted parts."""

    @property
    def activation_relu_or_gelu(self) -> int:
        """The fused operation's number of the activation: 0, for none that it knows, while adapters act inside."""
        own: int = vars(self)["activation_relu_or_gelu"]
        return 0 if any(_acts(part) for part in self.modules()) else own

    @activation_relu_or_gelu.setter
    def activation_relu_or_gelu(self, value: int) -> None:
        """Set the number."""
        vars(self)["activation_relu_or_gelu"] = value


def _acts(part: Any) -> bool:
    if not isinstance(part, AdapterModule) or isinstance(part, CallsItsParts):
        return False
    return not part.merged_adapters and bool(part.switch.acting or part.switch.rows)


def may_pass_by(module: nn.Module) -> bool:
    """True for a module that may be computed without calling its parts, some of which are adapted."""
    fused = isinstance(module, nn.TransformerEncoderLayer)
    return fused and any(isinstance(part, AdapterModule) for part in module.modules())
