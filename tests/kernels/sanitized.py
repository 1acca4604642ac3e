"""The compiled CPU code under AddressSanitizer and UndefinedBehaviorSanitizer: `python tests/kernels/sanitized.py`.

Builds the sources with both, and makes raw calls of the operations with arguments that need not fit each other, at
every level of instructions that this processor has: a read or write beyond a tensor ends the process with a report.
torch itself is not built with sanitizers; what it reads is what the operations let through to it.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
MODULE = "minipeft_native_sanitized"
FLAGS = "-O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined"
# torch's and Python's memory at exit is nobody's leak; a request for more than there is fails as it does without.
ADDRESS_OPTIONS = "detect_leaks=0:allocator_may_return_null=1:abort_on_error=0"


def compiler() -> str:
    """The C compiler that is asked for, or gcc."""
    return os.environ.get("CC", "gcc")


def build(folder: Path) -> Path:
    """The compiled part with both sanitizers, as a file in `folder`."""
    setup = (ROOT / "setup.py").read_text()
    names = re.search(r"for name in (\(.*?\))", setup)
    assert names is not None
    sources = [str(ROOT / "kernels" / "native" / f"{name}.c") for name in re.findall(r"\w+", names[1])]
    library = folder / f"{MODULE}.abi3.so"
    flags = [*FLAGS.split(), "-fopenmp", "-ffp-contract=off", "-fvisibility=hidden", "-fPIC", "-shared"]
    subprocess.run([compiler(), *flags, *sources, "-o", str(library)], check=True)
    return library


def environment(folder: Path, level: str) -> dict[str, str]:
    """That of a process which loads the library from `folder` and treats the processor as one of `level`."""
    found = [
        subprocess.run([compiler(), f"-print-file-name={name}"], check=True, capture_output=True, text=True).stdout
        for name in ("libasan.so", "libubsan.so", "libstdc++.so.6")
    ]
    paths = [ROOT, ROOT / "kernels", ROOT / "tests", HERE, HERE / "experts", folder]
    return {
        **os.environ,
        "LD_PRELOAD": " ".join(name.strip() for name in found),
        "ASAN_OPTIONS": ADDRESS_OPTIONS,
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "PYTHONMALLOC": "malloc",
        "MINIPEFT_BACKEND": "native",
        "MINIPEFT_CPU": level,
        "OMP_NUM_THREADS": "2",
    }


def run_at(folder: Path, level: str, calls: int, seed: int) -> str:
    """Make the calls in a process of its own, and return what it prints.

    Raises:
        AssertionError: it did not come to its end; with what it printed.
    """
    command = [sys.executable, "-W", "ignore", str(Path(__file__).resolve()), "--inside"]
    command += ["--calls", str(calls), "--seed", str(seed)]
    done = subprocess.run(command, env=environment(folder, level), capture_output=True, text=True)
    assert done.returncode == 0, f"at level {level}:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    return done.stdout.strip()


def inside(calls: int, seed: int) -> None:
    """Make the calls with the library of this process's environment."""
    from misfits import call_many

    from minipeft_kernels import dispatch, native

    native.MODULE = MODULE
    for read in (native._load, native.obstacle, native.level, dispatch.native_obstacle):
        read.cache_clear()
    assert not native.obstacle(), native.obstacle()
    assert native.library()._name.endswith(f"{MODULE}.abi3.so")
    last = [seed]
    try:
        computed, refused = call_many(calls, seed, lambda one: last.__setitem__(0, one))
    finally:
        print(f"last seed {last[0]}", flush=True)
    print(f"{calls} calls at level {native.LEVEL_NAMES[native.level()]}: {computed} computed, {refused} refused")


def main() -> None:
    """Build, and make the calls at every level."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=2000, help="at each level")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        return inside(args.calls, args.seed)
    from minipeft_kernels import native

    levels = [native.SCALAR] if native.obstacle() else native.levels()
    with tempfile.TemporaryDirectory() as name:
        build(Path(name))
        for level in levels:
            print(run_at(Path(name), native.LEVEL_NAMES[level], args.calls, args.seed), flush=True)


if __name__ == "__main__":
    main()
