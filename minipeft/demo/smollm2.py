"""SmolLM2-135M-Instruct as an ordinary model folder, converted once from a GGUF file.

The weights in that file were rounded to 4 bits (Q4_1), so the folder, though bfloat16, holds rounded weights.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minipeft.demo.assets import SMOLLM2_GGUF, build_folder, cache_dir, fetch, file_sha256, find_damage
from minipeft.train.errors import MissingExtraError
from minipeft.train.models import without_bars

FOLDER = "SmolLM2-135M-Instruct"

# Written last into the folder: file name -> sha256 of what the conversion wrote.
SUMS = "sha256.json"


def smollm2_folder(say: Callable[[str], None] = print) -> Path:
    """The converted model in the cache; the first call downloads and converts it (20 to 30 s).

    Args:
        say: gets a line for every step that takes time.

    Raises:
        AssetError: no download, or no place to write.
        MissingExtraError: the packages that read GGUF are not installed.
    """
    folder = cache_dir() / FOLDER
    if is_whole(folder):
        return folder
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingExtraError(f"reading a GGUF file needs {' and '.join(missing)}: run pip install 'minipeft[demo]'")
    gguf = fetch(SMOLLM2_GGUF, say)
    say(f"Converting the GGUF file once, to {folder} (20 to 30 s)")
    with without_bars():
        return build_folder(folder, lambda staging: _convert(gguf, SMOLLM2_GGUF.members[0].name, staging))


def is_whole(folder: Path) -> bool:
    """Whether every file that the conversion wrote is there, unchanged."""
    try:
        sums = json.loads((folder / SUMS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(sums, dict) and bool(sums) and find_damage(folder, sums) is None


def _convert(source: Path, file_name: str, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file_name)
    split_digits(tokenizer)
    # Without dequantize=True the model could not be saved.
    config = GgufConfig(gguf_file=file_name, dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=file_name, dtype=torch.bfloat16, quantization_config=config
    )
    # The file's own name for the model would stay in config.json, where it reads like a path.
    vars(model.config).pop("_model_name_or_path", None)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    sums = {path.name: file_sha256(path) for path in sorted(target.iterdir())}
    (target / SUMS).write_text(json.dumps(sums, indent=2), encoding="utf-8")


def split_digits(tokenizer: Any) -> None:
    """Put back the split of numbers into digits, which transformers leaves out of a GGUF tokenizer."""
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
