"""`minipeft train --push-to-hub`: before and after the run, with a stand-in for the hub, which no test reaches."""

from pathlib import Path
from typing import Any, ClassVar

import huggingface_hub
import pytest
from command_line import ok, refused, run
from test_cli import QUICK, RECORDS
from tiny_folder import save_model, write_jsonl


@pytest.fixture
def arguments(tmp_path: Path) -> list[Any]:
    save_model(tmp_path / "base")
    data = write_jsonl(tmp_path / "data.jsonl", RECORDS)
    where = ["train", "--model", tmp_path / "base", "--data", data, "--output", tmp_path / "run", *QUICK]
    return [*where, "--push-to-hub", "someone/words"]


class Hub:
    """What is asked of the hub."""

    asked: ClassVar[list[Any]] = []
    full = False

    def whoami(self) -> dict[str, str]:
        self.asked.append("whoami")
        return {"name": "someone"}

    def create_repo(self, name: str, private: bool, exist_ok: bool) -> None:
        self.asked.append((name, private, exist_ok))

    def upload_folder(self, repo_id: str, folder_path: Path, commit_message: str) -> None:
        if self.full:
            raise ConnectionError("the line\nis dead")
        self.asked.append((repo_id, sorted(file.name for file in Path(folder_path).iterdir())))


def test_the_adapter_is_uploaded_once_the_run_is_complete(
    tmp_path: Path, arguments: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    Hub.asked = []
    assert ok(*arguments).endswith("uploaded to someone/words\n")
    files = ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert Hub.asked == ["whoami", "whoami", ("someone/words", True, True), ("someone/words", files)]
    assert "push_to_hub" not in (tmp_path / "run/adapter/README.md").read_text()


def test_a_failure_costs_nothing(tmp_path: Path, arguments: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    # Offline, as the tests are, it is told before anything is trained.
    assert "push_to_hub someone/words: the hub cannot be written to from here" in refused(*arguments)
    assert not (tmp_path / "run").exists()
    assert "'push_to_hub' must be a name like org/name, got 'words'" in refused(*arguments[:-1], "words")
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(Hub, "full", True)
    code, _, said = run(*arguments)
    sentence = said.splitlines()[-1].removeprefix("minipeft: error: ")  # behind the progress bar
    assert code == 2 and sentence.startswith("the run is complete and its adapter lies in ")
    assert sentence.endswith(f"the line is dead; try again by: hf upload someone/words {tmp_path}/run/adapter")
    assert (tmp_path / "run/adapter/adapter_model.safetensors").is_file()
