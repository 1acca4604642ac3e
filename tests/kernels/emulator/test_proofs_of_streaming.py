"""Quantization, decoding and AdamW, compiled and emulated with all checks: see `compiled/test_proofs_streaming.py`."""

from compiled_apart import run_apart


def test_every_streaming_kernel_equals_its_reference() -> None:
    run_apart("test_proofs_streaming.py")
