"""`minipeft memory`, `trace`, `diff` and `inspect --tree`: a user's own model as text, as JSON and as one HTML page."""

from __future__ import annotations

import argparse
import dataclasses
import html
import json
import math
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from minipeft.commands.arguments import check_adapter_path, check_device
from minipeft.commands.inspect import describe, tensors_in
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

    from minipeft.show.memory import MOST_ROWS, GhostRun
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
        found |= {"budget": budget, "most_tried": MOST_ROWS, "largest_batch": 0 if largest is None else largest.rows}
        found |= {"largest_batch_peak": None if largest is None else largest.peak}
        found |= {"one_row_peak": run.step(1, args.tokens, not args.equal_lengths).peak}
    rows = _memory_rows(found)
    tell(args, found, [f"{name:<13} {value:>10}  {note}".rstrip() for name, value, note in rows])
    if args.html is not None:
        title = f"Memory of a training step of {Path(config.model).name}"
        picture = _memory_picture(step.history)
        page.write_page(Path(args.html), title, [page.table(rows, numbers=[1]), "<h2>Along the step</h2>", picture])


def _memory_rows(found: dict[str, Any]) -> list[tuple[str, str, str]]:
    notes = {"weights": f"{found['parameters']:,} parameters", "adapter": f"{found['trained']:,} trained parameters"}
    notes["activations"] = "what the backward pass needs, and what is computed with it"
    if not found["bytes"]["gradients"]:
        notes["gradients"] = f"none is alive at the peak, which is in the {found['peak_in']}"
    rows = [(name, size(nbytes), notes.get(name, "")) for name, nbytes in found["bytes"].items()]
    what = f"in the {found['peak_in']}, {found['batch']} x {found['tokens']} tokens; each kind as it is then"
    rows.append(("peak", size(found["peak"]), what))
    rows.append(("process", size(found["process"]), "Python and its libraries, on top of it (as this process has it)"))
    if "budget" in found:
        rows_of, peak = found["largest_batch"], found["largest_batch_peak"]
        told = f"rows fit, whose tensors take {size(peak)}" if rows_of else "not even one row fits: its tensors take "
        told += "" if rows_of else size(found["one_row_peak"])
        told += "; more were not tried" * (rows_of == found["most_tried"])
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


def trace(args: argparse.Namespace) -> None:
    """`minipeft trace`: time and bytes of one training step by module and operation.

    Raises:
        ConfigError, OutputDirError: settings that do not fit, a file that cannot be written; see `show.trace.trace`.
    """
    for file in (args.html, args.chrome):
        check_page(file)
    args.data = args.output_dir = "-"
    config = train_config(args)
    check_device(config.device)
    # torch's profiler would say on standard error that it begins and ends.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")

    from minipeft.show.trace import trace as run_trace

    found = run_trace(config, args.batch, args.tokens, None if args.chrome is None else Path(args.chrome))
    total = sum(row.milliseconds for row in found) or 1.0
    cells = [
        (
            *(row.phase, row.module or "-", row.operation, str(row.calls), f"{row.milliseconds:.2f}"),
            *(f"{100 * row.milliseconds / total:.1f}", signed(row.nbytes)),
        )
        for row in found
    ]
    header = ("part", "module", "operation", "calls", "ms", "%", "bytes")
    phases = {name: sum(row.milliseconds for row in found if row.phase == name) for name in _PHASES}
    told = [f"one step of {args.batch} x {args.tokens} tokens, {total:.1f} ms in operations"]
    told[0] += "".join(f", {name} {time:.1f}" for name, time in phases.items())
    lines = [*told, *columns(header, cells[: args.rows], numbers=range(3, 7))]
    rest = found[args.rows :]
    if rest:
        lines.append(f"and {len(rest)} more rows, {sum(row.milliseconds for row in rest):.2f} ms (--rows {len(found)})")
    if args.chrome is not None:
        lines.append(f"trace         {args.chrome}: open it in chrome://tracing or ui.perfetto.dev")
    tell(args, {"phases": phases, "rows": [dataclasses.asdict(row) for row in found]}, lines)
    if args.html is not None:
        title = f"A training step of {Path(config.model).name}"
        parts = [f"<p>{html.escape(told[0])}</p>", page.table(cells, header, numbers=range(3, 7))]
        page.write_page(Path(args.html), title, parts)


_PHASES = ("forward", "backward", "update")


def diff(args: argparse.Namespace) -> None:
    """`minipeft diff`: two adapters' updates, by layer.

    Raises:
        DiffError, OutputDirError: see `show.diff.diff`; a page that cannot be written.
    """
    check_page(args.html)

    from minipeft.show.diff import diff as compare
    from minipeft.show.diff import mean_angles

    found = compare(args.first, args.second)
    header = ("layer", "norm A", "norm B", "A - B", "cosine", "spectrum A", "spectrum B", "output", "input")
    cells = [
        (
            *(x.layer, f"{x.norms[0]:.4g}", f"{x.norms[1]:.4g}", f"{x.difference:.4g}"),
            "-" if x.cosine is None else f"{x.cosine:.3f}",
            *(_leading(values) for values in x.spectra),
            *(_range(degrees) for degrees in (x.output_angles, x.input_angles)),
        )
        for x in found.layers
    ]
    others = [(x.name, f"{x.norms[0]:.4g}", f"{x.norms[1]:.4g}", f"{x.difference:.4g}") for x in found.tensors]
    lines = [f"A {args.first}", f"B {args.second}"]
    lines += columns(header, cells, numbers=(1, 2, 3, 4)) if cells else []
    means = [f"{side}s {value:.1f}" for side, value in mean_angles(found.layers).items()]
    notes = [f"principal angles in degrees (90: nothing in common), on average {', '.join(means)}"] if means else []
    notes += found.alone
    lines += notes
    if others:
        lines += columns(("other tensors", "norm A", "norm B", "A - B"), others, numbers=(1, 2, 3))
    tell(args, found.to_dict(), lines)
    if args.html is not None:
        parts = [f"<p>A: {html.escape(args.first)}<br>B: {html.escape(args.second)}</p>"]
        if cells:
            parts += [page.table(cells, header, numbers=(1, 2, 3, 4)), _spectra(found.layers)]
        parts += [f"<p>{html.escape(note)}</p>" for note in notes]
        if others:
            parts.append(page.table(others, ("other tensors", "norm A", "norm B", "A - B"), numbers=(1, 2, 3)))
        page.write_page(Path(args.html), "Two adapters", parts)


def _leading(values: Sequence[float]) -> str:
    return " ".join(f"{value:.3g}" for value in values[:3]) + (" ..." if len(values) > 3 else "") or "0"


def _range(degrees: Sequence[float]) -> str:
    return f"{degrees[0]:.0f} to {degrees[-1]:.0f}" if degrees else "-"


def _spectra(layers: Sequence[Any]) -> str:
    """An SVG for each layer: the singular values of both updates as bars, on one scale for all."""
    most = max((value for x in layers for values in x.spectra for value in values), default=0) or 1.0
    pictures = []
    for x in layers:
        bars = []
        for which, (values, color) in enumerate(zip(x.spectra, ("#4878a8", "#e8902c"), strict=True)):
            for i, value in enumerate(values):
                tall = 80 * value / most
                place = f'x="{8 * i + 4 * which}" y="{80 - tall:.1f}" width="3.5" height="{tall:.1f}"'
                bars.append(f'<rect {place} fill="{color}"><title>{value:.4g}</title></rect>')
        wide = 8 * max(map(len, x.spectra), default=1) + 4
        picture = f'<svg viewBox="0 0 {wide} 80" width="{wide}" height="80" role="img">{"".join(bars)}</svg>'
        pictures.append(f"<figure>{picture}<figcaption>{html.escape(x.layer)}</figcaption></figure>")
    return f"<h2>Singular values</h2><p>Blue: A; orange: B.</p>{''.join(pictures)}"


def tree(args: argparse.Namespace) -> None:
    """`minipeft inspect MODEL [ADAPTER]` with --tree, --json or --html: the modules, what they hold, what was patched.

    Raises:
        ModelLoadError, AdapterError, OutputDirError: see `show.tree.tree`; a page that cannot be written.
    """
    check_page(args.html)
    if args.adapter is not None:
        check_adapter_path(Path(args.adapter))

    from minipeft.show.tree import tree as grow

    branches = grow(args.path, args.adapter, quantize=args.quantize)
    cells = []
    for branch in branches:
        name = branch.path.rsplit(".", 2 if branch.path.endswith(".*") else 1)[-1] if branch.path else args.path
        indent = "  " * (branch.path.count(".") - branch.path.count(".*") + bool(branch.path))
        times = f" x {branch.count}" if branch.count > 1 else ""
        cells.append((f"{indent}{name}{times}", branch.kind, " ".join(branch.patched), "", "", "", ""))
        for held in branch.tensors:
            shape = " x ".join(map(str, held.shape)) or "1"
            bits = f"{held.bits:.3g} bits" + (", trained" if held.trainable else "")
            what = (f"{indent}  .{held.name}", "", "", shape, held.dtype, bits, size(held.nbytes * branch.count))
            cells.append(what)
    header = ("module", "class", "patched by", "shape", "dtype", "an element", "bytes")
    held_by = [(b, t) for b in branches for t in b.tensors]
    total = sum(b.count * t.nbytes for b, t in held_by)
    trained = sum(b.count * math.prod(t.shape) for b, t in held_by if t.trainable)
    lines = [*columns(header, cells, numbers=(6,)), f"{size(total)}, {trained:,} parameters are trained"]
    tell(args, [dataclasses.asdict(branch) for branch in branches], lines)
    if args.html is not None:
        # A space at a cell's start would be dropped.
        shown = [(cell[0].replace("  ", "\u2003"), *cell[1:]) for cell in cells]
        parts = [page.table(shown, header, numbers=(6,)), f"<p>{lines[-1]}</p>"]
        page.write_page(Path(args.html), f"The modules of {Path(args.path).name}", parts)


def description(args: argparse.Namespace) -> None:
    """`minipeft inspect` of an adapter, a checkpoint or a run, as JSON and as a page.

    Raises:
        InspectError, OutputDirError: see `inspect.describe`; a page that cannot be written.
    """
    check_page(args.html)
    lines = describe(args.path).splitlines()
    tensors = tensors_in(Path(args.path))
    stored = [{"name": name, **dataclasses.asdict(info), "bytes": info.nbytes} for name, info in tensors.items()]
    tell(args, {"description": lines, "tensors": stored}, lines)
    if args.html is not None:
        cells = [(t["name"], " x ".join(map(str, t["shape"])), t["dtype"], size(t["bytes"])) for t in stored]
        text = html.escape("\n".join(lines))
        parts = [f'<pre class="wide">{text}</pre>', page.table(cells, ("tensor", "shape", "dtype", "bytes"), (3,))]
        page.write_page(Path(args.html), Path(args.path).resolve().name, parts)


def columns(header: Sequence[str], rows: Sequence[Sequence[str]], numbers: Iterable[int] = ()) -> list[str]:
    """Lines of aligned columns; `numbers` are those set to the right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    right = set(numbers)
    return [
        "  ".join(
            c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (header, *rows)
    ]


def signed(nbytes: int) -> str:
    """A difference in bytes, as `size` tells it."""
    return f"-{size(-nbytes)}" if nbytes < 0 else size(nbytes)


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
