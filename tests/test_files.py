"""Files that appear whole or not at all: in which order the system is asked to write, to rename and to remove."""

import os
import shutil
from pathlib import Path

import pytest

from minipeft.files import atomic_directory, atomic_path

Events = list[tuple[str, ...]]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Events:
    """What the system was asked for, in order; in place of a removal, what lies under the directory's old name then."""
    events: Events = []
    fsync, replace, rmtree = os.fsync, os.replace, shutil.rmtree

    def note_fsync(handle: int) -> None:
        events.append(("sync", os.readlink(f"/proc/self/fd/{handle}")))
        fsync(handle)

    def note_replace(source: Path, target: Path) -> None:
        events.append(("rename", str(source), str(target)))
        replace(source, target)

    def note_rmtree(path: Path, **options: bool) -> None:
        inside = [p.name for p in Path(path).iterdir()]
        events.append(("remove", *(text for n in inside for text in (n, (path.parent / n / "a").read_text()))))
        rmtree(path, **options)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    monkeypatch.setattr(shutil, "rmtree", note_rmtree)
    return events


def test_a_file_is_on_disk_before_it_has_its_name_and_the_name_is_on_disk_then(tmp_path: Path, asked: Events) -> None:
    target = tmp_path / "file"
    with atomic_path(target) as temporary:
        temporary.write_text("new")
    assert asked == [("sync", str(temporary)), ("rename", str(temporary), str(target)), ("sync", str(tmp_path))]


def test_a_directory_is_on_disk_before_it_has_its_name(tmp_path: Path, asked: Events) -> None:
    target = tmp_path / "folder"
    with atomic_directory(target) as temporary:
        (temporary / "inner").mkdir()
        for name in ("a", "inner/b"):
            (temporary / name).write_text("new")
    *before, rename, after = asked
    assert sorted(before) == sorted(("sync", str(temporary / name)) for name in ("", "a", "inner", "inner/b"))
    assert rename == ("rename", str(temporary), str(target)) and after == ("sync", str(tmp_path))


def test_what_a_directory_replaces_is_removed_once_the_new_one_has_its_name(tmp_path: Path, asked: Events) -> None:
    target = tmp_path / "folder"
    for content in ("old", "new"):
        with atomic_directory(target) as temporary:
            (temporary / "a").write_text(content)
    renames = [event for event in asked if event[0] == "rename"]
    assert renames[1][1] == str(target) and renames[2][1:] == (str(temporary), str(target))
    assert [event for event in asked if event[0] == "remove"] == [("remove", "folder", "new")]
