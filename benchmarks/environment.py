"""The facts that are recorded with a measurement: hardware, versions, commit, command, date, the machine's load."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

from benchmarks.limits import Roofline
from benchmarks.options import HUGE_PAGES
from minipeft.machine import version
from minipeft_kernels import native
from minipeft_kernels.dispatch import interpreting, use_native, use_triton

ROOT = Path(__file__).resolve().parent.parent
# bitsandbytes fetches other CPU code from the hub where PyPI's `kernels` is installed.
PACKAGES = ("torch", "transformers", "triton", "peft", "bitsandbytes", "kernels", "unsloth")
# Instruction sets that decide how fast a CPU's products are, as Linux calls them.
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def device_name(device: torch.device) -> str:
    """The processor's own name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return _cpu_info("model name") or platform.processor() or platform.machine()


def device_slug(device: torch.device) -> str:
    """The device in a file name: "cpu-amd-epyc-2-threads", "cuda-nvidia-l4"."""
    threads = f" {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    return re.sub(r"[^a-z0-9]+", "-", f"{device.type} {device_name(device)}{threads}".lower()).strip("-")


def describe_environment(device: torch.device, command: str) -> dict[str, str]:
    """The facts that stand above a table of results, as far as they are known before it is measured."""
    facts = {"device": f"{device.type}: {device_name(device)}"}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts["gpu"] = f"compute capability {properties.major}.{properties.minor}, {properties.total_memory >> 20} MiB"
        facts["cuda"] = str(torch.version.cuda)
        facts["driver"] = _command(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    else:
        flags = (_cpu_info("flags") or "").split()
        facts["pages"] = f"{HUGE_PAGES}={os.environ.get(HUGE_PAGES, 0)}"
        facts["instructions"] = " ".join(flag for flag in CPU_FLAGS if flag in flags)
    facts |= {
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} CPUs",
        "backend": backend(device),
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        "commit": commit(),
        "command": command,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    return {key: value for key, value in facts.items() if value}


def describe_limits(roofline: Roofline) -> dict[str, str]:
    """The device's limits that floors and shares were counted with."""
    rates = [f"{str(dtype).removeprefix('torch.')} {rate / 1e9:.4g} GFLOP/s" for dtype, rate in roofline.flops.items()]
    return {
        "bandwidth_limit": f"{roofline.bandwidth / 1e9:.4g} GB/s ({roofline.source})",
        "arithmetic_limit": ", ".join(rates) or "not needed",
    }


def backend(device: torch.device) -> str:
    """The form of minipeft's operations that runs on the device, in words: compiled, Triton or reference."""
    tensor = torch.empty(0, device=device)
    if not use_triton(tensor):
        return native.describe() if use_native(tensor) else "reference (PyTorch)"
    return "Triton's interpreter" if interpreting() else "Triton"


def load() -> str:
    """The mean number of processes that ran or waited in the last minute; "unknown" where nobody counts."""
    return f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"


def commit() -> str:
    """The commit of this checkout, and whether its sources were changed since; "" outside git."""
    short = _command(["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"])
    sources = ("minipeft", "kernels", "benchmarks/*.py")
    changed = _command(["git", "-C", str(ROOT), "status", "--porcelain", "--", *sources])
    return f"{short} with uncommitted changes" if short and changed else short


def _command(words: list[str]) -> str:
    try:
        return subprocess.run(words, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _cpu_info(field: str) -> str | None:
    file = Path("/proc/cpuinfo")
    if not file.is_file():
        return None
    found = re.search(rf"^{field}\s*:\s*(.+)$", file.read_text(), re.MULTILINE)
    return found.group(1).strip() if found else None
