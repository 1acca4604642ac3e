"""4-bit NormalFloat weights, the linear layer and the experts over them, and loading models in 4 bits."""

from typing import TYPE_CHECKING, Any

from .linear import NF4Linear
from .sizes import quantized_sizes
from .weight import NF4Weight

if TYPE_CHECKING:
    from .hf import BitsAndBytesConfig, NF4Config, quantize_model

__all__ = ["BitsAndBytesConfig", "NF4Config", "NF4Linear", "NF4Weight", "quantize_model", "quantized_sizes"]


def __getattr__(name: str) -> Any:
    # hf.py imports transformers, which takes seconds: only those who ask for its names wait.
    if name in __all__:
        from . import hf

        return getattr(hf, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
