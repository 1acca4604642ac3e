"""Two adapters side by side, by layer: how large their updates are, along which directions, and how these lie together.

LoRA's update of a weight is D = s B A, with B (out, r) and A (r, in). Its singular values and vectors come from the
factors: with B = Q_B R_B and A^T = Q_A R_A (QR), D = Q_B (s R_B R_A^T) Q_A^T, and the matrix in the middle is r x r.
The angles between two subspaces are those of Bjorck and Golub 1973 (Numerical methods for computing angles between
linear subspaces): by cosines where they are large, and by sines where they are small. All in float64.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from minipeft.config import PeftConfig
from minipeft.train.errors import TrainingError, as_user_error

_FACTOR = re.compile(r"(.+)\.lora_(embedding_)?([AB])(\.weight)?$")
_PREFIX = "base_model.model."


class DiffError(TrainingError, ValueError):
    """Folders that hold no adapters, or adapters that have nothing to compare."""


@dataclass(frozen=True)
class Update:
    """LoRA's update of one weight in its singular vectors: D = U diag(singular_values) V^T.

    Attributes:
        U, V: (out, k) and (in, k), float64, with orthonormal columns; k is the rank, at most r.
        singular_values: (k,), descending, above 0.
    """

    U: Tensor
    singular_values: Tensor
    V: Tensor

    @property
    def norm(self) -> float:
        """The Frobenius norm of D."""
        return float(self.singular_values.norm())


@dataclass(frozen=True)
class LayerDiff:
    """One layer of two adapters.

    Attributes:
        shape: Of the update, (out, in).
        norms: Frobenius norms of the two updates.
        difference: Frobenius norm of the first less the second.
        cosine: Of the angle between the two as vectors; None if one of them is 0.
        spectra: Singular values of each.
        output_angles, input_angles: Principal angles in degrees, ascending, between the spaces that the updates write
            to (columns) and read from (rows): as many as the smaller rank.
    """

    layer: str
    shape: tuple[int, int]
    norms: tuple[float, float]
    difference: float
    cosine: float | None
    spectra: tuple[list[float], list[float]]
    output_angles: list[float]
    input_angles: list[float]


@dataclass(frozen=True)
class TensorDiff:
    """One trained tensor that is no factor of LoRA, in two adapters: Frobenius norms, of each and of the difference."""

    name: str
    shape: tuple[int, ...]
    norms: tuple[float, float]
    difference: float


@dataclass(frozen=True)
class AdapterDiff:
    """Two adapters.

    Attributes:
        alone: What only one of them has, or has in another shape: a sentence each.
    """

    layers: list[LayerDiff]
    tensors: list[TensorDiff]
    alone: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON holds it."""
        return dataclasses.asdict(self)


def diff(first: str | Path, second: str | Path) -> AdapterDiff:
    """Compare the adapters in two folders.

    Raises:
        DiffError: no adapter there, damaged files, or nothing that both have.
    """
    (factors, tensors), (other_factors, other_tensors) = read(Path(first)), read(Path(second))
    layers, pairs, alone = [], [], []
    for name in sorted({*factors, *other_factors}, key=_in_order):
        one, two = factors.get(name), other_factors.get(name)
        if one is None or two is None:
            alone.append(f"{name} is adapted by {second if one is None else first} alone")
        elif (one[1].shape[0], one[0].shape[1]) != (two[1].shape[0], two[0].shape[1]):
            alone.append(f"{name} has other sizes: the adapters are of different models")
        else:
            layers.append(compare(name, one, two))
    for name in sorted({*tensors, *other_tensors}, key=_in_order):
        here, there = tensors.get(name), other_tensors.get(name)
        if here is None or there is None:
            alone.append(f"{name} is stored by {second if here is None else first} alone")
        elif here.shape != there.shape:
            alone.append(f"{name} is {list(here.shape)} and {list(there.shape)}")
        else:
            x, y = here.double(), there.double()
            norms = float(x.norm()), float(y.norm())
            pairs.append(TensorDiff(name, tuple(here.shape), norms, float((x - y).norm())))
    if not layers and not pairs:
        raise DiffError(f"{first} and {second} have nothing in common: {'; '.join(alone[:3])}")
    return AdapterDiff(layers, pairs, alone)


def read(folder: Path) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]:
    """The adapter in `folder`: (A, s B) by layer, in float64, and its other tensors by name.

    A convolution's factors are matrices here, (r, in * height * width) and (out, r), as its update is one.

    Raises:
        DiffError: no adapter there, or a damaged one.
    """
    if not (folder / "adapter_config.json").is_file():
        inner = folder / "adapter"
        hint = f"; there is one in {inner}" if (inner / "adapter_config.json").is_file() else ""
        raise DiffError(f"no adapter at {folder}: expected a folder with adapter_config.json{hint}")
    file = folder / "adapter_model.safetensors"
    try:
        with as_user_error(DiffError, str(folder)):
            config: Any = PeftConfig.from_pretrained(folder)
        stored = load_file(file)
    except SafetensorError as error:
        raise DiffError(f"{file} is cut off, or is not a safetensors file: {error}") from None
    except OSError as error:
        raise DiffError(f"cannot read {file}: {error.strerror or error}") from None
    halves: dict[str, dict[str, Tensor]] = {}
    rest = {}
    for name, tensor in stored.items():
        found = _FACTOR.match(name)
        if found is None or config.type_name != "LORA":
            rest[name.removeprefix(_PREFIX)] = tensor
        else:
            halves.setdefault(found[1].removeprefix(_PREFIX), {})[found[3]] = tensor
    factors = {}
    for layer, half in halves.items():
        if half.keys() != {"A", "B"}:
            raise DiffError(f"{file} holds only one of the factors of {layer}")
        if min(half["A"].ndim, half["B"].ndim) < 2:
            raise DiffError(f"{file}: the factors of {layer} must be matrices, not {_shapes(half)}")
        A, B = half["A"].double().flatten(1), half["B"].double().flatten(1)
        if not (A.isfinite().all() and B.isfinite().all()):
            raise DiffError(f"{file}: the factors of {layer} hold NaN or infinity")
        rank, _, scaling = config.settings_for(layer)
        if A.shape[0] != B.shape[1] or A.shape[0] != rank:
            # Experts in one parameter: factors side by side, each of its own expert's matrix.
            rest |= {f"{layer}.lora_{letter}": tensor for letter, tensor in half.items()}
        else:
            factors[layer] = (A, scaling * B)
    return factors, rest


def _shapes(half: Mapping[str, Tensor]) -> str:
    return " and ".join(str(list(tensor.shape)) for tensor in half.values())


def decompose(A: Tensor, B: Tensor) -> Update:
    """The singular value decomposition of B A, (out, r) (r, in), without forming it. B holds the scaling."""
    Q_B, R_B = torch.linalg.qr(B)
    Q_A, R_A = torch.linalg.qr(A.T)
    U, s, Vh = torch.linalg.svd(R_B @ R_A.T)
    # numpy's bound for the rank of a matrix.
    size = max(B.shape[0], A.shape[1])
    kept = int((s > s.max() * size * torch.finfo(s.dtype).eps).sum()) if len(s) else 0
    return Update(Q_B @ U[:, :kept], s[:kept], Q_A @ Vh[:kept].T)


def compare(layer: str, one: tuple[Tensor, Tensor], two: tuple[Tensor, Tensor]) -> LayerDiff:
    """Two updates of one weight, given as (A, s B)."""
    first, second = decompose(*one), decompose(*two)
    # D1 - D2 = [B1, -B2] [A1; A2], so that what they have in common cancels before a norm is taken.
    difference = decompose(torch.cat([one[0], two[0]]), torch.cat([one[1], -two[1]], 1)).norm
    inner = float(((one[1].T @ two[1]) * (one[0] @ two[0].T)).sum())
    lengths = first.norm * second.norm
    return LayerDiff(
        layer,
        (one[1].shape[0], one[0].shape[1]),
        (first.norm, second.norm),
        difference,
        inner / lengths if lengths else None,
        (first.singular_values.tolist(), second.singular_values.tolist()),
        angles(first.U, second.U),
        angles(first.V, second.V),
    )


def angles(one: Tensor, two: Tensor) -> list[float]:
    """Principal angles in degrees, ascending, between the spans of orthonormal columns, (n, k) and (n, l)."""
    if not one.shape[1] or not two.shape[1]:
        return []
    if one.shape[1] < two.shape[1]:
        one, two = two, one
    # Of the smaller space: its part within the larger one, and what stands out of it.
    within = one.T @ two
    cosines = torch.linalg.svdvals(within).clamp(max=1)
    sines = torch.linalg.svdvals(two - one @ within).flip(0).clamp(max=1)
    return torch.where(cosines**2 < 0.5, cosines.acos(), sines.asin()).rad2deg().tolist()


def _in_order(name: str) -> list[tuple[int, Any]]:
    """Layer 10 after layer 9."""
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in name.split(".")]


def mean_angles(layers: list[LayerDiff]) -> Mapping[str, float]:
    """Mean over the layers of the mean principal angle, by side."""
    sides = {"output": [x.output_angles for x in layers], "input": [x.input_angles for x in layers]}
    means = {side: [sum(a) / len(a) for a in all_angles if a] for side, all_angles in sides.items()}
    return {side: sum(values) / len(values) for side, values in means.items() if values}
