"""What the cases of a whole model share: models, sizes, peers, and a process for what needs one of its own."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.environment import ROOT
from benchmarks.finetune_models import PEFT, Models
from benchmarks.harness import Candidate, Missing, Run, Work
from benchmarks.peers import BITSANDBYTES, Peers
from benchmarks.peers import PEFT as PEFT_MODULE
from benchmarks.shapes import FineTuning
from minipeft.commands.bench import HUGE_PAGES

OP = "finetune"
OVER_BNB = f"{PEFT} + {BITSANDBYTES}"
NO_WORK = Work(0)


@dataclass(frozen=True)
class Bench:
    """What makes the cases: the models, each loaded when first needed."""

    models: Models
    what: FineTuning
    peers: Peers

    @property
    def quick(self) -> bool:
        return self.what.rounds == 1

    def forget(self) -> None:
        """Free the models that were loaded; the next case loads its own."""
        for cached in (Models.ours, Models.theirs, Models.right_step):
            cached.cache_clear()  # type: ignore[attr-defined]
        gc.collect()

    def peer(self, name: str, run: Callable[[], Run], *check: Any) -> Candidate | Missing:
        """PEFT or `OVER_BNB` as a candidate, or why it is none."""
        for module in (PEFT_MODULE, *([BITSANDBYTES] if name == OVER_BNB else [])):
            found = self.peers.find(module)
            if isinstance(found, str):
                return Missing(name, found)
        return Candidate(name, run, *check)


def shape_title(shape: tuple[int, int]) -> str:
    """ "4x256" of (4, 256): rows and tokens."""
    return f"{shape[0]}x{shape[1]}"


def run_python(*words: str) -> str:
    """What a new interpreter prints. Raises RuntimeError with the end of its errors if it fails."""
    # The allocator's large pages would be counted as used.
    environment = {k: v for k, v in os.environ.items() if k != HUGE_PAGES}
    done = subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)[:80]} failed: {done.stderr.strip()[-150:]}")
    return done.stdout
