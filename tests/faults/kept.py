"""Files that were once read wrong: a traceback, an error that named nothing, memory or time without end."""

import json
from collections.abc import Callable
from typing import Any

from faults.mutations import BOMB, DEEP, Raw, dumps

Change = Callable[[bytes], bytes]


def put(*path: str | int, value: Any) -> Change:
    """Another value at a place in JSON."""

    def change(content: bytes) -> bytes:
        values = json.loads(content)
        at = values
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = value
        return dumps(values).encode("utf-8", "surrogatepass")

    return change


def whole(content: str | bytes) -> Change:
    """Other content altogether."""
    return lambda old: content if isinstance(content, bytes) else content.encode()


def after(text: str) -> Change:
    """Something more at the end."""
    return lambda old: old + text.encode()


DEEP_LIST, DEEP_OBJECT = "[" * DEEP + "]" * DEEP, '{"a":' * DEEP + "1" + "}" * DEEP
STATE, WRITTEN_ANEW = "checkpoint-2/training_state.json", "resume with adamw, its manifest written anew"

# (reader, file, change): all are refused.
REFUSED: tuple[tuple[str, str, Change], ...] = (
    *(
        ("adapter of LoRA", "adapter_config.json", change)
        for change in (
            *(whole(DEEP_LIST), whole(DEEP_OBJECT), whole("[" * DEEP), whole("3"), whole("null"), whole(b"\xff\xfe")),
            *(put("r", value=value) for value in (10**12, 10**30, 1.5, True, "8", [8], {"x": 1}, Raw("9" * 5000))),
            *(put("lora_alpha", value=Raw(value)) for value in ("NaN", "Infinity", "-Infinity", "1e999", '"\\ud800"')),
            *(put("lora_dropout", value=value) for value in ("0.1", [0.1], 10**400)),
            *(put("target_modules", value=value) for value in ([1], {"x": 1}, 3, "(", "a" * 100_000)),
            *(put("peft_type", value=value) for value in ([], {"x": 1}, 3, "a" * 100_000)),
            *(put("init_lora_weights", value=value) for value in ([], 3, {"x": 1}, list(range(1000)))),
            *(put("use_bdlora", value=["x"] * 1000), put("rank_pattern", value=list(range(1000)))),
            *(put("trainable_token_indices", value=value) for value in ([-1], ["x"], [10**12], {"x": {}}, 3)),
            *(put("layer_replication", value=value) for value in ([[0, 10**9]], [[2, 1]], ["x"], [[0]], 3)),
        )
    ),
    *(
        (f"adapter of {kind}", "adapter_config.json", put(field, value=value))
        for kind in ("prefix tuning", "prompt tuning")
        for field in ("num_virtual_tokens", "token_dim", "num_layers", "num_transformer_submodules")
        for value in (10**12, 1e300, "3", [3], True)
    ),
    *(
        ("adapter of bottleneck", "adapter_config.json", put(field, value=value))
        for field in ("scaling", "reduction_factor", "dropout", "leave_out", "non_linearity")
        for value in (Raw("Infinity"), Raw("NaN"), {"x": 1}, [[1]], "x")
    ),
    *((WRITTEN_ANEW, STATE, put("optimizer_groups", value=value)) for value in ([], ["x"], 3, [{}], [[], []])),
    ("adapter of LoRA with patterns", "adapter_config.json", put("layers_pattern", value="(")),
    ("a run's settings", "run.yaml", after("\nmodel: " + "a" * 100_000)),
    *(
        (WRITTEN_ANEW, STATE, put(name, value=None))
        for name in ("progress", "identity", "schedule", "optimizer_groups")
    ),
    *((WRITTEN_ANEW, STATE, put("progress", value=value)) for value in ([], 3, {"step": "x"}, {"x": 1})),
    *((WRITTEN_ANEW, STATE, put("progress", "step", value=value)) for value in ("x", 1.5, [1], 10**30)),
    *((WRITTEN_ANEW, STATE, put("optimizer_scalars", value=value)) for value in ([], 3, {"x": 3}, "x")),
    *((WRITTEN_ANEW, STATE, put("identity", value=value)) for value in ([], 3, "x", {})),
    *((WRITTEN_ANEW, STATE, put("schedule", value=value)) for value in ([], 3, {"x": 3}, {"last_epoch": "x"})),
    *((WRITTEN_ANEW, STATE, whole(text)) for text in (DEEP_LIST, DEEP_OBJECT, "[]", "3", '{"format": 1}', "")),
    *(("quant_state", "quant_state.json", whole(text)) for text in (DEEP_LIST, DEEP_OBJECT, "3", "[]", "{", "NaN")),
    *(("quant_state", "quant_state.json", put("shape", value=value)) for value in (3, [2**63, 8], [-1, 8], ["x"])),
    *(
        (reader, file, after(f"\n{text}\n"))
        for reader, file in (("a run's settings", "run.yaml"), ("a comparison's runs", "runs.yaml"))
        for text in (
            *(BOMB, "x: &a [*a]", "x: !!timestamp x", "x: !!bool x", "x: " + "[" * 5000, "x: " + "9" * 5000),
            *("x: !!python/object/apply:os.system [id]", "x: 2001-13-99", "x: *y", "[a]: 1", "x: {[]: 1}", "lora: 3"),
        )
    ),
    *(
        ("records", "data.jsonl", after(f"{text}\n"))
        for text in (DEEP_LIST, DEEP_OBJECT, "3", "9" * 5000, '{"text":1}')
    ),
    *(("inspect a checkpoint", "training_state.json", whole(text)) for text in (DEEP_LIST, "3", '"x"', "")),
    *(("inspect a run", "run.json", whole(text)) for text in (DEEP_LIST, "[]", '{"config": 3}', "")),
)

# What is wrong there is no reason to refuse the rest: all are read.
READ: tuple[tuple[str, str, Change], ...] = (
    ("inspect a run", "log.jsonl", after(f"3\n[]\n{DEEP_LIST}\n" + '{"step": "x"}\n{"loss": "x", "step": 3}\n{"st')),
    ("inspect a checkpoint", "training_state.json", put("progress", value=[[1]])),
    ("inspect a model", "config.json", put("architectures", value=[1, {}])),
    ("a card", "README.md", whole(b"---\ntags: [a]\n---\n\xff")),
    ("a card", "README.md", whole("---\ntags: [{a: b}]\n---\n")),
    ("a card", "README.md", whole(f"---\n{BOMB}\n---\n")),
    ("a card", "README.md", whole("---\n&a [*a]\n---\n")),
    ("a card", "README.md", whole("---\nx: !!timestamp x\n---\n")),
)
