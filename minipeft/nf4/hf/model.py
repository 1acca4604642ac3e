"""The answers of a transformers model in 4 bits, to its user and to libraries that know bitsandbytes' models."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn
from transformers.utils.quantization_config import QuantizationMethod

from minipeft.mixins import Mixin, mix_in, mix_out
from minipeft.packed import numbers_of


class In4Bits(Mixin):
    """A transformers model with NF4 layers, in front of its own class; `unmark` takes it out.

    Attributes:
        is_loaded_in_4bit, quantization_method: as on a model that bitsandbytes has quantized, for Trainer, accelerate
            and TRL. `is_quantized` and `hf_quantizer` are transformers' own.
    """

    is_loaded_in_4bit: ClassVar[bool] = True
    quantization_method: ClassVar[str] = QuantizationMethod.BITS_AND_BYTES

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """A new model by this one's class, as from `type(model).from_pretrained`: of the plain class."""
        if cls.__mro__[1] is not In4Bits:  # a mixin in front of this one decides
            return super().__new__(cls)
        own: Any = cls
        return own._plain_class(*args, **kwargs)

    # transformers refuses these casts on a quantized model, since elsewhere they would cast the scales; an `NF4Linear`
    # keeps its own. They are nn.Module's, past those of transformers.

    def half(self) -> Any:
        """Cast to float16, as nn.Module's; the packed codes and scales stay, and merging gives float16."""
        return nn.Module.half(self)

    def float(self) -> Any:
        """Cast to float32, as nn.Module's; the packed codes and scales stay, and merging gives float32."""
        return nn.Module.float(self)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Move and cast, as nn.Module's; the packed codes and scales only move."""
        return nn.Module.to(self, *args, **kwargs)

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """The number of parameters, a packed weight counting all the numbers that it stands for.

        Args:
            only_trainable: Count those with a gradient alone.
            exclude_embeddings: Leave out the weights of `nn.Embedding`s.
        """
        numbers = numbers_of(self)
        left_out = {id(m.weight) for m in self.modules() if isinstance(m, nn.Embedding)} if exclude_embeddings else ()
        counted = (p for p in self.parameters() if p.requires_grad or not only_trainable)
        return sum(numbers.get(id(p), p.numel()) for p in counted if id(p) not in left_out)


def mark(model: Any) -> None:
    """Let `model` answer as a 4-bit model."""
    # The word that transformers has left on the instance would hide the class's.
    vars(model).pop("quantization_method", None)
    mix_in(model, In4Bits)


def unmark(model: Any) -> None:
    """Undo `mark`."""
    mix_out(model, In4Bits)
