"""Packages of which tests read files and import nothing: downloaded once, without what they depend on."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

CACHE = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "minipeft-tests").expanduser()


def wheel(requirement: str) -> Path:
    """The wheel of a package, such as "trl==1.16.0". The test is skipped where there is no package index."""
    CACHE.mkdir(parents=True, exist_ok=True)
    stem = requirement.replace("==", "-")
    found = list(CACHE.glob(f"{stem}-*.whl"))
    if not found:
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
            result = subprocess.run([*command, requirement, "-d", scratch], capture_output=True, text=True)
            if result.returncode != 0:
                pytest.skip(f"{requirement} cannot be had: {result.stderr.strip().splitlines()[-1]}")
            for file in Path(scratch).glob("*.whl"):
                os.replace(file, CACHE / file.name)
        found = list(CACHE.glob(f"{stem}-*.whl"))
    return found[0]
