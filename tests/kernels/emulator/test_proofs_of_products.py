"""Every shipped product, compiled and emulated with all checks: `compiled/test_proofs_{products,experts,thin}.py`."""

import pytest
from compiled_apart import run_apart


@pytest.mark.parametrize("half", ["sm_80", "not sm_80"])
def test_every_shipped_product_equals_float64(half: str) -> None:
    run_apart("test_proofs_products.py", "-k", half)


@pytest.mark.parametrize("half", ["sm_80", "not sm_80"])
def test_every_shipped_product_of_experts_equals_float64(half: str) -> None:
    run_apart("test_proofs_experts.py", "-k", half)


@pytest.mark.parametrize("half", ["sm_80", "not sm_80"])
def test_every_small_product_of_lora_has_the_precision_of_float32(half: str) -> None:
    run_apart("test_proofs_thin.py", "-k", half)
