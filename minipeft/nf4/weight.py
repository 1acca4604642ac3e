"""NF4Weight: a matrix in 4-bit NormalFloat, as a plain holder of tensors (Dettmers et al. 2023, QLoRA).

The tensors in memory are those on disk, named and laid out as transformers with bitsandbytes writes them, so either
library reads the other's checkpoints without quantizing again.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from minipeft.nf4.format import QUANT_STATE, dtype_name, read_fields, write_entries
from minipeft_kernels.nf4.codebooks import NF4_LEVELS, dynamic_map
from minipeft_kernels.nf4.dequantize import nf4_dequantize, scales_of
from minipeft_kernels.nf4.quantize import (
    NESTED_BLOCKSIZE,
    nf4_quantize,
    quantize_absmax,
)
from minipeft_kernels.packed import NF4


@dataclass(eq=False)
class NF4Weight:
    """A weight of n elements in blocks of `blocksize`, `blocks` = ceil(n / blocksize).

    codes: uint8 ((n+1)//2, 1), two weights a byte, the earlier one in the high half.
    absmax: the scale of each block: float32 (blocks,), or uint8 (blocks,) when doubly quantized.
    quant_map: float32 (16,), the level of each code.
    blocksize, shape, dtype: of the original weight.
    nested_absmax: float32 (ceil(blocks / nested_blocksize),), offset: float32 (), nested_quant_map: float32 (256,):
        absmax = nested_quant_map[code] * nested_absmax + offset. All None unless doubly quantized.
    """

    codes: Tensor
    absmax: Tensor
    quant_map: Tensor
    blocksize: int
    shape: torch.Size
    dtype: torch.dtype
    nested_absmax: Tensor | None = None
    offset: Tensor | None = None
    nested_quant_map: Tensor | None = None
    nested_blocksize: int = NESTED_BLOCKSIZE

    @classmethod
    def quantize(cls, w: Tensor, blocksize: int = 64, double_quant: bool = True) -> "NF4Weight":
        """Quantize a weight.

        Args:
            w: any shape, float32, bfloat16 or float16, all finite.
            blocksize: weights that share a scale; a power of two from 32 to 4096.
            double_quant: keep the scales in 8 bits: 4.127 bits a weight instead of 4.5, at blocksize 64.

        Raises:
            TypeError: another dtype. ValueError: another blocksize, or a weight that is not finite.
        """
        codes, absmax = nf4_quantize(w, blocksize)
        single = cls(codes, absmax, NF4_LEVELS.to(w.device, copy=True), blocksize, w.shape, w.dtype)
        if not double_quant:
            return single
        codes8, nested, offset = quantize_absmax(absmax)
        nested_map = dynamic_map().to(w.device, copy=True)
        return replace(single, absmax=codes8, nested_absmax=nested, offset=offset, nested_quant_map=nested_map)

    @property
    def double_quant(self) -> bool:
        """True if the scales are themselves quantized to 8 bits."""
        return self.nested_absmax is not None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, the maps included."""
        return sum(t.nbytes for t in self.tensors().values())

    def scales(self) -> Tensor:
        """The scale of each block, float32 (blocks,)."""
        return scales_of(self.packed())

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight in `dtype`, by default the original's; computed in float32 and rounded once."""
        w = nf4_dequantize(self.packed(), dtype or self.dtype)
        return w if w.shape == self.shape else w.view(self.shape)

    def packed(self) -> NF4:
        """The weight as the operations take it, sharing its tensors: a matrix of the last dimension's width."""
        return NF4(
            codes=self.codes,
            absmax=self.absmax,
            quant_map=self.quant_map,
            nested_absmax=self.nested_absmax,
            nested_map=self.nested_quant_map,
            offset=self.offset,
            rows=self.shape[:-1].numel(),
            columns=self.shape[-1] if self.shape else 1,
            blocksize=self.blocksize,
            nested_blocksize=self.nested_blocksize,
        )

    def to(self, device: torch.device | str) -> "NF4Weight":
        """The same weight on another device."""
        return self._map(lambda t: t.to(device))

    def _map(self, fn: Callable[[Tensor], Tensor]) -> "NF4Weight":
        new = copy.copy(self)
        for name, tensor in self.tensors().items():
            setattr(new, name, fn(tensor))
        return new

    def clone(self) -> "NF4Weight":
        """A copy that shares nothing."""
        return self._map(Tensor.clone)

    def state(self, prefix: str = "") -> dict[str, Tensor]:
        """The tensors of a checkpoint, as bitsandbytes names them: "weight", "weight.absmax", ...

        Args:
            prefix: put before each name, such as "model.layers.0.self_attn.q_proj.".
        """
        entries: dict[str, Any] = {
            "quant_type": "nf4",
            "blocksize": self.blocksize,
            "dtype": dtype_name(self.dtype),
            "shape": list(self.shape),
        }
        state = {"weight": self.codes, "weight.absmax": self.absmax, "weight.quant_map": self.quant_map}
        if self.nested_absmax is not None:
            assert self.nested_quant_map is not None and self.offset is not None
            state["weight.nested_absmax"] = self.nested_absmax
            state["weight.nested_quant_map"] = self.nested_quant_map
            entries["nested_blocksize"] = self.nested_blocksize
            entries["nested_dtype"] = "float32"
            # A tensor without data has no offset to write; its state serves for names and shapes only.
            entries["nested_offset"] = 0.0 if self.offset.is_meta else self.offset.item()
        state[QUANT_STATE] = write_entries(entries, self.codes.device)
        return {prefix + name: tensor for name, tensor in state.items()}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor], prefix: str = "") -> "NF4Weight":
        """The weight that `state(prefix)`, or bitsandbytes, wrote. The tensors are shared, not copied.

        Raises:
            ValueError: a tensor is missing or does not fit the others, or the weight is not NF4; names it.
        """
        return cls(**read_fields(state, prefix))

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by field name; what is None is left out."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}
