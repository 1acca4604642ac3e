"""Counting thresholds by the upper half of a float, against a search."""

import pytest
import torch
from torch import Tensor

from minipeft_kernels.nf4.codebooks import NF4_BOUNDARIES, count_below, dynamic_map, exact_thresholds, upper_half_tables

THRESHOLDS = {
    "nf4": NF4_BOUNDARIES,
    "signed": exact_thresholds(dynamic_map(signed=True)),
    "unsigned": exact_thresholds(dynamic_map(signed=False)),
}


def telling_numbers(thresholds: Tensor) -> Tensor:
    """The first and last number of every upper half, and each threshold with its neighbours."""
    upper = torch.arange(1 << 16, dtype=torch.int32) << 16
    ends = torch.cat([upper, upper | 0xFFFF]).view(torch.float32)
    infinity = torch.tensor(torch.inf)
    near = [thresholds, thresholds.nextafter(infinity), thresholds.nextafter(-infinity)]
    return torch.cat([ends[~ends.isnan()], *near])


@pytest.mark.parametrize("name", THRESHOLDS)
def test_counts_equal_a_search(name: str) -> None:
    thresholds = THRESHOLDS[name]
    x = telling_numbers(thresholds)
    assert torch.equal(count_below(x, upper_half_tables(thresholds)).long(), torch.bucketize(x, thresholds))


def test_two_thresholds_in_one_upper_half_are_refused() -> None:
    with pytest.raises(AssertionError):
        upper_half_tables(torch.tensor([1.0, 1.001]))
