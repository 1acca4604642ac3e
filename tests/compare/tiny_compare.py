"""A task for the tests of comparisons: which letter comes first?"""

from tiny_folder import write_jsonl

# A text of another kind.
OTHER = "The quick brown fox jumps over the lazy dog. " * 12


def letters(folder):
    """Forty records and the other text, as arguments of a comparison."""
    records = [{"prompt": f"{c}{i}{d} ->", "completion": f" {c}"} for i in range(10) for c in "ab" for d in "xy"]
    (folder / "other.txt").write_text(OTHER)
    return {"data": str(write_jsonl(folder / "data.jsonl", records)), "other_text": str(folder / "other.txt")}


def quiet(line):
    """What a comparison says is not shown."""


def forbidden(order):
    """For a run that must not be done."""
    raise AssertionError(f"{order.run.name} is done again")
