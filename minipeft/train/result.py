"""What a finished run leaves."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minipeft.train.evaluation import EvalResult


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
        peak_memory: bytes, see `metrics.peak_memory_bytes`.
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
