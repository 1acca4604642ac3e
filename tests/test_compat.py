"""The window of versions: what is refused, what the pages say, what .ci/matrix runs."""

import importlib.metadata
import re
from pathlib import Path

import pytest
from tiny import tiny_llama

from minipeft import compat

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("name", "version"), [("transformers", "5.5.4"), ("transformers", "4.57.6"), ("torch", "2.5.1+cu124")]
)
def test_a_release_that_does_not_work_is_refused_in_one_sentence(
    name: str, version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda asked: version if asked == name else real(asked))
    wanted = rf"minipeft needs {name} [\d.]+ or newer, and {re.escape(version)} is installed .*pip install '{name}>="
    with pytest.raises(ImportError, match=wanted) as refused:
        compat.check_versions()
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("version", ["2.6.0", "2.10.0", "2.15.0a0+git1234", "3.0"])
def test_newer_releases_are_not(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda asked: version if asked == "torch" else real(asked))
    compat.check_versions()


def test_what_is_not_installed_is_for_its_own_import_to_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    compat.check_versions()


def test_the_cache_is_found_under_each_of_its_names() -> None:
    cache = object()
    for name in compat.CACHE_NAMES:
        assert compat.cache_of({"input_ids": 1, name: cache, "cache_position": None}) is cache
    assert compat.cache_of({"past_key_values": None, "input_ids": 1}) is None


@pytest.mark.parametrize("older", [False, True])
def test_activations_are_checkpointed_by_either_name(older: bool) -> None:
    """transformers until 5.22 calls it gradient checkpointing."""
    model = tiny_llama()
    if older:
        model = OldNames(model)
    compat.checkpoint_activations(model)
    assert model.model.layers[0].gradient_checkpointing
    assert model.model.layers[0]._gradient_checkpointing_func.keywords == {"use_reentrant": False}
    compat.keep_activations(model)
    assert not model.model.layers[0].gradient_checkpointing


class OldNames:
    """A model of today under the names of transformers 5.22."""

    def __init__(self, model: object) -> None:
        self.inner, self.model = model, model.model

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict) -> None:
        self.inner.activation_checkpointing_enable(activation_checkpointing_kwargs=gradient_checkpointing_kwargs)

    def gradient_checkpointing_disable(self) -> None:
        self.inner.activation_checkpointing_disable()


def test_the_page_names_what_the_matrix_runs() -> None:
    """docs/differences.md has a row for each set, and the oldest set is the oldest that setup.py takes."""
    matrix = (ROOT / ".ci" / "matrix").read_text()
    page = (ROOT / "docs" / "differences.md").read_text()
    line = r"^python\[(\w+)\]=(\S+)\s+torch\[\1\]=(\S+)\s+rest\[\1\]='transformers==(\S+?)[ ']"
    sets = re.findall(line, matrix, re.M)
    assert len(sets) == 4
    for _, python, torch, transformers in sets:
        assert re.search(rf"^\| {python} \| {torch} \| [\d.]+ \| {transformers} \|", page, re.M)
    setup = (ROOT / "setup.py").read_text()
    _, python, torch, transformers = sets[0]
    assert f'python_requires=">={python}"' in setup
    for name, version in (("torch", torch), ("transformers", transformers)):
        oldest = compat.OLDEST[name][0]
        assert version.startswith(f"{oldest}.") and f'"{name}>={oldest}"' in setup


def test_the_newest_change_is_of_the_version_that_setup_gives() -> None:
    version = re.search(r'version="([\d.]+)"', (ROOT / "setup.py").read_text())
    heading = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert version and heading and version[1] == heading[1]
