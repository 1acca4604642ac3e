"""Data from files of every format, folders, `datasets` and several places: the same records, the same errors by row."""

import bz2
import csv
import gzip
import json
import lzma
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_folder import byte_tokenizer

import minipeft.train.tokens
from minipeft.train import DataError, TrainConfig, prepare_data, read_records
from minipeft.train.encoding import encode_records
from minipeft.train.errors import MissingExtraError
from minipeft.train.records import as_object, iterate_records

datasets = pytest.importorskip("datasets", reason="datasets is not installed")
pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
import pyarrow.parquet as pq  # noqa: E402

ROWS = [{"prompt": f'Ask {i}, \u2028with "quotes"\nand lines', "completion": f"answer {i}"} for i in range(7)]
TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello", "weight": 1}]


def jsonl(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """The rows in the format that the file's name says."""
    name = path.name
    if name.endswith((".csv", ".tsv")):
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            table = csv.DictWriter(file, list(rows[0]), delimiter="\t" if name.endswith(".tsv") else ",")
            table.writeheader()
            table.writerows({k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()} for row in rows)
    elif name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=3)
    elif name.endswith(".json"):
        path.write_text(json.dumps(rows, indent=2))
    else:
        packers: dict[str, Any] = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
        path.write_bytes(packers.get(path.suffix, bytes)(jsonl(rows)))
    return path


def seen(data: str | Path) -> list[dict[str, Any]]:
    return [as_object(record) for record in read_records(data)]


FILES = ["a.jsonl", "a.ndjson", "a.json", "a.csv", "a.tsv", "a.parquet", "a.jsonl.gz", "a.jsonl.bz2", "a.jsonl.xz"]


@pytest.mark.parametrize("name", FILES)
def test_every_format_gives_the_same_records(tmp_path: Path, name: str) -> None:
    assert seen(write(tmp_path / name, ROWS)) == ROWS
    talks = [{"messages": TALK}, {"messages": [TALK[0], {**TALK[1], "content": "Bye"}]}]
    if name.endswith((".csv", ".tsv", ".parquet")):  # tables give every message the fields of all
        talks[0]["messages"] = [dict(m) for m in TALK]
    assert seen(write(tmp_path / f"talks.{name}", talks)) == talks


@pytest.mark.parametrize("name", FILES)
def test_a_bad_row_is_named_by_file_and_row(tmp_path: Path, name: str) -> None:
    bad = [*ROWS[:4], {"prompt": "p", "completion": " "}, *ROWS[4:]]
    path = write(tmp_path / name, bad)
    # In a table of texts, each of these four rows takes two lines after the header.
    line = 10 if name.endswith((".csv", ".tsv")) else 5
    with pytest.raises(DataError, match="expected a non-empty 'completion': there is nothing to learn") as raised:
        read_records(path)
    assert str(raised.value).startswith(f"{path}:{line}: ")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"text\nfine\n\xff\n", r":3: expected UTF-8 text, found byte 0xff"),
        ("a.csv", b"text,text\na,b\n", r":1: expected every column once"),
        ("a.csv", b'text\n"open\n', r":2: expected a row of a table with ','"),
        ("a.csv", b"text\na,b\n", r":2: expected 1 cells as in the header, found 2"),
        ("a.csv", b"text;id\na;3\n", r":2: expected exactly one of .*found keys \['text;id'\]"),
        ("a.csv", b"messages\nnot json\n", r":2: expected JSON in the column 'messages', found invalid JSON"),
        ("a.csv", b"text\n", "the data set is empty"),
        ("a.json", b'[{"text": "a"}, 3]', r":2: expected a JSON object, found a number"),
        ("a.json", b'[{"text": "a"},', r"a\.json: expected a list of objects, found invalid JSON .*line 1"),
        ("a.json", b"[" * 100_000, "nested too deep|invalid JSON"),
        ("a.json", b"[]", "the data set is empty"),
        ("a.jsonl.gz", gzip.compress(jsonl(ROWS))[:-20], "the compressed file is damaged or cut off"),
        ("a.jsonl.gz", jsonl(ROWS), "the compressed file is damaged or cut off"),
        ("a.jsonl.xz", jsonl(ROWS), "the compressed file is damaged or cut off"),
        ("a.jsonl.bz2", jsonl(ROWS), "cannot read the data file"),
        ("a.parquet", b"PAR1 is how it begins", "cannot read the Parquet file"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as raised:
        read_records(path)
    assert str(raised.value).startswith(str(path)) and "\n" not in str(raised.value)


def test_texts_in_parquet_that_are_no_utf8_are_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": pa.array([b"fine", b"\xff\xfe"]).view(pa.string())}), path)
    with pytest.raises(DataError, match=r"a\.parquet: cannot read the Parquet file: .*utf-8"):
        read_records(path)
    broken = datasets.Dataset(pa.table({"text": pa.array([b"fine", b"\xff\xfe"]).view(pa.string())}))
    broken.save_to_disk(tmp_path / "folder")
    with pytest.raises(DataError, match=r"folder: the datasets library cannot read row 2: .*utf-8"):
        read_records(tmp_path / "folder")


def test_long_cells_are_read_and_the_limit_of_others_stays(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    assert len(read_records(write(tmp_path / "a.csv", [{"text": "x" * 300_000}]))[0].text or "") == 300_000
    assert csv.field_size_limit() == before


def test_folders_that_datasets_saved_and_the_parts_in_them(tmp_path: Path) -> None:
    train, test = datasets.Dataset.from_list(ROWS[:4]), datasets.Dataset.from_list(ROWS[4:])
    train.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=train, test=test).save_to_disk(tmp_path / "two")
    assert seen(tmp_path / "one") == seen(tmp_path / "two") == seen(f"{tmp_path}/two#train") == ROWS[:4]
    assert seen(f"{tmp_path}/two#test") == ROWS[4:]
    with pytest.raises(DataError, match=r"expected one of the parts \['train', 'test'\], got 'dev'"):
        read_records(f"{tmp_path}/two#dev")
    with pytest.raises(DataError, match="the data set has none"):
        read_records(f"{tmp_path}/one#test")


def test_a_folder_of_files_is_read_by_name_and_never_its_test_part_unasked(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "README.md").write_text("about")
    write(folder / "part-1.jsonl", ROWS[3:])
    write(folder / "part-0.parquet", ROWS[:3])
    assert seen(folder) == ROWS
    write(folder / "test-0.jsonl", ROWS[:1])
    with pytest.raises(DataError, match=r"expected the files of one part.*#test"):
        read_records(folder)
    assert seen(f"{folder}#test") == ROWS[:1]
    with pytest.raises(DataError, match=r"expected files of the part 'dev', found those of \['test'\]"):
        read_records(f"{folder}#dev")
    with pytest.raises(DataError, match="expected no part"):
        read_records(f"{folder}/part-1.jsonl#train")
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="found a directory without any"):
        read_records(tmp_path / "none")


def test_hub_names_are_loaded_by_datasets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[Any] = []

    def load(*arguments: Any) -> Any:
        asked.append(arguments)
        return datasets.DatasetDict(
            train=datasets.Dataset.from_list(ROWS[:2]), test=datasets.Dataset.from_list(ROWS[2:])
        )

    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"^someone/talks: no such file, and the datasets library cannot load it"):
        read_records("someone/talks")  # the tests are offline
    monkeypatch.setattr(datasets, "load_dataset", load)
    assert seen("someone/talks") == ROWS[:2]
    assert seen("someone/talks#main/test") == ROWS[2:]
    assert asked == [("someone/talks", None), ("someone/talks", "main")]
    # What looks like a file is one that is missing.
    for name in ("someone/talks.jsonl", "talks", "a/b/c", "/someone/talks"):
        with pytest.raises(DataError, match="cannot read the data file: No such file"):
            read_records(name)
    (tmp_path / "someone").mkdir()
    with pytest.raises(DataError, match="cannot read the data file: No such file"):
        read_records("someone/talks")


@pytest.mark.parametrize(("place", "package"), [("a.parquet", "pyarrow"), ("someone/talks", "datasets")])
def test_without_its_library_a_format_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, place: str, package: str
) -> None:
    write(tmp_path / "a.parquet", ROWS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, f"{package}.parquet", None)
    with pytest.raises(MissingExtraError, match=f"pip install {package}"):
        read_records(place)


SHARE_GPT = {
    "system": "Be short.",
    "conversations": [
        {"from": "human", "value": "Weather?"},
        {"from": "function_call", "value": '{"name": "look", "arguments": {"where": "here"}}'},
        {"from": "observation", "value": "rain"},
        {"from": "gpt", "value": "Rain.", "weight": 0},
        {"from": "human", "value": "And now?"},
        {"from": "gpt", "value": "Sun."},
    ],
    "tools": '[{"name": "look"}]',
}
ALPACA = {"instruction": "Add.", "input": "1 and 2", "output": "3", "text": "Below is an instruction ..."}


def test_share_gpts_and_alpacas_names_are_messages(tmp_path: Path) -> None:
    (talk,) = seen(write(tmp_path / "a.jsonl", [SHARE_GPT]))
    call = {"type": "function", "function": {"name": "look", "arguments": {"where": "here"}}}
    assert talk == {
        "messages": [
            {"role": "system", "content": "Be short."},
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "rain"},
            {"role": "assistant", "content": "Rain.", "weight": 0},
            {"role": "user", "content": "And now?"},
            {"role": "assistant", "content": "Sun."},
        ],
        "tools": [{"name": "look"}],
    }
    rows = [{**ALPACA, "input": "", "system": "S", "history": [["a", "b"]]}, ALPACA]
    for name in ("b.jsonl", "b.parquet"):
        second, first = (row["messages"] for row in seen(write(tmp_path / name, rows)))
        assert [(m["role"], m["content"]) for m in first] == [("user", "Add.\n1 and 2"), ("assistant", "3")]
        assert [m["content"] for m in second] == ["S", "a", "b", "Add.", "3"]
        assert [m["role"] for m in second] == ["system", "user", "assistant", "user", "assistant"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"conversations": []}, "expected 'conversations' to be a non-empty list"),
        ({"conversations": [{"from": "gpt"}]}, "message 1 of 'conversations' to have 'from' and 'value', found keys"),
        ({"conversations": [{"from": "narrator", "value": "x"}]}, "one of human, user, gpt, .*got 'narrator'"),
        ({"conversations": [{"from": "human", "value": 3}]}, "'content' of message 1 to be a string, found a number"),
        ({"conversations": [{"from": "human", "value": "x"}]}, "at least one non-empty message with role 'assistant'"),
        ({"conversations": [{"from": "function_call", "value": "x"}]}, "'value' of message 1 .* to be JSON"),
        ({"instruction": "a", "output": ""}, "expected a non-empty 'output'"),
        ({"instruction": "a", "output": 3}, "expected 'output' to be a string, found int"),
        ({"instruction": "a", "output": "b", "history": [["c"]]}, "entry 1 of 'history'"),
        ({"instruction": "a", "output": "b", "history": 3}, "expected 'history' to be a list"),
        ({"instruction": "a"}, r"expected exactly one of .*ShareGPT's.*found keys \['instruction'\]"),
        ({"instruction": "a", "output": "b", "prompt": "p", "completion": "c", "text": "t"}, "expected exactly one of"),
    ],
)
def test_bad_records_of_theirs_are_named_too(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "a.jsonl", [{"text": "fine"}, row])
    with pytest.raises(DataError, match=message) as raised:
        read_records(path)
    assert str(raised.value).startswith(f"{path}:2: ")


def prepared(data: str, **settings: Any) -> Any:
    config = TrainConfig(model="m", output_dir="o", data=data, **settings)
    return prepare_data(config, byte_tokenizer(), 256)


def completions(part: Any) -> Counter[str]:
    tokenizer = byte_tokenizer()
    return Counter(tokenizer.decode(example.input_ids).split("and lines")[1] for example in part.examples)


def test_several_places_have_their_shares_and_what_is_held_out_is_not_learned(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a.jsonl", ROWS[:4]), write(tmp_path / "b,2.csv", ROWS[4:])
    data, _ = prepared(f"{b}")  # a name with a comma in it
    assert len(data) == 3
    b = b.rename(tmp_path / "b.csv")
    data, _ = prepared(f"{a}, {b}")
    assert sorted(completions(data).values()) == [1] * 7 and not data.notices
    data, _ = prepared(f"{a}:2.5,{b}:0.4", seed=3)
    counts = completions(data)
    assert sorted(counts[f"answer {i}<|im_end|>"] for i in range(4)) == [2, 2, 3, 3]
    assert sum(counts[f"answer {i}<|im_end|>"] for i in range(4, 7)) == round(0.4 * 3)
    assert data.notices == ["11 records an epoch of 7, by the shares of the files"]
    assert data.content_hash() == prepared(f"{a}:2.5,{b}:0.4", seed=3)[0].content_hash()
    others = {prepared(f"{a}:2.5,{b}:0.4", seed=seed)[0].content_hash() for seed in range(8)}
    assert len(others) > 1
    train, held = prepared(f"{a}:3,{b}", eval_fraction=0.5)
    assert len(held) == 4 and not completions(train).keys() & completions(held).keys()
    assert sum(completions(train).values()) > len(train.examples) - 1 > 2
    for wrong, message in ((f"{a}:0", "expected a share above 0"), (f"{b}:0.1", "round to none"), ("x.csv:2", "x.csv")):
        with pytest.raises(DataError, match=message):
            prepared(wrong)
    with pytest.raises(DataError, match="only what is trained on has one"):
        prepared(str(a), eval_data=f"{b}:2")


def test_records_are_read_one_by_one_and_their_tokens_kept_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.jsonl", "a.jsonl.gz", "a.csv"):
        path = write(tmp_path / name, [{"text": "one"}, {"text": " "}])
        records = iterate_records(path)
        assert next(records).text == "one"  # before what is wrong with the second is known
        with pytest.raises(DataError):
            next(records)
    tokenizer = byte_tokenizer()
    whole = encode_records(read_records(write(tmp_path / "b.jsonl", ROWS)), tokenizer, 256)
    monkeypatch.setattr(minipeft.train.tokens, "PIECE", 100)
    pieces = encode_records(iterate_records(tmp_path / "b.jsonl"), tokenizer, 256)
    store: Any = pieces.examples
    assert len(store._pieces) > 1 and all(isinstance(piece, np.memmap) for piece in store._pieces)
    assert list(store) == list(whole.examples) and pieces.content_hash() == whole.content_hash()
    assert (pieces.tokens, pieces.loss_tokens) == (whole.tokens, sum(e.loss_tokens for e in whole.examples))
    chosen = store.select([5, 0, 5])
    assert [chosen[0], chosen[-1], *chosen[1:2]] == [store[5], store[5], store[0]] and chosen.lengths()[1] == len(
        store[0]
    )
    with pytest.raises(IndexError):
        chosen[3]


def test_a_hash_of_dated_data_is_that_of_its_json(tmp_path: Path) -> None:
    import hashlib

    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% set now = strftime_now('%d') %}" + tokenizer.chat_template
    talks = [{"messages": [dict(m) for m in TALK]}, {"messages": [dict(m) for m in TALK]}]
    data = encode_records(read_records(write(tmp_path / "a.jsonl", talks)), tokenizer, 256)
    whole = [json.dumps(tokenizer.chat_template), 256, "error", talks, sorted(tokenizer.get_vocab().items())]
    assert data.content_hash() == hashlib.sha256(json.dumps(whole).encode()).hexdigest()
