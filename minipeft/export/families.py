"""The families that are written as GGUF: their names and settings there, and what their tensors need on the way.

llama.cpp turns rotary embeddings of Llama's layout in pairs of neighbours, where transformers turns halves: the rows of
q_proj and k_proj (and of an adapter's B there) are put in the other order. The names are gguf's own table's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minipeft.stored import read_object
from minipeft.train.errors import MissingExtraError, TrainingError

# Of transformers' classes, llama.cpp's architecture.
ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
_ROTARY = re.compile(r"\.self_attn\.(q|k)_proj\.")


class ExportError(TrainingError, ValueError):
    """A model, adapter or tokenizer that cannot be written in the format that was asked for."""


def gguf_library() -> Any:
    """The module `gguf`; MissingExtraError without it."""
    try:
        import gguf
    except ImportError:
        raise MissingExtraError("writing GGUF needs the package gguf: pip install 'minipeft[demo]'") from None
    return gguf


class Family:
    """A model's config as llama.cpp has it.

    Args:
        folder: the model's, of which config.json is read.

    Raises:
        ExportError: a model of another family, or a setting that llama.cpp reads otherwise.
    """

    def __init__(self, folder: Path) -> None:
        try:
            self.config = config = read_object(folder / "config.json", ExportError)
        except OSError as error:
            raise ExportError(f"cannot read {folder / 'config.json'}: {error.strerror or error}") from None
        names = config.get("architectures")
        name = names[0] if isinstance(names, list) and names else None
        if name not in ARCHITECTURES:
            raise ExportError(
                f"{folder}: GGUF is written of {', '.join(ARCHITECTURES)}, and the model is {name}: llama.cpp's "
                "convert_hf_to_gguf.py may know it"
            )
        if "quantization_config" in config:
            raise ExportError(
                f"{folder} is stored quantized: merge it in 16 bits (minipeft merge without --requantize)"
            )
        self.name = ARCHITECTURES[name]
        self.layers, self.width = self._number("num_hidden_layers"), self._number("hidden_size")
        self.heads = self._number("num_attention_heads")
        self.kv_heads = self._number("num_key_value_heads", self.heads)
        self.head_dim = self._number("head_dim", self.width // self.heads)
        if config.get("hidden_act", "silu") != "silu":
            raise ExportError(
                f"{folder}: llama.cpp has silu in {self.name} models, the config {config['hidden_act']!r}"
            )
        self.rope = _mapping(config, "rope_parameters")
        if not self.rope:
            self.rope = {"rope_theta": config.get("rope_theta"), **_mapping(config, "rope_scaling")}
        self.rope_type = self.rope.get("rope_type", self.rope.get("type", "default"))
        if self.rope_type not in ("default", "linear", "llama3") or self.rope.get("partial_rotary_factor", 1) != 1:
            raise ExportError(f"{folder}: rotary embeddings of type {self.rope_type!r} are not written as GGUF")
        library = gguf_library()
        arch = next(key for key, value in library.MODEL_ARCH_NAMES.items() if value == self.name)
        self._names = library.get_tensor_name_map(arch, self.layers)

    def _number(self, key: str, default: int | None = None) -> int:
        value = self.config.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ExportError(f"config.json: expected {key!r} to be a whole number above 0, found {value!r}")
        return value

    def _real(self, values: Mapping[str, Any], key: str, default: float | None = None) -> float:
        value = values.get(key)
        value = default if value is None else value
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
            raise ExportError(f"config.json: expected {key!r} to be a number above 0, found {value!r}")
        return float(value)

    @property
    def window(self) -> int | None:
        """The tokens that a sliding window sees, which llama.cpp's models of these families do not have; or None."""
        window = self.config.get("sliding_window")
        used = self.config.get("use_sliding_window", self.config.get("model_type") == "mistral")
        return window if used and isinstance(window, int) else None

    @property
    def tied(self) -> bool:
        """True if the head is the embeddings."""
        return bool(self.config.get("tie_word_embeddings"))

    def name_of(self, tensor: str) -> str:
        """A tensor's name in GGUF.

        Raises:
            ExportError: it has none.
        """
        found = self._names.get_name(tensor, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise ExportError(f"llama.cpp's {self.name} models have no tensor for {tensor}")
        return found

    def in_order(self, tensor: str, values: torch.Tensor) -> torch.Tensor:
        """The values of a tensor of that name, (rows, ...), with rows in llama.cpp's order."""
        found = _ROTARY.search(tensor) if self.name == "llama" else None
        if found is None:
            return values
        heads = self.heads if found[1] == "q" else self.kv_heads
        if len(values) % (2 * heads):
            raise ExportError(f"{tensor} has {len(values)} rows, which {heads} heads do not divide in halves")
        halves = values.reshape(heads, 2, len(values) // heads // 2, *values.shape[1:])
        return halves.transpose(1, 2).reshape(values.shape)

    def write_settings(self, writer: Any) -> None:
        """Give a GGUFWriter what llama.cpp must know of the model."""
        config = self.config
        writer.add_context_length(self._number("max_position_embeddings"))
        writer.add_embedding_length(self.width)
        writer.add_block_count(self.layers)
        writer.add_feed_forward_length(self._number("intermediate_size"))
        writer.add_head_count(self.heads)
        writer.add_head_count_kv(self.kv_heads)
        writer.add_key_length(self.head_dim)
        writer.add_value_length(self.head_dim)
        writer.add_rope_dimension_count(self.head_dim)
        writer.add_vocab_size(self._number("vocab_size"))
        writer.add_layer_norm_rms_eps(self._real(config, "rms_norm_eps", 1e-6))
        writer.add_rope_freq_base(self._real(self.rope, "rope_theta", 10000.0))
        if self.rope_type == "linear":
            writer.add_rope_scaling_type(gguf_library().RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(self._real(self.rope, "factor"))

    def further(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Tensors that say what is a setting elsewhere: Llama 3's factors of the frequencies, (head_dim / 2,)."""
        if self.rope_type != "llama3":
            return
        rope, theta = self.rope, self._real(self.rope, "rope_theta", 10000.0)
        low, high, factor = (self._real(rope, key) for key in ("low_freq_factor", "high_freq_factor", "factor"))
        trained = self._real(rope, "original_max_position_embeddings", self._number("max_position_embeddings"))
        factors = []
        for pair in range(self.head_dim // 2):
            turns = trained / (2 * math.pi * theta ** (2 * pair / self.head_dim))
            if turns > high:
                factors.append(1.0)
            elif turns < low:
                factors.append(factor)
            else:
                smooth = (turns - low) / (high - low)
                factors.append(1 / ((1 - smooth) / factor + smooth))
        yield "rope_freqs.weight", torch.tensor(factors, dtype=torch.float32)


def _mapping(config: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = config.get(key) or {}
    if not isinstance(value, dict):
        raise ExportError(f"config.json: expected {key!r} to be an object, found {value!r}")
    return value


def write_gguf(
    writer: Any, tensors: Mapping[str, tuple[tuple[int, ...], str]], read: Callable[[str], torch.Tensor]
) -> None:
    """Write a file whose settings `writer` has: header first, then one tensor after the other.

    Args:
        tensors: by name, each shape and its type there, by gguf's name, such as F16.
        read: gives the values of one.
    """
    library = gguf_library()
    kinds = library.GGMLQuantizationType
    for name, (shape, kind) in tensors.items():
        size = library.quant_shape_to_byte_shape(shape, kinds[kind]) if kind not in ("F32", "F16") else shape
        item = {"F32": 4, "F16": 2}.get(kind, 1)
        dtype = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16)}.get(kind, np.dtype(np.uint8))
        writer.add_tensor_info(name, size, dtype, math.prod(size) * item, kinds[kind] if item == 1 else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, (_, kind) in tensors.items():
        values = read(name).detach().float().contiguous().numpy()
        writer.write_tensor_data(library.quants.quantize(values, kinds[kind]))
