"""Rounding float32 to an output dtype, to nearest even on the GPU and in the interpreter alike."""
# Device code has no Python types.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import triton
import triton.language as tl

from .dispatch import interpreting

_INTERPRETED = tl.constexpr(interpreting())


@triton.jit
def _round_to(x, dtype: tl.constexpr):
    """float32 -> dtype. The interpreter cuts a bfloat16's lower half off instead of rounding it: there, by integers."""
    if _INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        # To nearest, ties to even; a NaN stays one whatever its lower half.
        up = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
        return tl.where(x == x, up, 0x7FC0).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)
