"""Instructions that lanes of a warp execute together: which of them are there, and who must wait for whom."""

from __future__ import annotations

import numpy as np

from .errors import BarrierError
from .lanes import WARP, Lanes
from .steps import Step


def whole_warps(lanes: np.ndarray, width: int = WARP) -> bool:
    """True if ascending lanes are whole warps (or groups of `width` lanes)."""
    if lanes.size % width:
        return False
    first = lanes[::width]
    return bool((first % width == 0).all() and (lanes[width - 1 :: width] - first == width - 1).all())


def split_by_warp(step: Step, active: np.ndarray, alive: np.ndarray, lanes: Lanes) -> tuple[np.ndarray, np.ndarray]:
    """The lanes whose warps (or warpgroups) are there as far as their masks ask for, and the others.

    Args:
        active: lanes at the instruction. alive: (all lanes,) bool; exited ones are waited for by nobody.

    Raises:
        BarrierError: the instruction needs all lanes of a warp, and some have exited.
    """
    here = np.zeros(lanes.count, bool)
    here[active] = True
    rows = active // step.width
    living = alive.reshape(-1, step.width)[rows]
    if step.aligned and not living.all():
        lane = int(active[~living.all(1)][0])
        raise BarrierError(
            f"{step.instruction.place} needs all lanes of a warp, and some of those of {lanes.describe(lane)}'s "
            "have exited"
        )
    missing = step.members(active) & ~here.reshape(-1, step.width)[rows] & living
    complete = ~missing.any(1)
    if step.aligned:
        # If one lane of a warp has not come yet, the whole warp waits.
        complete = ~np.isin(rows, rows[~complete])
    return active[complete], active[~complete]
