"""The tables at the end, as short as a terminal's last page: what was measured, beside it what was predicted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.first_contact.record import read_rows

WHO = ("minipeft", "bitsandbytes", "torch bf16", "torch int4")
# Written and committed before the first run on any GPU, for an H100.
PREDICTIONS = Path(__file__).with_name("predictions.json")
SHOWN = 20


def show(folder: Path) -> int:
    """Print the tables of a folder's rows; 1 if anything was wrong or failed, else 0."""
    rows = read_rows(folder)
    print("\n" + "\n".join([*_products(rows), *_times(rows)]))
    wrong = [r for r in rows if is_wrong(r)]
    print(f"{len(rows)} rows; wrong or failed: {len(wrong)}")
    for row in wrong[:SHOWN]:
        print({key: str(value)[:300] for key, value in row.items()})
    return 1 if wrong else 0


def is_wrong(row: dict[str, Any]) -> bool:
    """True for a check that did not hold, a call that raised, and a stage that ended badly."""
    return row.get("right") is False or "failed" in row or row.get("ended", 0) != 0


def _products(rows: list[dict[str, Any]]) -> list[str]:
    found: dict[tuple[str, str, int], dict[str, float]] = {}
    for row in rows:
        if row["stage"] == "products" and "us" in row:
            shape = "x".join(map(str, row["shape"]))
            found.setdefault((row["what"], shape, row["rows"]), {})[row["who"]] = row["us"]
    predictions = json.loads(PREDICTIONS.read_text())
    lines = [f"microseconds: {' | '.join(WHO)}; predicted for an H100: the first three"] if found else []
    for (what, shape, rows_of_x), us in found.items():
        cells = " | ".join(f"{us[name]:9.2f}" if name in us else f"{'-':>9}" for name in WHO)
        predicted = predictions.get(what, {}).get(shape, {}).get(str(rows_of_x))
        beside = f"   {' '.join(map(str, predicted))}" if predicted else ""
        lines.append(f"{what[:14]:14} {shape:>11} M={rows_of_x:<5} {cells}{beside}")
    return lines


def _times(rows: list[dict[str, Any]]) -> list[str]:
    shown = ("host", "step", "optimizers")
    return [f"{r['stage']}: {r['what']}: {r['us']:.1f} us" for r in rows if r["stage"] in shown and "us" in r]
