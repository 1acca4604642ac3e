"""The standing attack: `python -m tests.faults fuzz --inputs N`."""

import argparse
import os
import sys
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
    args = parser.parse_args()

    from faults.fuzz import fuzz

    counts = fuzz(args.inputs, args.seed, args.most, args.minutes)
    for name, (read, refused) in sorted(counts.done.items()):
        print(f"{read + refused:8,} inputs  {read:8,} read  {refused:8,} refused  {name}")
    total = sum(map(sum, counts.done.values()))
    print(f"{total:8,} inputs, the slowest in {counts.slowest:.1f} s, {len(counts.failures)} broke the promise")
    for failure in counts.failures:
        print(failure)
    return 1 if counts.failures else 0


if __name__ == "__main__":
    sys.exit(main())
