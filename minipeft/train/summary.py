"""A finished run for people: what it was trained on and how, and how it went, in the adapter's card and on a page.

Of places only the last names are told: a card may be published, and the folders around a file are nobody's business.
Nothing here depends on the time or the machine, so that a run that was resumed has the card of one that was not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from minipeft.files import write_text
from minipeft.train import page
from minipeft.train.config import TrainConfig
from minipeft.train.encoding import EncodedDataset
from minipeft.train.report import running_mean
from minipeft.train.sources import is_on_hub, shares

Rows = list[tuple[str, str]]

# Settings that are no part of what was done: places, the machine, and what is told of a run.
_PLACES = (
    *("model", "data", "eval_data", "output_dir", "adapter", "chat_template", "device", "process_timeout"),
    *("tensorboard", "report_to", "plot", "page", "push_to_hub", "log_every", "save_every", "keep_last"),
    "optimizer_args",
)
_ALWAYS = ("method", "lr", "epochs", "batch_size", "seed")
# Rows of the table of losses, and the size of the picture.
_POINTS, _WIDTH, _HEIGHT = 10, 720, 300


@dataclasses.dataclass(frozen=True)
class Summary:
    """A run in tables: names and values.

    Attributes:
        log: rows of the run's log, see `report.read_log`.
    """

    data: Rows
    settings: Rows
    log: Sequence[Mapping[str, Any]]

    def points(self, key: str) -> list[tuple[int, float]]:
        """(step, value) of the rows that have it."""
        return [(row["step"], row[key]) for row in self.log if isinstance(row.get(key), int | float)]

    def last(self, key: str) -> Rows:
        """The last of these values, as a row; none where there is none."""
        return [(key, f"{value:.4f}") for _, value in self.points(key)[-1:]]


def summarize(
    config: TrainConfig, data: EncodedDataset, held_out: EncodedDataset | None, log: Sequence[Mapping[str, Any]]
) -> Summary:
    """The summary of a run over `data`."""
    rows = [("training data", _places(config.data)), ("records", f"{len(data):,}")]
    rows += [("tokens", f"{data.tokens:,}, of which {data.loss_tokens:,} are learned")]
    if held_out is not None:
        place = _places(config.eval_data) if config.eval_data else "a part of it held out"
        rows.append(("evaluated on", f"{place}: {len(held_out):,} records, {held_out.loss_tokens:,} learned tokens"))
    plain = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
    settings = [
        (name, str(value))
        for name, value in config.to_dict().items()
        if name not in _PLACES and value not in (None, {}) and (value != plain[name] or name in _ALWAYS)
    ]
    return Summary(rows, settings, log)


def _places(data: str) -> str:
    told = []
    for place, share in shares(data):
        name = place if is_on_hub(place.partition("#")[0]) else Path(place).name
        told.append(name if share == 1 else f"{name} ({share:g} times)")
    return ", ".join(told)


def complete_card(file: Path, summary: Summary) -> None:
    """Put what is known of the training into the card that `save_pretrained` wrote."""
    card = file.read_text(encoding="utf-8")
    told = "; ".join(f"{name}: {value}" if name != "training data" else value for name, value in summary.data)
    card = card.replace("- **Training data:** [More Information Needed]", f"- **Training data:** {told}", 1)
    section = "\n".join(["## Training", "", *_table("setting", "value", summary.settings), "", *_losses(summary), ""])
    before = "\n## Intended use"
    write_text(file, card.replace(before, f"\n{section}{before}", 1))


def _losses(summary: Summary) -> Iterator[str]:
    """The curve as a table: some of the steps, and every evaluation."""
    trained, held_out = dict(summary.points("loss")), dict(summary.points("eval_loss"))
    steps = sorted(trained)
    some = {steps[round(i * (len(steps) - 1) / (_POINTS - 1))] for i in range(_POINTS)} if steps else set()
    yield "| step | training loss (nats a token) | evaluation loss |"
    yield "|---|---|---|"
    for step in sorted(some | held_out.keys()):
        yield f"| {step} | {_number(trained.get(step))} | {_number(held_out.get(step))} |"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _table(first: str, second: str, rows: Rows) -> Iterator[str]:
    yield f"| {first} | {second} |"
    yield "|---|---|"
    yield from (f"| `{name}` | `{_in_a_cell(value)}` |" for name, value in rows)


def _in_a_cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ").replace("`", "'")


def write_page(file: Path, title: str, summary: Summary, result: Rows) -> None:
    """The run as one HTML page."""
    parts = ["<h2>Result</h2>", page.table(result), "<h2>Loss</h2>", _picture(summary)]
    parts += ["<h2>Data</h2>", page.table(summary.data), "<h2>Settings</h2>", page.table(summary.settings)]
    page.write_page(file, title, parts)


def _picture(summary: Summary) -> str:
    """An SVG of the losses: every logged step pale, their running mean, and the evaluations as dots."""
    trained, held_out = summary.points("loss"), summary.points("eval_loss")
    points = trained + held_out
    if not points:
        return "<p>Nothing was logged.</p>"
    left, right = min(step for step, _ in points), max(step for step, _ in points)
    low, high = min(value for _, value in points), max(value for _, value in points)

    def at(step: float, value: float) -> str:
        x = 60 + (_WIDTH - 80) * (step - left) / max(right - left, 1)
        y = _HEIGHT - 30 - (_HEIGHT - 50) * (value - low) / ((high - low) or 1.0)
        return f"{x:.1f},{y:.1f}"

    def line(values: Sequence[tuple[int, float]], color: str, width: float) -> str:
        path = " ".join(at(*point) for point in values)
        return f'<polyline fill="none" stroke="{color}" stroke-width="{width}" points="{path}"/>'

    mean = list(zip([step for step, _ in trained], running_mean([v for _, v in trained]), strict=True))
    shapes = [line(trained, "#9ecae1", 1), line(mean, "#1f77b4", 2)]
    for point in held_out:
        x, y = at(*point).split(",")
        told = f"<title>step {point[0]}: {point[1]:.4f}</title>"
        shapes.append(f'<circle cx="{x}" cy="{y}" r="4" fill="#ff7f0e">{told}</circle>')
    labels = [(8, _HEIGHT - 26, f"{low:.3g}"), (8, 24, f"{high:.3g}"), (60, _HEIGHT - 8, f"step {left}")]
    labels += [(_WIDTH - 90, _HEIGHT - 8, f"step {right}")]
    shapes += [f'<text x="{x}" y="{y}" font-size="12">{text}</text>' for x, y, text in labels]
    told = "<p>Blue: training, its running mean darker; orange: evaluation. Nats a token.</p>"
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" role="img">{"".join(shapes)}</svg>{told}'
