"""LoRA's small products in every tile that is shipped, as compiled for two GPUs, equal float64 with all checks on."""

import pytest
import torch
from proof_products import TARGETS
from torch import Tensor

from minipeft.kernels.emulator import EmulatedLaunch, emulate
from minipeft_kernels.lab.catalogue import Kernel, thin_kernels
from minipeft_kernels.linear import thin_triton
from minipeft_kernels.linear.thin import grad_of_A, grad_of_B, project, project_back

KERNELS = [
    pytest.param(target, kernel, id=f"{target} {kernel.name}")
    for target in TARGETS
    for kernel in thin_kernels(int(target.removeprefix("sm_")))
]


@pytest.fixture(autouse=True)
def _chosen_by_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MINIPEFT_BACKEND")


def prove(
    target: str, name: str, m: int, k: int, rank: int, x_dtype: torch.dtype, dtype: torch.dtype
) -> list[EmulatedLaunch]:
    """A product of x (m, k) as a target would compute it, twice, has float32's precision and the same bits."""
    x, a, b = torch.randn(m, k).to(x_dtype), torch.randn(rank, k).to(dtype), torch.randn(k, rank).to(dtype)
    g = torch.randn(m, rank).to(dtype)
    makers = {
        "x A^T": (lambda: project(x, a, 0.5, dtype), 0.5 * x.double(), a.T),
        "dy B": (lambda: project_back(x, b, -2.0, dtype), -2.0 * x.double(), b),
        "g^T x": (lambda: grad_of_A(g, x, torch.float32), g.T, x),
        "dy^T low": (lambda: grad_of_B(x, g, torch.float32), x.T, g),
    }
    make, left, right = makers[name]
    with emulate(target) as run:
        outs: list[Tensor] = [make() for _ in range(2)]
    assert torch.equal(*outs)
    out, left, right = outs[0].double(), left.double(), right.double()
    error = 1e-6 + (0 if outs[0].dtype == torch.float32 else torch.finfo(outs[0].dtype).eps / 2)
    assert out.shape == (left.shape[0], right.shape[1])
    assert ((out - left @ right).abs() <= error * (left.abs() @ right.abs())).all()
    assert len(run.launches) == 2
    return list(run.launches)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(("target", "kernel"), KERNELS)
def test_a_shipped_tile(target: str, kernel: Kernel, whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On shapes that the tile divides, which programs share; and on ragged ones; smaller than it is shipped for."""
    name = kernel.name.split(" bf16")[0]
    sizes = kernel.constants
    tile = thin_triton.Tile(sizes["BI"], sizes["BD"], sizes["BR"], kernel.warps, kernel.stages)
    monkeypatch.setattr(thin_triton, "tile_for", lambda *sizes: tile)
    monkeypatch.setattr(thin_triton, "_planned", thin_triton._planned.__wrapped__)  # which keeps no plan of other tests
    width, depth, rank = sizes["BI"], (16 if sizes["BR"] == 64 else 8) * sizes["BD"], sizes["BR"]
    if not whole:
        width, depth, rank = width - 3, 3 * sizes["BD"] + 9, rank - 3
    m, k = (depth, width) if sizes["OVER_ROWS"] else (width, depth)
    for launch in prove(target, name, m, k, rank, torch.bfloat16, torch.float32):
        assert launch.name == kernel.function.__name__ and launch.warps == kernel.warps
        assert {name: launch.constants[name] for name in sizes if name.isupper()} == {
            name: value for name, value in sizes.items() if name.isupper()
        }
        assert launch.grid[1] > 1 or not whole


@pytest.mark.parametrize(("target", "dtype"), [("sm_80", torch.bfloat16), ("sm_90", torch.float16)])
def test_factors_of_16_bits(target: str, dtype: torch.dtype) -> None:
    for name in ("x A^T", "dy B", "g^T x", "dy^T low"):
        for launch in prove(target, name, 80, 96, 8, dtype, dtype):
            assert launch.constants["PARTS"] == 1


@pytest.mark.parametrize("target", TARGETS)
def test_ranks_beyond_one_tile(target: str) -> None:
    for name in ("x A^T", "dy^T low"):
        prove(target, name, 70, 72, 70, torch.bfloat16, torch.float32)
