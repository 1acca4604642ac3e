"""A model's modules, with what each holds and what an adapter made of it: from its config alone, without weights."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from minipeft.config import PeftConfig
from minipeft.mixins import taken_apart
from minipeft.nf4.experts import NF4Experts
from minipeft.nf4.linear import NF4Linear
from minipeft.show.memory import as_new, check_stored, ghost_model
from minipeft.train.errors import as_user_error
from minipeft.train.methods import AdapterError, attach


@dataclass(frozen=True)
class Held:
    """A tensor that a module holds.

    Attributes:
        shape: Of a packed weight, that of the weight.
        bits: For one element, scales included.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    bits: float
    trainable: bool
    nbytes: int


@dataclass(frozen=True)
class Branch:
    """A module, or several that differ in nothing but the number of their layer.

    Attributes:
        path: With * for that number; "" is the model.
        count: How many there are.
        kind: The class without what was put in front of it. A layer in 4 bits is an NF4Linear.
        patched: Mixins in front of the class, the outer first; hooks; a forward on the object.
    """

    path: str
    count: int
    kind: str
    patched: tuple[str, ...]
    tensors: tuple[Held, ...]


def tree(
    model: str, adapter: str | Path | None = None, *, quantize: str | None = None, dtype: str = "auto"
) -> list[Branch]:
    """The modules of a model, with an adapter where one is given, in the order of the model.

    Args:
        model: directory, hub name or .gguf file; its config alone is read.
        adapter: a folder, of which the config is read, and the shapes of its tensors.

    Raises:
        ModelLoadError, AdapterError: a model or an adapter that is not there, or does not fit.
    """
    config = None
    if adapter is not None:
        with as_user_error(AdapterError, str(adapter)):
            config = as_new(PeftConfig.from_pretrained(adapter))
    ghosts, built = ghost_model(model, quantize, dtype)
    if config is not None and adapter is not None:
        with ghosts.running():
            built = attach(built, config)
            check_stored(built, adapter)
    else:
        built.requires_grad_(False)
    return grow(built)


def grow(model: nn.Module) -> list[Branch]:
    """The branches of a model in memory."""
    found: dict[tuple[Any, ...], int] = {}
    seen: set[int] = set()
    for path, module in model.named_modules():
        short = re.sub(r"(?<![^.])\d+(?![^.])", "*", path)
        key = (short, taken_apart(type(module))[0].__name__, _patches(module), tuple(_held(module, seen)))
        found[key] = found.get(key, 0) + 1
    return [Branch(path, count, *rest) for (path, *rest), count in found.items()]


def _patches(module: nn.Module) -> tuple[str, ...]:
    names = [mixin.__name__ for mixin, _ in reversed(taken_apart(type(module))[1])]
    hooks = {**module._forward_hooks, **module._forward_pre_hooks}
    names += [f"hook {getattr(hook, '__qualname__', type(hook).__name__)}" for hook in hooks.values()]
    return (*names, *(["a forward of its own"] if "forward" in vars(module) else []))


def _held(module: nn.Module, seen: set[int]) -> Iterator[Held]:
    """The tensors that are the module's own; one that several modules share is told of the first."""
    packed: dict[int, tuple[tuple[int, ...], int]] = {}
    passed: set[str] = set()
    if isinstance(module, NF4Linear):
        weight = module.nf4_weight()
        packed[id(module.weight)] = (tuple(weight.shape), weight.nbytes)
        passed = {name for name, _ in module.named_buffers(recurse=False)}
    if isinstance(module, NF4Experts):
        for name in module.packed_names():
            stack = module.stack(name)
            packed[id(module.get_parameter(name))] = (tuple(stack.shape), stack.nbytes)
        passed = {name for name, _ in module.named_buffers(recurse=False)}
    tensors: list[tuple[str, Tensor]] = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    for name, tensor in tensors:
        if name in passed or id(tensor) in seen:
            continue
        seen.add(id(tensor))
        shape, nbytes = packed.get(id(tensor), (tuple(tensor.shape), tensor.nbytes))
        dtype = "nf4" if id(tensor) in packed else str(tensor.dtype).removeprefix("torch.")
        elements = 1
        for length in shape:
            elements *= length
        yield Held(name, shape, dtype, 8 * nbytes / max(1, elements), tensor.requires_grad, nbytes)
