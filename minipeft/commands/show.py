"""`minipeft memory`, `trace` and `diff`: a user's own model looked at, as text, as JSON and as one HTML page."""

from __future__ import annotations

import argparse
import html
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from minipeft.commands.train import train_config
from minipeft.files import size
from minipeft.train import page
from minipeft.train.config import STEP_SETTINGS
from minipeft.train.errors import ConfigError, OutputDirError

_UNITS = {"": 1, "B": 1, **{f"{p}B": 1000**i for i, p in enumerate("KMGT", 1)}}
_UNITS |= {f"{p}IB": 1024**i for i, p in enumerate("KMGT", 1)}
_COLORS = {
    **{"weights": "#4878a8", "adapter": "#e8902c", "gradients": "#c8504e", "optimizer": "#8064a2"},
    **{"activations": "#58a058", "logits": "#b0983c"},
}


def memory(args: argparse.Namespace) -> None:
    """`minipeft memory`: what training takes, predicted without loading a weight.

    Raises:
        ConfigError: a budget that is no number of bytes, settings that do not fit; see `GhostRun`.
    """
    budget = None if args.budget is None else number_of_bytes(args.budget)
    check_page(args.html)
    args.data = args.output_dir = "-"
    config = train_config(args)

    from minipeft.show.memory import GhostRun
    from minipeft.train.models import resolve_device
    from minipeft.train.report import memory_bytes

    process = memory_bytes(resolve_device("cpu"))
    run = GhostRun(config)
    step = run.step(args.batch, args.tokens, not args.equal_lengths)
    found: dict[str, Any] = {
        "model": config.model,
        **{name: getattr(config, name) for name in STEP_SETTINGS},
        "batch": step.rows,
        "tokens": step.tokens,
        "parameters": run.parameters,
        "trained": run.trained,
        "bytes": step.kinds,
        "peak": step.peak,
        "peak_in": step.phase,
        "process": process,
    }
    if budget is not None:
        largest = run.largest(budget, args.tokens, not args.equal_lengths, near=args.batch)
        found |= {"budget": budget, "largest_batch": 0 if largest is None else largest.rows}
        found |= {"largest_batch_peak": None if largest is None else largest.peak}
    rows = _memory_rows(found)
    tell(args, found, [f"{name:<13} {value:>10}  {note}".rstrip() for name, value, note in rows])
    if args.html is not None:
        title = f"Memory of a training step of {Path(config.model).name}"
        picture = _memory_picture(step.history)
        page.write_page(Path(args.html), title, [page.table(rows, numbers=[1]), "<h2>Along the step</h2>", picture])


def _memory_rows(found: dict[str, Any]) -> list[tuple[str, str, str]]:
    notes = {"weights": f"{found['parameters']:,} parameters", "adapter": f"{found['trained']:,} trained parameters"}
    notes["activations"] = "what the backward pass needs, and what is computed with it"
    rows = [(name, size(nbytes), notes.get(name, "")) for name, nbytes in found["bytes"].items()]
    what = f"in the {found['peak_in']}, {found['batch']} x {found['tokens']} tokens; each kind as it is then"
    rows.append(("peak", size(found["peak"]), what))
    rows.append(("process", size(found["process"]), "Python and its libraries, on top of it (as this process has it)"))
    if "budget" in found:
        rows_of, peak = found["largest_batch"], found["largest_batch_peak"]
        told = "not even one row fits" if not rows_of else f"rows fit, which take {size(peak)}"
        rows.append((f"in {size(found['budget'])}", str(rows_of), told))
    return rows


def _memory_picture(history: Sequence[tuple[str, tuple[int, ...]]]) -> str:
    """An SVG of the bytes that are alive after each operation, kind upon kind, with the parts of the step below."""
    width, height, left, bottom = 900, 360, 70, 300
    points = [history[i * (len(history) - 1) // 600] for i in range(601)] if len(history) > 601 else list(history)
    most = max(sum(values) for _, values in points) or 1

    def at(i: int, nbytes: float) -> str:
        x = left + (width - left - 10) * i / max(1, len(points) - 1)
        return f"{x:.1f},{bottom - (bottom - 20) * nbytes / most:.1f}"

    shapes = []
    for number, (kind, color) in enumerate(_COLORS.items()):
        low = [at(i, sum(values[:number])) for i, (_, values) in enumerate(points)]
        high = [at(i, sum(values[: number + 1])) for i, (_, values) in enumerate(points)]
        shapes.append(f'<polygon fill="{color}" points="{" ".join(high + low[::-1])}"><title>{kind}</title></polygon>')
        shapes.append(f'<rect x="{left + 138 * number}" y="{height - 16}" width="12" height="12" fill="{color}"/>')
        shapes.append(f'<text x="{left + 138 * number + 17}" y="{height - 5}" font-size="14">{kind}</text>')
    starts = [i for i, (phase, _) in enumerate(points) if i == 0 or points[i - 1][0] != phase]
    for i in starts:
        x = at(i, 0).split(",")[0]
        shapes.append(f'<path d="M{x} 20V{bottom + 6}" stroke="currentColor" stroke-dasharray="3"/>')
        shapes.append(f'<text x="{x}" y="{bottom + 22}" font-size="14">{html.escape(points[i][0])}</text>')
    shapes += [
        f'<text x="4" y="{bottom}" font-size="14">0</text>',
        f'<text x="4" y="24" font-size="14">{size(most)}</text>',
    ]
    return f'<svg viewBox="0 0 {width} {height}" width="{width}" role="img">{"".join(shapes)}</svg>'


def tell(args: argparse.Namespace, found: Any, lines: Iterable[str]) -> None:
    """Print lines, or with --json the whole as JSON; and say where the page will lie."""
    if args.json:
        print(json.dumps(found, indent=1))
        return
    print("\n".join(lines))
    if args.html is not None:
        print(f"page          {args.html}")


def check_page(path: str | None) -> None:
    """Raise OutputDirError for a page that cannot be written, before any work is done."""
    if path is not None and (Path(path).is_dir() or not Path(path).absolute().parent.is_dir()):
        raise OutputDirError(f"cannot write {path}: it is a folder, or its folder does not exist")


def number_of_bytes(text: str) -> int:
    """16GB, 512MiB, 1.5e9: a number of bytes.

    Raises:
        ConfigError: anything else.
    """
    found = re.fullmatch(r"\s*([\d.]+(?:e\d+)?)\s*([a-z]*)\s*", text, re.I)
    try:
        if found is not None:
            nbytes = float(found[1]) * _UNITS[found[2].upper()]
            if 0 < nbytes < 1e18:
                return int(nbytes)
    except (KeyError, ValueError):
        pass
    raise ConfigError(f"--budget must be a number of bytes such as 16GB, 512MiB or 8e9, got {text!r}")
