"""Rows of results, each in its file as soon as it is known."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

FILE = "rows.jsonl"


@dataclass(frozen=True)
class Contact:
    """The folder, the name and the device that a stage is given.

    folder: for its files. pretend: no GPU is there: tiny sizes, by the emulator. stage: its name.
    """

    folder: Path
    stage: str
    pretend: bool = False

    @property
    def device(self) -> str:
        """The device that tensors are made on."""
        return "cpu" if self.pretend else "cuda"

    def wait(self) -> None:
        """Wait for all that the GPU was given."""
        if not self.pretend:
            torch.cuda.synchronize()

    def row(self, **facts: Any) -> None:
        """Append one row and print it."""
        append(self.folder, {"stage": self.stage, **facts})


def append(folder: Path, row: dict[str, Any]) -> None:
    """Write a row at the end of the folder's file, and show it."""
    line = json.dumps({key: _short(value) for key, value in row.items()})
    with (folder / FILE).open("a") as file:
        file.write(line + "\n")
    print(line, flush=True)


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """All rows of the folder so far."""
    file = folder / FILE
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def _short(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value
