"""A budget is real: the process, not only its book-keeping, takes no more memory."""

import sys

from processes import run_process

# Half a page for what Python and torch take along the way, and the allocator keeps.
SLACK_MB = 20
SCRIPT = """
import re, sys, torch
from minipeft import PagedAdamW

def megabytes(name):
    with open("/proc/self/status") as file:
        return int(re.search(name + r":\\s+(\\d+)", file.read())[1]) / 1024

directory, budget = sys.argv[1], int(sys.argv[2]) << 20
p = torch.nn.Parameter(torch.zeros(1 << 24))
p.grad = torch.ones(1 << 24)
warm = torch.nn.Parameter(torch.zeros(1 << 16))
warm.grad = torch.ones(1 << 16)
PagedAdamW([warm]).step()

def measure(budget, saving):
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = megabytes("VmRSS")
    optimizer = PagedAdamW([p], host_budget=budget, spill_dir=directory)
    for _ in range(2):
        optimizer.step()
    peaks = [megabytes("VmHWM") - before]
    if saving:
        optimizer.save_state(directory + "/state.safetensors")
        peaks.append(megabytes("VmHWM") - before)
        optimizer.load_state(directory + "/state.safetensors")
        # Not the file's own pages, which the system takes back when it wants to.
        peaks.append(megabytes("RssAnon") - before_anonymous)
    print(*peaks, optimizer.memory_stats()["page_ins"])
    return optimizer

before_anonymous = megabytes("RssAnon")
measure(budget, saving=True)
# This one is never closed: the process ends with it.
optimizer = measure(budget, saving=False)
del optimizer
optimizer = measure(None, saving=False)
"""


def test_peak_memory_of_the_process_shows_the_budget(tmp_path):
    """16.8 million parameters have 134 MB of state; the budget is a quarter of it."""
    words = [sys.executable, "-c", SCRIPT, str(tmp_path), "32"]
    done = run_process(words)
    assert done.returncode == 0 and not done.stderr, done.stderr
    (*budgeted, page_ins), (again, _), (free, moved) = (
        [float(w) for w in row.split()] for row in done.stdout.splitlines()
    )
    assert page_ins > 0 and len(budgeted) == 3
    assert budgeted[0] >= 32 and max(*budgeted, again) < 32 + SLACK_MB
    assert free > 120 and moved == 0, "without a budget it takes what it takes"
