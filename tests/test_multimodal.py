"""What every method does on models of images and of sound, over plain and NF4 base weights: docs/families.md, tried."""

import functools
import re
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT_TARGETS
from tiny import randomize
from tiny_multimodal import LISTENING_OR_SEEING, SEEING, Kind

from minipeft import (
    BottleneckConfig,
    LoraConfig,
    NF4Config,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    TrainableTokensConfig,
    get_peft_model,
    quantize_model,
)
from minipeft.bottleneck.layer import BottleneckLayer
from minipeft.lora.layer import LoraLayer

KINDS: dict[str, Kind] = {**SEEING, **LISTENING_OR_SEEING}
# Its convolutions, since it has no linear layer but the head; and the linear layers of all others.
TARGETS: dict[str, Any] = {**dict.fromkeys(KINDS, "all-linear"), "ResNet": ["convolution"]}
VIRTUAL = {"prefix": PrefixTuningConfig, "prompt": PromptTuningConfig}
# Why those raise that are not in WORKING.
REFUSED = {
    "Qwen2-VL": "does not know how a model of type 'qwen2_vl_text' tells positions",
    "Qwen2.5-VL": "does not know how a model of type 'qwen2_5_vl_text' tells positions",
    "PaliGemma": "attends in both directions: a prompt would have to see the text; prefix tuning works",
    "Gemma 4": "looks every token up again in each layer: a prompt has no token; prefix tuning works",
    "Whisper": "does not know encoder-decoders of type 'whisper'",
    **{
        name: f"does not know how a model of type '{kind.model_type}.*' tells positions"
        for name, kind in LISTENING_OR_SEEING.items()
        if name != "Whisper"
    },
}
WORKING = [
    *((name, way) for name in SEEING for way in VIRTUAL if name not in REFUSED),
    *(("Gemma 4", "prefix"), ("PaliGemma", "prefix")),
]
# PEFT's prompt fails there.
PROMPTS_NOT_IN_PEFT = ("Llama 4", "BLIP-2")
BOTTLENECKS = [*SEEING, "Whisper", "ViT", "SigLIP", "CLIP"]
every_kind = pytest.mark.parametrize("name", KINDS)
BASES = [(name, base) for name in KINDS for base in ("plain", "nf4") if (name, base) != ("ResNet", "nf4")]


def base_model(name: str, base: str = "plain") -> Any:
    model = KINDS[name].build()
    return quantize_model(model, NF4Config()) if base == "nf4" else model


def logits(model: Any, name: str, without: tuple[str, ...] = ()) -> torch.Tensor:
    batch = {key: tensor for key, tensor in KINDS[name].batch().items() if key not in without}
    with torch.no_grad():
        outputs = model.eval()(**batch)
    return outputs["logits_per_image" if name == "CLIP" else "logits"]


@functools.cache
def base_logits(name: str, base: str) -> torch.Tensor:
    return logits(base_model(name, base), name)


def config_of(method: str, name: str) -> Any:
    task = KINDS[name].task_type
    if method == "lora":
        return LoraConfig(r=4, lora_alpha=16, target_modules=TARGETS[name], task_type=task)
    if method == "bottleneck":
        return BottleneckConfig.houlsby(bottleneck_size=8, task_type=task)
    return VIRTUAL[method](num_virtual_tokens=3, task_type=task)


def trained(name: str, method: str, base: str) -> tuple[Any, list[float]]:
    """A model after a few steps, and its losses: in eval mode, so that running statistics stay the base's."""
    model = get_peft_model(base_model(name, base), config_of(method, name)).eval()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(**KINDS[name].batch()).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, losses


def check_contract(name: str, method: str, base: str, folder: Path) -> tuple[Any, torch.Tensor]:
    """It learns, leaves the base alone, can be disabled, saved and loaded. Returns the model and its logits."""
    model, losses = trained(name, method, base)
    assert losses[-1] < losses[0]
    before = base_model(name, base).state_dict()
    after = model.state_dict()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    acting = logits(model, name)
    assert (acting - base_logits(name, base)).abs().max() > 1e-4
    with model.disable_adapter():
        torch.testing.assert_close(logits(model, name), base_logits(name, base), rtol=0, atol=1e-6)
    model.save_pretrained(folder)
    assert torch.equal(logits(PeftModel.from_pretrained(base_model(name, base), folder), name), acting)
    return model, acting


def loaded_by_peft(name: str, folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(base_model(name), folder)


# Llama 4's experts are no layers, and transformers does not say how they are computed.
some_experts = pytest.mark.filterwarnings(
    "ignore:target_modules takes .*shared_expert", "ignore:Llama4TextExperts stays dense"
)


@some_experts
@pytest.mark.parametrize(("name", "base"), BASES)
def test_lora_learns_and_merges(name: str, base: str, tmp_path: Path) -> None:
    model, acting = check_contract(name, "lora", base, tmp_path)
    if base == "plain":
        torch.testing.assert_close(logits(loaded_by_peft(name, tmp_path), name), acting, rtol=0, atol=2e-6)
    merged = model.merge_and_unload()
    assert type(merged) is type(base_model(name))
    torch.testing.assert_close(logits(merged, name), acting, rtol=0, atol=1e-5)
    assert merged.state_dict().keys() == base_model(name).state_dict().keys()


def test_convolutions_are_refused_4_bits_in_words() -> None:
    with pytest.raises(ValueError, match="has nothing to put into NF4"):
        base_model("ResNet", "nf4")


@some_experts
@every_kind
def test_lora_unloads_to_the_same_model(name: str) -> None:
    model = get_peft_model(base_model(name), config_of("lora", name))
    randomize(model)
    plain = model.unload()
    assert not any(isinstance(module, LoraLayer) for module in plain.modules())
    assert torch.equal(logits(plain, name), base_logits(name, "plain"))


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.model_type in PEFT_TARGETS])
def test_default_targets_are_pefts(name: str) -> None:
    ours = get_peft_model(base_model(name), LoraConfig())
    theirs = peft.get_peft_model(base_model(name), peft.LoraConfig())
    adapted = {path for path, module in ours.named_modules() if isinstance(module, LoraLayer)}
    layers = (path for path, module in theirs.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer))
    assert adapted == {path.removeprefix("base_model.model.") for path in layers}


@pytest.mark.parametrize("name", BOTTLENECKS)
def test_bottleneck_adapters_learn(name: str, tmp_path: Path) -> None:
    start = get_peft_model(base_model(name), config_of("bottleneck", name))
    torch.testing.assert_close(logits(start, name), base_logits(name, "plain"), rtol=0, atol=1e-6)
    model, _ = check_contract(name, "bottleneck", "plain", tmp_path)
    adapted = [path for path, module in model.named_modules() if isinstance(module, BottleneckLayer)]
    if name in SEEING:
        # The language model's two layers, and nothing in the tower for images.
        assert len(adapted) == 4 and all(re.search("language_model|text_model", path) for path in adapted)


@pytest.mark.parametrize("name", sorted(KINDS.keys() - set(BOTTLENECKS)))
def test_other_models_are_refused_bottleneck_adapters_in_words(name: str) -> None:
    with pytest.raises(ValueError, match="there are no usual places for adapters in a model of type"):
        get_peft_model(base_model(name), config_of("bottleneck", name))


def received(name: str) -> tuple[Any, dict[str, torch.Tensor]]:
    """A base model's language model, and what it gets for the batch: words and the image's features."""
    model = base_model(name)
    language_model = model.get_decoder()
    seen: dict[str, torch.Tensor] = {}

    def see(module: Any, args: Any, kwargs: Any) -> None:
        seen.update(kwargs)

    with language_model.register_forward_pre_hook(see, with_kwargs=True):
        logits(model, name, without=("attention_mask", "token_type_ids", "labels"))
    return model, seen


@pytest.mark.parametrize(("name", "way"), WORKING)
def test_prefixes_and_prompts_learn_and_are_pefts(name: str, way: str, tmp_path: Path) -> None:
    model, _ = check_contract(name, way, "plain", tmp_path)
    without = ("token_type_ids",)  # PEFT drops them
    ours = logits(model, name, without)
    if way == "prompt" and name in PROMPTS_NOT_IN_PEFT:
        return
    theirs = logits(loaded_by_peft(name, tmp_path), name, without)
    # A padded token's own logits, which nobody reads, are of another position.
    real = KINDS[name].batch()["attention_mask"].bool()
    torch.testing.assert_close(ours[real], theirs[:, -ours.shape[1] :][real], rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", [name for name, way in WORKING if way == "prompt"])
def test_a_prompt_acts_as_embeddings_in_front_of_words_and_image(name: str) -> None:
    model = get_peft_model(base_model(name), config_of("prompt", name))
    randomize(model)
    ours = logits(model, name, without=("attention_mask", "token_type_ids"))
    prompt = next(tensor for path, tensor in model.named_parameters() if "prompt_encoder" in path)
    plain, seen = received(name)
    embeds = torch.cat([prompt.expand(2, -1, -1), seen["inputs_embeds"]], dim=1)
    with torch.no_grad():
        outputs = plain.get_decoder()(inputs_embeds=embeds)
        head = plain.get_output_embeddings()
        there = outputs.logits if hasattr(outputs, "logits") else head(outputs.last_hidden_state)
    torch.testing.assert_close(ours, there[:, 3:], rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("name", "way"), [(name, way) for name in REFUSED for way in VIRTUAL if (name, way) not in WORKING]
)
def test_other_models_are_refused_virtual_tokens_in_words(name: str, way: str) -> None:
    with pytest.raises(ValueError, match=REFUSED[name]):
        get_peft_model(base_model(name), config_of(way, name))


@pytest.mark.parametrize("name", ["Wav2Vec2", "ViT", "CLIP", "Segformer", "ResNet"])
def test_models_without_embeddings_of_tokens_say_so(name: str, tmp_path: Path) -> None:
    model = get_peft_model(base_model(name), config_of("lora", name))
    with pytest.warns(UserWarning, match="has no get_input_embeddings"):
        model.save_pretrained(tmp_path, save_embedding_layers=True)
    with pytest.raises(ValueError, match="has no embeddings of tokens that could be resized"):
        model.resize_token_embeddings(200)
    inverted = BottleneckConfig.from_adapterhub("seq_bn_inv", target_modules=r".*\.dense", hidden_size=32)
    for config in (TrainableTokensConfig(token_indices=[1]), inverted):
        if name != "CLIP":
            with pytest.raises((ValueError, TypeError), match=r"token|embed|target_modules"):
                get_peft_model(base_model(name), config)


def yes(works: bool) -> str:
    return "yes" if works else "raises"


def test_the_documentation_lists_them() -> None:
    text = (Path(__file__).parents[1] / "docs" / "families.md").read_text()
    section = text.split("## Images and sound\n")[1].split("\n## ")[0]
    lines = [line.strip("| ").split(" | ") for line in re.findall(r"^\| .*", section, re.M)]
    expected = [
        [
            *(name, ", ".join(f"`{target}`" for target in TARGETS[name]) if name == "ResNet" else '`"all-linear"`'),
            *(yes((name, "nf4") in BASES), yes(name in BOTTLENECKS), *(yes((name, way) in WORKING) for way in VIRTUAL)),
        ]
        for name in KINDS
    ]
    assert lines[1:] == expected
