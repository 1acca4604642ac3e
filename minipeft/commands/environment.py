"""`minipeft env`: what a report of a bug needs to say about the machine, and what would make minipeft do more there."""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
from pathlib import Path

import minipeft
from minipeft.files import size
from minipeft.machine import memory, processor, version

# What must be installed, and what is for some tasks: distribution -> the task that wants it.
NEEDED = ("torch", "triton", "transformers", "tokenizers", "safetensors", "numpy")
OPTIONAL = {
    "accelerate": "device_map, and transformers' Trainer",
    "gguf": "minipeft demo",
    "matplotlib": "pictures of minipeft demo and compare",
}
VARIABLES = ("MINIPEFT_", "TRITON_INTERPRET", "OMP_NUM_THREADS", "HF_HUB_OFFLINE", "CUDA_VISIBLE_DEVICES")


def environment(args: argparse.Namespace) -> None:
    """`minipeft env`: print it."""
    print("\n".join(f"{name:<13} {what}" for name, what in facts()))


def facts() -> list[tuple[str, str]]:
    """Names and what there is to say of each, in the order of printing. Nothing raises: what fails is told."""
    own = f"{version('minipeft')} in {Path(minipeft.__file__).parent}; names and files of PEFT {minipeft.__version__}"
    found = [
        ("minipeft", own),
        ("python", f"{platform.python_version()} on {platform.platform()}"),
        *((name, version(name)) for name in NEEDED),
        *((name, _optional(name, task)) for name, task in OPTIONAL.items()),
        ("processor", f"{processor()}, {memory()}"),
        ("compiler", _compiler()),
    ]
    try:
        import torch
    except Exception as error:  # whatever a broken installation raises
        found.append(("problem", f"torch cannot be imported: {type(error).__name__}: {error}"))
    else:
        found += [("threads", f"{torch.get_num_threads()} of torch's"), ("GPU", _gpu()), *_forms()]
    found += [(name, os.environ[name]) for name in sorted(os.environ) if name.startswith(VARIABLES)]
    return found


def _optional(distribution: str, task: str) -> str:
    found = version(distribution)
    return f"{found}: {task} would want it" if found == "not installed" else found


def _compiler() -> str:
    """The C compiler that an installation from source would take, by the first line that it says of itself."""
    words = (os.environ.get("CC") or "cc").split()
    if shutil.which(words[0]) is None:
        return f"no {words[0]}: an installation from source leaves the compiled part out"
    try:
        said = subprocess.run([*words, "--version"], capture_output=True, text=True, timeout=20).stdout.splitlines()
    except (OSError, subprocess.SubprocessError) as error:
        return f"{words[0]} cannot be run: {error}"
    return said[0] if said else f"{words[0]} says nothing of itself"


def _gpu() -> str:
    import torch

    if not torch.cuda.is_available():
        return f"none that torch {torch.__version__} can use"
    count, names = torch.cuda.device_count(), []
    for number in range(count):
        about = torch.cuda.get_device_properties(number)
        names.append(f"{about.name} (compute capability {about.major}.{about.minor}, {size(about.total_memory)})")
    return f"{'; '.join(names)}; CUDA {torch.version.cuda or torch.version.hip}"


def _forms() -> list[tuple[str, str]]:
    """The form in which the operations run here: Triton, C, or the reference in PyTorch."""
    try:
        import torch

        from minipeft_kernels import native
        from minipeft_kernels.dispatch import interpreting, use_native, use_triton

        places = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
        forms = []
        for place in places:
            tensor = torch.empty(0, device=place)
            if use_triton(tensor):
                form = "Triton's interpreter: slow, for tests" if interpreting() else "Triton"
            else:
                form = native.describe() if use_native(tensor) else f"reference in PyTorch ({native.obstacle()})"
            forms.append((f"NF4 on {place}", form))
        return forms
    except Exception as error:
        return [("problem", f"the kernels cannot be used: {type(error).__name__}: {error}")]
