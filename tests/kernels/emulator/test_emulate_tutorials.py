"""Kernels of the kind that Triton's tutorials teach, compiled and emulated, against torch in float64."""

from compiled_apart import run_apart


def test_tutorial_kernels_give_what_torch_gives() -> None:
    run_apart("test_tutorials.py")
