"""The compiled part on processors and by compilers that are not this machine's: ARM, x86-64 of 2008 and 2013, clang.

Each is compiled with the flags that setup.py has, and decodes what `test_native_decode.py` decodes and multiplies what
`product_driver.c` compares with plain C, where the compiler and qemu's user mode are there (Debian:
gcc-aarch64-linux-gnu, libc6-dev-arm64-cross, qemu-user, clang).
"""

import ctypes
import re
import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from native_weights import by_reference, random_state

from minipeft_kernels import native
from minipeft_kernels.nf4.cpu import decode_range

ROOT = Path(__file__).parents[2]
DRIVERS = [Path(__file__).with_name(f"{name}_driver.c") for name in ("decode", "product")]
SOURCES = [*sorted((ROOT / "kernels" / "native").glob("*.c")), *DRIVERS]
BUILT: dict[str, Path] = {}
# What is compiled with, what runs the result, and the level of that processor.
MACHINES = {
    "aarch64": (["aarch64-linux-gnu-gcc", "-static"], ["qemu-aarch64"], native.NEON),
    "x86-64 of 2008": (["gcc", "-static"], ["qemu-x86_64", "-cpu", "Nehalem"], native.SCALAR),
    "x86-64 of 2013": (["gcc", "-static"], ["qemu-x86_64", "-cpu", "Haswell"], native.AVX2),
    "clang without OpenMP": (["clang"], [], None),
}


def flags(openmp: bool) -> list[str]:
    """Those of setup.py."""
    found = re.search(r"extra_compile_args=\[(.*?)\]", (ROOT / "setup.py").read_text())
    assert found
    return [flag for flag in re.findall(r'"(.*?)"', found[1]) if openmp or flag != "-fopenmp"]


class Elsewhere:
    """The library's calls, each in a process of its own on the other processor.

    Attributes:
        level: that which the processor said it has.
    """

    def __init__(self, command: list[str]) -> None:
        self.command, self.level = command, -1

    def minipeft_decode(self, packed: bytes) -> None:
        """As in kernels/native/entry.c."""
        call = list(struct.unpack("16q", packed))
        rows, columns, blocksize, nested_blocksize = call[6:10]
        blocks = -(-rows * columns // blocksize)
        nested = bool(call[3])
        sizes = [(rows * columns + 1) // 2, blocks * (1 if nested else 4), 16 * 4]
        sizes += [-(-blocks // nested_blocksize) * 4, 256 * 4, 4] if nested else [0, 0, 0]
        tensors = b"".join(ctypes.string_at(place, size) for place, size in zip(call[:6], sizes, strict=True) if size)
        out, nbytes = call[12], (call[11] - call[10]) * (4 if call[13] == native.DTYPES[torch.float32] else 2)
        header = struct.pack("16q", *sizes, *call[6:12], nbytes, *call[13:])
        ran = subprocess.run(self.command, input=header + tensors, capture_output=True, timeout=60, check=True)
        (self.level,) = struct.unpack("i", ran.stdout[:4])
        assert len(ran.stdout) == 4 + nbytes
        ctypes.memmove(out, ran.stdout[4:], nbytes)


@pytest.fixture(params=MACHINES, scope="module")
def machine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], int | None]:
    """The command that runs the drivers, and the processor's level."""
    compiler, runner, level = MACHINES[request.param]
    for tool in (compiler[0], *runner[:1]):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    key = " ".join(compiler)
    if key not in BUILT:  # two machines may run one program
        BUILT[key] = tmp_path_factory.mktemp("native") / "drivers"
        openmp = request.param != "clang without OpenMP"
        subprocess.run([*compiler, *flags(openmp), "-o", BUILT[key], *SOURCES, "-lm"], check=True)
    return [*runner, str(BUILT[key])], level


@pytest.fixture
def elsewhere(machine: tuple[list[str], int | None]) -> Any:
    return Elsewhere(machine[0]), machine[1]


def test_products_equal_plain_c(machine: tuple[list[str], int | None]) -> None:
    command, level = machine
    ran = subprocess.run([*command, "products"], capture_output=True, text=True, timeout=120)
    found, *errors = ran.stdout.split()
    assert level is None or int(found) == level
    if int(found) == native.SCALAR:
        assert ran.returncode == 1 and not errors  # refused, for torch to compute
    else:
        assert ran.returncode == 0 and len(errors) == 4, ran.stderr
        assert all(float(error) < 1e-6 for error in errors), errors


@given(
    n=st.integers(1, 3000),
    blocksize=st.sampled_from([32, 64, 128, 4096, 48]),
    double=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    part=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_part_decodes_to_the_references_bits(
    elsewhere: Any, n: int, blocksize: int, double: bool, dtype: torch.dtype, part: tuple[float, float]
) -> None:
    library, level = elsewhere
    w = random_state(n, blocksize, double)
    first, last = sorted(round(x * n) for x in part)
    out = torch.full((last - first,), torch.nan, dtype=dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "library", lambda: library)
        patch.setattr(native, "level", lambda: native.AVX512_BF16)  # the driver takes the processor's own
        decode_range(out, w.packed(), first, last)
    assert torch.equal(out, by_reference(w, dtype)[first:last])
    assert level is None or library.level == level
