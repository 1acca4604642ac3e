"""Adapters from when every expert was a module: the update of each acts as it did, and PEFT reads them alike."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_old_experts import CONVERTED, PHIMOE, QWEN2, false_alarm, logits
from tiny_families import Family

from minipeft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict

JAMBA = Family(
    "jamba",
    {
        **{"num_experts": 4, "num_experts_per_tok": 2, "attn_layer_period": 1, "attn_layer_offset": 0},
        **{"expert_layer_period": 2, "expert_layer_offset": 1, "use_mamba_kernels": False},
    },
)
# The parameter that a layer has become a part of, and which part.
PLACES = {
    "gate_proj": ("gate_up_proj", 0, 2),
    "up_proj": ("gate_up_proj", 1, 2),
    "down_proj": ("down_proj", 0, 1),
    "w1": ("gate_up_proj", 0, 2),
    "w3": ("gate_up_proj", 1, 2),
    "w2": ("down_proj", 0, 1),
}
QWEN_LAYERS, MIXTRAL_LAYERS = ["gate_proj", "up_proj", "down_proj"], ["w1", "w2", "w3"]


class OldFile:
    """A file as transformers 4 and PEFT wrote it, made tensor by tensor, and the model with the updates added."""

    def __init__(self, family: Family, **config: Any) -> None:
        self.family, self.tensors = family, dict[str, torch.Tensor]()
        self.config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 6, **config}
        self.want = family.build()
        self.draw = torch.Generator().manual_seed(5)

    @torch.no_grad()
    def add(self, old: str, weight: torch.Tensor, r: int = 2, scaling: float = 3.0) -> None:
        """Factors under the name `old`, whose update is added to `weight`, (out_features, in_features)."""
        A, B = (torch.randn(s, generator=self.draw) * 0.2 for s in ((r, weight.shape[1]), (weight.shape[0], r)))
        self.tensors |= {f"base_model.model.{old}.lora_A.weight": A, f"base_model.model.{old}.lora_B.weight": B}
        weight += (scaling * B.double() @ A.double()).float()

    def add_experts(self, layers: list[str], experts: Any = None, r: Any = None, **scaling: Any) -> "OldFile":
        """Factors for `layers` of all experts, or of some: (layer, expert) -> bool; r: (layer, expert) -> rank."""
        for path, module in self.want.named_modules():
            if path.endswith(".experts"):
                for expert in range(len(module.down_proj)):
                    for layer in layers:
                        parameter, part, parts = PLACES[layer]
                        weight = getattr(module, parameter)[expert].chunk(parts)[part]
                        if experts is None or experts(path, expert, layer):
                            self.add(f"{path}.{expert}.{layer}", weight, **({"r": r(layer)} if r else {}), **scaling)
        return self

    def write(self, folder: Path) -> Path:
        save_file(self.tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        (folder / "adapter_config.json").write_text(json.dumps(self.config))
        return folder

    def check(self, folder: Path, **loading: Any) -> Any:
        """Load it; the outputs are those of the updated weights, and the adapter saves and loads as any other."""
        model = PeftModel.from_pretrained(self.family.build(), self.write(folder), **loading)
        assert not torch.allclose(logits(self.want), logits(self.family.build()), atol=1e-3)
        torch.testing.assert_close(logits(model), logits(self.want), rtol=0, atol=2e-5)
        model.save_pretrained(folder / "again")
        again = PeftModel.from_pretrained(self.family.build(), folder / "again")
        assert torch.equal(logits(again), logits(model))
        return model


@false_alarm
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe"])
def test_files_of_single_experts_are_read_as_peft_reads_them(family: str, tmp_path: Path) -> None:
    mixtral = family == "mixtral"
    layers = MIXTRAL_LAYERS if mixtral else QWEN_LAYERS
    file = OldFile(CONVERTED[family], target_modules=["q_proj", *layers]).add_experts(layers)
    if mixtral:  # as its blocks were called
        file.tensors = {name.replace(".mlp.", ".block_sparse_moe."): t for name, t in file.tensors.items()}
    for layer, block in enumerate(file.want.model.layers):
        file.add(f"model.layers.{layer}.self_attn.q_proj", block.self_attn.q_proj.weight)
    ours = file.check(tmp_path)
    theirs = peft.PeftModel.from_pretrained(CONVERTED[family].build(), tmp_path)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    stored, mine = (load_file(tmp_path / f / "adapter_model.safetensors") for f in ("theirs", "again"))
    assert stored.keys() == mine.keys() and all(torch.equal(stored[name], mine[name]) for name in stored)
    a, b = (json.loads((tmp_path / f / "adapter_config.json").read_text()) for f in ("theirs", "again"))
    for field in ("target_parameters", "target_modules", "rank_pattern", "alpha_pattern"):
        assert sorted(a[field]) == sorted(b[field]) and (isinstance(a[field], list) or a[field] == b[field])


@pytest.mark.parametrize("family", [QWEN2, PHIMOE, JAMBA, CONVERTED["glm4_moe"]], ids=lambda f: f.model_type)
def test_shared_experts_routers_and_dense_layers_keep_theirs(family: Family, tmp_path: Path) -> None:
    """In silence PEFT drops these tensors in the families that it converts, and the experts' in the others."""
    phi = family is PHIMOE
    file = OldFile(family, target_modules="all-linear", lora_dropout=0.05).add_experts(
        MIXTRAL_LAYERS if phi else QWEN_LAYERS
    )
    for path, module in list(file.want.named_modules()):
        if path.endswith(("gate_proj", "down_proj", "o_proj")) or (path.endswith(".gate") and not phi):
            file.add(path, module.weight)
    assert any("shared" in name or "layers.0.feed_forward" in name for name in file.tensors) or phi
    model = file.check(tmp_path)
    assert model.peft_config["default"].lora_dropout == 0.05  # no matter in inference


@pytest.mark.parametrize(
    ("config", "settings"),
    [
        ({"use_rslora": True}, {"scaling": 6 / 2**0.5}),
        ({"rank_pattern": {"up_proj": 3}, "alpha_pattern": {"up_proj": 9}}, {"r": {"up_proj": 3}}),
        ({"rank_pattern": {"up_proj": 3}, "alpha_pattern": {"up_proj": 1.5}}, {"r": {"up_proj": 3}, "up": 0.5}),
        (
            {"rank_pattern": {r"experts\.\d+\.down_proj": 1}, "lora_alpha": 3},
            {"r": {"down_proj": 1}, "scaling": 1.5, "down": 3},
        ),
    ],
)
def test_ranks_and_scalings_of_single_layers(config: dict[str, Any], settings: dict[str, Any], tmp_path: Path) -> None:
    file = OldFile(CONVERTED["olmoe"], target_modules=QWEN_LAYERS, **config)
    for layer in QWEN_LAYERS:
        scaling = settings.get(layer.partition("_")[0], settings.get("scaling", 3.0))
        file.add_experts([layer], r=lambda name: settings.get("r", {}).get(name, 2), scaling=scaling)
    file.check(tmp_path)


@pytest.mark.parametrize(
    "some",
    [
        lambda path, expert, layer: expert != 1,
        lambda path, expert, layer: layer != "up_proj",
        lambda path, expert, layer: "layers.1" in path or layer == "down_proj",
        lambda path, expert, layer: (expert, layer) in ((0, "down_proj"), (2, "gate_proj")),
    ],
)
def test_experts_and_layers_without_tensors_stay_as_they_are(some: Any, tmp_path: Path) -> None:
    OldFile(CONVERTED["olmoe"], target_modules=QWEN_LAYERS).add_experts(QWEN_LAYERS, some).check(tmp_path)


def test_an_old_file_that_does_not_fit_is_refused_by_name(tmp_path: Path) -> None:
    def error(change: Any, **config: Any) -> str:
        file = OldFile(CONVERTED["olmoe"], target_modules=QWEN_LAYERS, **config).add_experts(QWEN_LAYERS)
        change(file.tensors)
        with pytest.raises(ValueError) as raised:
            PeftModel.from_pretrained(CONVERTED["olmoe"].build(), file.write(tmp_path))
        return str(raised.value)

    up = "base_model.model.model.layers.1.mlp.experts.2.up_proj.lora_"
    beyond = {f"{up}A.weight".replace("experts.2", "experts.9"): torch.zeros(2, 64)}
    assert "experts.2.up_proj.lora_B.weight: the shape is None" in error(lambda t: t.pop(f"{up}B.weight"))
    assert "there are 4 experts" in error(lambda t: t.update(beyond))
    assert "the shape is (2, 64), expected (3, 64)" in error(lambda t: None, rank_pattern={"up_proj": 3})
    assert "lora_magnitude_vector" in error(lambda t: t.update({f"{up}magnitude_vector": torch.ones(96)}))


def test_training_goes_on_with_the_dropout_of_the_file(tmp_path: Path) -> None:
    file = OldFile(CONVERTED["olmoe"], target_modules=QWEN_LAYERS, lora_dropout=0.05).add_experts(QWEN_LAYERS)
    model = file.check(tmp_path, is_trainable=True)
    assert sum(p.requires_grad for p in model.parameters()) == 2 * 2 * 2
    assert sum(isinstance(m, torch.nn.Dropout) and m.p == 0.05 for m in model.modules()) == 2 * 2


@false_alarm
def test_an_old_state_dict_goes_into_an_adapter_that_is_there() -> None:
    file = OldFile(CONVERTED["mixtral"], target_modules=MIXTRAL_LAYERS).add_experts(MIXTRAL_LAYERS)
    old = {name.replace(".mlp.", ".block_sparse_moe."): tensor for name, tensor in file.tensors.items()}
    config = LoraConfig(r=2, lora_alpha=6, target_modules=MIXTRAL_LAYERS)
    model = get_peft_model(file.family.build(), config)
    set_peft_model_state_dict(model, old)
    torch.testing.assert_close(logits(model), logits(file.want), rtol=0, atol=2e-5)
    theirs = peft.get_peft_model(file.family.build(), peft.LoraConfig(r=2, lora_alpha=6, target_modules=MIXTRAL_LAYERS))
    peft.set_peft_model_state_dict(theirs, old)
    torch.testing.assert_close(logits(model), logits(theirs), rtol=0, atol=1e-5)
