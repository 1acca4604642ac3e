"""These tests compile kernels, and are not collected under Triton's interpreter: `../compiled_apart.py` runs them."""

import os

# Triton 3.9 warns, once, of a kernel that leaves it open whether products and sums are fused.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

from minipeft_kernels.dispatch import interpreting

collect_ignore_glob = ["test_*.py"] if interpreting() else []
