"""LoRA on parameters by their own names: a mixture's experts, all in one 3-D parameter, and any 2-D weight.

transformers keeps `gate_up_proj` and `down_proj` of all experts as one parameter each, (experts, out_features,
in_features) (or with the last two swapped, where the module says `is_transposed`). Every expert e has an update of its
own, split from its weight: a row x that its router sent there becomes

    y = W_e x + s B_e (A_e dropout(x))

in one operation for all experts (`minipeft_kernels/experts`). W_e + s B_e A_e is formed in merging alone: in a forward
it would be formed for every expert, chosen or not.

A 2-D weight (out_features, in_features), such as a router's, is updated as one expert's would be. The module reads it
itself, and so it does the parameters of experts whose class does not say how they are computed, or that are trained:
then the updated weight stands in the parameter's place while the module runs.

A and B of all experts lie as PEFT lays them: A (experts * r, in_features), expert by expert, B (out_features,
r * experts), rank by rank.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from minipeft.adapter import AdapterModule, WrappedForward
from minipeft.dispatched import device_of
from minipeft.errors import NoMatchingPeftModuleError
from minipeft.experts import Sorted, has_interface, is_stack, matrices, packed, run_experts, weight_names
from minipeft.lora.config import LoraConfig
from minipeft.lora.rows import check_unmerged
from minipeft.lora.variants import init_factors
from minipeft.mixins import plain_class
from minipeft.rows import RowAdapters
from minipeft.targets import ends_with
from minipeft_kernels.experts.op import experts_linear
from minipeft_kernels.linear.low_rank import Lora


class ExpertFactors(nn.Module):
    """A and B of one parameter and one adapter, and the dropout of their input."""

    def __init__(self, shape: tuple[int, int, int], r: int, scaling: float, dropout: float, **like: Any) -> None:
        super().__init__()
        self.experts, out_features, in_features = shape
        self.scaling = scaling
        self.dropout = nn.Dropout(dropout) if dropout else None
        self.lora_A = nn.Parameter(torch.empty(self.experts * r, in_features, **like))
        self.lora_B = nn.Parameter(torch.empty(out_features, r * self.experts, **like))

    def by_expert(self) -> Lora:
        """A (experts, r, in_features), B (experts, out_features, r) and s."""
        lora_A = self.lora_A.unflatten(0, (self.experts, -1))  # (E r, in) -> (E, r, in)
        lora_B = self.lora_B.unflatten(1, (-1, self.experts)).permute(2, 0, 1)  # (out, r E) -> (E, out, r)
        return lora_A, lora_B, self.scaling

    def update(self) -> Tensor:
        """s B_e A_e of every expert: (experts, out_features, in_features)."""
        lora_A, lora_B, scaling = self.by_expert()
        return lora_B @ lora_A * scaling


class LoraParameters(AdapterModule):
    """A module with 2-D or 3-D parameters of its own that adapters update.

    Attributes:
        lora_experts: adapter -> parameter -> its `ExpertFactors`.
    """

    name_prefix: ClassVar[str] = "Lora"
    peft_name: ClassVar[str] = "lora.ParamWrapper"
    # In front of LoRA on the layer, which reads the weight before it calls the layer's own forward.
    outermost: ClassVar[int] = 1
    _own_attributes: ClassVar[tuple[str, ...]] = ("lora_experts",)

    lora_experts: Any
    # Of `NF4Experts`.
    weight_dtype: torch.dtype
    stack_sizes: dict[str, Any]
    dense_experts: Callable[[str, torch.dtype | None], Tensor]
    set_experts: Callable[[str, Tensor], None]

    def attach(self, switch: Any) -> None:
        super().attach(switch)
        if not hasattr(self, "lora_experts"):
            self.lora_experts = nn.ModuleDict()

    def add_factors(self, adapter: str, dtype: torch.dtype, init: bool, config: LoraConfig, path: str) -> None:
        """Create the factors of `adapter` for the parameters that `config.target_parameters` names here."""
        own = self.lora_experts[adapter] = nn.ModuleDict()
        for name in target_parameters_of(self, path, config):
            parameter = self._parameters[name]
            assert parameter is not None
            r, _, scaling = config.settings_for(f"{path}.{name}")
            like = {"dtype": dtype, "device": device_of(self) if parameter.is_meta else parameter.device}
            shape, dropout = self._matrices_shape(name), config.lora_dropout
            own[name] = factors = ExpertFactors(shape, r, scaling, dropout, **like).train(self.training)
            if init:
                init_factors(factors.lora_A, factors.lora_B, config.init_lora_weights)
                if config.init_lora_weights == "gaussian":  # its spread is 1 / r
                    with torch.no_grad():
                        factors.lora_A.mul_(shape[0])

    def _matrices_shape(self, name: str) -> tuple[int, int, int]:
        """(experts, out_features, in_features)."""
        stack = packed(self, name)
        if stack is not None:
            return stack.experts, stack.rows, stack.columns
        parameter: Any = self._parameters[name]
        experts, *sides = parameter.shape if parameter.dim() == 3 else (1, *parameter.shape)
        out_features, in_features = reversed(sides) if self._transposed(name) else sides
        return experts, out_features, in_features

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward with the updates of the adapters that act.

        Raises ValueError if the rows of a batch are to go through adapters of their own while others are merged, or
            where the module's own forward reads the updated parameters.
        """
        rows = self.switch.rows
        acting = [adapter for adapter in self.switch.acting if adapter in self.lora_experts]
        if not acting and (rows is None or not any(adapter in self.lora_experts for adapter in rows.names)):
            return super().forward(*args, **kwargs)
        if self.merged_adapters:
            if rows is not None:
                check_unmerged(self.merged_adapters)
            return super().forward(*args, **kwargs)
        if self._splits(acting if rows is None else rows.names):
            return run_experts(self, self._product, *args, **kwargs)
        if rows is not None:
            raise ValueError(
                f"adapter_names: {plain_class(self).__name__} reads its updated parameters itself, which act on the "
                "whole batch"
            )
        plain = {name: self._parameters[name] for adapter in acting for name in self.lora_experts[adapter]}
        try:
            self._parameters.update({name: self._updated(name, acting) for name in plain})
            return super().forward(*args, **kwargs)
        finally:
            self._parameters.update(plain)

    def _splits(self, adapters: Iterable[str]) -> bool:
        """True if `run_experts` may stand for the module's own forward: no other forward, and no trained base."""
        if not splits(self):
            return False
        updated = {name for adapter in adapters if adapter in self.lora_experts for name in self.lora_experts[adapter]}
        bases = [self._parameters[name] for name in weight_names(self)]
        trained = torch.is_grad_enabled() and any(base is not None and base.requires_grad for base in bases)
        return not trained and updated.issubset(weight_names(self))

    def _product(self, name: str, x: Tensor, order: Sorted) -> Tensor:
        """W_e x + s B_e (A_e dropout(x)) of each row x: (S, in_features) -> (S, out_features)."""
        weight, rows = matrices(self, name), self.switch.rows
        names = self.switch.acting if rows is None else ()
        acting = [self.lora_experts[one][name] for one in names if one in self.lora_experts and self._has(one, name)]
        x = x if not isinstance(weight, Tensor) or torch.is_autocast_enabled(x.device.type) else x.to(weight.dtype)
        # The first update is one sum with the base product, unless it has another x.
        first = acting.pop(0).by_expert() if acting and not drops(acting[0]) else None
        out = experts_linear(x, order.offsets, weight, first, getattr(self, "compute_dtype", None))
        for factors in acting:
            dropped = x if factors.dropout is None else factors.dropout(x)
            out = (out + experts_linear(dropped, order.offsets, None, factors.by_expert())).to(out.dtype)
        return out if rows is None else self._add_row_updates(rows, name, x, order, out)

    def _add_row_updates(self, rows: RowAdapters, name: str, x: Tensor, order: Sorted, base: Tensor) -> Tensor:
        """`base` with the update of each row's own adapter."""
        out = base.clone()
        # A layer of experts gets the tokens of the whole batch in one dimension, row by row.
        for adapter, tokens in rows.groups(order.token_count, x.device, parts=True):
            if adapter in self.lora_experts and self._has(adapter, name):
                own = torch.zeros(order.token_count, dtype=torch.bool, device=x.device).index_fill_(0, tokens, True)
                own = own[order.tokens]
                # Rows of this adapter before each place -> the ends of its rows by expert.
                before = nn.functional.pad(own.cumsum(0), (1, 0))
                factors = self.lora_experts[adapter][name].by_expert()
                update = experts_linear(x[own], before[order.offsets].int(), None, factors)
                out[own] += update.to(out.dtype)
        return out

    def _has(self, adapter: str, name: str) -> bool:
        return name in self.lora_experts[adapter]

    def _dense(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """The parameter called `name`, dequantized if it is packed; in `dtype`, or its own."""
        if packed(self, name) is not None:
            return self.dense_experts(name, dtype)
        parameter: Any = self._parameters[name]
        return parameter if dtype is None else parameter.to(dtype)

    def _updated(self, name: str, adapters: list[str]) -> Tensor:
        weight = self._dense(name)
        for adapter in adapters:
            if name in self.lora_experts[adapter]:
                weight = weight + self.delta_parameter(adapter, name).to(weight.dtype)
        return weight

    def delta_parameter(self, adapter: str, name: str) -> Tensor:
        """The change of the parameter called `name` by merging `adapter`, of its shape."""
        update: Tensor = self.lora_experts[adapter][name].update()
        if not is_stack(self, name):
            return update.reshape(self._parameters[name].shape)  # type: ignore[union-attr]
        return update.transpose(1, 2) if self._transposed(name) else update

    def _transposed(self, name: str) -> bool:
        return is_stack(self, name) and bool(getattr(self, "is_transposed", False))

    def adapter_names(self) -> set[str]:
        return set(self.lora_experts) | super().adapter_names()

    def adapter_state(self, adapter: str) -> dict[str, Tensor]:
        state = super().adapter_state(adapter)
        own = list(self.lora_experts[adapter].values()) if adapter in self.lora_experts else []
        for depth, factors in enumerate(reversed(own)):
            # PEFT wraps the module once for each parameter, and these are the names that nesting leaves in its files.
            inside = "base_layer." * depth
            state = {
                **state,
                f"{inside}lora_A.weight": factors.lora_A,
                f"{inside}lora_B.weight": factors.lora_B,
            }
        return state

    def parameter_targets(self, adapter: str) -> list[str]:
        return list(self.lora_experts[adapter]) if adapter in self.lora_experts else []

    def delete_adapter(self, adapter: str) -> None:
        super().delete_adapter(adapter)
        if adapter in self.lora_experts:
            del self.lora_experts[adapter]

    @torch.no_grad()
    def merged_finite(self, adapters: tuple[str, ...]) -> bool:
        own = [(a, name) for a in adapters if a in self.lora_experts for name in self.lora_experts[a]]
        finite = all(bool(torch.isfinite(self.delta_parameter(adapter, name)).all()) for adapter, name in own)
        return finite and super().merged_finite(adapters)

    @torch.no_grad()
    def fold(self, adapters: tuple[str, ...]) -> None:
        here = [adapter for adapter in adapters if adapter in self.lora_experts]
        merged = {}
        for name in {name for adapter in here for name in self.lora_experts[adapter]}:
            parameter: Any = self._parameters[name]
            dtype = parameter.dtype if packed(self, name) is None else self.weight_dtype
            wide = self._dense(name, torch.promote_types(dtype, torch.float32))
            total = sum(self.delta_parameter(a, name).to(wide.dtype) for a in here if name in self.lora_experts[a])
            merged[name] = (wide + total).to(dtype)
        super().fold(adapters)
        for name, tensor in merged.items():
            self._install(name, tensor)

    def requantize(self) -> None:
        for name in list(self._originals) if hasattr(self, "set_experts") else ():
            if name in self.stack_sizes and packed(self, name) is None:
                self.set_experts(name, self.get_parameter(name))
                del self._originals[name]
        super().requantize()


def splits(module: nn.Module) -> bool:
    """True for experts that LoRA updates without forming the updated weights: transformers' own forward, unwrapped."""
    return has_interface(module) and not isinstance(module, WrappedForward)


def drops(factors: ExpertFactors) -> bool:
    """True if the input of the update is not that of the base product."""
    return factors.dropout is not None and factors.dropout.training


def target_parameters_of(module: nn.Module, path: str, config: LoraConfig) -> list[str]:
    """The names of the parameters right in `module`, which is at `path`, that `config` targets."""
    targets = config.target_parameters or ()
    return [
        name for name in module._parameters if any(ends_with(f"{path}.{name}".strip("."), target) for target in targets)
    ]


def check_target_parameters(config: LoraConfig) -> None:
    """Raise ValueError for settings that an update of a parameter cannot have."""
    refused: dict[str, Any] = {"use_dora": False, "lora_bias": False}
    if not config.target_modules:
        # They choose among modules; PEFT leaves the parameters as they are named, too.
        refused |= {"layers_to_transform": None, "exclude_modules": None}
    for field, neutral in refused.items():
        if getattr(config, field) != neutral:
            raise ValueError(
                f"{field}={getattr(config, field)!r} does not go with target_parameters (lora.ParamWrapper does not "
                f"work with {field} != {neutral!r})"
            )
    if config.init_lora_weights not in (True, False, "gaussian"):
        raise ValueError(f"init_lora_weights={config.init_lora_weights!r} does not go with target_parameters")


def find_target_parameters(
    modules: dict[str, nn.Module], config: LoraConfig, taken: list[str], never_read: Callable[[str], bool]
) -> list[str]:
    """The dotted names of the modules that hold the parameters in `config.target_parameters`.

    If none of these matches anything, but the adapter has other modules, a warning says so.

    Args:
        taken: The modules that the adapter updates otherwise.
        never_read: True for a module whose parameters others may read without calling it.

    Raises ValueError for a parameter that cannot be updated; NoMatchingPeftModuleError if nothing is left to adapt.
    """
    found: dict[str, list[str]] = {}
    for path, module in modules.items():
        names = target_parameters_of(module, path, config)
        for name in names:
            _check_target(path, name, module, path in taken, never_read(path), config)
        if names:
            found[path] = names
    missing = [
        target
        for target in config.target_parameters or ()
        if not any(ends_with(f"{path}.{name}".strip("."), target) for path, names in found.items() for name in names)
    ]
    if not found and taken:
        warnings.warn(
            f"target_parameters={config.target_parameters} were set but no parameter was matched.",
            RuntimeWarning,
            stacklevel=2,
        )
    elif missing and not found:
        fused = {name for module in modules.values() for name in module._parameters if is_stack(module, name)}
        problem = f"target_parameters: {missing[0]!r} matches no parameter; 3-D ones here: {sorted(fused)}"
        raise NoMatchingPeftModuleError(f"No `target_modules` passed but also no `target_parameters` found. {problem}")
    return list(found)


def _check_target(path: str, name: str, module: nn.Module, taken: bool, never_read: bool, config: LoraConfig) -> None:
    parameter, full = module._parameters[name], f"{path}.{name}"
    if not path:
        raise ValueError(f"Targeting an nn.Parameter on the top-level module is not supported (parameter {name!r}).")
    if taken:
        raise ValueError(
            f"Trying to wrap an `nn.Parameter` of layer {path!r} of type {type(module).__name__}, which is not a valid "
            f"target. Make sure that this layer is not also targeted with `target_modules` ({full} would get two "
            "updates of one adapter)"
        )
    if never_read:
        raise ValueError(f"target_parameters: {full} may be read without its module being called, past the update")
    dims = 0 if parameter is None else 3 if is_stack(module, name) else parameter.dim()
    if dims not in (2, 3) or not (parameter.is_floating_point() or packed(module, name)):  # type: ignore[union-attr]
        shape, dtype = (None, None) if parameter is None else (tuple(parameter.shape), parameter.dtype)
        raise ValueError(
            f"target_parameters: {full} is a {dims} dimensional Parameter (shape {shape}, {dtype}), but only 2d and 3d "
            "are supported, of floating point"
        )
    if config.lora_dropout and not config.inference_mode and not (splits(module) and name in weight_names(module)):
        raise ValueError(
            f"lora_dropout={config.lora_dropout!r} does not go with target_parameters={full!r}: its module reads the "
            "updated weight, and there is no input of the update alone to drop from"
        )
