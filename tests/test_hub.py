"""Adapters by name on the hub, out of its cache: without a network, as on a cluster's nodes."""

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from tiny import some_ids, tiny_llama
from tiny_folder import byte_tokenizer, save_model
from transformers import AutoModelForCausalLM

import minipeft
from minipeft import LoraConfig, PeftConfig, PeftModel, get_peft_model, load_peft_weights
from minipeft.helpers import check_if_peft_model

SHA = "0123456789abcdef0123456789abcdef01234567"
OTHER = "f" * 40


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache with one repository "org/adapter": an adapter, another in its folder "inner", a branch "v2"."""
    home = tmp_path / "cache" / "models--org--adapter"
    (home / "refs").mkdir(parents=True)
    for seed, (branch, sha) in enumerate((("main", SHA), ("v2", OTHER))):
        (home / "refs" / branch).write_text(sha)
        for folder, more in ((home / "snapshots" / sha, 0), (home / "snapshots" / sha / "inner", 10)):
            made(seed + more).save_pretrained(folder)
    return tmp_path / "cache"


def made(seed: int) -> PeftModel:
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", r=seed + 1))
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize(
    ("where", "seed"),
    [({}, 0), ({"revision": "v2"}, 1), ({"subfolder": "inner"}, 10), ({"revision": OTHER, "subfolder": "inner"}, 11)],
)
def test_a_name_is_loaded_from_the_cache(cache: Path, where: dict[str, str], seed: int) -> None:
    expected = made(seed)(some_ids()).logits
    where = {**where, "cache_dir": str(cache), "local_files_only": True, "token": None}
    assert torch.equal(PeftModel.from_pretrained(tiny_llama(), "org/adapter", **where)(some_ids()).logits, expected)
    assert PeftConfig.from_pretrained("org/adapter", **where).r == seed + 1
    model = made(seed + 2)
    model.load_adapter("org/adapter", "second", **where)
    model.set_adapter("second")
    assert torch.equal(model(some_ids()).logits, expected)
    weights = load_peft_weights("org/adapter", **where)
    if "subfolder" not in where:
        theirs = peft.load_peft_weights("org/adapter", device="cpu", **where)
        assert weights.keys() == theirs.keys()
    minipeft.set_peft_model_state_dict(made(seed), weights)
    swapped = made(seed + 1)
    minipeft.hotswap_adapter(swapped, "org/adapter", "default", **where)
    torch.testing.assert_close(swapped(some_ids()).logits, expected)


def test_the_cache_of_transformers_is_the_default(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    assert PeftConfig.from_pretrained("org/adapter").r == 1
    assert check_if_peft_model("org/adapter")
    assert not check_if_peft_model("org/nothing")


def test_a_folder_wins_over_a_name_on_the_hub(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made(6).save_pretrained(tmp_path / "org" / "adapter")
    monkeypatch.chdir(tmp_path)
    assert PeftConfig.from_pretrained("org/adapter", cache_dir=str(cache)).r == 7


def test_what_is_neither_is_an_error_that_says_so(cache: Path, tmp_path: Path) -> None:
    for error in (FileNotFoundError, ValueError):  # scripts for PEFT expect the second
        with pytest.raises(error, match=r"no adapter at 'org/nothing': Can't find 'adapter_config.json' .* no folder"):
            PeftModel.from_pretrained(tiny_llama(), "org/nothing", cache_dir=str(cache))
    with pytest.raises(FileNotFoundError, match=r"no adapter at '/no/such/folder'.* no folder"):
        PeftConfig.from_pretrained("/no/such/folder")
    with pytest.raises(FileNotFoundError, match=r"no adapter at .*deeper"):
        made(0).save_pretrained(tmp_path / "here")
        PeftConfig.from_pretrained(tmp_path / "here", subfolder="deeper")
    with pytest.raises(TypeError, match=r"does not take .'colour'"):
        PeftConfig.from_pretrained("org/adapter", colour=1, cache_dir=str(cache))
    with pytest.raises(TypeError, match="does not take 'colour'"):
        made(0).load_adapter("org/adapter", "second", colour=1, cache_dir=str(cache))


def test_a_pickle_on_the_hub_is_not_opened(cache: Path) -> None:
    folder = cache / "models--org--adapter" / "snapshots" / SHA
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match=r"adapter_model\.bin.*does not open.*safetensors/convert"):
        PeftModel.from_pretrained(tiny_llama(), "org/adapter", cache_dir=str(cache))


def test_adapter_and_base_model_are_found_by_their_names(cache: Path) -> None:
    base = cache / "models--org--base"
    (base / "refs").mkdir(parents=True)
    (base / "refs" / "main").write_text(SHA)
    tiny_llama().save_pretrained(base / "snapshots" / SHA)
    file = cache / "models--org--adapter" / "snapshots" / OTHER / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": "org/base"}))
    found = minipeft.AutoPeftModelForCausalLM.from_pretrained("org/adapter", revision="v2", cache_dir=str(cache))
    assert torch.equal(found(some_ids()).logits, made(1)(some_ids()).logits)


@pytest.mark.parametrize("name", ["org/base", "base"])
def test_a_resized_vocabulary_is_known_by_the_name_of_the_base(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "cache" / f"models--{name.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(SHA)
    tiny_llama().save_pretrained(folder / "snapshots" / SHA)
    stored = []
    for size in (128, 140):
        base = AutoModelForCausalLM.from_pretrained(name)
        base.resize_token_embeddings(size)
        model = get_peft_model(base, LoraConfig(target_modules=["q_proj"]))
        model.save_pretrained(tmp_path / str(size))
        stored.append(
            {key for key in load_file(tmp_path / str(size) / "adapter_model.safetensors") if "lora" not in key}
        )
    assert stored == [set(), {f"base_model.model.{end}.weight" for end in ("model.embed_tokens", "lm_head")}]
    shutil.rmtree(folder)
    with pytest.warns(UserWarning, match=f"Could not find a config file in {name} .*save_embedding_layers=True"):
        model.save_pretrained(tmp_path / "unknown")


def test_a_base_whose_folder_is_gone_is_told(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), LoraConfig(target_modules=["q_proj"])
    )
    shutil.rmtree(tmp_path / "base")
    with pytest.warns(UserWarning, match="Could not find a config file in .*base - will assume"):
        model.save_pretrained(tmp_path / "adapter")


@pytest.mark.parametrize("rows", [512, 64])
def test_the_vocabulary_grows_to_the_tokenizer_beside_the_adapter_and_never_shrinks(rows: int, tmp_path: Path) -> None:
    save_model(tmp_path / "base", vocab_size=rows)
    tokenizer = byte_tokenizer()
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    if len(tokenizer) > rows:
        base.resize_token_embeddings(len(tokenizer))
    config = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"], "task_type": "CAUSAL_LM"}
    model = peft.get_peft_model(base, peft.LoraConfig(**config))
    model.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    loaded = minipeft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert loaded.get_input_embeddings().weight.shape[0] == max(rows, len(tokenizer))
    ids = some_ids()
    torch.testing.assert_close(loaded(ids).logits, theirs(ids).logits)
    with loaded.disable_adapter(), theirs.disable_adapter():
        torch.testing.assert_close(loaded(ids).logits, theirs(ids).logits)
