"""The peers that minipeft is measured against; one that is not installed is named with the reason."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Candidate, Missing, Run, Work, describe
from minipeft.nf4 import NF4Weight

BITSANDBYTES, UNSLOTH, PEFT = "bitsandbytes", "unsloth", "peft"
MODULES = {BITSANDBYTES: "bitsandbytes", UNSLOTH: "unsloth.kernels", PEFT: "peft"}


class Peers:
    """The peers' modules, imported when first asked for."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._found: dict[str, Any] = {}

    def candidate(
        self,
        name: str,
        make: Callable[[Any], Run],
        error: Callable[[Any], float],
        tolerance: float,
        work: Work,
    ) -> Candidate | Missing:
        """A candidate whose `make` is given the peer's module, or Missing."""
        found = self.find(name)
        if isinstance(found, str):
            return Missing(name, found)
        return Candidate(name, lambda: make(found), error, tolerance, work)

    def find(self, name: str) -> Any:
        """The peer's module, or a string that says why there is none."""
        if name not in self._found:
            self._found[name] = self._import(name)
        return self._found[name]

    def _import(self, name: str) -> Any:
        if name == UNSLOTH and self.kind != "cuda":
            return "runs on GPUs only"
        if importlib.util.find_spec(name) is None:
            return f"not installed (pip install {name})"
        try:
            return importlib.import_module(MODULES[name])
        # A peer that cannot be imported here, for whatever reason, is one that is missing.
        except Exception as error:
            return f"cannot be imported: {describe(error)}"


def bitsandbytes_state(bnb: Any, weight: NF4Weight) -> tuple[Tensor, Any]:
    """Our packed weight as bitsandbytes holds one: its codes and its QuantState, of the same tensors."""
    state = weight.state()
    codes = state.pop("weight")
    return codes, bnb.functional.QuantState.from_dict(state, device=codes.device)


def bitsandbytes_linear(bnb: Any, weight: NF4Weight, dtype: torch.dtype, train: bool) -> torch.nn.Module:
    """A Linear4bit without bias of the same weight, as transformers makes it from a checkpoint."""
    state = weight.state()
    codes = state.pop("weight")
    out_features, in_features = weight.shape
    layer: torch.nn.Module = bnb.nn.Linear4bit(
        in_features, out_features, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta"
    )
    layer.weight = bnb.nn.Params4bit.from_prequantized(
        data=codes.clone(), quantized_stats=state, device=codes.device, module=layer
    )
    return layer.train(train)
