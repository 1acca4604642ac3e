"""Cases that bitsandbytes 0.50.2 wrote on a CPU; `description.json` inside says what each is."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

_FILE = np.load(Path(__file__).parent / "golden" / "nf4_bitsandbytes_0.50.2_cpu.npz")
CASES: dict[str, dict[str, Any]] = json.loads(bytes(_FILE["description.json"]))["cases"]
KEYS = frozenset(_FILE.files)


def golden(key: str) -> torch.Tensor:
    """One array of the file, such as "basic.absmax"."""
    return torch.from_numpy(_FILE[key])
