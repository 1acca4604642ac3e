"""Derivatives of every kind through adapted models: torch.func's, forward and second ones are PEFT's."""

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from tiny import tiny_llama
from torch import Tensor
from torch.func import functional_call, grad, jvp, vmap
from transformers import MixtralConfig, MixtralForCausalLM

import minipeft
from minipeft import LoraConfig, NF4Config, get_peft_model, quantize_model

IDS = torch.arange(18).reshape(3, 6) * 7 % 100
ALL = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False}
METHODS: dict[str, Callable[[Any], Any]] = {
    "lora": lambda package: package.LoraConfig(**ALL),
    "DoRA": lambda package: package.LoraConfig(**ALL, use_dora=True),
    "rsLoRA, biases": lambda package: package.LoraConfig(**ALL, use_rslora=True, lora_bias=True),
    "embeddings": lambda package: package.LoraConfig(**ALL | {"target_modules": ["embed_tokens", "q_proj"]}),
    "a saved head": lambda package: package.LoraConfig(
        **ALL | {"target_modules": ["v_proj"]}, modules_to_save=["lm_head"]
    ),
    "tokens": lambda package: package.TrainableTokensConfig(token_indices=[0, 7, 14]),
    "prompt": lambda package: package.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "prefix": lambda package: package.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
}


class Problem:
    """The loss of a model as a function of what it trains, the same numbers for the same method in any package."""

    def __init__(self, package: Any, method: str, base: Any) -> None:
        base.config._attn_implementation = "eager"  # torch's fused attention has no forward derivatives
        torch.manual_seed(0)
        self.model = package.get_peft_model(base, METHODS[method](package)).train()
        trained = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        generator = torch.Generator().manual_seed(1)
        for _, parameter in sorted(trained, key=lambda pair: self.plain(pair[0])):
            parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        self.trained = {name: p.detach() for name, p in sorted(trained, key=lambda pair: self.plain(pair[0]))}
        self.tangent = {name: torch.randn(p.shape, generator=generator) for name, p in self.trained.items()}

    @staticmethod
    def plain(name: str) -> str:
        """A parameter's name without what a wrapper and an adapter's name add to it."""
        name = name.replace("base_model.model.", "").replace("model.prompt_encoder", "prompt_encoder")
        return ".".join(part for part in name.split(".") if part not in ("default", "token_adapter"))

    def loss(self, trained: dict[str, Tensor], ids: Tensor = IDS) -> Tensor:
        logits = functional_call(self.model, trained, (ids,), {"use_cache": False}).logits
        logits = logits[:, -ids.shape[1] :]
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    def hessian_product(self) -> list[Tensor]:
        """Forward over reverse."""
        return [*jvp(grad(self.loss), (self.trained,), (self.tangent,))[1].values()]

    def twice_backward(self) -> list[Tensor]:
        """The same product by autograd alone."""
        trained = {name: p.clone().requires_grad_() for name, p in self.trained.items()}
        first = torch.autograd.grad(self.loss(trained), list(trained.values()), create_graph=True)
        total = sum((g * t).sum() for g, t in zip(first, self.tangent.values(), strict=True))
        return list(torch.autograd.grad(total, list(trained.values()), materialize_grads=True))


def close(ours: Any, theirs: Any, scale: float = 1.0) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5 * scale)


def bases(base: str) -> tuple[Any, Any]:
    if base == "dense":
        return tiny_llama(), tiny_llama()
    packed = quantize_model(tiny_llama(), NF4Config())
    dense = tiny_llama()
    for name, module in packed.named_modules():
        if isinstance(module, minipeft.nf4.linear.NF4Linear):
            dense.get_submodule(name).weight.data = module.dequantize().float()
    return packed, dense


# torch's own rules for derivatives are scripted when the first dual number is made.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning", "ignore:`lora_bias=True` was passed")
@pytest.mark.parametrize("base", ["dense", "NF4"])
@pytest.mark.parametrize("method", METHODS)
def test_every_derivative_is_pefts(method: str, base: str) -> None:
    packed, dense = bases(base)
    ours, theirs = Problem(minipeft, method, packed), Problem(peft, method, dense)
    assert [Problem.plain(n) for n in ours.trained] == [Problem.plain(n) for n in theirs.trained]
    close(grad(ours.loss)(ours.trained).values(), grad(theirs.loss)(theirs.trained).values())
    each = vmap(grad(lambda t, ids: ours.loss(t, ids[None])), in_dims=(None, 0))(ours.trained, IDS)
    for row in range(3):
        close([g[row] for g in each.values()], grad(theirs.loss)(theirs.trained, IDS[row : row + 1]).values())
    slope = jvp(ours.loss, (ours.trained,), (ours.tangent,))[1]
    close([slope], [jvp(theirs.loss, (theirs.trained,), (theirs.tangent,))[1]], 10)
    exact = theirs.twice_backward()
    size = max(t.abs().max().item() for t in exact)
    close(ours.hessian_product(), exact, size)
    close(ours.twice_backward(), exact, size)


def gradient(model: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """By torch.func, and by autograd."""
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def loss(trained: dict[str, Tensor]) -> Tensor:
        return functional_call(model, trained, (IDS,), {"use_cache": False}).logits.square().mean()

    found = grad(loss)(trained)
    leaves = {name: p.clone().requires_grad_() for name, p in trained.items()}
    exact = torch.autograd.grad(loss(leaves), list(leaves.values()))
    return found, dict(zip(leaves, exact, strict=True))


@pytest.mark.parametrize("kind", ["bottleneck", "experts", "packed experts"])
def test_other_methods_have_gradients_by_torch_func(kind: str) -> None:
    torch.manual_seed(0)
    if kind == "bottleneck":
        model = get_peft_model(tiny_llama(), minipeft.BottleneckConfig(bottleneck_size=8))
    else:
        sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "vocab_size": 128}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
        model = MixtralForCausalLM(MixtralConfig(**sizes, **heads))
        if kind == "packed experts":
            model = quantize_model(model, NF4Config())
        model = get_peft_model(model, LoraConfig(**ALL))
    found, exact = gradient(model)
    assert any(g.abs().max() > 1e-6 for g in exact.values())
    for name, g in exact.items():
        torch.testing.assert_close(found[name], g, rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("base", ["dense", "NF4"])
def test_an_adapted_model_is_exported_for_any_batch_and_length(base: str) -> None:
    model = tiny_llama() if base == "dense" else quantize_model(tiny_llama(), NF4Config())
    model = get_peft_model(model, LoraConfig(**ALL, task_type="CAUSAL_LM")).eval()
    sizes = {0: torch.export.Dim("batch", min=1, max=8), 1: torch.export.Dim("length", min=2, max=64)}
    arguments = {"input_ids": IDS, "use_cache": False}
    shapes = {"input_ids": sizes, "use_cache": None}
    program = torch.export.export(model, (), arguments, dynamic_shapes=shapes, strict=False)
    for ids in (IDS[:2, :4], IDS.repeat(2, 4)):
        assert ids.shape != IDS.shape
        torch.testing.assert_close(program.module()(input_ids=ids, use_cache=False).logits, model(ids).logits)
