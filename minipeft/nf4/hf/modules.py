"""The choice of the modules that become `NF4Linear`, and the swap itself, there and back.

Converted, as by transformers for bitsandbytes: `nn.Linear` proper and GPT-2's `Conv1D`, whose weight (in_features,
out_features) is transposed first. Left dense: what transformers leaves dense, and every weight that a second module
uses too. Subclasses of `nn.Linear` are left too: Llama 4's router returns two things, `nn.MultiheadAttention` reads
its projection's weight without a call; Falcon's only multiplies, but no reader of a checkpoint expects it packed.

Besides, the 3-D weights of a mixture's experts become packed where transformers says how their class is computed.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from minipeft.errors import PeftWarning
from minipeft.experts import has_interface, linear_routers
from minipeft.nf4.experts import NF4Experts, expert_parameters
from minipeft.nf4.hf.config import NF4Config
from minipeft.nf4.linear import NF4Linear


def modules_to_skip(model: nn.Module, skip_modules: list[str] | None, packed_already: bool = False) -> list[str]:
    """Name patterns of the modules that stay dense, sorted.

    For a transformers model: the given list, or by default its output head, tied weights and last module; and in
    any case the modules it keeps in float32, its tied ones, and a mixture's routers. A plain module has only the list.

    Args:
        model: the dense model, also on the meta device.
        skip_modules: `NF4Config.skip_modules`.
        packed_already: the checkpoint is packed. Then exactly what bitsandbytes would have left dense is dense.
    """
    if not isinstance(model, PreTrainedModel):
        return sorted(skip_modules or [])
    keep = list(model._keep_in_fp32_modules or [])
    tied = [key.removesuffix(".weight") for pair in model.all_tied_weights_keys.items() for key in pair]
    if not packed_already:
        # transformers names some of these by their parameter; and a router's choice is not to change.
        keep = [*(name.removesuffix(".weight") for name in keep), *linear_routers(model)]
        keep += getattr(model, "_keep_in_fp32_modules_strict", None) or []
        if skip_modules is None:
            # transformers means to leave the last module dense, and misses one that ends in a bias: a classifier
            keep += [list(model.named_parameters())[-1][0].rpartition(".")[0]]
    return sorted({*HfQuantizer.get_modules_to_not_convert(model, skip_modules, keep), *tied} - {""})


def skip_modules_for_file(model: nn.Module, skip_modules: list[str] | None) -> list[str] | None:
    """The skip list that a reader of the packed checkpoint needs; to be asked before the swap.

    A reader (bitsandbytes too) takes a list as it is and adds nothing. None, "the default", is kept where it
    comes to the same: a model with another head on top has its own default, which a list would not know.
    """
    ours = _convertible(model, modules_to_skip(model, skip_modules))
    theirs = _convertible(model, modules_to_skip(model, skip_modules, packed_already=True))
    if skip_modules is None and ours == theirs:
        return None
    return modules_to_skip(model, skip_modules)


def convertible_modules(model: nn.Module, skip: list[str]) -> list[list[str]]:
    """Names of the modules to convert, in the model's order: one list a module, all of its names in it.

    Names and not modules, so that a caller who replaces them one by one also frees them one by one.
    """
    uses = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)

    def wanted(names: list[str]) -> bool:
        module = model.get_submodule(names[0])
        if type(module) is not nn.Linear and not isinstance(module, Conv1D):
            return False
        return uses[id(module.weight)] == 1 and all(should_convert_module(name, skip) for name in names)

    return [names for names in names_by_module(model, (nn.Linear, Conv1D)) if wanted(names)]


def convertible_experts(model: nn.Module, skip: list[str]) -> list[tuple[str, list[str]]]:
    """The modules of experts to pack, a shared one under its first name, each with the names of its weights to pack.

    `skip` may name such a module or one of its weights.
    """
    found = []
    for names in names_by_module(model, nn.Module):
        weights = [
            weight
            for weight in expert_parameters(model.get_submodule(names[0]))
            if all(
                should_convert_module(name, skip) and should_convert_module(f"{name}.{weight}", skip) for name in names
            )
        ]
        if weights:
            found.append((names[0], weights))
    return found


def _convertible(model: nn.Module, skip: list[str]) -> tuple[Any, Any]:
    return convertible_modules(model, skip), convertible_experts(model, skip)


def warn_of_dense_experts(model: nn.Module) -> None:
    """Warn of experts that stay dense since their class does not say how they are computed."""
    classes: Counter[str] = Counter()
    for module in model.modules():
        if "Expert" in type(module).__name__ and not has_interface(module) and not isinstance(module, nn.Linear):
            own = (p for p in module._parameters.values() if p is not None and p.dim() > 1 and p.is_floating_point())
            classes[type(module).__name__] += sum(p.numel() for p in own)
    for name, numbers in (+classes).items():
        warnings.warn(
            f"{name} stays dense, {numbers:,} numbers that are not in 4 bits: transformers does not say how these "
            "experts are computed (use_experts_implementation)",
            PeftWarning,
            stacklevel=3,
        )


def names_by_module(model: nn.Module, kind: type[nn.Module] | tuple[type[nn.Module], ...]) -> list[list[str]]:
    """The names of each module of a kind, a module that stands in several places having several."""
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, kind):
            names.setdefault(id(module), []).append(name)
    return list(names.values())


def require_convertible(model: nn.Module, skip: list[str], of_experts: list[tuple[str, list[str]]]) -> list[list[str]]:
    """`convertible_modules`; ValueError when there is none and there are no experts to convert either."""
    groups = convertible_modules(model, skip)
    if not groups and not of_experts:
        special = {type(m).__name__ for m in model.modules() if isinstance(m, nn.Linear) and type(m) is not nn.Linear}
        stays = f"; its {', '.join(sorted(special))} stays dense, as with bitsandbytes" if special else ""
        raise ValueError(
            f"{type(model).__name__} has nothing to put into NF4: no nn.Linear or Conv1D (subclasses do not count) "
            f"besides those left dense: {', '.join(skip) or 'none'}{stays}"
        )
    return groups


def nf4_linear_like(module: nn.Module, config: NF4Config) -> NF4Linear:
    """An `NF4Linear` on the meta device with the shape, bias and dtype of a `Linear` or `Conv1D`."""
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    transposed = isinstance(module, Conv1D)
    out_features, in_features = reversed(weight.shape) if transposed else weight.shape
    # from_pretrained makes every tensor on the meta device, and NF4's constant tables, made once, must be real
    with torch.device("cpu"):
        linear = NF4Linear(
            in_features,
            out_features,
            bias=module.bias is not None,
            compute_dtype=config.compute_dtype,
            blocksize=config.blocksize,
            double_quant=config.double_quant,
            dtype=weight.dtype,
            device="meta",
        )
    linear.from_conv1d = transposed  # type: ignore[assignment]
    linear.train(module.training)
    return linear


def dense_weight(linear: NF4Linear, weight: torch.Tensor) -> torch.Tensor:
    """The weight as (out_features, in_features), from how the replaced module stored it.

    Raises:
        ValueError: the shape or dtype is not that of the module.
    """
    expected = (linear.out_features, linear.in_features)
    stored = expected[::-1] if linear.from_conv1d else expected
    if tuple(weight.shape) != stored:
        raise ValueError(f"the weight is {tuple(weight.shape)}, the module expects {stored}")
    if not weight.is_floating_point():
        raise ValueError(f"the weight is {weight.dtype}: it is packed already, and the config does not say how")
    # (in_features, out_features) -> (out_features, in_features)
    return weight.t().contiguous() if linear.from_conv1d else weight.detach()


def dense_experts(experts: Any, name: str, weight: torch.Tensor) -> torch.Tensor:
    """The weights `name` as (experts, out_features, in_features), from how the class of `experts` has them.

    Raises:
        ValueError: the shape or dtype is not that of the module.
    """
    expected = tuple(experts._parameters[name].shape)
    if tuple(weight.shape) != expected:
        raise ValueError(f"the weights are {tuple(weight.shape)}, the module expects {expected}")
    if not weight.is_floating_point():
        raise ValueError(f"the weights are {weight.dtype}: they are packed already, and the config does not say how")
    return weight.detach().transpose(1, 2) if experts.is_transposed else weight.detach()


def nf4_experts(model: nn.Module) -> Iterator[tuple[str, NF4Experts]]:
    """The modules of packed experts of a model by name, a shared one under its first name."""
    for name, module in model.named_modules():
        if isinstance(module, NF4Experts):
            yield name, module


def packed_names(model: nn.Module) -> list[str]:
    """The names of the parameters of a model that hold codes."""
    linears = [f"{name}.weight" for name, _ in nf4_linears(model)]
    return linears + [f"{name}.{weight}" for name, experts in nf4_experts(model) for weight in experts.packed_names()]


def nf4_linears(model: nn.Module) -> Iterator[tuple[str, NF4Linear]]:
    """The `NF4Linear` modules of a model by name, a shared one under its first name."""
    for name, module in model.named_modules():
        if isinstance(module, NF4Linear):
            yield name, module
