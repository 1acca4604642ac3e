"""A run's adapter on Hugging Face's hub: whether it can be sent is asked before the run, and a failure costs nothing.

huggingface_hub, which transformers brings, finds the login by itself (HF_TOKEN, or `hf auth login`).
"""

from __future__ import annotations

from pathlib import Path

from minipeft.train.errors import ConfigError, TrainingError


class PushError(TrainingError):
    """A finished run's adapter that could not be uploaded; it is on disk."""


def check_login(name: str) -> None:
    """Raise ConfigError where the hub cannot be reached, or knows nobody here, before anything is trained.

    Args:
        name: where the adapter is to go, `org/name`.
    """
    from huggingface_hub import HfApi

    try:
        HfApi().whoami()
    except Exception as error:  # of many kinds: the network's, the hub's, a login that is missing
        raise ConfigError(f"push_to_hub {name}: the hub cannot be written to from here: {_said(error)}") from error


def push(folder: Path, name: str) -> None:
    """Upload an adapter's folder to `name`, which is made private if it is not there.

    Raises:
        PushError: it could not be uploaded.
    """
    from huggingface_hub import HfApi

    try:
        HfApi().create_repo(name, private=True, exist_ok=True)
        HfApi().upload_folder(repo_id=name, folder_path=folder, commit_message="Upload an adapter")
    except Exception as error:
        raise PushError(
            f"the run is complete and its adapter lies in {folder}, but it could not be sent to {name}: "
            f"{_said(error)}; try again by: hf upload {name} {folder}"
        ) from error


def _said(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
