"""Every shipped product, compiled and emulated with all checks: see `compiled/test_proofs_products.py`."""

from compiled_apart import run_apart


def test_every_shipped_product_equals_float64() -> None:
    run_apart("test_proofs_products.py")
