"""Steps over a mixture's experts in a process of their own, so that its peak memory is theirs.

    python -m benchmarks.experts_process '{"side": "minipeft", "kind": "nf4", ...}'

Printed is a line of JSON: the bytes of the peak beyond the model and its adapter, and the norm of the output.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.experts_models import Batch, adapted_by_minipeft, adapted_by_peft, base_of, fill_randomly
from benchmarks.resident import resident_bytes
from benchmarks.shapes import Mixture

STEPS = 2


def main(text: str) -> None:
    """Build the model, take the steps, print."""
    settings: dict[str, Any] = json.loads(text)
    torch.set_num_threads(settings["threads"])
    device, dtype = torch.device(settings["device"]), getattr(torch, settings["dtype"])
    mixture = Mixture(*settings["mixture"])
    adapted = adapted_by_minipeft if settings["side"] == "minipeft" else adapted_by_peft
    model = adapted(base_of(mixture, dtype, device, fill_randomly), settings["kind"])
    batch = Batch(mixture, settings["tokens"], dtype, device)
    gc.collect()
    if cuda := device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
        before = resident_bytes("VmRSS")
    for _ in range(STEPS):
        y, *_ = batch.step(model)
    peak = torch.cuda.max_memory_allocated() if cuda else resident_bytes("VmHWM")
    print(json.dumps({"beyond": peak - before, "norm": float(y.float().norm())}))


if __name__ == "__main__":
    main(sys.argv[1])
