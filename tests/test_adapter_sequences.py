"""Any sequence of adding, switching, disabling, merging, unmerging and deleting adapters gives the output that a
simple pure function of the base weights and the adapters' factors gives."""

import contextlib
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tiny import randomize
from torch import Tensor, nn

from minipeft import LoraConfig, get_peft_model, get_peft_model_state_dict
from minipeft.nf4 import NF4Linear

NAMES = ["a", "b", "c"]
X = torch.randn(3, 64, generator=torch.Generator().manual_seed(5), dtype=torch.float32)
names = st.sampled_from(NAMES)


def network(quantized: bool) -> nn.Module:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8))
    if quantized:
        net[0] = NF4Linear.from_linear(net[0])
    return net


def warning_if(condition: object, text: str) -> Any:
    return pytest.warns(UserWarning, match=text) if condition else contextlib.nullcontext()


class AdapterSequences(RuleBasedStateMachine):
    """The model beside its oracle: factors by adapter name, and which of them act."""

    @initialize(quantized=st.booleans())
    def start(self, quantized: bool) -> None:
        self.base = network(quantized)
        self.stack = contextlib.ExitStack()
        self.adapters: dict[str, dict[str, Tensor]] = {}
        self.active: tuple[str, ...] = ("a",)
        self.merged: tuple[str, ...] = ()
        self.disabled = False
        self.model = get_peft_model(network(quantized), LoraConfig(r=2, target_modules=["0", "2"]), "a")
        self.remember("a")

    def remember(self, name: str) -> None:
        # Only this adapter is moved: the others' values are what the oracle holds already.
        randomize(self.model, seed=len(self.adapters), scale=0.2, adapter=name)
        state = get_peft_model_state_dict(self.model, adapter_name=name)
        self.adapters[name] = {key.removeprefix("base_model.model."): t.clone() for key, t in state.items()}

    @precondition(lambda self: not self.disabled)
    @rule(name=names, rslora=st.booleans(), layers=st.sampled_from([["0"], ["2"], ["0", "2"]]))
    def add(self, name: str, rslora: bool, layers: list[str]) -> None:
        if name in self.adapters:
            return
        self.model.add_adapter(name, LoraConfig(r=3, lora_alpha=3, target_modules=layers, use_rslora=rslora))
        self.merged = ()
        self.remember(name)

    @precondition(lambda self: not self.disabled)
    @rule(chosen=st.lists(names, min_size=1, max_size=3, unique=True))
    def switch(self, chosen: list[str]) -> None:
        if set(chosen) <= set(self.adapters):
            with warning_if(self.merged, "Unmerging the model first"):
                self.model.set_adapter(chosen)
            self.active, self.merged = tuple(chosen), ()

    @precondition(lambda self: not self.disabled)
    @rule(name=names)
    def delete(self, name: str) -> None:
        if name in self.merged:
            with pytest.raises(ValueError, match="while they are merged"):
                self.model.delete_adapter(name)
        elif name in self.adapters and len(self.adapters) > 1:
            left = tuple(n for n in self.active if n != name)
            with warning_if(not left, "which is now deleted"):
                self.model.delete_adapter(name)
            del self.adapters[name]
            self.active = left or tuple(self.adapters)[:1]

    @precondition(lambda self: not self.disabled)
    @rule(chosen=st.none() | st.lists(names, min_size=1, max_size=2, unique=True))
    def merge(self, chosen: list[str] | None) -> None:
        if chosen is None or set(chosen) <= set(self.adapters):
            new = [n for n in (chosen or self.active) if n not in self.merged]
            with warning_if(self.merged, "additionally merging" if new else "nothing to do"):
                self.model.merge_adapter(chosen)
            self.merged += tuple(new)

    @precondition(lambda self: not self.disabled)
    @rule()
    def unmerge(self) -> None:
        with warning_if(not self.merged, "Already unmerged"):
            self.model.unmerge_adapter()
        self.merged = ()

    @precondition(lambda self: not self.disabled)
    @rule()
    def disable(self) -> None:
        self.stack.enter_context(self.model.disable_adapter())
        self.disabled = True

    def teardown(self) -> None:
        """Leave the context now, not when a later test happens to collect garbage."""
        self.stack.close()

    @precondition(lambda self: self.disabled)
    @rule()
    def enable(self) -> None:
        self.stack.close()
        self.disabled = False

    @invariant()
    def output_is_the_oracles(self) -> None:
        acting = () if self.disabled else self.merged or self.active
        hidden = torch.tanh(self.layer("0", X, acting))
        with torch.no_grad():
            torch.testing.assert_close(self.model(X), self.layer("2", hidden, acting), rtol=1e-4, atol=1e-5)

    @invariant()
    def base_tensors_are_untouched_while_nothing_is_merged(self) -> None:
        if not self.merged or self.disabled:
            state: dict[str, Any] = self.model.state_dict()
            assert all(torch.equal(state[name], tensor) for name, tensor in self.base.state_dict().items())

    @torch.no_grad()
    def layer(self, name: str, x: Tensor, acting: tuple[str, ...]) -> Tensor:
        module = self.base.get_submodule(name)
        out = module(x)
        for adapter in acting:
            factors, config = self.adapters[adapter], self.model.peft_config[adapter]
            if f"{name}.lora_A.weight" in factors:
                update = x @ factors[f"{name}.lora_A.weight"].T @ factors[f"{name}.lora_B.weight"].T
                out = out + update * config.settings_for(name)[2]
        return out


TestAdapterSequences = AdapterSequences.TestCase
TestAdapterSequences.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)
