"""How far a result may lie from the same computation in float64, by the dtype it was computed in.

For numbers of about unit size: products of normalized inputs over a few hundred terms.
"""

from typing import Any

import torch

TOLERANCES: dict[torch.dtype, dict[str, Any]] = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.float16: {"rtol": 2e-3, "atol": 2e-3},
    torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2},
}
