"""The manifest of a checkpoint: the size and the checksum of every file, by which damage is noticed.

It is written last, so a folder that has one was whole once; what differs from it was changed since, by whatever. A
checksum finds what storage and copying do to files, no one who rewrites the manifest as well.
"""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

from minipeft.files import file_sha256, write_text

MANIFEST = "manifest.json"


def write_manifest(folder: Path) -> None:
    """Describe every file in `folder` and its folders as it is now."""
    files = {name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)} for name, path in _files(folder).items()}
    write_text(folder / MANIFEST, _text(files))


def damage(folder: Path) -> list[str]:
    """Sentences on what is not as the manifest says, each of which begins with a file's name; none for a whole folder.

    A file that the manifest does not know is damage where it could be read as a part of the checkpoint.
    """
    # A file is read once for all who ask, as long as nobody writes to it.
    marks = []
    for name, path in _files(folder, with_manifest=True).items():
        found = path.stat()
        marks.append((name, found.st_size, found.st_mtime_ns, found.st_ino))
    return list(_damage(folder, tuple(marks)))


@functools.lru_cache(maxsize=256)
def _damage(folder: Path, marks: tuple[Any, ...]) -> tuple[str, ...]:
    try:
        listed = _read(folder / MANIFEST)
    except FileNotFoundError:
        return (f"{MANIFEST} is missing",)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return (f"{MANIFEST} itself is not as it was written",)
    found = _files(folder)
    problems = [f"{name} is missing" for name in listed if name not in found]
    for name, path in found.items():
        if name not in listed:
            if path.suffix in (".json", ".safetensors"):
                problems.append(f"{name} does not belong to it")
            continue
        size, checksum = listed[name]
        try:
            if path.stat().st_size != size:
                problems.append(f"{name} has {path.stat().st_size} bytes, {size} were written")
            elif file_sha256(path) != checksum:
                problems.append(f"{name} holds other bytes than were written")
        except OSError as error:
            problems.append(f"{name} cannot be read: {error.strerror or error}")
    return tuple(problems)


def _read(path: Path) -> dict[str, tuple[Any, Any]]:
    """The size and the checksum of each file by its name, from the manifest at `path`.

    Raises FileNotFoundError without one, and whatever reading a damaged one raises.
    """
    text = path.read_text(encoding="utf-8")
    files = json.loads(text)["files"]
    if text != _text(files):
        raise ValueError("the manifest does not have its own checksum")
    return {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}


def _text(files: Any) -> str:
    """The manifest: the files, and the checksum of what it says of them."""
    own = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
    return json.dumps({"files": files, "sha256": own}, indent=2, sort_keys=True) + "\n"


def _files(folder: Path, with_manifest: bool = False) -> dict[str, Path]:
    """The files below `folder` by their names relative to it, sorted."""
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return paths if with_manifest else {name: path for name, path in paths.items() if name != MANIFEST}
