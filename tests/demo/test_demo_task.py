"""The demo's data: balanced, without leaks between the parts, read strictly."""

import random
from collections import Counter

import pytest

from minipeft.demo.data import (
    LABELS,
    MAX_LENGTH,
    MIN_LENGTH,
    Snippet,
    make_task,
    own_data,
    prompt,
    read_snippets,
    sentiment_data,
)
from minipeft.train.errors import DataError

RATINGS = {"terrible": -3.0, "bad": -1.0, "neutral": 0.0, "good": 1.0, "great": 3.0}


def snippets(documents=40):
    """Texts of random words, which share few; each document has one of every label."""
    rng = random.Random(0)
    return [
        Snippet(" ".join(f"w{rng.randrange(1000)}" for _ in range(8)), rating, f"source/{document}")
        for document in range(documents)
        for rating in RATINGS.values()
    ]


@pytest.mark.parametrize(
    ("rating", "label"),
    [
        (-4, "terrible"),
        (-2.01, "terrible"),
        (-2, "bad"),
        (-0.5, "neutral"),
        (0.49, "neutral"),
        (0.5, "good"),
        (2, "great"),
    ],
)
def test_the_rating_decides_the_label(rating, label):
    assert Snippet("x", rating, "d").label == label


def test_every_label_is_equally_often_in_both_parts():
    task = make_task(snippets(), train_rows=63, held_out_rows=27, seed=0)
    assert Counter(s.label for s in task.train) == dict.fromkeys(LABELS, 12)
    assert Counter(s.label for s in task.held_out) == dict.fromkeys(LABELS, 5)
    # Balanced from the beginning: the first ten rows hold every label twice.
    assert set(Counter(s.label for s in task.train[:10]).values()) == {2}


def test_no_document_gives_rows_to_both_parts():
    task = make_task(snippets(), 60, 25, seed=0)
    assert not {s.document for s in task.train} & {s.document for s in task.held_out}


@pytest.mark.parametrize("change", ["{}", "{}!!", "  {} ", "and {}"])
def test_a_near_copy_of_a_held_out_text_is_not_trained_on(change):
    originals = snippets()
    copies = [Snippet(change.format(s.text.upper()), s.rating, f"copy/{s.document}") for s in originals]
    task = make_task([*originals, *copies], 1000, 25, seed=3)
    seen = {_letters(s.text) for s in task.held_out}
    assert len(seen) == 25
    assert not any(text in _letters(s.text) or _letters(s.text) in text for s in task.train for text in seen)


def _letters(text):
    return "".join(c for c in text.lower() if c.isalnum())


def test_the_seed_alone_decides_the_rows():
    assert make_task(snippets(), 60, 25, 0) == make_task(snippets(), 60, 25, 0)
    assert make_task(snippets(), 60, 25, 0) != make_task(snippets(), 60, 25, 1)


def test_texts_too_short_or_too_long_are_left_out():
    odd = [Snippet("short", r, "a/1") for r in RATINGS.values()] + [
        Snippet("w " * 60, r, "a/2") for r in RATINGS.values()
    ]
    task = make_task([*snippets(), *odd], 1000, 25, seed=0)
    assert all(MIN_LENGTH <= len(s.text) <= MAX_LENGTH for s in (*task.train, *task.held_out))


def test_too_few_snippets_are_refused():
    with pytest.raises(DataError, match="too few"):
        make_task(snippets(documents=1), 10, 10, seed=0)


def test_files_are_read_with_entities_and_spaces_cleaned(tmp_path):
    (tmp_path / "reviews.tsv").write_bytes("7_1\t-1.25\tgood &amp; bad,  caf\u00e9\r\n7_2\t3\tx\n".encode())
    first, second = read_snippets(tmp_path)
    assert first == Snippet("good & bad, café", -1.25, "reviews/7")
    assert second.document == first.document
    assert first.record() == {"prompt": prompt("good & bad, café"), "completion": " bad"}


@pytest.mark.parametrize("line", ["1\t2", "1\tmany\ttext", "1 2 text"])
def test_a_bad_line_is_named(line, tmp_path):
    (tmp_path / "reviews.tsv").write_text(f"1\t2\tfine\n{line}\n")
    with pytest.raises(DataError, match=r"reviews\.tsv:2: expected id, rating and text"):
        read_snippets(tmp_path)
    (tmp_path / "reviews.tsv").unlink()
    with pytest.raises(DataError, match="no rated snippets"):
        read_snippets(tmp_path)


def test_sentiment_data_asks_for_the_five_labels(tmp_path):
    lines = [f"{s.document.split('/')[1]}_1\t{s.rating}\t{s.text}\n" for s in snippets()]
    (tmp_path / "source.tsv").write_text("".join(lines))
    data = sentiment_data(tmp_path, 50, 20, seed=0)
    assert (len(data.train), len(data.held_out)) == (50, 20)
    assert data.labels == (" terrible", " bad", " neutral", " good", " great")
    assert {record.completion for record in data.held_out} == set(data.labels)
    assert data.example not in {record.prompt for record in (*data.train, *data.held_out)}


def write(path, lines):
    path.write_text("".join(f"{line}\n" for line in lines))
    return str(path)


def test_own_data_is_split_without_repeated_records(tmp_path):
    lines = [f'{{"prompt": "p{i % 20}", "completion": " {"yes" if i % 2 else "no"}"}}' for i in range(60)]
    data = own_data(write(tmp_path / "d.jsonl", lines), 1000, 400, seed=0)
    prompts = [[record.prompt for record in part] for part in (data.train, data.held_out)]
    assert [len(part) for part in prompts] == [16, 4]
    assert len({*prompts[0], *prompts[1]}) == 20
    assert data.labels == (" no", " yes")
    data.write(tmp_path)
    assert own_data(str(tmp_path / "train.jsonl"), 1000, 400, 0).labels == data.labels


@pytest.mark.parametrize(
    "lines",
    [
        [f'{{"prompt": "p{i}", "completion": " {i}"}}' for i in range(40)],
        [f'{{"text": "t{i}"}}' for i in range(40)],
        [f'{{"messages": [{{"role": "assistant", "content": "m{i}"}}]}}' for i in range(40)],
        [f'{{"prompt": "p{i}", "completion": " {"yes" * (1 + i % 2)}"}}' for i in range(40)],
    ],
)
def test_free_text_has_no_labels(lines, tmp_path):
    data = own_data(write(tmp_path / "d.jsonl", lines), 1000, 400, seed=0)
    assert data.labels == ()
    data.write(tmp_path)
    assert len(own_data(str(tmp_path / "train.jsonl"), 1000, 400, 0).train) > 0


def test_one_record_cannot_be_split(tmp_path):
    with pytest.raises(DataError, match="at least two different records"):
        own_data(write(tmp_path / "d.jsonl", ['{"text": "a"}'] * 3), 10, 10, 0)
