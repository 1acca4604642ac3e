"""A forked process never changes its parent's optimizer state: it has its own, or is refused."""

import os
import sys
from pathlib import Path

import pytest
from processes import run_process

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no os.fork")

# In a process of its own, of one thread: torch's OpenMP hangs in a child of a process that has computed with more.
FORK = """
import os, signal, sys
import torch
torch.set_num_threads(1)
from optim_cases import PAGE, parameters, train
from minipeft import PagedAdamW
from minipeft.optim import PagingError

directory = sys.argv[1]
# Whether a child has state of its own.
CASES = [
    ({}, True),
    ({"host_budget": 200 * PAGE}, True),
    ({"device_budget": 3 * PAGE}, False),
    ({"device_budget": 200 * PAGE}, False),
    ({"host_budget": 3 * PAGE, "spill_dir": directory}, False),
    ({"device_budget": 2 * PAGE, "host_budget": 2 * PAGE, "spill_dir": directory}, False),
]

def in_child(work):
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        try:
            work()
        except BaseException as error:
            print(repr(error), flush=True)
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def check(own, bits, settings):
    def make(params):
        return PagedAdamW(params, page_bytes=PAGE, state_bits=bits, **settings)

    params, twins = parameters(), parameters()
    optimizer, alone = make(params), torch.optim.AdamW(twins, fused=True) if bits == 32 else make(twins)
    train(optimizer, params, 3)
    train(alone, twins, 3)

    def step():
        # What other steps would be in a process that was not forked: of an optimizer that was made in the child.
        same = [p.detach().clone().requires_grad_() for p in params]
        other = make(same)
        other.load_state_dict(optimizer.state_dict())
        train(optimizer, params, 2, first=50)
        train(other, same, 2, first=50)
        assert all(map(torch.equal, params, same))
        optimizer.close()

    def refused():
        for call in (lambda: train(optimizer, params, 1), optimizer.state_dict):
            try:
                call()
            except PagingError as error:
                assert "was forked" in str(error), error
            else:
                raise AssertionError("not refused")
        optimizer.memory_stats()
        optimizer.close()

    kept = [p.detach().clone() for p in params]
    assert in_child(step if own else refused) == 0
    assert all(map(torch.equal, params, kept))
    # The parent goes on as if nobody had been forked.
    train(optimizer, params, 3, first=3)
    train(alone, twins, 3, first=3)
    assert all(map(torch.equal, params, twins))

for settings, own in CASES:
    for bits in (32, 8):
        check(own, bits, settings)
        print(settings, bits, flush=True)
"""


def test_a_forked_process_leaves_its_parents_state_alone(tmp_path: Path) -> None:
    path = os.pathsep.join([*sys.path, os.path.dirname(__file__)])
    command = [sys.executable, "-W", "ignore", "-c", FORK, str(tmp_path)]
    done = run_process(command, check=True, env={**os.environ, "PYTHONPATH": path})
    assert len(done.stdout.splitlines()) == 12
