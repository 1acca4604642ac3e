"""The checks of what is read from files, one by one; the fuzzer in tests/faults has them together."""

import json
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from tiny import tiny_llama

from minipeft import LoraConfig, get_peft_model
from minipeft.files import atomic_path
from minipeft.stored import DEEPEST, brief, check_fields, fits, naming, parse_json, parse_yaml, read_object, shown


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"[" * 10_000, "nested too deep|Expecting"),
        (b"[" * 10_000 + b"]" * 10_000, "nested too deep"),
        (b"[" * (DEEPEST + 1) + b"]" * (DEEPEST + 1), "nested too deep"),
        (b'{"a": NaN}', "NaN is no JSON number"),
        (b'{"a": -Infinity}', "-Infinity is no JSON number"),
        (b'{"a": 1e999}', "1e999 is larger than any number"),
        (b'{"a": "\\ud800"}', "unpaired surrogate"),
        (b'{"\\ud800": 1}', "unpaired surrogate"),
        (b"\xff", "can't decode byte"),
        (b"9" * 5000, "4300"),
        (b"", "Expecting value"),
    ],
)
def test_json_that_is_none_is_refused_by_name(content: bytes, said: str) -> None:
    with pytest.raises(ValueError, match=f"^config.json is not valid JSON: .*({said})"):
        parse_json(content, "config.json")


def test_json_reads_what_json_may_hold(tmp_path: Path) -> None:
    values = {"a": [1, -2.5e10, True, None, "\U0001f984", {"b": {}}], "": 10**100}
    deep = json.loads("[" * (DEEPEST - 1) + "]" * (DEEPEST - 1))
    (tmp_path / "a.json").write_text(json.dumps({**values, "deep": deep[0]}))
    assert read_object(tmp_path / "a.json") == {**values, "deep": deep[0]}


def bomb(levels: int) -> str:
    return "b0: &b0 [x, x]\n" + "".join(f"b{i}: &b{i} [*b{i - 1}, *b{i - 1}]\n" for i in range(1, levels))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (bomb(60), "aliases stand for more than 1,000,000"),
        ("a: &a [*a]", "aliases stand for more"),
        ("a: &a {b: {c: *a}}", "aliases stand for more"),
        ("a: !!timestamp x", "kind that its tag says"),
        ("a: !!bool x", "kind that its tag says"),
        ("[" * 5000 + "]" * 5000, "nested too deep"),
    ],
)
def test_yaml_that_harms_is_refused(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse_yaml(text)


def test_yaml_reads_as_pyyaml_does() -> None:
    for text in ("", "a: 1", bomb(10), "a: &a [1]\nb: *a\nc: {<<: {x: 1}, y: 2}", "- 2001-01-01\n- 1e5\n- ~"):
        assert parse_yaml(text) == yaml.safe_load(text)
    with pytest.raises(yaml.YAMLError):
        parse_yaml("a: !!python/object/apply:os.getcwd []")


@pytest.mark.parametrize(
    ("hint", "right", "wrong"),
    [
        (int, (0, -3), (True, 1.0, "1", [1], 2**63)),
        (float, (0, 1.5), (True, "1", float("nan"), float("inf"), 10**400)),
        (bool, (True,), (0, "true")),
        (bool | str, (True, "x"), (1, [])),
        (set[str] | list[str] | str | None, ("x", ["x"], {"x"}, None), (1, [1], {"x": 1})),
        (dict[str, int], ({}, {"a": 1}), ([], {"a": 1.5}, {"a": "x"})),
    ],
)
def test_kinds_of_fields(hint: object, right: tuple[object, ...], wrong: tuple[object, ...]) -> None:
    assert all(fits(value, hint) for value in right)
    assert not any(fits(value, hint) for value in wrong)


def test_a_field_of_another_kind_is_named_with_its_file() -> None:
    check_fields({"r": 8, "lora_alpha": None, "x": 3}, LoraConfig, "file")
    with pytest.raises(ValueError, match=r"^file: lora_alpha must be a finite number, got 'x'$"):
        check_fields({"lora_alpha": "x"}, LoraConfig, "file")
    with pytest.raises(ValueError, match=r"^file: rank_pattern must be a mapping of whole numbers, got \[1\]$"):
        check_fields({"rank_pattern": [1]}, LoraConfig, "file")


def test_errors_are_named_once_and_stay_short() -> None:
    with pytest.raises(ValueError, match=r"^a file: wrong$"), naming("a file"):
        raise ValueError("wrong")
    with pytest.raises(ValueError, match=r"^a file is wrong$"), naming("a file"):
        raise ValueError("a file is wrong")
    with pytest.raises(ValueError, match=r"^a file: not enough memory"), naming("a file"):
        raise RuntimeError("not enough memory: you tried to allocate 4 bytes")
    with pytest.raises(RuntimeError, match=r"^a bug"), naming("a file"):
        raise RuntimeError("a bug")
    assert brief("abc") == "abc" and len(brief("a" * 10_000)) < 1100 and len(shown(["x"] * 1000)) < 250


@pytest.fixture
def _full_disk() -> Iterator[None]:
    """Files end after 2,000 bytes, as on a disk that is full."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.usefixtures("_full_disk")
def test_an_error_of_writing_names_the_file_and_leaves_the_old_one(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("old")
    with (
        pytest.raises(OSError, match=r"File too large.*notes"),
        atomic_path(tmp_path / "notes") as temporary,
        open(temporary, "w", buffering=1) as file,
    ):
        file.write("x" * 10_000)
    assert (tmp_path / "notes").read_text() == "old" and len(list(tmp_path.iterdir())) == 1
    model = get_peft_model(tiny_llama(), LoraConfig(r=8, target_modules=["q_proj"]))
    with pytest.raises(OSError, match=r"cannot write it: .*adapter_model\.safetensors"):
        model.save_pretrained(tmp_path / "adapter")
    assert list((tmp_path / "adapter").iterdir()) == []
