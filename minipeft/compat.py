"""Names that other libraries change from release to release, entry by entry, and the releases that do not work.

Each entry says from when to when a name holds, so that it can be deleted when the window has moved on: the oldest
releases are in setup.py. Triton's names are used by the emulator alone (`minipeft_kernels.emulator.driver`).
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from typing import Any

# The argument that hands a model or an attention module its keys and values: `past_key_values` until transformers 5.23,
# `cache` from 5.24 (where a decorator takes the older name with a warning until 5.40). GPT-Neo's, GPT-J's and Bloom's
# attention modules say `layer_past` in all of them.
CACHE_NAMES = ("cache", "past_key_values", "layer_past")

# Releases that are known not to work: distribution -> (the first that works, why not an earlier one).
# Nothing is refused for being new.
OLDEST = {
    "torch": ("2.6", "nothing older was tried"),
    "transformers": ("5.6", "it renames weights while loading them by classes that older ones lack"),
}


class UnsupportedVersionError(ImportError):
    """A library is installed in a release with which minipeft is known not to work."""


def check_versions() -> None:
    """Refuse an installed library that is known not to work. Takes less than a millisecond a library.

    Raises UnsupportedVersionError, an ImportError, in one sentence. A library that is not there is for its own import
    to complain about.
    """
    for name, (oldest, reason) in OLDEST.items():
        try:
            installed = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if _numbers(installed) < _numbers(oldest):
            raise UnsupportedVersionError(
                f"minipeft needs {name} {oldest} or newer, and {installed} is installed ({reason}): "
                f"pip install '{name}>={oldest}'"
            )


def _numbers(version: str) -> tuple[int, ...]:
    """The first two numbers of a version: "2.13.0+cpu" -> (2, 13)."""
    return tuple(int("".join(c for c in part if c.isdigit()) or 0) for part in version.split(".")[:2])


def changes_conversions(quantizer: Any) -> bool:
    """True if transformers hands its quantizers, of the base class `quantizer`, a model's conversions to change.

    Until 5.6 it only asks them for more, which act after the model's own.
    """
    return hasattr(quantizer, "update_weight_conversions")


def causality(attention: Any) -> bool | None:
    """True for an attention module whose tokens see what stands before them, None for a module that does not say.

    T5's say `is_causal` from transformers 5.15; until 5.14 only which half they are of, by `is_decoder`, so that those
    which read the encoder are called causal here, too.
    """
    causal: bool | None = getattr(attention, "is_causal", None)
    if causal is None and type(attention).__name__.endswith("T5Attention"):
        causal = attention.is_decoder
    return causal


def rotation_table(rotary: Any, attention: Any) -> Any:
    """The module whose `embed_positions` rotates GPT-J's keys, None for a model that has no such table.

    The attention module until transformers 5.23, the decoder's rotary module from 5.24.
    """
    return next((part for part in (rotary, attention) if hasattr(part, "embed_positions")), None)


def cache_of(arguments: Mapping[str, Any]) -> Any:
    """The cache among the keyword arguments of a model's forward, under whichever of its names; None without one."""
    return next((arguments[name] for name in CACHE_NAMES if arguments.get(name) is not None), None)


def checkpoint_activations(model: Any, use_reentrant: bool = False, **options: Any) -> None:
    """Have a transformers model recompute its activations in the backward pass.

    `activation_checkpointing_enable` from transformers 5.23; `gradient_checkpointing_enable` until 5.22, deprecated
    from 5.24.

    Args:
        use_reentrant: Which of `torch.utils.checkpoint`'s two ways; the reentrant one needs inputs with gradients.
        options: Further arguments of `torch.utils.checkpoint.checkpoint`.

    Raises what the model raises, ValueError if it cannot.
    """
    options = {"use_reentrant": use_reentrant, **options}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def keep_activations(model: Any) -> None:
    """Undo `checkpoint_activations`. The names changed with its."""
    if hasattr(model, "activation_checkpointing_disable"):
        model.activation_checkpointing_disable()
    else:
        model.gradient_checkpointing_disable()
