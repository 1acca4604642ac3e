"""`minipeft data`, and data of several formats given to the other commands."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from command_line import ok, refused
from test_cli import QUICK
from tiny_folder import save_model, write_jsonl

from minipeft.commands.cli import main


def talk(words: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": words}]}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "base")


def tokens(words: str) -> tuple[int, int]:
    """Tokens of a talk and learned ones, one a byte, counted by hand: markers and ends are one each."""
    around = len("user\nHi") + len("\nassistant\n") + 3
    return around + len(words.encode()) + 1, len(words.encode()) + 1


def test_the_report_counts_shows_and_names_the_worst(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["no", "yes", "a\x1b[31mb", "l" * 60]
    file = write_jsonl(tmp_path / "a.jsonl", [talk(word) for word in words])
    with file.open("a") as lines:
        lines.write('{oops\n{"text": 3}\n')
    arguments = ["data", str(file), "--model", str(base), "--max-length", "50", "--show", "3"]
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert said.err == "minipeft: error: 3 of 6 records cannot be trained on; the worst are named above\n"
    total, learned = (sum(part) for part in zip(*map(tokens, words), strict=True))
    assert (
        f"6 records, {total} tokens, of which {learned} are learned\n  2 cannot be read\n  1 with more than" in said.out
    )
    # As the chat template writes it, and nothing that steers a terminal.
    assert "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n>>>no<|im_end|><<<\n" in said.out
    assert f"--- {file}:3: {tokens(words[2])[0]} tokens" in said.out
    assert ">>>a\\x1b[31mb<|im_end|><<<" in said.out and "\x1b" not in said.out
    rows = re.findall(rf"^  {re.escape(str(file))}:(\d+) +(.*)$", said.out, re.MULTILINE)
    assert [row for row, _ in rows] == ["5", "6", "4", "1", "2", "3"]
    assert rows[0][1].startswith("expected one JSON object, found invalid JSON")
    most = tokens(words[3])[0]
    assert rows[2][1] == f"{most} tokens, {most - 50} more than 50"
    assert rows[3][1] == f"3 of {tokens('no')[0]} tokens learned"
    counts = [int(n) for n in re.findall(r"^ +\d+ to \d+ .*?(\d+)$", said.out, re.MULTILINE)]
    assert sum(counts) == 4 and counts[-1] == 1 and len(counts) <= 12


def test_what_is_cut_is_shown_and_colors_are_for_terminals(base: Path, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [talk("yes and no"), talk("y" * 900)])
    where = ["data", file, "--model", base, "--too-long", "truncate", "--show", "1"]
    length = tokens("yes and no")[0] - 4  # behind it lie "no" with the space before, and the end
    said = ok(*where, "--max-length", length)
    assert ">>>yes and<<<[cut:  no<|im_end|>]\n" in said and "2 with more than" in said and "are cut" in said
    said = ok(*where, "--max-length", length, "--color", "always")
    assert "\x1b[32myes and\x1b[0m\x1b[31m no<|im_end|>\x1b[0m" in said
    assert "and all that is learned lies behind them" in ok(*where, "--max-length", 5)
    assert "are left out" in ok(*where[:4], "--max-length", length, "--too-long", "drop", "--worst", 0)
    assert "tokens more" in ok(*where[:4], "--show", 2, "--max-length", 256, "--too-long", "drop")


def test_a_message_that_the_template_leaves_out_is_among_the_worst(base: Path, tmp_path: Path) -> None:
    template = "{% for m in messages if m['role'] != 'system' %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
    (tmp_path / "template.jinja").write_text(template)
    told = {"messages": [{"role": "system", "content": "Be kind"}, *talk("yes")["messages"]]}
    file = write_jsonl(tmp_path / "a.jsonl", [talk("no"), told])
    said = ok("data", file, "--model", base, "--chat-template", tmp_path / "template.jinja")
    assert "1 have a message that the chat template does not write as it is" in said
    assert re.search(rf"the worst 2\n  {re.escape(str(file))}:2 .*role 'system'", said)


def test_bad_input_is_one_sentence(base: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    assert "the data set is empty" in refused("data", empty, "--model", base)
    assert "No such file" in refused("data", tmp_path / "none.jsonl", "--model", base)
    assert "must not be empty" in refused("data", "", "--model", base)
    assert "0 or greater, got '-1'" in refused("data", empty, "--model", base, "--show=-1")


def test_train_and_eval_take_every_format(base: Path, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    import pyarrow

    rows = [{"instruction": f"Ask {i}", "input": "", "output": "yes"} for i in range(8)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "b.parquet")
    data = f"{tmp_path}/a.json:2,{tmp_path}/b.parquet:0.5"
    said = ok("train", "--model", base, "--data", data, "--output", tmp_path / "run", *QUICK)
    assert "20 records an epoch of 16, by the shares of the files" in said
    where = ["eval", "--model", base, "--data", tmp_path / "b.parquet"]
    before, after = (
        float(re.findall(r"loss (\S+)", ok(*argv))[0])
        for argv in (where, [*where, "--adapter", tmp_path / "run/adapter"])
    )
    assert after < before - 0.5
    assert "only what is trained on has one" in refused("eval", "--model", base, "--data", f"{tmp_path}/b.parquet:2")
