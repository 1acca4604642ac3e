"""The fuzzer: changes files at random, has them read, and holds what comes of it to the promise.

The promise: files are read, or refused by one error of ours that names the file, in bounded time and memory. Every
input is made from one number, which a failure names: `python -m tests.faults fuzz --seed N --inputs 1` makes it again.
"""

import collections
import json
import logging
import mmap
import os
import random
import resource
import signal
import struct
import tempfile
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import torch
from faults.kept import READ, REFUSED
from faults.mutations import mutate
from faults.readers import ExitCode, Reader, lay_out, readers

from minipeft.optim.tiers import PagingError
from minipeft.train.errors import TrainingError

SECONDS = 20
MEMORY = 3 << 30  # bytes that a reader may take more than the process has
LONGEST = 2000  # characters of an error


class TooLong(BaseException):
    """A reader did not come back."""


@dataclass
class Counts:
    """What came of the inputs of each reader: (read, refused)."""

    done: dict[str, list[int]] = field(default_factory=lambda: collections.defaultdict(lambda: [0, 0]))
    failures: list[str] = field(default_factory=list)
    slowest: float = 0.0


def verdict(error: BaseException, folder: Path, changed: list[str]) -> str:
    """What is wrong with an error as a refusal, "" where nothing is."""
    kind, text = type(error), str(error)
    if isinstance(error, TooLong):
        return f"no answer in {SECONDS} seconds of computing"
    if isinstance(error, ExitCode) or not isinstance(error, ValueError | OSError | TrainingError | PagingError):
        return "an error of another kind"
    if not kind.__module__.startswith(("minipeft", "builtins")) or issubclass(kind, UnicodeError):
        return "an error of a library"
    if len(text) > LONGEST:
        return f"an error of {len(text)} characters"
    if str(folder) not in text and not any(Path(name).name in text for name in changed):
        return "an error that names no file"
    return ""


def run_one(number: int, folder: Path, counts: Counts) -> None:
    """Make the input of this number, have it read, and note what came of it."""
    choose = random.Random(number)
    every = readers()
    reader: Reader = choose.choices(every, [r.weight for r in every])[0]
    files = dict(reader.files)
    changed = choose.sample(reader.changed, 1 if choose.random() < 0.85 else min(2, len(reader.changed)))
    for name in changed:
        files[name] = mutate(name, files[name], choose)
    lay_out(files, folder)
    torch.manual_seed(number)
    started = time.process_time()
    error = attempt(reader, folder)
    counts.slowest = max(counts.slowest, time.process_time() - started)
    if error is None:
        counts.done[reader.name][0] += 1
        return
    counts.done[reader.name][1] += 1
    wrong = verdict(error, folder, changed)
    if wrong:
        said = " ".join(str(error).split())[:400]
        counts.failures.append(
            f"--seed {number}: {reader.name}, {', '.join(changed)}: {wrong}: {type(error).__name__}: {said}"
        )


def run_kept(folder: Path, counts: Counts) -> None:
    """Have the files read that were once read wrong."""
    by_name = {reader.name: reader for reader in readers()}
    for cases, refused in ((REFUSED, True), (READ, False)):
        for place, (name, file, change) in enumerate(cases):
            reader = by_name[name]
            lay_out({**reader.files, file: change(reader.files[file])}, folder)
            error = attempt(reader, folder)
            counts.done["kept files"][error is not None] += 1
            wrong = "" if error is None else verdict(error, folder, [file])
            if refused and error is None:
                wrong = "it was read"
            elif error is not None and not refused:
                wrong = "it was refused"
            if wrong:
                said = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
                counts.failures.append(
                    f"kept {'refused' if refused else 'read'} {place}, {name}, {file}: {wrong}: {said}"
                )


def attempt(reader: Reader, folder: Path) -> BaseException | None:
    """The error of reading, None without one; within limits of time and memory."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise TooLong

    before = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        taken = int(file.read().split()[0]) * resource.getpagesize()
    # Seconds of this process's own: a busy machine breaks no promise.
    signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, before[1]))
    try:
        reader.read(folder)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        return error
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, before)
    return None


def fuzz(inputs: int, seed: int, most: int = 10**9, minutes: float = 1e9) -> Counts:
    """Run the kept files, and `inputs` inputs from the number `seed` on, until `most` failures or so many minutes.

    Each thousand runs in a process of its own, so that one which ends it is found, too.
    """
    counts, until = Counts(), time.monotonic() + 60 * minutes
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    readers()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _in_child(range(0), counts)
        number = seed
        while number < seed + inputs and len(counts.failures) < most and time.monotonic() < until:
            number = _in_child(range(number, min(number + 1000, seed + inputs)), counts)
    return counts


def _in_child(numbers: range, counts: Counts) -> int:
    """Run inputs, or the kept files if there are none, in a child, add up what came of them; return the next number."""
    at = mmap.mmap(-1, 8)  # the number that the child is at, also if it dies
    with tempfile.TemporaryDirectory() as name:
        child = os.fork()
        if child == 0:
            own = Counts()
            if not numbers:
                run_kept(Path(name) / "input", own)
            for number in numbers:
                at[:8] = struct.pack("<q", number)
                run_one(number, Path(name) / "input", own)
            (Path(name) / "counts").write_text(json.dumps([own.done, own.failures, own.slowest]))
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status:
            # What was counted before is lost, and not said to have been run.
            (number,) = struct.unpack("<q", at[:8])
            counts.failures.append(f"--seed {number}: the process ended with {status}")
            return number + 1
        done, failures, slowest = json.loads((Path(name) / "counts").read_text())
    for reader, (read, refused) in done.items():
        counts.done[reader][0] += read
        counts.done[reader][1] += refused
    counts.failures += failures
    counts.slowest = max(counts.slowest, slowest)
    return numbers.stop
