"""The standing attack.

python -m tests.faults fuzz --inputs N       # changed files for every reader (`fuzz.py`)
python -m tests.faults attack --minutes N    # kills, full disks, crowds, bad numbers (`attacks.py`)
python -m tests.faults soak --steps 20000    # small steps: what memory, open files and threads grow by
"""

import argparse
import os
import random
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def main() -> int:
    """Run the attack that is asked for; 1 where it found something."""
    parser = argparse.ArgumentParser(description=__doc__)
    attacks = parser.add_subparsers(dest="attack", required=True)
    fuzzer = attacks.add_parser("fuzz", help="changed files for every reader")
    fuzzer.add_argument("--inputs", type=int, default=1000)
    fuzzer.add_argument("--seed", type=int, default=0, help="the number of the first input")
    fuzzer.add_argument("--most", type=int, default=20, help="failures after which it stops")
    fuzzer.add_argument("--minutes", type=float, default=1e9)
    attacker = attacks.add_parser("attack", help="kills, full disks, crowds, bad numbers")
    attacker.add_argument("--minutes", type=float, default=10)
    attacker.add_argument("--seed", type=int, default=0, help="the number of the first round")
    soaker = attacks.add_parser("soak", help="many small steps")
    soaker.add_argument("--steps", type=int, default=20_000)
    args = parser.parse_args()
    if args.attack == "attack":
        return go_through(args.minutes, args.seed)
    if args.attack == "soak":
        from faults.attacks import many_small_steps_hold_nothing

        with tempfile.TemporaryDirectory() as folder:
            print(many_small_steps_hold_nothing(random.Random(0), Path(folder), args.steps))
        return 0

    from faults.fuzz import fuzz

    counts = fuzz(args.inputs, args.seed, args.most, args.minutes)
    for name, (read, refused) in sorted(counts.done.items()):
        print(f"{read + refused:8,} inputs  {read:8,} read  {refused:8,} refused  {name}")
    total = sum(map(sum, counts.done.values()))
    print(f"{total:8,} inputs, the slowest in {counts.slowest:.1f} s, {len(counts.failures)} broke the promise")
    for failure in counts.failures:
        print(failure)
    return 1 if counts.failures else 0


def go_through(minutes: float, seed: int) -> int:
    """All attacks in turn until the time is over, each at least once; prints the times and failures of each."""
    from faults.attacks import ROUND

    end, times, failures = time.monotonic() + 60 * minutes, Counter[str](), Counter[str]()
    number = seed
    while number == seed or time.monotonic() < end:
        for attack in ROUND:
            times[attack.__name__] += 1
            try:
                with tempfile.TemporaryDirectory(prefix="minipeft-attack-") as folder:
                    attack(random.Random(number), Path(folder))
            except Exception:
                failures[attack.__name__] += 1
                print(f"{attack.__name__}, round {number}:\n{traceback.format_exc()}", flush=True)
        number += 1
    for name, count in times.items():
        print(f"{count:4} times, {failures[name]:3} broke the promise: {name.replace('_', ' ')}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
