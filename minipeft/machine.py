"""The machine in words: what stands beside a measurement, and in a report of a bug."""

import importlib.metadata
import os
import platform
from pathlib import Path

from minipeft.files import size


def processor() -> str:
    """The processor's cores and name, as far as the system tells it: "2 cores of AMD EPYC"."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{os.cpu_count()} cores of {name}"


def version(distribution: str) -> str:
    """The version of an installed distribution; "not installed"."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def memory() -> str:
    """The size of the host's memory: "25.2 GB"; "memory unknown" where the system does not tell, as on Windows."""
    try:
        return size(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):
        return "memory unknown"
