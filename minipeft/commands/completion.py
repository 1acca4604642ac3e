"""`minipeft completion`: a script by which a shell completes the command's words, made from its own parser."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
from typing import Any

from minipeft.train.config import TrainConfig

# Flags whose value is a file or folder, or may be one.
_FILES = "--adapter|--base|--chat-template|--config|--data|--eval-data|--json|--model|--other-text|--output"
_FILES += "|--output-dir|--plot|--resume|--runs"


def completion(args: argparse.Namespace) -> None:
    """`minipeft completion`: print the script for a shell."""
    from minipeft.commands.cli import build_parser

    parser = build_parser(["bench"])  # with what it alone takes
    commands = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    print(script(commands.choices, args.shell))


def _values(command: str, action: argparse.Action) -> list[str]:
    """The values that an argument takes, where they are few and known."""
    known = action.choices
    if command == "train":  # its flags are checked as settings
        about: Any = next((f.metadata for f in dataclasses.fields(TrainConfig) if f.name == action.dest), {})
        known = known or about.get("choices") or about.get("known")
    return [str(value) for value in known or ()]


def script(commands: dict[str, argparse.ArgumentParser], shell: str) -> str:
    """The script: for bash, or for zsh, which runs bash's by its own bashcompinit."""
    words, values = [], []
    for name, parser in commands.items():
        flags = [flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")]
        words.append(f"    {name}) words={shlex.quote(' '.join(flags))} ;;")
        for action in parser._actions:
            known = _values(name, action)
            for flag in action.option_strings if known else ():
                values.append(f"    {name}:{flag}) words={shlex.quote(' '.join(known))} ;;")
    names = shlex.quote(" ".join(commands))
    head = "autoload -U +X bashcompinit && bashcompinit\n" if shell == "zsh" else ""
    return f"""{head}# Completion of minipeft for {shell}; load it by: eval "$(minipeft completion {shell})"
_minipeft() {{
  local cur=${{COMP_WORDS[COMP_CWORD]}} prev=${{COMP_WORDS[COMP_CWORD-1]}} command=${{COMP_WORDS[1]}} words=
  COMPREPLY=()
  if [ "$COMP_CWORD" -eq 1 ]; then
    COMPREPLY=( $(compgen -W {names} -- "$cur") )
    return
  fi
  case "$command:$prev" in
{chr(10).join(values)}
  esac
  if [ -z "$words" ]; then
    case "$prev" in
      {_FILES}) COMPREPLY=( $(compgen -f -- "$cur") ); return ;;
    esac
    case "$cur" in
      -*) ;;
      *) COMPREPLY=( $(compgen -f -- "$cur") ); return ;;
    esac
    case "$command" in
{chr(10).join(words)}
    esac
  fi
  COMPREPLY=( $(compgen -W "$words" -- "$cur") )
}}
complete -o filenames -F _minipeft minipeft"""
