"""What a run reports: the JSONL log, TensorBoard events, speed and memory."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import torch

from minipeft.files import write_text
from minipeft.train.errors import MissingExtraError


class RunLog:
    """`log.jsonl`: one JSON object a line, each with its `step`; on request TensorBoard events beside it.

    Rows with `loss` are training rows, rows with `eval_loss` evaluation rows.

    Raises:
        MissingExtraError: TensorBoard was asked for and is not installed.
    """

    def __init__(self, path: Path, tensorboard_dir: Path | None = None) -> None:
        self.path = path
        self._writer = None if tensorboard_dir is None else _tensorboard_writer(tensorboard_dir)

    def write(self, row: dict[str, Any]) -> None:
        """Append one row. Numbers that JSON cannot hold are written as null."""
        clean = {key: _json_number(value) for key, value in row.items()}
        with open(self.path, "a", encoding="utf-8") as handle:
            handle.write(json.dumps(clean, allow_nan=False) + "\n")
        if self._writer is not None:
            for key, value in row.items():
                if key != "step":
                    self._writer.add_scalar(key, value, row["step"])

    def rewind(self, step: int) -> None:
        """Drop rows after `step` (a killed run logs further than it saves) and a half-written last line."""
        if not self.path.exists():
            return
        rows = [row for row in read_log(self.path) if row["step"] <= step]
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in rows))

    def close(self) -> None:
        """Flush the TensorBoard events."""
        if self._writer is not None:
            self._writer.close()


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """Rows of a `log.jsonl`. A half-written last line, left by a kill, is skipped."""
    rows = []
    for line in Path(path).read_bytes().split(b"\n"):
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def check_tensorboard() -> None:
    """Raise MissingExtraError now rather than after the model is loaded."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError:
        message = "tensorboard: true needs the package tensorboard: pip install tensorboard"
        raise MissingExtraError(message) from None


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
        # Where there is this file, ru_maxrss will not do: it starts from what the parent process held.
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


def _tensorboard_writer(directory: Path) -> Any:
    check_tensorboard()
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(directory))
