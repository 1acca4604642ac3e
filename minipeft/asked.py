"""Arguments of a call that loads an adapter, about the base model, which is there: answers where it is otherwise.

Scripts give `PeftModel.from_pretrained` what they gave transformers' `from_pretrained`: `torch_dtype`, `device_map`,
`offload_folder`. PEFT takes all of it and follows little. An adapter lies where its base model lies, in float32 or in
the base's dtype: what is so is well, and of the rest a warning says what it is about and what the model is like.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch

from minipeft.errors import PeftWarning
from minipeft.packed import Packed

# They change how a file is fetched or read, and no result.
_HARMLESS = (
    *("torch_device", "low_cpu_mem_usage", "ephemeral_gpu_offload", "offload_state_dict", "trust_remote_code"),
    *("proxies", "resume_download", "weights_only", "return_dict", "ignore_mismatched_sizes"),
)


def answer(function: str, model: Any, given: Mapping[str, Any]) -> None:
    """Warn of arguments in `given` that `model` does not meet, by name.

    Args:
        function: The caller's name, for messages.

    Raises TypeError for an argument that nobody knows, ValueError for one that asks for pickles.
    """
    if unknown := [name for name in given if name not in _HARMLESS and name not in _ANSWERS]:
        raise TypeError(f"{function}() does not take {unknown[0]!r}")
    found = {
        name: _ANSWERS[name](model, value) for name, value in given.items() if name in _ANSWERS and value is not None
    }
    told = [f"{name}={given[name]!r} ({how})" for name, how in found.items() if how is not None]
    if told:
        warnings.warn(
            f"an adapter is attached to the base model as it is, and lies where it lies; not met: {', '.join(told)}. "
            "Give this to the call that loads the base model",
            PeftWarning,
            stacklevel=4,
        )


def _dtype(model: Any, wanted: Any) -> str | None:
    wanted = str(wanted).removeprefix("torch.")
    own = str(_first(model).dtype).removeprefix("torch.")
    return None if wanted in ("auto", own) else f"the base model is in {own}"


def _device(model: Any, wanted: Any) -> str | None:
    placed = getattr(model, "hf_device_map", None)
    own = sorted({str(parameter.device) for parameter in model.parameters()} - {"meta"})  # where a disk's would be
    if wanted in ("auto", "balanced", "balanced_low_0", "sequential"):
        fits = placed is not None or own != ["cpu"] or not torch.accelerator.is_available()
    elif isinstance(wanted, Mapping):
        fits = wanted == placed or (placed is None and all(_is_on(own, place) for place in wanted.values()))
    else:
        fits = placed is None and _is_on(own, wanted)
    return None if fits else f"the base model lies on {', '.join(own)}"


def _is_on(devices: list[str], wanted: Any) -> bool:
    """True if `wanted`, a device, its number or its name, is the only one of `devices`."""
    if isinstance(wanted, int):
        kind = torch.accelerator.current_accelerator()
        wanted = f"{kind.type if kind is not None else 'cuda'}:{wanted}"
    return devices == [str(wanted)] or (":" not in str(wanted) and devices == [f"{wanted}:0"])


def _dispatched(model: Any, wanted: Any) -> str | None:
    placed = wanted is False or getattr(model, "hf_device_map", None) is not None
    return None if placed else "the base model was not dispatched, and nothing is offloaded"


def _quantized(model: Any, wanted: Any) -> str | None:
    packed = getattr(model, "is_quantized", False) or any(isinstance(part, Packed) for part in model.modules())
    return None if packed or wanted is False else "the base model is not quantized"


def _attention(model: Any, wanted: Any) -> str | None:
    own = getattr(getattr(model, "config", None), "_attn_implementation", None)
    wanted = "flash_attention_2" if wanted is True else wanted
    return None if wanted is False or own == wanted else f"the base model has {own!r}"


def _pickles(model: Any, wanted: Any) -> str | None:
    if not wanted:
        raise ValueError(
            "use_safetensors=False asks for a pickle (adapter_model.bin), which minipeft does not open, since loading "
            "one runs whatever it holds; leave the argument out"
        )
    return None


def _first(model: Any) -> torch.Tensor:
    parameters = [parameter for parameter in model.parameters() if parameter.is_floating_point()]
    return parameters[0] if parameters else torch.empty(())


_ANSWERS: dict[str, Callable[[Any, Any], str | None]] = {
    **dict.fromkeys(("torch_dtype", "dtype"), _dtype),
    "device_map": _device,
    **dict.fromkeys(("max_memory", "offload_folder", "offload_dir", "offload_index", "offload_buffers"), _dispatched),
    **dict.fromkeys(("load_in_8bit", "load_in_4bit", "quantization_config"), _quantized),
    **dict.fromkeys(("attn_implementation", "use_flash_attention_2"), _attention),
    "use_safetensors": _pickles,
}
