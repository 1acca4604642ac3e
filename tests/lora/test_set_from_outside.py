"""Code that sets or replaces the tensors of a layer finds an adapted layer to be as the plain one."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from minipeft import LoraConfig, get_peft_model

LAYERS: dict[str, Any] = {
    "linear": lambda: nn.Linear(4, 6),
    "unbiased": lambda: nn.Linear(4, 6, bias=False),
    "conv": lambda: nn.Conv1d(4, 6, 1),
    "conv1d": lambda: Conv1D(6, 4),
    "norm": lambda: nn.LayerNorm(4),
}


def adapted(kind: str, bias: str = "none", **config: Any) -> Any:
    torch.manual_seed(0)
    parts = {"layer": LAYERS[kind](), "last": nn.Linear(4, 4)}
    model = nn.ModuleDict(parts)
    target = "last" if kind == "norm" else "layer"
    return get_peft_model(
        model, LoraConfig(target_modules=[target], bias=bias, init_lora_weights=False, **config)
    ).eval()


def an_input(kind: str) -> torch.Tensor:
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    return x[:, :, None] if kind == "conv" else x


@pytest.mark.parametrize(("kind", "bias"), [*((kind, "all") for kind in LAYERS), ("linear", "none"), ("conv", "none")])
def test_a_bias_that_is_set_is_the_base_one(kind: str, bias: str) -> None:
    layer, plain = adapted(kind, bias)["layer"], LAYERS[kind]()
    plain.load_state_dict({name: value for name, value in layer.state_dict().items() if name in ("weight", "bias")})
    layer.enable_adapters(False)
    x = an_input(kind)
    for change in ("set", "none", "set", "delete", "set"):
        for one in (layer, plain):
            if change == "delete":
                del one.bias
                assert not hasattr(one, "bias")
                continue
            one.bias = (
                nn.Parameter(torch.arange(one.weight.shape[kind == "conv1d"]).float()) if change == "set" else None
            )
            assert "bias" in one._parameters
        if change == "set" or (change == "none" and kind != "conv1d"):
            assert torch.equal(layer(x), plain(x))
    with pytest.raises(TypeError, match="cannot assign"):
        layer.bias = torch.zeros(6)


@pytest.mark.parametrize("kind", ["linear", "conv", "conv1d"])
def test_functional_calls_and_parametrizations_see_through(kind: str) -> None:
    model = adapted(kind, lora_bias=kind != "conv1d")
    layer, x = model["layer"], an_input(kind)
    update = layer(x) - layer.base_layer(x)
    new = {name: torch.randn(value.shape) for name, value in layer.named_parameters() if name in ("weight", "bias")}
    plain = LAYERS[kind]()
    expected = torch.func.functional_call(plain, new, (x,)) + update
    torch.testing.assert_close(torch.func.functional_call(layer, new, (x,)), expected)

    class Double(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return 2 * weight

    plain.load_state_dict({name: value for name, value in layer.state_dict().items() if name in ("weight", "bias")})
    with torch.no_grad():
        for name in ("weight", "bias"):
            parametrize.register_parametrization(layer, name, Double())
            getattr(plain, name).mul_(2)
    torch.testing.assert_close(layer(x), plain(x) + update)


@pytest.fixture
def one_process() -> Iterator[None]:
    dist.init_process_group(backend="gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Chain(nn.Module):
    """An embedding, attention, a linear layer, a norm, a Conv1D and a convolution in succession."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2)
        self.emb, self.linear, self.norm = nn.Embedding(9, 4), nn.Linear(4, 6), nn.LayerNorm(6)
        self.conv1d, self.conv = Conv1D(4, 6), nn.Conv1d(4, 3, 1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.emb(ids)
        x, _ = self.attention(x, x, x)
        out: torch.Tensor = self.conv(self.conv1d(self.norm(self.linear(x))).transpose(1, 2))
        return out


@pytest.mark.filterwarnings("ignore")  # torch's own about FSDP on a CPU
@pytest.mark.parametrize(
    "config",
    [
        *({}, {"bias": "all"}, {"use_dora": True}, {"bias": "lora_only"}),
        {"target_modules": ["attention", "emb"]},
        {"target_modules": ["linear"], "trainable_token_indices": {"emb": [4, 1]}},
        {"target_modules": ["linear"], "modules_to_save": ["emb"]},
    ],
)
def test_fsdp_computes_and_trains_as_without(config: dict[str, Any], one_process: None) -> None:
    def model() -> Any:
        torch.manual_seed(0)
        targets = {"target_modules": ["emb", "linear", "conv1d", "conv"]}
        return get_peft_model(Chain(), LoraConfig(init_lora_weights=False, **{**targets, **config}))

    ids = torch.arange(6).view(2, 3)
    alone, sharded = model(), FullyShardedDataParallel(model(), use_orig_params=True, device_id=torch.device("cpu"))
    for one in (alone, sharded):
        optimizer = torch.optim.SGD([p for p in one.parameters() if p.requires_grad], lr=0.01)
        for _ in range(2):
            optimizer.zero_grad()
            one(ids).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(sharded(ids), alone(ids), rtol=1e-5, atol=1e-5)
