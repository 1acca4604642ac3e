import pytest

from minipeft.train import DataError, make_records, read_jsonl

GOOD = b'{"text": "one"}\n'


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (b'{"text": "x"', "expected one JSON object, found invalid JSON .*column"),
        (b"[1]", "expected a JSON object, found a list"),
        (b"3", "expected a JSON object, found a number"),
        (b"null", "expected a JSON object, found null"),
        (b"{}", "expected exactly one of .*, found an empty object"),
        (b'{"a": 1}', r"expected exactly one of .*, found keys \['a'\]"),
        (b'{"text": "x", "prompt": "y"}', "expected exactly one of"),
        (b'{"text": 3}', "expected 'text' to be a string, found a number"),
        (b'{"text": " \\n"}', "expected a non-empty 'text'"),
        (b'{"prompt": "x"}', "expected key 'completion', found keys"),
        (b'{"completion": "x"}', "expected key 'prompt', found keys"),
        (b'{"prompt": "x", "completion": ""}', "expected a non-empty 'completion'"),
        (b'{"prompt": "x", "completion": null}', "expected 'completion' to be a string, found null"),
        (b'{"text": "\xff"}', "expected UTF-8 text, found byte 0xff at column 11"),
        (b'{"text": "\\ud800"}', "unpaired surrogate"),
        (b"[" * 100_000, "nested too deep|invalid JSON"),
        (b'{"messages": []}', "'messages' to be a non-empty list, found an empty list"),
        (b'{"messages": "hi"}', "'messages' to be a non-empty list, found a string"),
        (b'{"messages": [3]}', "expected message 1 to be an object, found a number"),
        (b'{"messages": [{"content": "x"}]}', "expected key 'role' of message 1"),
        (b'{"messages": [{"role": "user", "content": ["x"]}]}', "'content' of message 1 to be a string, found a list"),
        (b'{"messages": [{"role": "user", "content": "x"}]}', "at least one non-empty message with role 'assistant'"),
    ],
)
def test_bad_record_names_file_line_and_expectation(tmp_path, bad, message):
    path = tmp_path / "train.jsonl"
    path.write_bytes(GOOD + b"\n" + GOOD + bad + b"\n" + GOOD)
    with pytest.raises(DataError, match=message) as raised:
        read_jsonl(path)
    assert str(raised.value).startswith(f"{path}:4: ")
    assert (raised.value.path, raised.value.line) == (str(path), 4)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("content", [b"", b"\n \n\t\n", b"\xef\xbb\xbf"])
def test_file_without_records_is_an_error(tmp_path, content):
    path = tmp_path / "empty.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"empty\.jsonl: the data set is empty"):
        read_jsonl(path)


def test_missing_file_and_directory_are_errors(tmp_path):
    with pytest.raises(DataError, match=r"nope\.jsonl: cannot read the data file: No such file"):
        read_jsonl(tmp_path / "nope.jsonl")
    with pytest.raises(DataError, match="found a directory"):
        read_jsonl(tmp_path)


def test_blank_lines_byte_order_mark_and_unicode_line_separators_are_fine(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD + b"\r\n" + '{"text": "a\u2028b", "id": 7}'.encode())
    records = read_jsonl(path)
    assert [r.text for r in records] == ["one", "a\u2028b"]
    assert [r.line for r in records] == [1, 3]


def test_records_in_memory_are_checked_and_counted():
    with pytest.raises(DataError, match=r"^record 2: expected exactly one of"):
        make_records([{"text": "x"}, {"t": "y"}])
    with pytest.raises(DataError, match="the data set is empty"):
        make_records([])
