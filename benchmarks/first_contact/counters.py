"""The counters of the GPU, by Nsight Compute, of a few launches: they say why a kernel takes as long as it does."""

from __future__ import annotations

import shutil
import subprocess
import sys

import torch

from benchmarks.first_contact.products import weights_of
from benchmarks.first_contact.record import Contact
from minipeft_kernels.linear import gpu

SECTIONS = ("SpeedOfLight", "MemoryWorkloadAnalysis", "WarpStateStats", "Occupancy", "LaunchStats", "SchedulerStats")
ROWS = (1, 16, 64)
FILE = "counters.txt"


def run(contact: Contact) -> None:
    """One row: where the report is."""
    if contact.pretend or shutil.which("ncu") is None:
        contact.row(what="counters", why="no ncu here")
        return
    words = ["ncu", "--clock-control", "none", "--profile-from-start", "off", "-k", "regex:nf4"]
    words += [word for section in SECTIONS for word in ("--section", section)]
    words += [sys.executable, "-m", "benchmarks.first_contact.counters"]
    done = subprocess.run(words, capture_output=True, text=True)
    (contact.folder / FILE).write_text(done.stdout + done.stderr[-5000:])
    contact.row(what="counters", code=done.returncode, file=FILE, lines=done.stdout.count("\n"))


def profiled() -> None:
    """The launches that are looked at, each run before."""
    weights = weights_of((4096, 4096), "cuda")
    for count in range(2):
        if count:
            torch.cuda.profiler.start()
        weights.packed[count].dequantize(torch.bfloat16)
        for m in ROWS:
            x = torch.randn(m, 4096, device="cuda").bfloat16()
            gpu.launch(x, weights.packed[count].packed(), None, None, False)
            gpu.launch(x, weights.packed[count].packed(), None, None, True)
        torch.cuda.synchronize()
    torch.cuda.profiler.stop()


if __name__ == "__main__":
    profiled()
