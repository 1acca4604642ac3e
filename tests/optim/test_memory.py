"""A budget is real: the process, not only its book-keeping, takes no more memory."""

import subprocess
import sys

# Half a page for what Python and torch take along the way, and the allocator keeps.
SLACK_MB = 20
SCRIPT = """
import re, sys, torch
from minipeft import PagedAdamW

def megabytes(name):
    with open("/proc/self/status") as file:
        return int(re.search(name + r":\\s+(\\d+)", file.read())[1]) / 1024

directory, budget = sys.argv[1], int(sys.argv[2])
p = torch.nn.Parameter(torch.zeros(1 << 24))
p.grad = torch.ones(1 << 24)
warm = torch.nn.Parameter(torch.zeros(1 << 16))
warm.grad = torch.ones(1 << 16)
PagedAdamW([warm]).step()
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
before = megabytes("VmRSS")
optimizer = PagedAdamW([p], host_budget=budget or None, spill_dir=directory)
for _ in range(2):
    optimizer.step()
after_steps = megabytes("VmHWM") - before
optimizer.save_state(directory + "/state.safetensors")
after_saving = megabytes("VmHWM") - before
optimizer.load_state(directory + "/state.safetensors")
anonymous = megabytes("RssAnon")
print(after_steps, after_saving, anonymous - before, optimizer.memory_stats()["page_ins"])
"""


def memory(directory, budget_mb):
    words = [sys.executable, "-c", SCRIPT, str(directory), str(budget_mb << 20)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=True)
    return [float(word) for word in done.stdout.split()]


def test_peak_memory_of_the_process_shows_the_budget(tmp_path):
    """16.8 million parameters have 134 MB of state; the budget is a quarter of it."""
    stepping, saving, loading, page_ins = memory(tmp_path, 32)
    assert page_ins > 0
    assert 32 <= stepping < 32 + SLACK_MB and saving < 32 + SLACK_MB and loading < 32 + SLACK_MB
    stepping, *_, page_ins = memory(tmp_path, 0)
    assert stepping > 128 and page_ins == 0, "without a budget it takes what it takes"
