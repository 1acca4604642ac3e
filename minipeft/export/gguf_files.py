"""GGUF files, as llama.cpp reads them: of a model's folder, and of a LoRA adapter's, tensor by tensor."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from minipeft.export.families import ExportError, Family, gguf_library, write_gguf
from minipeft.export.servers import adapter_ranks, refusals
from minipeft.export.vocabulary import write_tokenizer
from minipeft.files import atomic_path
from minipeft.train.errors import as_user_error
from minipeft.train.models import load_tokenizer

# Types of matrices by the dtype that a file has them in.
_STORED = {"BF16": "BF16", "F16": "F16", "F32": "F32"}


def export_model(folder: Path, output: Path, kind: str = "auto") -> list[str]:
    """Write a model's folder as one GGUF file; sentences on what is otherwise there.

    Args:
        kind: of the matrices: auto, f32, f16, bf16 or q8_0; vectors are written in float32. "auto" keeps what they are.

    Raises:
        ExportError: a model or tokenizer that cannot be written.
    """
    family = Family(folder)
    tokenizer = load_tokenizer(str(folder), None)
    with contextlib.ExitStack() as stack:
        stored = _Stored(folder, stack)
        writer = _writer(output, stack, family.name)
        names = {name: family.name_of(name) for name in stored if not name.endswith("rotary_emb.inv_freq")}
        if family.tied:
            names.pop("lm_head.weight", None)
        extra = dict(family.further())
        tensors: dict[str, tuple[tuple[int, ...], str]] = {name: (tuple(t.shape), "F32") for name, t in extra.items()}
        for name, other in names.items():
            shape, dtype = stored.about(name)
            tensors[other] = (shape, _kind(shape, dtype, kind))
        sources = {other: name for name, other in names.items()}
        if "token_embd.weight" not in tensors:
            raise ExportError(f"{folder} has no embeddings: its files are not whole")
        rows = tensors["token_embd.weight"][0][0]
        writer.add_type(gguf_library().GGUFType.MODEL)
        writer.add_name(folder.resolve().name)
        writer.add_file_type(_file_type(tensors["token_embd.weight"][1]))
        writer.add_quantization_version(gguf_library().GGML_QUANT_VERSION)
        family.write_settings(writer)
        write_tokenizer(writer, tokenizer, rows)

        def read(name: str) -> torch.Tensor:
            return extra[name] if name in extra else family.in_order(sources[name], stored.read(sources[name]))

        write_gguf(writer, tensors, read)
    window = family.window
    if window is None:
        return []
    return [f"llama.cpp has no sliding window here: beyond {window:,} tokens it sees more than the model did"]


def export_adapter(folder: Path, output: Path, base: Path, kind: str = "auto") -> None:
    """Write a LoRA adapter's folder as a GGUF file, for `llama-server --lora`.

    llama.cpp scales every update by alpha / r: where the adapter has another scaling (rsLoRA, patterns), B is stored
    multiplied by what is missing.

    Args:
        base: the folder of its base model, of which config.json is read.

    Raises:
        ExportError: an adapter that llama.cpp cannot take, or of a model of another family.
    """
    from minipeft import PeftConfig

    with as_user_error(ExportError, str(folder)):
        config: Any = PeftConfig.from_pretrained(folder)
    family = Family(base)
    with contextlib.ExitStack() as stack:
        stored = _Stored(folder, stack, "adapter_model.safetensors")
        shapes = {name: stored.about(name)[0] for name in stored}
        problems = list(refusals(config, shapes, "llama.cpp"))
        if problems:
            raise ExportError(f"llama.cpp cannot take {folder}: {'; '.join(problems)}. Merge it, and export the model")
        ranks = adapter_ranks(shapes)
        if family.tied and "lm_head" in ranks:
            raise ExportError(f"{folder} adapts lm_head, which llama.cpp ties to the embeddings: merge it, export that")
        alpha = float(config.lora_alpha) or 1.0
        tensors: dict[str, tuple[tuple[int, ...], str]] = {}
        reads: dict[str, Callable[[], torch.Tensor]] = {}
        for path, rank in ranks.items():
            a, b = (stored.factor(path, letter) for letter in "AB")
            name = family.name_of(f"{path}.weight")
            missing = config.settings_for(path)[2] * rank / alpha
            embedding = "lora_embedding" in a
            for letter, source in (("a", a), ("b", b)):
                shape, dtype = stored.about(source)
                turned = embedding and letter == "a"
                tensors[f"{name}.lora_{letter}"] = (shape[::-1] if turned else shape, _kind(shape, dtype, kind))

            def read_a(a: str = a, embedding: bool = embedding) -> torch.Tensor:
                return stored.read(a).T if embedding else stored.read(a)

            def read_b(b: str = b, path: str = path, missing: float = missing) -> torch.Tensor:
                values = stored.read(b) if math.isclose(missing, 1.0) else stored.read(b).float() * missing
                return family.in_order(f"{path}.weight", values)

            reads |= {f"{name}.lora_a": read_a, f"{name}.lora_b": read_b}
        writer = _writer(output, stack, family.name)
        library = gguf_library()
        writer.add_type(library.GGUFType.ADAPTER)
        writer.add_string(library.Keys.Adapter.TYPE, "lora")
        writer.add_float32(library.Keys.Adapter.LORA_ALPHA, alpha)
        if config.alora_invocation_tokens:
            kinds = library.GGUFValueType
            tokens = (library.Keys.Adapter.ALORA_INVOCATION_TOKENS, list(config.alora_invocation_tokens))
            writer.add_key_value(*tokens, kinds.ARRAY, kinds.UINT32)
        writer.add_name(folder.resolve().name)
        write_gguf(writer, tensors, lambda name: reads[name]())


class _Stored:
    """The tensors of a folder's safetensors files, read one at a time."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack, pattern: str = "*.safetensors") -> None:
        self._files: dict[str, Any] = {}
        files = sorted(folder.glob(pattern))
        if not files:
            raise ExportError(f"{folder} holds no {pattern} file")
        for file in files:
            try:
                opened = stack.enter_context(safe_open(file, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise ExportError(f"{file} is cut off, or is not a safetensors file: {error}") from None
            self._files |= dict.fromkeys(opened.keys(), opened)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def about(self, name: str) -> tuple[tuple[int, ...], str]:
        """Shape and dtype; ExportError for one that is no floating point."""
        part = self._files[name].get_slice(name)
        if part.get_dtype() not in _STORED:
            raise ExportError(f"{name} is stored as {part.get_dtype()}: GGUF is written of 16 and 32 bits")
        return tuple(part.get_shape()), part.get_dtype()

    def factor(self, path: str, letter: str) -> str:
        """The name of a layer's A or B."""
        names = (f"base_model.model.{path}.lora_{letter}.weight", f"base_model.model.{path}.lora_embedding_{letter}")
        found = next((name for name in names if name in self._files), None)
        if found is None:
            raise ExportError(f"{path} has no lora_{letter}: the file is not whole")
        return found

    def read(self, name: str) -> torch.Tensor:
        """The values of one."""
        return self._files[name].get_tensor(name)


def _writer(output: Path, stack: contextlib.ExitStack, architecture: str) -> Any:
    """A GGUFWriter of a file that is there only once it is whole."""
    temporary = stack.enter_context(atomic_path(output))
    writer = gguf_library().GGUFWriter(temporary, architecture)
    stack.callback(writer.close)
    return writer


def _kind(shape: tuple[int, ...], dtype: str, kind: str) -> str:
    if len(shape) == 1:
        return "F32"
    if kind == "auto":
        return _STORED[dtype]
    # Blocks of Q8_0 have 32 values of a row.
    return "F16" if kind == "q8_0" and shape[-1] % 32 else kind.upper()


def _file_type(kind: str) -> int:
    types = gguf_library().LlamaFileType
    return types.ALL_F32 if kind == "F32" else types[f"MOSTLY_{kind}"]
