"""Which entry of a sorted map is nearest, for millions of numbers: counted by the upper half of their bits.

The upper half of a float32 (sign, exponent, 7 bits of mantissa) tells how many thresholds lie below it, unless one of
them lies among the numbers that share it: then one comparison settles it. So two look-ups and a comparison replace a
search. NF4 quantization of 4096x4096 on one thread: 41 ms so, 117 ms with 15 comparisons, 368 ms with torch.bucketize.
"""

import torch
from torch import Tensor

Tables = tuple[Tensor, Tensor]
"""uint8 (65536,): the least count of an upper half. float32 (65536,): the threshold within it, infinity for none."""


def upper_half_tables(thresholds: Tensor) -> Tables:
    """The tables of up to 255 thresholds, float32, ascending; no two of them may share an upper half."""
    upper = torch.arange(1 << 16, dtype=torch.int32, device="cpu") << 16
    first, last = upper.view(torch.float32), (upper | 0xFFFF).view(torch.float32)
    last = torch.where(last.isnan(), first, last)
    counts = torch.bucketize(torch.stack([first, last]), thresholds)
    lowest, highest = counts.amin(0), counts.amax(0)
    assert int((highest - lowest).max()) == 1
    inside = thresholds[lowest.clamp(max=len(thresholds) - 1)]
    return lowest.to(torch.uint8), torch.where(highest > lowest, inside, torch.inf)


def count_below(x: Tensor, tables: Tables) -> Tensor:
    """How many thresholds lie below each number, so the index of the nearest entry, a tie to the lower one.

    Args:
        x: float32, contiguous, no NaN. tables: on its device.

    Returns:
        uint8 of x's shape.
    """
    lowest, threshold = tables
    upper = (x.view(torch.int32).view(-1) >> 16).bitwise_and_(0xFFFF)
    above = torch.gt(x.view(-1), threshold.index_select(0, upper))
    return lowest.index_select(0, upper).add_(above.view(torch.uint8)).view(x.shape)
