"""The model card beside an adapter: README.md with the metadata by which a hub finds it (PEFT's).

The text of a card that is there already stays, and so does its metadata, but for what says what the adapter is.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

from minipeft.attach import base_name
from minipeft.config import PeftConfig, TaskType
from minipeft.files import write_text
from minipeft.mixins import plain_class
from minipeft.public import PEFT_VERSION
from minipeft.stored import parse_yaml, shown

_FRONT = re.compile(r"\A---[ \t]*\r?\n(.*?)^---[ \t]*\r?\n", re.DOTALL | re.MULTILINE)

# What hubs call the tasks.
_PIPELINES = {
    TaskType.CAUSAL_LM: "text-generation",
    TaskType.SEQ_CLS: "text-classification",
    TaskType.TOKEN_CLS: "token-classification",
    TaskType.QUESTION_ANS: "question-answering",
    TaskType.FEATURE_EXTRACTION: "feature-extraction",
}


def write_card(model: Any, config: PeftConfig, folder: str | Path) -> None:
    """Write the card of one adapter to `folder`, or complete the metadata of the one that is there.

    A card whose metadata is no YAML mapping is left as it is; a warning says so.
    """
    import yaml

    file = Path(folder) / "README.md"
    try:
        old = file.read_text(encoding="utf-8") if file.is_file() else None
    except UnicodeDecodeError:
        warnings.warn(f"{file} is left as it is: it is not UTF-8 text", stacklevel=2)
        return
    front = _FRONT.match(old or "")
    try:
        data = (parse_yaml(front[1]) or {}) if front else {}
    except (yaml.YAMLError, ValueError) as error:
        data = error
    tags = data.get("tags") if isinstance(data, dict) else None
    if not isinstance(data, dict) or not isinstance(tags, list | None) or not all(map(_is_text, tags or ())):
        warnings.warn(
            f"{file} is left as it is: it begins with {shown(data)} between two lines of ---, expected YAML such as "
            "'key: value', with texts as tags",
            stacklevel=2,
        )
        return
    text = _text(model, config) if old is None else old[front.end() :] if front else old
    lines = yaml.safe_dump({**data, **_metadata(model, config, data)}, sort_keys=False, allow_unicode=True)
    write_text(file, f"---\n{lines}---\n{text}")


def create_or_update_model_card(model: Any, output_dir: str | Path) -> None:
    """Write the card of the adapter that acts, or the first, to `output_dir` (PEFT's function): see `write_card`."""
    names = [*model.active_adapters, *model.peft_config]
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    write_card(model, model.peft_config[names[0]], output_dir)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _metadata(model: Any, config: PeftConfig, old: dict[str, Any]) -> dict[str, Any]:
    base = config.base_model_name_or_path or base_name(model)
    kept = [tag for tag in old.get("tags") or [] if not tag.startswith("base_model:adapter:")]
    tags = [f"base_model:adapter:{base}"] if base else []
    tags += ["lora"] if config.type_name == "LORA" else []
    tags += ["transformers"] if plain_class(model).__module__.startswith("transformers.") else []
    data: dict[str, Any] = {"base_model": base} if base else {}
    data |= {"library_name": "peft", "tags": sorted({*kept, *tags, "minipeft"})}
    task = _PIPELINES.get(config.task_type)  # type: ignore[call-overload]
    return {**data, **({"pipeline_tag": task} if task and "pipeline_tag" not in old else {})}


def _text(model: Any, config: PeftConfig) -> str:
    base = config.base_model_name_or_path or base_name(model)
    kind = config.type_name or "an"
    auto = "AutoModelForCausalLM" if config.task_type is TaskType.CAUSAL_LM else "AutoModel"
    settings = {
        name: value
        for name, value in config.to_dict().items()
        if value not in (None, False, [], {}, "") and name not in ("auto_mapping", "base_model_name_or_path")
    }
    table = "\n".join(f"| `{name}` | `{value}` |" for name, value in sorted(settings.items()))
    return f"""
# {kind} adapter of {f"`{base}`" if base else f"a {plain_class(model).__name__}"}

This folder holds an adapter: `adapter_model.safetensors` has its tensors, `adapter_config.json` says where they go in
the base model, which is not part of it.

- **Base model:** {f"`{base}`" if base else "not recorded"}, a `{plain_class(model).__name__}`
- **Method:** {kind}
- **Task:** {config.task_type.value if isinstance(config.task_type, TaskType) else "not recorded"}
- **Training data:** [More Information Needed]
- **Language, license:** [More Information Needed]

## Use

With minipeft, or with PEFT by importing `peft` instead:

```python
from minipeft import PeftModel
from transformers import {auto}

model = {auto}.from_pretrained({base!r})
model = PeftModel.from_pretrained(model, "path/to/this/folder")
model = model.merge_and_unload()  # if the adapter is to become part of the weights
```

## Intended use, limits and evaluation

[More Information Needed]

## Settings

| | |
|---|---|
{table}

### Framework versions

- PEFT {PEFT_VERSION} (the format; written by minipeft)
"""
