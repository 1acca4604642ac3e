"""The tables of NF4 against the ones that bitsandbytes wrote."""

import pytest
import torch
from nf4_golden import golden

from minipeft_kernels.nf4.codebooks import NF4_BOUNDARIES, NF4_LEVELS, NF4_ZERO_CODE, dynamic_map


@pytest.mark.parametrize(
    ("name", "ours"),
    [("nf4_code", NF4_LEVELS), ("nf4_bounds", NF4_BOUNDARIES), ("dynamic_map_signed", dynamic_map())],
)
def test_table_is_bitsandbytes(name: str, ours: torch.Tensor) -> None:
    assert ours.dtype == torch.float32
    assert torch.equal(ours, golden(name))


def test_zero_is_a_level_and_an_entry_of_the_dynamic_map() -> None:
    assert NF4_LEVELS[NF4_ZERO_CODE] == 0
    assert dynamic_map()[127] == 0
    assert dynamic_map()[255] == 1


def test_tables_are_built_on_the_cpu_whatever_the_default_device() -> None:
    dynamic_map.cache_clear()
    with torch.device("meta"):
        assert dynamic_map().device.type == "cpu"
