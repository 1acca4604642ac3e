"""NF4Experts: the module of a mixture's experts with its frozen weights in 4-bit NormalFloat.

transformers keeps the weights of all experts of a layer as one 3-D parameter each of `gate_up_proj` (or `up_proj`) and
`down_proj`. Packed, the module stays the same object, of its own class with `NF4Experts` in front: a parameter keeps
its name and holds codes, buffers beside it hold the scales. Biases, norms and the router stay as they are.

Each expert's matrix is quantized by itself, as (out_features, in_features). Only the experts that rows are sent to are
decoded. No cast touches codes and scales, and `state_dict` speaks names as bitsandbytes would give them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from minipeft.experts import Sorted, has_interface, matrices, run_experts, weight_names
from minipeft.mixins import Mixin, mix_in, mix_out
from minipeft.nf4.codes import HoldsCodes
from minipeft.nf4.dense import make_dense
from minipeft.nf4.stack import NF4ExpertsWeight
from minipeft.packed import Packed
from minipeft.shards import is_sharded
from minipeft_kernels.experts.op import experts_linear
from minipeft_kernels.experts.stack import NF4Stack

SCALES = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "offset")
# What follows a parameter's name in a state dict.
STATE_SUFFIXES = (
    ".quant_state.bitsandbytes__nf4",
    ".quant_state.bitsandbytes__fp4",
    ".nested_quant_map",
    ".nested_absmax",
    ".quant_map",
    ".absmax",
    "",
)


class StackSizes(NamedTuple):
    """Sizes of packed weights that their tensors do not say."""

    shape: torch.Size
    blocksize: int
    nested_blocksize: int


class NF4Experts(Mixin, HoldsCodes, Packed):
    """In front of a class of experts whose weights are packed.

    Attributes:
        stack_sizes: name of a parameter that is packed -> its sizes: (experts, out_features, in_features), whatever the
            class's own layout. The parameter is uint8 (experts, (out_features * in_features + 1)//2), never trained;
            its scales are buffers called `<name>_absmax` and so on, as in `NF4ExpertsWeight`.
        compute_dtype: Of the products; None for that of the hidden states.
    """

    name_prefix: ClassVar[str] = "NF4"

    stack_sizes: dict[str, StackSizes]
    compute_dtype: torch.dtype | None
    is_transposed: bool

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """As the class's own: (T, hidden), each token's k experts and their weights -> (T, hidden)."""

        # Not a method: LoRA's mixin, in front of this one, has a product of its own.
        def product(name: str, rows: Tensor, order: Sorted) -> Tensor:
            return experts_linear(rows, order.offsets, matrices(self, name), compute_dtype=self.compute_dtype)

        return run_experts(self, product, hidden_states, top_k_index, top_k_weights)

    def packed_experts(self, name: str) -> NF4Stack | None:
        """The packed weights `name` as the operations take them, sharing this module's tensors; None for dense ones."""
        if name not in self.packed_names():
            return None
        weight: Any = self._parameters[name]
        held: Any = self._buffers
        shape, blocksize, nested_blocksize = self.stack_sizes[name]
        return NF4Stack(
            weight,
            held[f"{name}_absmax"],
            held[f"{name}_quant_map"],
            held[f"{name}_nested_absmax"],
            held[f"{name}_nested_quant_map"],
            held[f"{name}_offset"],
            shape[1],
            shape[2],
            blocksize,
            nested_blocksize,
        )

    def packed_names(self) -> list[str]:
        """The names of the weights that are packed now: a merged one may stand, dense, in the place of the codes."""
        return [name for name in self.stack_sizes if self._parameters[name].dtype == torch.uint8]  # type: ignore[union-attr]

    def stack(self, name: str) -> NF4ExpertsWeight:
        """The packed weights `name` as an object, which shares their tensors."""
        sizes = self.stack_sizes[name]
        codes: Any = self._parameters[name]
        scales: Any = {scale: self._buffers[f"{name}_{scale}"] for scale in SCALES}
        return NF4ExpertsWeight(
            codes=codes.data,
            shape=sizes.shape,
            blocksize=sizes.blocksize,
            nested_blocksize=sizes.nested_blocksize,
            dtype=self.weight_dtype,
            **scales,
        )

    def stored_scales(self) -> dict[str, tuple[str, str]]:
        return {f"{name}_{scale}": (name, scale) for name in self.stack_sizes for scale in SCALES}

    def set_stack(self, name: str, w: NF4ExpertsWeight) -> None:
        """Take the tensors of `w` as those of the packed weights `name`, with its block sizes.

        Raises:
            ValueError: it has another shape.
        """
        known = self.stack_sizes.get(name)
        expected = matrices_shape(self, name) if known is None else known.shape
        if w.shape != expected:
            raise ValueError(f"NF4 weights of shape {tuple(w.shape)} do not fit experts of shape {tuple(expected)}")
        setattr(self, name, nn.Parameter(w.codes, requires_grad=False))
        for scale in SCALES:
            self.register_buffer(f"{name}_{scale}", getattr(w, scale))
        self.stack_sizes[name] = StackSizes(w.shape, w.blocksize, w.nested_blocksize)

    def dense_experts(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """The packed weights `name`, dequantized, in the class's own layout.

        Args:
            dtype: Of the result; None for that which they had.

        Returns:
            (experts, out_features, in_features), or a transposed view of it where the class has it so.
        """
        dense = self.stack(name).dequantize(dtype)
        return dense.transpose(1, 2) if self.is_transposed else dense

    def set_experts(self, name: str, tensor: Tensor) -> None:
        """Quantize `tensor`, in the class's own layout, and let it be the weights `name`, packed as they were.

        Raises:
            ValueError: it has another shape, or is not finite.
        """
        old = self.stack(name)
        dense = tensor.detach().transpose(1, 2) if self.is_transposed else tensor.detach()
        new = NF4ExpertsWeight.quantize(dense, old.blocksize, old.double_quant)
        self.set_stack(name, new)

    def to_dense(self, dtype: torch.dtype | None = None) -> nn.Module:
        """This module, of its plain class again, with dense weights in the class's own layout."""
        packed = self.packed_names()
        dense = {
            name: self.dense_experts(name, dtype).contiguous() if name in packed else self.get_parameter(name).to(dtype)
            for name in self.stack_sizes
        }
        for name in dense:
            for scale in SCALES:
                delattr(self, f"{name}_{scale}")
        del self.stack_sizes, self.compute_dtype, self.weight_dtype
        mix_out(self, NF4Experts)
        for name, tensor in dense.items():
            setattr(self, name, nn.Parameter(tensor, requires_grad=False))
        return self

    def packed_sizes(self) -> list[tuple[nn.Parameter, int]]:
        return [(self.get_parameter(name), self.stack_sizes[name].shape.numel()) for name in self.packed_names()]

    @classmethod
    def make_dense(cls, model: nn.Module, dtype: torch.dtype | None) -> None:
        make_dense(model, dtype)

    def extra_repr(self) -> str:
        """The sizes of the packed weights, and the bits that a number takes with its scales."""
        lines = [super().extra_repr()]
        for name in self.packed_names():
            w = self.stack(name)
            experts, rows, columns = w.shape
            bits = 8 * w.nbytes / max(1, w.shape.numel())
            lines.append(
                f"{name}: experts={experts}, out_features={rows}, in_features={columns}, blocksize={w.blocksize}, "
                f"double_quant={w.double_quant}, {bits:.2f} bits a weight"
            )
        return "\n".join(line for line in lines if line)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # As in `NF4Linear`: codes and scales follow to a device, never to a dtype.
        fixed = {id(self._parameters[name]) for name in self.packed_names()}
        fixed |= {id(self._buffers[f"{name}_{scale}"]) for name in self.stack_sizes for scale in SCALES}
        device = self.get_parameter("down_proj").device
        self.weight_dtype = fn(torch.empty(0, dtype=self.weight_dtype, device=device)).dtype

        def keep_dtype(t: Tensor) -> Tensor:
            new = fn(t)
            return t.to(new.device) if id(t) in fixed and new.dtype != t.dtype else new

        return super()._apply(keep_dtype, recurse)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # Of a sharded module the names are those of parameters and buffers, as of an `NF4Linear`.
        for name in self.stack_sizes if not self._is_sharded() else ():
            for scale in SCALES:
                destination.pop(f"{prefix}{name}_{scale}", None)
            # The codes are there already, as the variable where that was asked for.
            state = self.stack(name).state(prefix + name) if name in self.packed_names() else {}
            destination.update({key: tensor.detach() for key, tensor in state.items() if key != prefix + name})

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        if self._is_sharded():
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )
            return
        own = {f"{prefix}{name}{suffix}" for name in self.packed_names() for suffix in STATE_SUFFIXES}
        rest = {key: value for key, value in state_dict.items() if key not in own}
        missing: list[str] = []
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs)
        scales = {f"{prefix}{name}_{scale}" for name in self.stack_sizes for scale in SCALES}
        missing_keys += [key for key in missing if key not in own | scales]
        for name in self.packed_names():
            try:
                assign = local_metadata.get("assign_to_params_buffers", False)
                self._load_stack(name, state_dict, prefix + name, assign, missing_keys)
            except ValueError as error:
                error_msgs.append(str(error))

    def _is_sharded(self) -> bool:
        return any(is_sharded(self._parameters[name]) for name in self.packed_names())

    def _load_stack(self, name: str, state: dict[str, Any], key: str, assign: bool, missing_keys: list[str]) -> None:
        if not any(key + suffix in state for suffix in STATE_SUFFIXES):
            missing_keys += self.stack(name).state(key)
            return
        if key in state and state[key].is_floating_point() and key + ".absmax" not in state:
            raise ValueError(f"{key} is a dense weight: load it into the dense model and quantize that")
        w: Any = NF4ExpertsWeight.from_state(state, key)
        if assign:
            self.set_stack(name, w)
            self.weight_dtype = w.dtype
            return
        parameter = self.get_parameter(name)
        if parameter.is_meta:
            raise ValueError(f"{key} is on device meta, where nothing can be copied to: load with assign=True")
        # They are copied into ours, as torch does, unless they are cut into other blocks.
        w = w.to(parameter.device)
        old, new = self.stack(name).tensors(), w.tensors()
        same = old.keys() == new.keys() and all(
            old[field].shape == new[field].shape and old[field].dtype == new[field].dtype for field in old
        )
        if not same or w.shape != self.stack_sizes[name].shape:
            return self.set_stack(name, w.clone())
        with torch.no_grad():
            for field, tensor in old.items():
                tensor.copy_(new[field])
        self.stack_sizes[name] = StackSizes(w.shape, w.blocksize, w.nested_blocksize)


def expert_parameters(module: nn.Module) -> list[str]:
    """The names of the weights of a module of experts that can be packed; none for any other module."""
    names = weight_names(module) if has_interface(module) else ()
    found = {name: module._parameters.get(name) for name in names}
    return [name for name, weight in found.items() if weight is not None and weight.dim() == 3]


def matrices_shape(module: Any, name: str) -> torch.Size:
    """(experts, out_features, in_features) of the dense weights `name` of a module of experts."""
    return torch.Size(matrices(module, name).shape)


def start_packing(module: Any, compute_dtype: torch.dtype | None) -> NF4Experts:
    """Put `NF4Experts` in front of the class of `module`; each weight stays dense until `set_stack`."""
    names = expert_parameters(module)
    module.stack_sizes = {}
    module.compute_dtype = compute_dtype
    module.weight_dtype = module._parameters[names[0]].dtype
    mix_in(module, NF4Experts)
    experts: NF4Experts = module
    return experts


def pack_weights(module: NF4Experts, name: str, blocksize: int, double_quant: bool) -> None:
    """Quantize the dense weights `name` in place; on device meta they become packed weights without values.

    Raises ValueError if they are not finite.
    """
    w = matrices(module, name).detach()
    if w.is_meta:
        with torch.device("cpu"):  # the maps, which are made once for all, must have values
            packed = NF4ExpertsWeight.zeros(w.shape, w.dtype, blocksize, double_quant, "meta")
    else:
        packed = NF4ExpertsWeight.quantize(w, blocksize, double_quant)
    module.set_stack(name, packed)
