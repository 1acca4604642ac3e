"""What a run tells while it goes on: progress bar, log rows, speed."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from minipeft.train.checkpoint import Progress
from minipeft.train.evaluation import EvalResult
from minipeft.train.metrics import RunLog, memory_bytes

# Without a terminal a bar is a long line of control characters: then it is drawn every ten seconds only.
_TERMINAL_SECONDS, _FILE_SECONDS = 0.1, 10.0


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
        """Show a step that was taken on `tokens` real tokens."""
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
        """For what is not training."""
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
