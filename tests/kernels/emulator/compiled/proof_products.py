"""What the proofs of the products share: one product by its launcher, checked against float64 and the catalogue."""

from typing import Any

import torch
from nf4_weights import Weight
from tolerances import TOLERANCES

from minipeft.kernels.emulator import EmulatedLaunch, emulate
from minipeft_kernels.lab.catalogue import Kernel
from minipeft_kernels.linear.gpu import launch_forward, launch_input_gradient

TARGETS = ("sm_80", "sm_90")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def prove(
    target: str, m: int, weight: Weight, dtype: torch.dtype, grad: bool, bias: bool = False, rank: int = 0
) -> EmulatedLaunch:
    """y = x W^T or dx = dy W as the target would compute it, with all checks, equals float64; returns the launch."""
    n, k = weight.dense.shape
    depth, width = (n, k) if grad else (k, n)
    rows = torch.randn(m, depth).to(dtype)
    b = torch.randn(n).to(dtype) if bias else None
    low, up = torch.randn(m, rank) * 0.3, torch.randn(*((rank, width) if grad else (width, rank))) * 0.3
    low, up = low.to(dtype).float(), up.to(dtype).float()
    options: dict[str, Any] = {"update": (low, up) if rank else None} | ({} if grad else {"bias": b})
    with emulate(target) as run:
        launcher = launch_input_gradient if grad else launch_forward
        out = launcher(rows, weight.packed, **options)
    update = low.double() @ up.double() if grad else low.double() @ up.double().t()
    right = rows.double() @ (weight.dense if grad else weight.dense.t()) + update + (0 if b is None else b.double())
    assert out.dtype == dtype and out.shape == right.shape
    torch.testing.assert_close(out.double(), right, **TOLERANCES[dtype])
    (launch,) = run.launches
    return launch


def assert_is(launch: EmulatedLaunch, kernel: Kernel) -> None:
    """The launch was of a shipped configuration: same function, tile, warps."""
    assert launch.name == kernel.function.__name__
    tile = ("BM", "BN", "CHUNK", "NB", "GRAD", "PRMT")
    assert {t: launch.constants[t] for t in tile if t in kernel.constants} == {
        t: kernel.constants[t] for t in tile if t in kernel.constants
    }
    assert launch.warps == kernel.warps
