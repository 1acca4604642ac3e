"""The size of a model in 4 bits beside what it would be without: its packed layers, its packed experts and all else."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from minipeft.files import size
from minipeft.nf4.experts import NF4Experts
from minipeft.nf4.linear import NF4Linear
from minipeft.nf4.weight import NF4Weight


@dataclass
class Sizes:
    """A part of a model.

    Attributes:
        weights: How many matrices, or stacks of them.
        numbers: How many numbers they hold.
        before, after: Their bytes in the dtype that they had, and as they are, with scales and tables.
    """

    weights: int = 0
    numbers: int = 0
    before: int = 0
    after: int = 0

    def add(self, w: NF4Weight) -> None:
        """Count a packed weight."""
        self.weights += 1
        self.numbers += w.shape.numel()
        self.before += w.shape.numel() * w.dtype.itemsize
        self.after += w.nbytes


@dataclass
class QuantizedSizes:
    """Sizes of the parts of a model, as `quantized_sizes` gives and `print` shows them."""

    layers: Sizes
    experts: Sizes
    dense: Sizes

    def __str__(self) -> str:
        named = {"linear layers": self.layers, "stacks of experts": self.experts}
        lines = [
            f"{one.weights} {name} in 4 bits: {one.numbers:,} numbers, {size(one.before)} -> {size(one.after)}"
            for name, one in named.items()
            if one.weights
        ]
        lines.append(f"the rest stays as it is: {self.dense.numbers:,} numbers, {size(self.dense.before)}")
        return "\n".join(lines)


def quantized_sizes(model: nn.Module) -> QuantizedSizes:
    """The parts of a model that are in 4 bits, with their bytes before and after; an adapter is of the rest."""
    found = QuantizedSizes(Sizes(), Sizes(), Sizes())
    packed: set[int] = set()
    for module in model.modules():
        if isinstance(module, NF4Linear):
            found.layers.add(module.nf4_weight())
            packed.add(id(module.weight))
        if isinstance(module, NF4Experts):
            for name in module.packed_names():
                found.experts.add(module.stack(name))
                packed.add(id(module.get_parameter(name)))
    for parameter in model.parameters():
        if id(parameter) not in packed:
            found.dense.weights += 1
            found.dense.numbers += parameter.numel()
            found.dense.before += parameter.nbytes
            found.dense.after += parameter.nbytes
    return found
