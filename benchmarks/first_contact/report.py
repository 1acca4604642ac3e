"""The tables at the end, as short as a terminal's last page: what was measured, beside it what was predicted.

`python -m benchmarks.first_contact.report FILE.jsonl [--plot FILE.png]` shows a file of rows again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.first_contact.record import FILE

WHO = ("minipeft", "bitsandbytes", "torch bf16", "torch int4")
# Written and committed before the first run on any GPU, for an H100.
PREDICTIONS = Path(__file__).with_name("predictions.json")
SHOWN = 20


def main(argv: Sequence[str] | None = None) -> int:
    """The command, with these arguments: 0 when nothing in the file was wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.first_contact.report", description=__doc__)
    parser.add_argument("file", type=Path, help="rows.jsonl of a run, or a folder with it")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the products' times relative to bitsandbytes'")
    args = parser.parse_args(argv)
    file = args.file / FILE if args.file.is_dir() else args.file
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    if args.plot:
        plot(rows, args.plot)
    return show(rows)


def show(rows: Sequence[dict[str, Any]]) -> int:
    """Print the tables of a run's rows; 1 if anything was wrong or failed, else 0."""
    print("\n" + "\n".join([*_products(rows), *_times(rows)]))
    wrong = [r for r in rows if is_wrong(r)]
    print(f"{len(rows)} rows; wrong or failed: {len(wrong)}")
    for row in wrong[:SHOWN]:
        print({key: str(value)[:300] for key, value in row.items()})
    return 1 if wrong else 0


def is_wrong(row: dict[str, Any]) -> bool:
    """True for a check that did not hold, a call that raised, and a stage that ended badly."""
    return row.get("right") is False or "failed" in row or row.get("ended", 0) != 0


def products(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, str, int], dict[str, float]]:
    """Microseconds by (operation, shape, rows of x), then by whose they are."""
    found: dict[tuple[str, str, int], dict[str, float]] = {}
    for row in rows:
        if row["stage"] == "products" and "us" in row:
            shape = "x".join(map(str, row["shape"]))
            found.setdefault((row["what"], shape, row["rows"]), {})[row["who"]] = row["us"]
    return found


def plot(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """Draw ours over bitsandbytes' and over torch's in bfloat16 for each shape, forward and input gradient, by rows."""
    from matplotlib.figure import Figure

    found = products(rows)
    operations = ("forward", "input gradient")
    figure = Figure(figsize=(9, 4), layout="constrained")
    for axes, operation in zip(figure.subplots(1, 2, sharey=True), operations, strict=True):
        for shape in sorted({s for what, s, _ in found if what == operation}):
            counts = [m for what, s, m in found if (what, s) == (operation, shape)]
            for peer, style in (("bitsandbytes", "-"), ("torch bf16", ":")):
                points = [found[operation, shape, m] for m in counts]
                ratios = [p["minipeft"] / p[peer] for p in points]
                axes.plot(counts, ratios, style, marker="o", markersize=3, label=f"{shape} / {peer}")
        axes.axhline(1, color="grey", linewidth=0.8)
        axes.set(title=operation, xlabel="rows of x", xscale="log")
        axes.set_ylim(0, None)
    figure.axes[0].set_ylabel("minipeft's time / its time")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=7)
    gpu = next((row["gpu"] for row in rows if row.get("what") == "versions"), "")
    figure.suptitle(f"x W^T and dy W, W in NF4, bfloat16, {gpu}")
    figure.savefig(file, dpi=120)


def _products(rows: Sequence[dict[str, Any]]) -> list[str]:
    found = products(rows)
    predictions = json.loads(PREDICTIONS.read_text())
    lines = [f"microseconds: {' | '.join(WHO)}; predicted for an H100: the first three"] if found else []
    for (what, shape, rows_of_x), us in found.items():
        cells = " | ".join(f"{us[name]:9.2f}" if name in us else f"{'-':>9}" for name in WHO)
        predicted = predictions.get(what, {}).get(shape, {}).get(str(rows_of_x))
        beside = f"   {' '.join(map(str, predicted))}" if predicted else ""
        lines.append(f"{what[:14]:14} {shape:>11} M={rows_of_x:<5} {cells}{beside}")
    return lines


def _times(rows: Sequence[dict[str, Any]]) -> list[str]:
    shown = ("host", "step", "optimizers")
    return [f"{r['stage']}: {r['what']}: {r['us']:.1f} us" for r in rows if r["stage"] in shown and "us" in r]


if __name__ == "__main__":
    raise SystemExit(main())
