"""Files and directories that appear whole or not at all, whenever the process dies."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Names of directories that are being written or removed begin with it.
TEMPORARY_PREFIX = ".incomplete-"


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to; it takes the name `path` when the block ends without an error.

    The data is on disk before the name is, so after a crash `path` holds the old content or the new, whole.
    On an error the temporary file is removed and `path` is left as it was.
    """
    path = Path(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        readable_like_new(temporary)
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except Exception as error:
        # safetensors' error says what failed and not in which file; so does that of writing to an open one.
        if type(error).__name__ == "SafetensorError" or (isinstance(error, OSError) and error.filename is None):
            raise OSError(getattr(error, "errno", None) or errno.EIO, f"cannot write it: {error}", str(path)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` to `path` as UTF-8, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def sync(path: Path) -> None:
    """Wait until a file's content, or a directory's names, are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def readable_like_new(path: Path, mode: int = 0o666) -> None:
    """Give a file (or, with mode 0o777, a directory) the permissions that a new one of the user's would have.

    What tempfile and safetensors make is private.
    """
    # Reading the umask means setting it; this is the only way the standard library offers.
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(mode & ~mask)


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
    # The names that `atomic_path` gives to files it is writing.
    for path in directory.glob(".*.tmp"):
        path.unlink()


def sync_tree(directory: Path) -> None:
    """fsync every file and directory under `directory`, and itself."""
    for path in directory.rglob("*"):
        sync(path)
    sync(directory)


def file_sha256(path: Path) -> str:
    """Hexadecimal sha256 of a file, read piece by piece. (`hashlib.file_digest` came with Python 3.11.)"""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def size(nbytes: float) -> str:
    """A number of bytes as people read it, in powers of 1000: 1.5 MB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if nbytes < 1000 or unit == "GB":
            return f"{nbytes:.0f} bytes" if unit == "bytes" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    raise AssertionError
