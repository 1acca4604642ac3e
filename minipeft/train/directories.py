"""Directories that appear whole or not at all, whenever the process dies; see `minipeft.files`."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from minipeft.files import readable_like_new, sync

TEMPORARY_PREFIX = ".incomplete-"


@contextlib.contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """Give a temporary directory beside `target` to fill; on leaving, it is synced and becomes `target`.

    An existing `target` is replaced: it is moved aside first and removed last, because a directory cannot be
    renamed onto one that is not empty.
    """
    temporary = Path(tempfile.mkdtemp(prefix=TEMPORARY_PREFIX, dir=target.parent))
    try:
        yield temporary
        readable_like_new(temporary, 0o777)
        for file in temporary.rglob("*"):
            if file.is_file():
                readable_like_new(file)
        sync_tree(temporary)
        if target.exists():
            old = Path(tempfile.mkdtemp(prefix=TEMPORARY_PREFIX, dir=target.parent))
            os.replace(target, old / target.name)
            os.replace(temporary, target)
            shutil.rmtree(old)
        else:
            os.replace(temporary, target)
        sync(target.parent)
    finally:
        if temporary.exists():
            shutil.rmtree(temporary, ignore_errors=True)


def remove_directory(path: Path) -> None:
    """Remove a directory so that a half-removed one is never taken for a whole one."""
    doomed = Path(tempfile.mkdtemp(prefix=TEMPORARY_PREFIX, dir=path.parent))
    os.replace(path, doomed / path.name)
    shutil.rmtree(doomed)


def remove_leftovers(directory: Path) -> None:
    """Remove what an earlier process was writing when it died."""
    for path in directory.glob(TEMPORARY_PREFIX + "*"):
        shutil.rmtree(path)
    # The names that minipeft.files gives to files it is writing.
    for path in directory.glob(".*.tmp"):
        path.unlink()


def sync_tree(directory: Path) -> None:
    """fsync every file and directory under `directory`, and itself."""
    for path in directory.rglob("*"):
        sync(path)
    sync(directory)
