"""Changes of files: of their bytes, of the JSON in them, of the header of a safetensors file, of the lines of YAML.

A change is made by a `random.Random` alone, so that a seed says all of it.
"""

import json
import random
import struct
from typing import Any

DEEP = 100_000


class Raw(str):
    """Text that stands in the JSON as it is, such as a number that json.dumps would not write."""


VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 3, 7, 0.5, -0.0, 1e-300, 10**6, 2**31, 2**63, 10**30, -(10**30)),
    *("", " ", "x", "0", "true", "nan", "lora", "all-linear", ".*", "(", "[", "(a+)+$", "*" * 50, "../../etc/passwd"),
    *("\x00", "é", "\U0001f984", "a" * 10_000, "a.b.c.d", "default", "base_model.model.x", "cuda:99", "float99"),
    *([], {}, [None], [[]], [0], [-1], ["x"], [1, "x", None], {"x": 1}, {"x": None}, {"0": {"1": {}}}, {"default": 3}),
    *([[0, 1]], [[0, 10**9]], [10**12], ["x"] * 1000, {str(i): i for i in range(1000)}, list(range(1000))),
    *(Raw("NaN"), Raw("Infinity"), Raw("-Infinity"), Raw("1e999"), Raw("9" * 5000), Raw('"\\ud800"')),
    *(Raw("[" * DEEP + "]" * DEEP), Raw('{"a":' * DEEP + "1" + "}" * DEEP), Raw("[" * DEEP), Raw("01"), Raw("'x'")),
)


def mutate(name: str, content: bytes, choose: random.Random) -> bytes:
    """The content of the file `name`, changed once or a few times."""
    for _ in range(choose.choice((1, 1, 1, 2, 3))):
        content = _mutate_once(name, content, choose)
    return content


def _mutate_once(name: str, content: bytes, choose: random.Random) -> bytes:
    if choose.random() < 0.25:
        return change_bytes(content, choose)
    if name.endswith(".json"):
        return change_json(content, choose)
    if name.endswith(".jsonl"):
        return change_lines(content, choose)
    if name.endswith((".yaml", ".md")):
        return change_yaml(content, choose)
    if name.endswith(".safetensors"):
        return change_safetensors(content, choose)
    return change_bytes(content, choose)


def change_bytes(content: bytes, choose: random.Random) -> bytes:
    """Flip, cut, insert, repeat, overwrite."""
    kind, at = choose.randrange(9), choose.randrange(len(content) + 1)
    until = min(len(content), at + choose.choice((1, 2, 8, 64, 1000)))
    if kind == 0 and content:
        at = min(at, len(content) - 1)
        return content[:at] + bytes([content[at] ^ 1 << choose.randrange(8)]) + content[at + 1 :]
    if kind == 1:
        return content[:at]
    if kind == 2:
        return content[at:]
    if kind == 3:
        return content[:at] + content[until:]
    if kind == 4:
        return content[:at] + choose.randbytes(choose.choice((1, 8, 100))) + content[at:]
    if kind == 5:
        return content[:until] + content[at:]
    if kind == 6:
        return content[:at] + bytes(until - at) + content[until:]
    if kind == 7:
        return content[:at] + b"\xff" * (until - at) + content[until:]
    return choose.choice((b"", b"\n", b"null", b"{}", b"[]", b"\xef\xbb\xbf" + content, choose.randbytes(100)))


def change_json(content: bytes, choose: random.Random) -> bytes:
    """Another value at a place in the JSON; or a key that is gone, new, or twice there."""
    try:
        values = json.loads(content)
    except (ValueError, RecursionError):
        return change_bytes(content, choose)
    return dumps(changed_value(values, choose)).encode("utf-8", "surrogatepass")


def changed_value(values: Any, choose: random.Random) -> Any:
    """`values` with one place changed."""
    if isinstance(values, dict) and values and choose.random() < 0.95:
        key, kind = choose.choice(list(values)), choose.randrange(10)
        if kind == 0:
            return {k: v for k, v in values.items() if k != key}
        if kind == 1:
            return {**values, choose.choice(("x", "r", "", key + "x", key[:-1], "__proto__")): choose.choice(VALUES)}
        if kind == 2:
            return {(choose.choice(("x", key + " ", key.upper())) if k == key else k): v for k, v in values.items()}
        if kind == 3:
            return {**values, key: values[choose.choice(list(values))]}
        nested = isinstance(values[key], dict | list) and values[key] and choose.random() < 0.7
        return {**values, key: changed_value(values[key], choose) if nested else choose.choice(VALUES)}
    if isinstance(values, list) and values and choose.random() < 0.9:
        at, kind = choose.randrange(len(values)), choose.randrange(5)
        if kind == 0:
            return values[:at] + values[at + 1 :]
        if kind == 1:
            return [*values, values[at]]
        if kind == 2 and isinstance(values[at], str):
            return [*values[:at], values[at] + choose.choice(("x", "(", ".")), *values[at + 1 :]]
        new = changed_value(values[at], choose) if isinstance(values[at], dict | list) else choose.choice(VALUES)
        return [*values[:at], new, *values[at + 1 :]]
    return choose.choice(VALUES)


def dumps(values: Any) -> str:
    """JSON, with `Raw` texts as they are."""
    if isinstance(values, Raw):
        return str(values)
    if isinstance(values, dict):
        return "{" + ", ".join(f"{json.dumps(key)}: {dumps(value)}" for key, value in values.items()) + "}"
    if isinstance(values, list):
        return "[" + ", ".join(map(dumps, values)) + "]"
    return json.dumps(values)


def change_lines(content: bytes, choose: random.Random) -> bytes:
    """One line of JSON lines changed, repeated or gone."""
    lines = content.split(b"\n")
    at = choose.randrange(len(lines))
    kind = choose.randrange(6)
    if kind == 0:
        return b"\n".join(lines[:at] + lines[at + 1 :])
    if kind == 1:
        return b"\n".join([*lines, *lines])
    return b"\n".join([*lines[:at], change_json(lines[at], choose), *lines[at + 1 :]])


BOMB = "\n".join(
    ["b0: &b0 [x, x, x, x, x, x, x, x, x, x]"]
    + [f"b{i}: &b{i} [{', '.join([f'*b{i - 1}'] * 10)}]" for i in range(1, 12)]
)
YAML_VALUES = (
    *(
        "",
        "~",
        "yes",
        "0x1f",
        "1e-4",
        "1e999",
        ".nan",
        ".inf",
        "-.inf",
        "9" * 5000,
        "2001-13-99",
        "2001-01-01",
        "[",
        "{",
    ),
    *(
        "[1, 2",
        "{a: 1, a: 2}",
        "&a [*a]",
        "*missing",
        "!!python/object/apply:os.system [id]",
        "!!binary xx",
        "!!set {a}",
    ),
    *(
        "'",
        '"',
        "|",
        ">",
        "? x",
        "[" * 5000,
        "{a: " * 2000,
        "<<: *x",
        "'\x07'",
        "- - - -",
        "{1: 2}",
        "{[1]: 2}",
        "{r: 8}",
    ),
    *("{r: .inf}", "{r: 1e30}", "{r: 100000000000}", "{lora_alpha: .nan}", "{target_modules: 3}", "{r: [[[[]]]]}"),
    *("a" * 100_000, "!!float x", "!!int x", "!!timestamp x", "1:2:3", "0b", "0o8", "true", "None", "-1", "0", "1.5"),
    *("{num_virtual_tokens: 10000000000}", "\n  a: &x {b: *x}", "[" + "a, " * 10_000 + "]", "{method_args: {r: 1}}"),
)


def change_yaml(content: bytes, choose: random.Random) -> bytes:
    """One line of YAML with another value, at another depth, twice there or gone; or aliases that grow and grow."""
    lines = content.decode("utf-8", "replace").split("\n")
    at, kind = choose.randrange(len(lines)), choose.randrange(9)
    name = lines[at].partition(":")[0]
    if kind == 0:
        lines[at : at + 1] = []
    elif kind == 1:
        lines[at:at] = [lines[at]]
    elif kind == 2:
        lines[at] = choose.choice(("  ", "\t", "- ", "? ")) + lines[at]
    elif kind == 3:
        lines[at:at] = [f"{choose.choice(('x', 'lr', 'method', '1', '~', '[a]', '{}'))}: {choose.choice(YAML_VALUES)}"]
    elif kind == 4:
        lines[at:at] = [BOMB, f"{name or 'x'}: *b11"] if choose.random() < 0.5 else [BOMB]
    else:
        lines[at] = f"{name}: {choose.choice(YAML_VALUES)}"
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def change_safetensors(content: bytes, choose: random.Random) -> bytes:
    """Another header, another length of it, other numbers in the tensors."""
    if len(content) < 8:
        return change_bytes(content, choose)
    size, kind = struct.unpack("<Q", content[:8])[0], choose.randrange(8)
    header, rest = content[8 : 8 + size], content[8 + size :]
    if kind == 0:
        size = choose.choice((0, 1, max(0, size - 1), min(size + 1, 2**64 - 1), 2**31, 2**63, 2**64 - 1))
        return struct.pack("<Q", size) + content[8:]
    if kind == 1 and rest:
        at = choose.randrange(len(rest))
        return content[: 8 + size + at] + choose.choice((b"\x00\x00\xc0\x7f", b"\xff" * 4, bytes(4))) + rest[at + 4 :]
    if kind == 2:
        return content + choose.randbytes(8)
    changed = change_json(header, choose)
    if kind < 5:
        changed = _renamed(header, choose)
    return struct.pack("<Q", len(changed)) + changed + rest


def _renamed(header: bytes, choose: random.Random) -> bytes:
    """A header with another name, shape or dtype of one tensor, which may still be one."""
    try:
        values = json.loads(header)
        name = choose.choice([key for key in values if key != "__metadata__"])
        entry = dict(values[name])
        shape, kind = list(entry["shape"]), choose.randrange(6)
    except (ValueError, RecursionError, IndexError, KeyError, TypeError):
        return change_json(header, choose)
    if kind == 0:
        entry["shape"] = shape[::-1]
    elif kind == 1:
        entry["shape"] = [1, *shape]
    elif kind == 2:
        entry["dtype"] = choose.choice(
            ("F32", "I32", "U32", "F16", "BF16", "I64", "F64", "BOOL", "U8", "F8_E4M3", "C64")
        )
    elif kind == 3:
        values = {k: v for k, v in values.items() if k != name}
    if kind == 4:
        values["__metadata__"] = choose.choice(VALUES)
    if kind != 3:
        renamed = (
            name if kind != 5 else choose.choice((name + "x", "x", "", name.replace("lora_A", "lora_Z"), name[:-1]))
        )
        values = {(renamed if k == name else k): (entry if k == name else v) for k, v in values.items()}
    return dumps(values).encode("utf-8", "surrogatepass")
