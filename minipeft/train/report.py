"""The report of a run: log, progress bar, loss curve, and the result that it ends with."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from minipeft.files import atomic_path, write_text
from minipeft.train.checkpoint import Progress
from minipeft.train.errors import MissingExtraError
from minipeft.train.evaluation import EvalResult
from minipeft.train.trackers import Trackers

# Seconds between two drawings of the bar. In a file it is a long line of control characters, so it is drawn rarely.
_TERMINAL_SECONDS, _FILE_SECONDS = 0.1, 10.0

# Above this many rows the training loss is drawn as a running mean, over so many neighbours on either side.
FEW_ROWS, REACH = 20, 2


class RunLog:
    """`log.jsonl`: one JSON object a line, each with its `step`; trackers are told the same.

    Args:
        writes: False in a process beside the one that writes: then it is read alone.

    Rows with `loss` are training rows, rows with `eval_loss` evaluation rows.
    """

    def __init__(self, path: Path, trackers: Trackers | None = None, writes: bool = True) -> None:
        self.path, self._trackers, self._writes = path, trackers, writes

    def write(self, row: dict[str, Any]) -> None:
        """Append one row. Numbers that JSON cannot hold are written as null."""
        if not self._writes:
            return
        clean = {key: _json_number(value) for key, value in row.items()}
        with open(self.path, "a", encoding="utf-8") as handle:
            handle.write(json.dumps(clean, allow_nan=False) + "\n")
        if self._trackers is not None:
            self._trackers.log(row)

    def rewind(self, step: int) -> None:
        """Drop rows after `step` (a killed run logs further than it saves) and a half-written last line."""
        if not self._writes or not self.path.exists():
            return
        rows = [row for row in read_log(self.path) if row["step"] <= step]
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in rows))

    def close(self) -> None:
        """Tell the trackers that the run has ended."""
        if self._trackers is not None:
            self._trackers.close()


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """Rows of a `log.jsonl`. What is no row, such as a half-written last line, left by a kill, is skipped."""
    rows = []
    for line in Path(path).read_bytes().split(b"\n"):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and type(row.get("step")) is int:
            rows.append(row)
    return rows


class Reporter:
    """Follows `progress` and writes to the log and the bar. Time spent in `paused()` counts as no training time."""

    def __init__(
        self,
        log: RunLog,
        progress: Progress,
        device: torch.device,
        *,
        total_steps: int,
        batches_per_epoch: int,
        progress_bar: bool,
        on_log: Callable[[dict[str, Any]], None],
    ) -> None:
        self._log, self._progress, self._device, self._on_log = log, progress, device, on_log
        self._batches_per_epoch = batches_per_epoch
        self._started = self._window_started = time.perf_counter()
        self._started -= progress.seconds
        self._window_tokens = 0
        self._last: dict[str, float] = {}
        self._bar = tqdm(
            total=total_steps,
            initial=progress.step,
            desc="training",
            unit="step",
            dynamic_ncols=True,
            disable=not progress_bar,
            mininterval=_TERMINAL_SECONDS if sys.stderr.isatty() else _FILE_SECONDS,
        )

    @property
    def seconds(self) -> float:
        """Training time so far, that of earlier processes included."""
        return time.perf_counter() - self._started

    @property
    def log_path(self) -> Path:
        """The log's file."""
        return self._log.path

    def step(self, tokens: int, loss: float, lr: float, grad_norm: float) -> None:
        """Show in the bar a step that was taken on `tokens` real tokens, with its loss in nats per token."""
        self._window_tokens += tokens
        self._last = {"lr": lr, "grad_norm": grad_norm}
        shown = {
            "loss": f"{loss:.3f}",
            "tok/s": f"{self._tokens_per_second():.0f}",
            "MiB": f"{memory_bytes(self._device) / 2**20:.0f}",
        }
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update()

    def log_window(self) -> None:
        """Write a row on the steps since the last one, and start a new window."""
        progress = self._progress
        row = {
            "step": progress.step,
            "epoch": round(progress.epoch + progress.batch / self._batches_per_epoch, 4),
            "loss": progress.window_loss / progress.window_loss_tokens,
            **self._last,
            "tokens": progress.tokens,
            "tokens_per_second": round(self._tokens_per_second(), 1),
            "memory_mib": round(memory_bytes(self._device) / 2**20, 1),
            "seconds": round(self.seconds, 3),
        }
        self._write(row)
        progress.window_loss, progress.window_loss_tokens = 0.0, 0
        self._window_started, self._window_tokens = time.perf_counter(), 0

    def log_evaluation(self, result: EvalResult) -> None:
        """Write a row on an evaluation."""
        row = {"eval_loss": result.loss, "eval_perplexity": result.perplexity, "eval_tokens": result.tokens}
        self._write({"step": self._progress.step, **row})

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Keep the time spent inside out of the training time."""
        start = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            self._started += spent
            self._window_started += spent

    def close(self) -> None:
        """Finish bar and log."""
        self._bar.close()
        self._log.close()

    def _write(self, row: dict[str, Any]) -> None:
        self._log.write(row)
        self._on_log(row)

    def _tokens_per_second(self) -> float:
        return self._window_tokens / max(time.perf_counter() - self._window_started, 1e-9)


def memory_bytes(device: torch.device) -> int:
    """Memory in use now: allocated on an accelerator, resident for the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return peak_memory_bytes(device)


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory in use so far, counted as in `memory_bytes`; 0 where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        # VmHWM where the system has it: ru_maxrss also counts the memory that the parent process held at the fork.
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        pass
    try:
        import resource
    except ImportError:  # Windows
        return 0
    # Linux counts in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _json_number(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True)
class TrainResult:
    """Numbers and places of a finished run.

    Attributes:
        steps: optimizer steps in all.
        loss: training loss of the last log row, in nats per token.
        eval_start, eval_end: evaluation before the first and after the last step, where asked for.
        adapter_dir, log_path, plot_path: where the results are.
        seconds: training time, of all processes that worked on the run.
        tokens: real tokens trained on (padding not counted).
        peak_memory: bytes, see `peak_memory_bytes`.
    """

    steps: int
    loss: float
    eval_start: EvalResult | None
    eval_end: EvalResult | None
    adapter_dir: Path
    log_path: Path
    plot_path: Path | None
    seconds: float
    tokens: int
    peak_memory: int


def logged_evaluation(rows: list[dict[str, Any]], step: int) -> EvalResult | None:
    """The evaluation that an earlier process of this run logged at `step`."""
    for row in rows:
        if row["step"] == step and "eval_loss" in row and row["eval_loss"] is not None:
            return EvalResult(row["eval_loss"], row["eval_tokens"])
    return None


def check_matplotlib() -> None:
    """Raise MissingExtraError now rather than at the end of the run."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        message = "drawing a loss curve needs matplotlib: pip install 'minipeft[demo]'"
        raise MissingExtraError(message) from None


def plot_loss_curve(rows: Sequence[Mapping[str, Any]], path: str | Path, title: str = "loss") -> Path:
    """Draw training and evaluation loss over steps as a PNG.

    Args:
        rows: rows of the run's log, see `read_log`.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    check_matplotlib()
    # The object interface with its own canvas: pyplot would choose a backend for the whole process.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps, losses = _series(rows, "loss")
    if len(losses) > FEW_ROWS:
        # A single step's loss depends much on its batch: it stays visible, pale, behind the running mean.
        axes.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=1)
        axes.plot(steps, running_mean(losses), color="tab:blue", label="training (running mean)")
    elif losses:
        axes.plot(steps, losses, color="tab:blue", label="training")
    held_out_steps, held_out = _series(rows, "eval_loss")
    if held_out:
        axes.plot(held_out_steps, held_out, "o-", color="tab:orange", markersize=5, label="evaluation")
    axes.set(xlabel="optimizer step", ylabel="loss (nats per token)", title=title)
    _scale(axes, [*losses, *held_out])
    axes.grid(alpha=0.3, which="both")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
    return Path(path)


def _series(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[list[int], list[float]]:
    points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    return [step for step, _ in points], [value for _, value in points]


def running_mean(values: Sequence[float]) -> list[float]:
    """Every value averaged with up to `REACH` neighbours on either side."""
    windows = [values[max(0, i - REACH) : i + REACH + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def _scale(axes: Any, values: Sequence[float]) -> None:
    """Logarithmic, with plain numbers, where the loss falls far: a linear axis would show an L."""
    if not values or min(values) <= 0 or max(values) < 10 * min(values):
        return
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
