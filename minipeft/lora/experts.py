"""LoRA on parameters by their own names: a mixture's experts, all in one 3-D parameter, and any 2-D weight.

transformers keeps `gate_up_proj` and `down_proj` of all experts as one parameter each, (experts, out_features,
in_features) (or with the last two swapped, where the module says `is_transposed`). Every expert e has an update of its
own, W_e + s B_e A_e. The module reads its parameters itself, so while it runs they stand in its place with the update
added: unlike for a layer, the whole updated weight is made in every forward.

A 2-D weight (out_features, in_features), such as a router's, is updated in the same way, as one expert's would be.

A and B of all experts lie as PEFT lays them: A (experts * r, in_features), expert by expert, B (out_features,
r * experts), rank by rank.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from minipeft.adapter import AdapterModule
from minipeft.dispatched import device_of
from minipeft.errors import NoMatchingPeftModuleError
from minipeft.lora.config import LoraConfig
from minipeft.lora.variants import init_factors
from minipeft.targets import ends_with


class ExpertFactors(nn.Module):
    """A and B of one parameter and one adapter."""

    def __init__(self, shape: tuple[int, int, int], r: int, scaling: float, **like: Any) -> None:
        super().__init__()
        self.experts, out_features, in_features = shape
        self.scaling = scaling
        self.lora_A = nn.Parameter(torch.empty(self.experts * r, in_features, **like))
        self.lora_B = nn.Parameter(torch.empty(out_features, r * self.experts, **like))

    def update(self) -> Tensor:
        """s B_e A_e of every expert: (experts, out_features, in_features)."""
        lora_A = self.lora_A.unflatten(0, (self.experts, -1))  # (E r, in) -> (E, r, in)
        lora_B = self.lora_B.unflatten(1, (-1, self.experts)).permute(2, 0, 1)  # (out, r E) -> (E, out, r)
        return lora_B @ lora_A * self.scaling


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
            experts, *sides = parameter.shape if parameter.dim() == 3 else (1, *parameter.shape)
            out_features, in_features = reversed(sides) if self._transposed(name) else sides
            like = {"dtype": dtype, "device": device_of(self) if parameter.is_meta else parameter.device}
            own[name] = factors = ExpertFactors((experts, out_features, in_features), r, scaling, **like)
            if init:
                init_factors(factors.lora_A, factors.lora_B, config.init_lora_weights)
                if config.init_lora_weights == "gaussian":  # its spread is 1 / r
                    with torch.no_grad():
                        factors.lora_A.mul_(experts)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward, with W + s B A in the place of each adapted parameter W while it runs."""
        acting = [adapter for adapter in self.switch.acting if adapter in self.lora_experts]
        if self.merged_adapters or not acting:
            return super().forward(*args, **kwargs)
        plain = {name: self._parameters[name] for adapter in acting for name in self.lora_experts[adapter]}
        try:
            self._parameters.update({name: self._updated(name, acting) for name in plain})
            return super().forward(*args, **kwargs)
        finally:
            self._parameters.update(plain)

    def _updated(self, name: str, adapters: list[str]) -> Tensor:
        weight: Any = self._parameters[name]
        for adapter in adapters:
            if name in self.lora_experts[adapter]:
                weight = weight + self.delta_parameter(adapter, name).to(weight.dtype)
        return weight

    def delta_parameter(self, adapter: str, name: str) -> Tensor:
        """The change of the parameter called `name` by merging `adapter`, of its shape."""
        update: Tensor = self.lora_experts[adapter][name].update()
        update = update.transpose(1, 2) if self._transposed(name) else update
        return update.reshape(self._parameters[name].shape)  # type: ignore[union-attr]

    def _transposed(self, name: str) -> bool:
        parameter: Any = self._parameters[name]
        return parameter.dim() == 3 and bool(getattr(self, "is_transposed", False))

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
            weight = self._parameters[name]
            assert weight is not None
            wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
            total = sum(self.delta_parameter(a, name).to(wide.dtype) for a in here if name in self.lora_experts[a])
            merged[name] = (wide + total).to(weight.dtype)
        super().fold(adapters)
        for name, tensor in merged.items():
            self._install(name, tensor)


def target_parameters_of(module: nn.Module, path: str, config: LoraConfig) -> list[str]:
    """The names of the parameters right in `module`, which is at `path`, that `config` targets."""
    targets = config.target_parameters or ()
    return [
        name for name in module._parameters if any(ends_with(f"{path}.{name}".strip("."), target) for target in targets)
    ]


def check_target_parameters(config: LoraConfig) -> None:
    """Raise ValueError for settings that an update of a parameter cannot have."""
    refused: dict[str, Any] = {"use_dora": False, "lora_bias": False}
    if not config.inference_mode:
        refused["lora_dropout"] = 0.0
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
            _check_target(path, name, module, path in taken, never_read(path))
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
        fused = {n for m in modules.values() for n, p in m._parameters.items() if p is not None and p.dim() == 3}
        problem = f"target_parameters: {missing[0]!r} matches no parameter; 3-D ones here: {sorted(fused)}"
        raise NoMatchingPeftModuleError(f"No `target_modules` passed but also no `target_parameters` found. {problem}")
    return list(found)


def _check_target(path: str, name: str, module: nn.Module, taken: bool, never_read: bool) -> None:
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
    dims = 0 if parameter is None else parameter.dim()
    if dims not in (2, 3) or not parameter.is_floating_point():  # type: ignore[union-attr]
        shape, dtype = (None, None) if parameter is None else (tuple(parameter.shape), parameter.dtype)
        raise ValueError(
            f"target_parameters: {full} is a {dims} dimensional Parameter (shape {shape}, {dtype}), but only 2d and 3d "
            "are supported, of floating point"
        )
