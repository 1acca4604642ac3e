"""`minipeft completion`: what bash itself completes with the script."""

import shutil
import subprocess
from pathlib import Path

import pytest
from command_line import ok, refused

from minipeft.commands.cli import build_parser


def completed(*words: str, folder: Path) -> list[str]:
    """What bash proposes for the last of the words."""
    if shutil.which("bash") is None:
        pytest.skip("bash is not installed")
    given = " ".join(f"'{word}'" for word in ("minipeft", *words))
    asked = f'COMP_WORDS=({given}); COMP_CWORD={len(words)}; _minipeft; printf "%s\\n" "${{COMPREPLY[@]}}"'
    script = ok("completion", "bash") + "\n" + asked
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=folder, check=True)
    assert not done.stderr
    return done.stdout.split()


def test_bash_completes_commands_flags_values_and_files(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").touch()
    assert completed("mer", folder=tmp_path) == ["merge"]
    commands = completed("", folder=tmp_path)
    assert {"train", "data", "export", "bench", "completion"} <= set(commands)
    assert completed("train", "--gradient-", folder=tmp_path) == ["--gradient-accumulation", "--gradient-checkpointing"]
    assert completed("train", "--optimizer", "paged", folder=tmp_path) == ["paged_adamw", "paged_adamw_8bit"]
    assert completed("inspect", "--for", "", folder=tmp_path) == ["vllm", "llama.cpp"]
    assert completed("train", "--data", "da", folder=tmp_path) == completed("data", "da", folder=tmp_path)
    assert completed("train", "--data", "da", folder=tmp_path) == ["data.jsonl"]
    assert completed("bench", "--", folder=tmp_path)
    assert completed("nothing", "--x", folder=tmp_path) == []


def test_every_flag_of_every_command_is_in_both_scripts() -> None:
    commands = next(action for action in build_parser(["bench"])._actions if action.dest == "name")
    assert isinstance(commands.choices, dict)
    for shell in ("bash", "zsh"):
        script = ok("completion", shell)
        for name, parser in commands.choices.items():
            (line,) = [line for line in script.splitlines() if line.startswith(f"    {name}) words=")]
            for action in parser._actions:
                assert all(flag in line for flag in action.option_strings if flag.startswith("--")), (name, action)
    assert "bashcompinit" in ok("completion", "zsh") and "bashcompinit" not in ok("completion", "bash")
    assert "invalid choice: 'tcsh'" in refused("completion", "tcsh")
