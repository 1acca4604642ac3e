"""The memory of this process. It imports nothing that would be part of the answer."""

import re
from pathlib import Path


def resident_bytes(name: str) -> int:
    """A line of this process's memory, "VmRSS" or its peak "VmHWM"."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024
