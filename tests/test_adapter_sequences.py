"""Any sequence of adding, switching, disabling, merging, unmerging and deleting adapters gives the output that a
simple pure function of the base weights and the adapters' factors gives."""

import contextlib
from typing import Any

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
        for parameter_name, parameter in self.model.named_parameters():
            parameter.requires_grad = f".{name}." in parameter_name
        randomize(self.model, seed=len(self.adapters), scale=0.2)
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
            self.model.set_adapter(chosen)
            self.active, self.merged = tuple(chosen), ()

    @precondition(lambda self: not self.disabled)
    @rule(name=names)
    def delete(self, name: str) -> None:
        if name in self.adapters and len(self.adapters) > 1:
            self.model.delete_adapter(name)
            del self.adapters[name]
            left = tuple(n for n in self.active if n != name)
            self.active, self.merged = left or tuple(self.adapters)[:1], ()

    @precondition(lambda self: not self.disabled)
    @rule(chosen=st.none() | st.lists(names, min_size=1, max_size=2, unique=True))
    def merge(self, chosen: list[str] | None) -> None:
        if chosen is None or set(chosen) <= set(self.adapters):
            self.model.merge_adapter(chosen)
            self.merged = self.active if chosen is None else tuple(chosen)

    @precondition(lambda self: not self.disabled)
    @rule()
    def unmerge(self) -> None:
        self.model.unmerge_adapter()
        self.merged = ()

    @precondition(lambda self: not self.disabled)
    @rule()
    def disable(self) -> None:
        self.stack.enter_context(self.model.disable_adapter())
        self.disabled = True

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
