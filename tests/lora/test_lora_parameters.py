"""LoRA on the 3-D parameters of a mixture's experts: PEFT's numbers and files, and the contract of every method."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from largest_tensor import LargestTensor
from tiny import randomize, some_ids
from tiny_experts import experts_classes, routed, tiny_experts
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import minipeft
from minipeft import LoraConfig, get_peft_model, lora_plus_groups
from minipeft.experts import weight_names
from minipeft.mixins import plain_class

CONFIG: dict[str, Any] = {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj"]}
BOTH = ["gate_up_proj", "mlp.experts.down_proj"]
ROUTERS = [*BOTH, "gate.weight"]
SIZES: dict[str, Any] = {
    **{"vocab_size": 128, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2},
}


def mixtral() -> Any:
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=3)).eval()


def qwen() -> Any:
    torch.manual_seed(0)
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "head_dim": 8}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **experts)).eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(some_ids()).logits


def adapted(library: Any, plain: Any = mixtral, targets: Any = BOTH, **changes: Any) -> Any:
    model = library.get_peft_model(plain(), library.LoraConfig(**{**CONFIG, "target_parameters": targets, **changes}))
    randomize(model, scale=0.2)
    return model


@pytest.mark.parametrize("plain", [mixtral, qwen])
@pytest.mark.parametrize("targets", [BOTH, ["down_proj"], ROUTERS])
def test_adapters_move_between_the_libraries(plain: Any, targets: list[str], tmp_path: Path) -> None:
    theirs = adapted(peft, plain, targets)
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = minipeft.PeftModel.from_pretrained(plain(), tmp_path / "theirs")
    assert not torch.allclose(logits(loaded), logits(plain()), atol=1e-3)
    torch.testing.assert_close(logits(loaded), logits(theirs), rtol=0, atol=1e-5)
    ours = adapted(minipeft, plain, targets)
    ours.save_pretrained(tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(plain(), tmp_path / "ours")
    torch.testing.assert_close(logits(back), logits(ours), rtol=0, atol=1e-5)


# PEFT says so of its own pattern, and follows it (the ranks in the file are the pattern's).
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")
@pytest.mark.parametrize("plain", [mixtral, qwen])
def test_what_peft_makes_of_all_linear_loads_here(plain: Any, tmp_path: Path) -> None:
    theirs = peft.get_peft_model(plain(), peft.LoraConfig(r=2, target_modules="all-linear"))
    randomize(theirs, scale=0.2)
    theirs.save_pretrained(tmp_path)
    ours = minipeft.PeftModel.from_pretrained(plain(), tmp_path)
    config = ours.peft_config["default"]
    assert "gate.weight" in config.target_parameters and config.rank_pattern, "PEFT's defaults changed"
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=1e-5)


@pytest.mark.parametrize("targets", [BOTH, ROUTERS])
@pytest.mark.parametrize("plain", [mixtral, qwen])
def test_contract_of_every_method(plain: Any, targets: list[str]) -> None:
    untouched, model = plain(), get_peft_model(plain(), LoraConfig(**CONFIG, target_parameters=targets))
    base = logits(untouched)
    torch.testing.assert_close(logits(model), base, rtol=0, atol=0)
    randomize(model, scale=0.2)
    changed = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), changed, rtol=0, atol=1e-4)
    model.unmerge_adapter()
    assert torch.equal(logits(model), changed)
    model.add_adapter("other", LoraConfig(**CONFIG, target_parameters=["down_proj"]))
    model.set_adapter(["default", "other"])
    torch.testing.assert_close(logits(model), changed)
    model.delete_adapter("default")
    assert torch.equal(logits(model), base)
    plain_again = model.unload()
    assert plain_again.state_dict().keys() == untouched.state_dict().keys()
    assert all(torch.equal(plain_again.state_dict()[n], t) for n, t in untouched.state_dict().items())


@pytest.mark.parametrize("start", [True, False, "gaussian"])
def test_starts_are_pefts_from_the_same_seed(start: Any) -> None:
    drawn = []
    for library in (peft, minipeft):
        base = mixtral()
        torch.manual_seed(3)
        config = library.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=ROUTERS, init_lora_weights=start)
        drawn.append(library.get_peft_model_state_dict(library.get_peft_model(base, config)))
    theirs, ours = drawn
    assert theirs.keys() == ours.keys() and any(name.endswith("experts.lora_A.weight") for name in ours)
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_the_updated_weight(checkpointing: bool) -> None:
    model = adapted(minipeft, targets=["down_proj"])
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    loss = model.train()(some_ids(), labels=some_ids()).loss
    factors = model.model.layers[0].mlp.experts.lora_experts["default"]["down_proj"]
    got = torch.autograd.grad(loss, (factors.lora_A, factors.lora_B))
    experts = mixtral().model.layers[0].mlp.experts
    plain = adapted(minipeft, targets=["down_proj"])
    plain.merge_adapter()
    weight = plain.model.layers[0].mlp.experts.down_proj.requires_grad_()
    (grad,) = torch.autograd.grad(plain.train()(some_ids(), labels=some_ids()).loss, weight)
    assert grad.shape == experts.down_proj.shape
    wanted = torch.autograd.grad((factors.update() * grad).sum(), (factors.lora_A, factors.lora_B))
    for ours, expected in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-5)


def test_parameters_alone_need_no_modules() -> None:
    model = adapted(minipeft, target_modules=None)
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 8 and all("experts" in name for name in trained)
    rates = {g["lr"]: len(g["params"]) for g in lora_plus_groups(model, 1e-3, 4)}
    assert rates == {1e-3: 4, 4e-3: 4}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"targets": ["down_proj", "nope"]},
            r"'nope' matches no parameter; 3-D ones here: \['down_proj', 'gate_up_proj'\]",
        ),
        (
            {"targets": ["norm.weight"]},
            r"norm\.weight is a 1 dimensional Parameter \(shape \(32,\), torch.float32\), but only 2d and 3d",
        ),
        ({"use_dora": True}, "use_dora=True does not go with target_parameters"),
        (
            {"lora_dropout": 0.1, "targets": ROUTERS},
            r"lora_dropout=0.1 does not go with target_parameters='model.layers.0.mlp.gate.weight'",
        ),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' does not go with"),
        ({"target_modules": ["experts"]}, r"'model\.layers\.0\.mlp\.experts' is a .*MixtralExperts"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        adapted(minipeft, **changes)


class Dense(nn.Module):
    """Two linear layers, an embedding and a parameter right in the model."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.emb, self.first, self.second = nn.Embedding(7, 6), nn.Linear(6, 5), nn.Linear(5, 4)
        self.own = nn.Parameter(torch.ones(4, 4))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.second(torch.tanh(self.first(self.emb(ids)))) @ self.own
        return out


def dense(library: Any, **fields: Any) -> Any:
    given = {"target_parameters": ["first.weight", "emb.weight"], "target_modules": ["second"], "r": 2}
    config = library.LoraConfig(init_lora_weights=False, **{**given, **fields})
    return library.get_peft_model(Dense().eval(), config)


@torch.no_grad()
def test_weights_of_layers_move_in_both_directions(tmp_path: Path) -> None:
    ids, ours = torch.arange(7), dense(minipeft)
    ours.save_pretrained(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(Dense().eval(), str(tmp_path / "ours"))
    torch.testing.assert_close(theirs(ids), ours(ids))
    theirs = dense(peft)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    back = minipeft.PeftModel.from_pretrained(Dense().eval(), tmp_path / "theirs")
    torch.testing.assert_close(back(ids), theirs(ids))
    acting = back(ids)
    back.merge_adapter()
    torch.testing.assert_close(back(ids), acting)
    back.unmerge_adapter()
    assert torch.equal(back(ids), acting)
    assert torch.equal(back.unload()(ids), Dense()(ids))


@torch.no_grad()
def test_a_layer_and_its_weight_adapted_by_two_adapters_act_together() -> None:
    ids, model = torch.arange(7), dense(minipeft)
    model.add_adapter("layer", minipeft.LoraConfig(target_modules=["first"], r=2, init_lora_weights=False))
    base = model.first.weight.clone()
    change = model.first.delta_parameter("default", "weight") + model.first.get_delta_weight("layer")
    model.set_adapter(["default", "layer"])
    model.second.set_adapter([])
    model.emb.set_adapter([])
    wanted = nn.functional.linear(Dense().emb(ids), base + change, model.first.bias)
    torch.testing.assert_close(model.first(Dense().emb(ids)), wanted)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_parameters": ["first.bias"]}, "1 dimensional Parameter.*only 2d and 3d are supported"),
        ({"target_parameters": ["own"]}, "top-level module is not supported"),
        ({"target_parameters": ["second.weight"]}, "not also targeted with `target_modules`"),
        ({"target_parameters": ["nope"], "target_modules": None}, "no `target_parameters` found"),
    ],
)
def test_parameters_that_cannot_be_updated_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dense(minipeft, **fields)


def test_names_that_match_nothing_are_told_as_peft_tells_them() -> None:
    with pytest.warns(RuntimeWarning, match="were set but no parameter was matched"):
        dense(minipeft, target_parameters=["nope"])
    with pytest.warns(RuntimeWarning, match=r"rank_pattern keys did not match any .*ignored: \['first'\]"):
        model = dense(minipeft, rank_pattern={"first": 3, "emb.weight": 4})
    assert model.emb.lora_experts["default"]["weight"].lora_A.shape == (4, 6)
    with pytest.warns(UserWarning, match="no modules were excluded by"):
        dense(minipeft, exclude_modules=["nope"])


@pytest.mark.parametrize("targets", [["second"], ["second", "emb"], "first|second"])
def test_matching_is_peft_s(targets: Any) -> None:
    from peft.tuners.tuners_utils import check_target_module_exists, inspect_matched_modules

    ours, theirs = (
        library.get_peft_model(Dense(), library.LoraConfig(target_modules=targets)) for library in (minipeft, peft)
    )
    names = [name for name, _ in Dense().named_modules() if name]
    config = peft.LoraConfig(target_modules=targets)
    wanted = [name for name in names if check_target_module_exists(config, name)]
    assert minipeft.tuners.tuners_utils.inspect_matched_modules(ours)["matched"] == wanted
    assert wanted == inspect_matched_modules(theirs.base_model)["matched"]


@pytest.mark.parametrize("pattern", [None, "layers", ["layers", "h"], "experts"])
def test_the_first_number_of_a_name_is_its_layer(pattern: Any) -> None:
    from peft.tuners.tuners_utils import check_target_module_exists

    for key in ("model.layers.1.layers.0.up", "model.layers.1.mlp.experts.0.up", "a.b.1.c.d.2.up", "x.h.2.up"):
        for layer in range(3):
            fields = {"target_modules": ["up"], "layers_to_transform": [layer], "layers_pattern": pattern}
            wanted = bool(check_target_module_exists(peft.LoraConfig(**fields), key))
            ours = minipeft.tuners.tuners_utils.check_target_module_exists(minipeft.LoraConfig(**fields), key)
            assert ours == wanted, (key, layer)


def test_calls_for_layers_refuse_parameters(tmp_path: Path) -> None:
    model = adapted(minipeft).eval()
    model.add_adapter("other", LoraConfig(**CONFIG))
    with pytest.raises(ValueError, match="it has target_parameters"):
        model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "both")
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    with pytest.raises(ValueError, match="target_parameters are not hot-swapped"):
        minipeft.hotswap_adapter(model, tmp_path, "default")
    model.load_adapter(tmp_path, "default")
    assert isinstance(model.model.layers[0].mlp.experts, nn.Module)


@pytest.mark.filterwarnings("ignore")  # Dynamo's own doings
@torch.no_grad()
def test_compiled_model_gives_the_same() -> None:
    model = adapted(minipeft).eval()
    torch.compiler.reset()
    torch.testing.assert_close(logits(torch.compile(model, backend="eager")), logits(model))


class Half(nn.Module):
    """A dropout whose outcome is known."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / 2


def test_dropout_acts_on_the_input_of_the_update_alone() -> None:
    model = adapted(minipeft, lora_dropout=0.5).train()
    ids, experts = some_ids(), [layer.mlp.experts for layer in model.model.layers]
    torch.manual_seed(0)
    first, second = model(ids).logits, model(ids).logits
    assert not torch.allclose(first, second, atol=1e-4)
    torch.testing.assert_close(logits(model), logits(adapted(minipeft)))
    for factors in (f for module in experts for f in module.lora_experts["default"].values()):
        factors.dropout = Half()
    q_proj = [layer.self_attn.q_proj for layer in model.model.layers]
    for layer in q_proj:
        layer.lora_dropout["default"] = nn.Identity()
    halved = adapted(minipeft)
    for factors in (f for layer in halved.model.layers for f in layer.mlp.experts.lora_experts["default"].values()):
        factors.scaling /= 2
    torch.testing.assert_close(model.train()(ids).logits, halved(ids).logits)


@torch.no_grad()
@pytest.mark.parametrize("plain", [mixtral, qwen])
def test_each_row_goes_through_its_own_adapter(plain: Any) -> None:
    model = adapted(minipeft, plain)
    model.add_adapter("other", LoraConfig(**{**CONFIG, "r": 3}, target_parameters=["down_proj"]))
    model.add_adapter("layers", LoraConfig(**CONFIG))
    torch.manual_seed(1)
    randomize(model, scale=0.2)
    model.eval()
    names, ids = ["other", "__base__", "default", "layers", "other"], some_ids(5)
    got = model(ids, adapter_names=names).logits
    for row, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                wanted = model(ids[row : row + 1]).logits
        else:
            model.set_adapter(name)
            wanted = model(ids[row : row + 1]).logits
        torch.testing.assert_close(got[row : row + 1], wanted, rtol=0, atol=2e-5)
    model.set_adapter("default")
    with pytest.raises(ValueError, match="5 names"):
        model(ids[:3], adapter_names=names)
    grown = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    beams = model.generate(ids[:2], adapter_names=["other", "default"], num_beams=2, **grown)
    alone = [
        model.generate(ids[i : i + 1], adapter_names=[n], num_beams=2, **grown)
        for i, n in enumerate(("other", "default"))
    ]
    assert torch.equal(beams, torch.cat(alone))
    model.merge_adapter(["default"])
    with pytest.raises(ValueError, match="unmerge_adapter"):
        model(ids, adapter_names=names)


def test_rank_stabilized_scaling_is_the_papers() -> None:
    stable, plain = (
        adapted(minipeft, lora_alpha=alpha, use_rslora=rs) for alpha, rs in ((6, True), (6 * 2**0.5, False))
    )
    torch.testing.assert_close(logits(stable), logits(plain))
    assert stable.model.layers[0].mlp.experts.lora_experts["default"]["down_proj"].scaling == 6 / 2**0.5


@pytest.mark.parametrize("name", experts_classes())
def test_every_class_of_experts_is_updated_as_its_merged_weights(name: str) -> None:
    """Output and gradients of split LoRA, by the eager forward over weights with the updates in them."""
    model = nn.Module()
    model.experts = tiny_experts(experts_classes()[name])
    targets = list(weight_names(model.experts))
    experts = minipeft.inject_adapter_in_model(LoraConfig(r=3, lora_alpha=6, target_parameters=targets), model).experts
    factors = [experts.lora_experts["default"][target] for target in targets]
    with torch.no_grad():
        for parameter in (p for f in factors for p in f.parameters()):
            parameter.normal_(std=0.2)
    hidden, index, weights = routed()
    inputs = [hidden.requires_grad_(), weights.requires_grad_(), *(p for f in factors for p in f.parameters())]
    dy = torch.randn(hidden.shape)
    with LargestTensor() as largest:
        got = experts(hidden, index, weights)
        got_grads = torch.autograd.grad(got, inputs, dy)
    assert largest.nbytes < min(experts._parameters[target].nbytes for target in targets)
    own = dict(experts._parameters)
    merged = {target: own[target] + experts.delta_parameter("default", target) for target in targets}
    experts._parameters.update(merged)
    wanted = plain_class(experts).forward(experts, hidden, index, weights)
    experts._parameters.update(own)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    for ours, expected in zip(got_grads, torch.autograd.grad(wanted, inputs, dy), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)


def test_trained_experts_under_lora_keep_their_gradients() -> None:
    model = adapted(minipeft)
    weight = model.model.layers[0].mlp.experts.down_proj.requires_grad_()
    model.train()(some_ids(), labels=some_ids()).loss.backward()
    assert weight.grad is not None and weight.grad.abs().max() > 0
