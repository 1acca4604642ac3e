"""Times of a product of two threads beside busy processes, by how long OpenMP's threads wait busily.

`python -m benchmarks.neighbour`: for each setting a process of its own, since libgomp reads it when it is loaded,
beside one busy process for each core.
"""

import argparse
import os
import subprocess
import sys
import time

SETTINGS: dict[str, dict[str, str]] = {
    "as libgomp has it": {},
    "GOMP_SPINCOUNT=5000": {"GOMP_SPINCOUNT": "5000"},
    "OMP_WAIT_POLICY=passive": {"OMP_WAIT_POLICY": "passive"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
BUSY = "while True: pass"


def measure(seconds: float) -> float:
    """Microseconds a product of one row with a packed weight of 1536 x 576, in this process."""
    import torch

    from minipeft.nf4 import NF4Weight
    from minipeft_kernels.linear.op import linear

    torch.set_grad_enabled(False)
    weights = [NF4Weight.quantize(torch.randn(1536, 576)).packed() for _ in range(20)]
    x, products = torch.randn(1, 576), 0
    started = time.perf_counter()
    while time.perf_counter() < started + seconds:
        for weight in weights:
            linear(x, weight)
        products += len(weights)
        torch.mm(torch.randn(64, 576), torch.randn(576, 576))
    return (time.perf_counter() - started) / products * 1e6


def main() -> None:
    """Measure every setting, beside busy processes and alone."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=4)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        return print(f"{measure(args.seconds):.0f}")
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.neighbour", "--inside", "--seconds", str(args.seconds)]
    for busy in (0, os.cpu_count() or 1):
        neighbours = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(busy)]
        try:
            for name, variables in SETTINGS.items():
                environment = {**os.environ, "OMP_NUM_THREADS": "2", **variables}
                done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
                print(f"{busy} busy processes, {name:<24} {done.stdout.strip():>6} us a product", flush=True)
        finally:
            for neighbour in neighbours:
                neighbour.kill()
                neighbour.wait()


if __name__ == "__main__":
    main()
