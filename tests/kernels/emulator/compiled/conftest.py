"""These tests compile kernels, and are not collected under Triton's interpreter: `../compiled_apart.py` runs them."""

from minipeft.kernels.dispatch import interpreting

collect_ignore_glob = ["test_*.py"] if interpreting() else []
