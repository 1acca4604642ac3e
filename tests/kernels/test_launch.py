"""Every launcher, in a process that compiles for a GPU which is not there."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from processes import run_process

PROGRAM = Path(__file__).with_name("pretend_gpu.py")
STREAMING = {
    *("_nf4_quantize_kernel", "_quantize_absmax_kernel", "_nf4_dequantize_kernel"),
    *("_adamw_kernel", "_adamw_8bit_kernel"),
}
WIDE = {"_nf4_quantize_kernel": ["LDG"], "_nf4_dequantize_kernel": ["STG"], "_adamw_kernel": ["LDG", "STG"]}
FUSED = {"_nf4_matmul_direct_kernel", "_nf4_matmul_staged_kernel"}


@pytest.fixture(scope="module")
def launches() -> list[dict[str, Any]]:
    environment = {k: v for k, v in os.environ.items() if k not in ("MINIPEFT_BACKEND", "TRITON_INTERPRET")}
    done = run_process([sys.executable, "-W", "error", PROGRAM], env=environment, check=True)
    return list(json.loads(done.stdout))


def test_every_kernel_compiles_with_the_arguments_that_its_launcher_gives(launches: list[dict[str, Any]]) -> None:
    assert {launch["kernel"] for launch in launches} >= STREAMING | FUSED


def test_shared_memory_fits_the_smallest_gpu(launches: list[dict[str, Any]]) -> None:
    assert max(launch.get("shared", 0) for launch in launches) <= 99 * 1024


def test_many_rows_and_ragged_weights_are_decoded_first(launches: list[dict[str, Any]]) -> None:
    names = [launch["kernel"] for launch in launches]
    rest = names[names.index("many rows") :]
    # In each of the two, W is decoded for two products, forward and backward, and once alone.
    decoded = [name for name in rest if name != "_thin_product_kernel"]
    assert decoded == ["many rows", *["_nf4_dequantize_kernel"] * 5, "ragged", *["_nf4_dequantize_kernel"] * 5]
    # One of the two products is LoRA's: x A^T, dy B, dA and dB.
    assert rest.count("_thin_product_kernel") == 2 * 4


def test_experts_are_one_launch_forward_and_one_backward(launches: list[dict[str, Any]]) -> None:
    names = [launch["kernel"] for launch in launches]
    for at in (i for i, name in enumerate(names) if name == "experts"):
        assert names[at + 1 : at + 3] == ["_nf4_matmul_direct_kernel", "_nf4_matmul_staged_kernel"]


def codes_of(launches: list[dict[str, Any]], kernel: str) -> list[set[str]]:
    """The kinds of instructions of each launch of a kernel."""
    return [set(launch["code"].split()) for launch in launches if launch["kernel"] == kernel]


def test_decoding_rounds_products_and_sums_apart(launches: list[dict[str, Any]]) -> None:
    for code in codes_of(launches, "_nf4_dequantize_kernel"):
        assert not any(name.startswith("FFMA") for name in code)
    assert any("FADD" in code for code in codes_of(launches, "_nf4_dequantize_kernel"))


def test_aligned_tensors_are_read_and_written_16_bytes_at_a_time(launches: list[dict[str, Any]]) -> None:
    for kernel, ways in WIDE.items():
        accesses = [f"{way}.E.128" for way in ways]
        assert any(code.issuperset(accesses) for code in codes_of(launches, kernel)), kernel
