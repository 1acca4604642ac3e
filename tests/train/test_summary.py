"""The card and the page of a run: its data, settings, losses and result, and nothing of the places it ran in."""

import html.parser
import re
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import make_config, make_data, make_model

from minipeft.train import Trainer, TrainingInterrupted, read_log


def trainer(folder: Path, **settings: Any) -> Trainer:
    config = make_config(folder, **{"log_every": 1, "max_steps": 12, "eval_every": 4, "save_every": 4} | settings)
    config.data = f"{folder.parent}/secret place/ta|lks.jsonl:2,someone/talks#test"
    return Trainer(make_model(), make_data(), config, eval_data=make_data(7, seed=1), progress_bar=False)


def test_the_card_says_what_was_done_and_not_where(tmp_path: Path) -> None:
    result = trainer(tmp_path / "run", lr=0.0123, page=True).train()
    card = (result.adapter_dir / "README.md").read_text()
    data, held = make_data(), make_data(7, seed=1)
    told = (
        f"- **Training data:** ta|lks.jsonl (2 times), someone/talks#test; records: {len(data)}; tokens: {data.tokens}"
    )
    assert f"{told}, of which {data.loss_tokens} are learned; evaluated on: a part of it held out: 7 records" in card
    assert f"{held.loss_tokens} learned tokens" in card
    assert "| `lr` | `0.0123` |" in card and "| `max_steps` | `12` |" in card and "| `seed` |" in card
    assert "secret place" not in card and str(tmp_path) not in card and "output_dir" not in card
    rows = re.findall(r"^\| (\d+) \| ([\d.]*) \| ([\d.]*) \|$", card, re.MULTILINE)
    log = read_log(result.log_path)
    losses = {row["step"]: row["loss"] for row in log if "loss" in row}
    held_out = {row["step"]: row["eval_loss"] for row in log if "eval_loss" in row}
    assert len(rows) >= 10 and {int(step) for step, _, _ in rows} >= {1, 4, 8, 12}
    for step, loss, evaluated in rows:
        assert not loss or float(loss) == pytest.approx(losses[int(step)], abs=1e-4)
        assert bool(evaluated) == (int(step) in held_out)
        assert not evaluated or float(evaluated) == pytest.approx(held_out[int(step)], abs=1e-4)
    assert "## Intended use" in card and card.startswith("---\n")


def test_a_resumed_runs_card_is_that_of_one_that_was_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = trainer(tmp_path / "whole").train()
    first = trainer(tmp_path / "run")
    monkeypatch.setattr(first, "_save", lambda save=first._save: (save(), setattr(first, "_stopping", True))[0])
    with pytest.raises(TrainingInterrupted):
        first.train()
    result = trainer(tmp_path / "run").train(resume=True)
    cards = [(folder / "README.md").read_text() for folder in (whole.adapter_dir, result.adapter_dir)]
    assert cards[0] == cards[1]


class Page(html.parser.HTMLParser):
    """Cells, points of the curve, dots, and what is loaded from elsewhere."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.curves: list[list[list[float]]] = []
        self.dots, self.outside, self.open = 0, 0, 0
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.outside += "src" in given or "href" in given
        self.dots += tag == "circle"
        if tag == "polyline":
            points = (given["points"] or "").split()
            self.curves.append([[float(x) for x in point.split(",")] for point in points])

    def handle_data(self, data: str) -> None:
        self.cells.append(data)


def test_the_page_stands_alone_and_draws_the_log(tmp_path: Path) -> None:
    result = trainer(tmp_path / "a<b", page=True).train()
    text = (tmp_path / "a<b" / "report.html").read_text()
    page = Page(text)
    assert not page.outside and "<script" not in text and "a&lt;b" in text
    assert page.dots == 3 and [len(curve) for curve in page.curves] == [12, 12]
    losses = [row["loss"] for row in read_log(result.log_path) if "loss" in row]
    # Higher on the page is a smaller y.
    by_height = sorted(range(12), key=lambda i: -page.curves[0][i][1])
    assert by_height == sorted(range(12), key=lambda i: losses[i])
    assert f"{losses[-1]:.4f}" in page.cells and "12" in page.cells
    assert not (trainer(tmp_path / "plain").train().adapter_dir.parent / "report.html").exists()
