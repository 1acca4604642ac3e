"""NF4ExpertsWeight: the matrices of a mixture's experts in 4-bit NormalFloat, each quantized by itself.

As `NF4Weight`, with a first dimension more: no block, no nested scale and no offset belongs to two experts, so the bits
of an expert are those that its matrix alone would have.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minipeft.nf4.format import dtype_name, read_stack_fields, write_entries
from minipeft.nf4.weight import NF4Weight
from minipeft_kernels.experts.stack import NF4Stack
from minipeft_kernels.nf4.codebooks import NESTED_BLOCKSIZE, NF4_LEVELS, dynamic_map
from minipeft_kernels.nf4.dequantize import nf4_dequantize


@dataclass(eq=False)
class NF4ExpertsWeight(NF4Weight):
    """The weights of `experts` matrices, n = rows * columns elements each, `blocks` = ceil(n / blocksize).

    codes: uint8 (experts, (n+1)//2), two weights a byte, the earlier one in the high half.
    absmax: float32 (experts, blocks), or uint8 when doubly quantized.
    shape: (experts, rows, columns), rows being the out_features of an expert and columns its in_features.
    nested_absmax: float32 (experts, ceil(blocks / nested_blocksize)), offset: float32 (experts,).
    All else as in `NF4Weight`.
    """

    @classmethod
    def quantize(cls, w: Tensor, blocksize: int = 64, double_quant: bool = True) -> "NF4ExpertsWeight":
        """Quantize each expert's matrix by itself.

        Args:
            w: (experts, rows, columns), perhaps a transposed view; float32, bfloat16 or float16, all finite.
            blocksize, double_quant: as `NF4Weight.quantize`.

        Raises:
            TypeError: another dtype. ValueError: another shape or blocksize, or an expert that is not finite.
        """
        if w.dim() != 3 or not w.shape[0]:
            raise ValueError(f"the weights of experts are (experts, rows, columns), got {tuple(w.shape)}")
        new = cls.zeros(w.shape, w.dtype, blocksize, double_quant, w.device)
        for e, matrix in enumerate(w):
            new.put(e, NF4Weight.quantize(matrix.contiguous(), blocksize, double_quant))
        return new

    @classmethod
    def zeros(
        cls,
        shape: torch.Size,
        dtype: torch.dtype,
        blocksize: int,
        double_quant: bool,
        device: torch.device | str | None,
        nested_blocksize: int = NESTED_BLOCKSIZE,
    ) -> "NF4ExpertsWeight":
        """Packed zeros, without going through float matrices."""
        experts, rows, columns = shape
        n = rows * columns
        blocks = -(-n // blocksize)
        device = device or torch.get_default_device()
        new = cls(
            codes=torch.full((experts, (n + 1) // 2), 0x77, dtype=torch.uint8, device=device),
            absmax=torch.zeros(experts, blocks, dtype=torch.uint8 if double_quant else torch.float32, device=device),
            quant_map=NF4_LEVELS.to(device, copy=True),
            blocksize=blocksize,
            shape=torch.Size(shape),
            dtype=dtype,
            nested_blocksize=nested_blocksize,
        )
        if double_quant:
            nested = -(-blocks // nested_blocksize)
            new.nested_absmax = torch.zeros(experts, nested, dtype=torch.float32, device=device)
            new.nested_quant_map = dynamic_map().to(device, copy=True)
            new.offset = torch.zeros(experts, dtype=torch.float32, device=device)
        return new

    def put(self, e: int, w: NF4Weight) -> None:
        """Let `w`, of the same sizes and kinds of scales, be the matrix of expert e."""
        self.codes[e] = w.codes.reshape(-1)
        self.absmax[e] = w.absmax
        if self.nested_absmax is not None:
            assert w.nested_absmax is not None and w.offset is not None and self.offset is not None
            self.nested_absmax[e] = w.nested_absmax
            self.offset[e] = w.offset

    def stack(self) -> NF4Stack:
        """The weights as the operations take them, sharing their tensors."""
        return NF4Stack(
            self.codes,
            self.absmax,
            self.quant_map,
            self.nested_absmax,
            self.nested_quant_map,
            self.offset,
            self.shape[1],
            self.shape[2],
            self.blocksize,
            self.nested_blocksize,
        )

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weights (experts, rows, columns) in `dtype`, by default the original's; rounded once from float32."""
        w = torch.empty(self.shape, dtype=dtype or self.dtype, device=self.codes.device)
        stack = self.stack()
        for e in range(stack.experts if not w.is_meta else 0):
            w[e] = nf4_dequantize(stack.expert(e), w.dtype)
        return w

    def state(self, prefix: str = "") -> dict[str, Tensor]:
        """The tensors of a checkpoint, named as bitsandbytes names those of a layer: `prefix`, `prefix`.absmax, ...

        Args:
            prefix: the parameter's name, such as "model.layers.0.mlp.experts.down_proj".
        """
        entries: dict[str, Any] = {
            "quant_type": "nf4",
            "blocksize": self.blocksize,
            "dtype": dtype_name(self.dtype),
            "shape": list(self.shape),
        }
        state = {"": self.codes, ".absmax": self.absmax, ".quant_map": self.quant_map}
        if self.nested_absmax is not None:
            assert self.nested_quant_map is not None and self.offset is not None
            state[".nested_absmax"] = self.nested_absmax
            state[".nested_quant_map"] = self.nested_quant_map
            entries["nested_blocksize"] = self.nested_blocksize
            entries["nested_dtype"] = "float32"
            # A tensor without data has no offsets to write; its state serves for names and shapes only.
            offset = torch.zeros(self.shape[0]) if self.offset.is_meta else self.offset
            entries["nested_offset"] = offset.tolist()
        state[".quant_state.bitsandbytes__nf4"] = write_entries(entries, self.codes.device)
        return {prefix + name: tensor for name, tensor in state.items()}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor], prefix: str = "") -> "NF4ExpertsWeight":
        """The weights that `state(prefix)` wrote. The tensors are shared, not copied.

        Raises:
            ValueError: a tensor is missing or does not fit the others, or the weights are not NF4; names it.
        """
        return cls(**read_stack_fields(state, prefix))
