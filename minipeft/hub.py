"""Names on Hugging Face's hub: an adapter's stands for a folder, in the cache that transformers uses, too."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from minipeft.errors import AdapterNotFoundError

# Arguments that say how to reach the hub. They are huggingface_hub's, but for `use_auth_token`, an old name of `token`.
HUB_ARGUMENTS = ("revision", "token", "use_auth_token", "cache_dir", "local_files_only", "force_download")

_ABOUT_PICKLES = (
    ". If there is a pickle (adapter_model.bin), which minipeft does not open: "
    "https://huggingface.co/spaces/safetensors/convert makes safetensors of it"
)


def base_names(model: str | Path) -> set[str]:
    """The names that a base model may go by: its folder's, that of the folder a link leads to, a hub's in its cache."""
    given, real = Path(model), Path(model).resolve()
    names = {given.name, real.name} - {"", ".."}
    # .../models--org--name/snapshots/<commit>
    names |= {part.rpartition("--")[2] for part in real.parts if part.startswith("models--")}
    return names


def hub_arguments(given: dict[str, Any]) -> dict[str, Any]:
    """The `HUB_ARGUMENTS` among `given`, taken out of it."""
    return {name: given.pop(name) for name in HUB_ARGUMENTS if name in given}


def adapter_folder(
    name: str | Path, files: Iterable[str], optional: Iterable[str] = (), subfolder: str | None = None, **hub: Any
) -> Path:
    """The folder of an adapter; from the hub, unless there is a folder called `name`, its files are fetched first.

    Args:
        name: A folder, or "org/name" on the hub.
        files: Names of the files that are needed. A folder on disk is not searched for them.
        optional: Names of files that may be missing.
        subfolder: Of the folder or the repository.
        hub: `HUB_ARGUMENTS`. Without network (HF_HUB_OFFLINE, `local_files_only`) the cache has to have the files.

    Raises AdapterNotFoundError when `name` is neither, or lacks one of `files`.
    """
    folder = Path(name) / (subfolder or "")
    if folder.is_dir():
        return folder
    wanted = [*files]
    if Path(name).exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(name)):
        raise AdapterNotFoundError(f"no adapter at {str(folder)!r}: Can't find '{wanted[0]}' there, it is no folder")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    arguments = {key: value for key, value in hub.items() if value is not None}
    if "use_auth_token" in arguments:
        arguments["token"] = arguments.pop("use_auth_token")
    found = None
    for file in (*wanted, *optional):
        try:
            found = Path(hf_hub_download(str(name), file, subfolder=subfolder, **arguments)).parent
        except (EntryNotFoundError, HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, OSError) as error:
            if file not in wanted and isinstance(error, EntryNotFoundError):
                continue
            raise AdapterNotFoundError(
                f"no adapter at {str(name)!r}: Can't find '{file}' there. It is no folder, and the hub gives none "
                f"({type(error).__name__}: {error}){_ABOUT_PICKLES if file.endswith('.safetensors') else ''}"
            ) from error
    assert found is not None
    return found
