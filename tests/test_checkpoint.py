"""Adapter directories: written whole or not at all, read strictly, never unpickled."""

import json
import os
import re
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
import yaml
from processes import run_process
from safetensors.torch import load_file, save_file
from tiny import randomize, some_ids, tiny_llama
from transformers import LlamaForCausalLM, ViTConfig, ViTForImageClassification

import minipeft
from minipeft import AutoPeftModelForCausalLM, LoraConfig, PeftConfig, PeftModel, TaskType, get_peft_model
from minipeft.auto import _AUTO_CLASSES

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def adapted(seed: int = 2, **changes: Any) -> Any:
    model = get_peft_model(tiny_llama(), LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], **changes}))
    randomize(model, seed)
    return model


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    adapted().save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def edit_config(directory: Path, **values: Any) -> None:
    config = json.loads((directory / CONFIG).read_text())
    (directory / CONFIG).write_text(json.dumps({**config, **values}))


def edit_tensors(directory: Path, change: Any) -> None:
    tensors = load_file(directory / WEIGHTS)
    change(tensors)
    save_file(tensors, directory / WEIGHTS)


def test_a_model_of_images_needs_no_vocabulary_to_be_saved(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=8)).save_pretrained(tmp_path / "base")
    model = ViTForImageClassification.from_pretrained(tmp_path / "base")
    get_peft_model(model, LoraConfig(target_modules="all-linear")).save_pretrained(tmp_path / "adapter")
    assert len(load_file(tmp_path / "adapter" / WEIGHTS)) == 12


def load(directory: Path) -> Any:
    return PeftModel.from_pretrained(tiny_llama(), directory)


def assert_refused(directory: Path, error: type[Exception], complaint: str) -> None:
    """Loading raises, into a plain model and beside an adapter, and leaves both models as they were."""
    plain = tiny_llama()
    with pytest.raises(error, match=complaint):
        PeftModel.from_pretrained(plain, directory)
    assert type(plain) is LlamaForCausalLM and plain.state_dict().keys() == tiny_llama().state_dict().keys()
    model = adapted()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(error, match=complaint):
        model.load_adapter(directory, "second")
    assert list(model.peft_config) == ["default"]
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_what_is_saved_comes_back(directory: Path) -> None:
    model, again = adapted(), load(directory)
    assert torch.equal(again(some_ids()).logits, model(some_ids()).logits)
    assert not any(p.requires_grad for p in again.parameters())
    assert again.active_adapter == "default"
    assert sorted(os.listdir(directory)) == ["README.md", CONFIG, WEIGHTS]


def test_adapter_is_loaded_trainable_on_request(directory: Path) -> None:
    model = PeftModel.from_pretrained(tiny_llama(), directory, is_trainable=True)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in model.named_parameters() if "lora_" in n
    }
    model.load_adapter(directory, "frozen")
    assert not any(p.requires_grad for n, p in model.named_parameters() if "frozen" in n)
    assert model.active_adapter == "default"


def test_loading_into_an_adapter_that_exists_overwrites_its_values(directory: Path) -> None:
    model = adapted(seed=3)
    assert not torch.equal(model(some_ids()).logits, adapted()(some_ids()).logits)
    model.load_adapter(directory, "default")
    assert torch.equal(model(some_ids()).logits, adapted()(some_ids()).logits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtype_of_a_16_bit_adapter_is_kept_on_disk(dtype: torch.dtype, tmp_path: Path) -> None:
    config = LoraConfig(target_modules=["q_proj"])
    model = get_peft_model(tiny_llama().to(dtype), config, autocast_adapter_dtype=False)
    model.save_pretrained(tmp_path)
    assert {t.dtype for t in load_file(tmp_path / WEIGHTS).values()} == {dtype}
    wide = PeftModel.from_pretrained(tiny_llama().to(dtype), tmp_path)
    assert {p.dtype for n, p in wide.named_parameters() if "lora_" in n} == {torch.float32}
    narrow = PeftModel.from_pretrained(tiny_llama().to(dtype), tmp_path, autocast_adapter_dtype=False)
    assert {p.dtype for n, p in narrow.named_parameters() if "lora_" in n} == {dtype}


def test_state_dict_argument_is_what_is_saved(tmp_path: Path) -> None:
    model = adapted()
    state = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=state)
    assert all(not tensor.any() for tensor in load_file(tmp_path / WEIGHTS).values())


def test_only_selected_adapters_are_saved_and_only_by_the_main_process(tmp_path: Path) -> None:
    model = adapted()
    model.add_adapter("other", LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "none", is_main_process=False)
    model.save_pretrained(tmp_path / "one", selected_adapters=["other"])
    assert not (tmp_path / "none").exists()
    assert os.listdir(tmp_path / "one") == ["other"]


def test_base_model_is_found_by_its_name(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    model = get_peft_model(LlamaForCausalLM.from_pretrained(tmp_path / "base"), LoraConfig(target_modules=["q_proj"]))
    randomize(model)
    model.save_pretrained(tmp_path / "adapter")
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    mixed = {"torch_dtype": torch.bfloat16, "device_map": "cpu", "autocast_adapter_dtype": False, "torch_device": "cpu"}
    narrow = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", **mixed)
    assert {parameter.dtype for parameter in narrow.parameters()} == {torch.bfloat16}
    assert isinstance(again, minipeft.PeftModelForCausalLM)
    assert torch.equal(again(some_ids()).logits, model.eval()(some_ids()).logits)


@pytest.mark.parametrize(
    ("task", "kind", "changes"),
    [
        ("SEQ_CLS", "SequenceClassification", {"num_labels": 3}),
        ("TOKEN_CLS", "TokenClassification", {"num_labels": 4}),
        ("QUESTION_ANS", "QuestionAnswering", {}),
        ("FEATURE_EXTRACTION", "FeatureExtraction", {}),
        ("CAUSAL_LM", "CausalLM", {}),
    ],
)
def test_base_model_is_found_for_every_task(task: str, kind: str, changes: dict[str, Any], tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    auto = getattr(minipeft, f"AutoPeftModelFor{kind}")
    theirs = getattr(transformers, _AUTO_CLASSES[TaskType(task)])
    base = theirs.from_pretrained(tmp_path / "base", **changes)
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(theirs.from_pretrained(tmp_path / "base"), LoraConfig(task_type=task))
    randomize(model)
    model.save_pretrained(tmp_path / "adapter")
    for again in (auto, minipeft.AutoPeftModel):
        loaded = again.from_pretrained(tmp_path / "adapter")
        assert isinstance(loaded, getattr(minipeft, f"PeftModelFor{kind}"))
        got, expected = loaded(some_ids()[:1]), model.eval()(some_ids()[:1])
        assert torch.equal(got[0], expected[0])
    other = minipeft.AutoPeftModelForSeq2SeqLM
    with pytest.raises(ValueError, match=f"is for {task}, AutoPeftModelForSeq2SeqLM for SEQ_2_SEQ_LM"):
        other.from_pretrained(tmp_path / "adapter")


def test_without_a_task_the_base_models_class_is_taken_from_transformers_alone(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    model = get_peft_model(LlamaForCausalLM.from_pretrained(tmp_path / "base"), LoraConfig())
    model.save_pretrained(tmp_path / "adapter")
    assert isinstance(minipeft.AutoPeftModel.from_pretrained(tmp_path / "adapter"), LlamaForCausalLM)
    for mapping, complaint in (
        ({"base_model_class": "Trainer"}, "a transformers.Trainer, which is no class of models"),
        ({"base_model_class": "system", "parent_library": "os"}, r"os\.system, which is not in the import allowlist"),
        ({}, "neither its task_type nor the class"),
    ):
        edit_config(tmp_path / "adapter", auto_mapping=mapping)
        for kind in (minipeft.AutoPeftModel, AutoPeftModelForCausalLM) if mapping else (minipeft.AutoPeftModel,):
            with pytest.raises(ValueError, match=complaint):
                kind.from_pretrained(tmp_path / "adapter")
    edit_config(tmp_path / "adapter", auto_mapping={"base_model_class": "TinyOwn", "parent_library": __name__})
    with pytest.raises(ValueError, match="no class of models"):
        minipeft.AutoPeftModel.from_pretrained(tmp_path / "adapter", import_allowlist=[__name__])


def test_weights_are_read_for_an_adapter_that_is_there(directory: Path) -> None:
    model = adapted()
    minipeft.set_peft_model_state_dict(model, minipeft.load_peft_weights(directory))
    expected = load_file(directory / "adapter_model.safetensors")
    assert all(torch.equal(t, expected[n]) for n, t in minipeft.get_peft_model_state_dict(model).items())
    assert {t.device.type for t in minipeft.load_peft_weights(directory, device="meta").values()} == {"meta"}


def test_failed_write_leaves_the_old_adapter_whole(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {name: (directory / name).read_bytes() for name in os.listdir(directory)}

    def disk_full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("minipeft.directory.save_file", disk_full)
    with pytest.raises(OSError, match="No space left"):
        adapted(seed=3).save_pretrained(directory)
    assert {name: (directory / name).read_bytes() for name in os.listdir(directory)} == before


@pytest.mark.parametrize("text", ["mine\n", "---\nmeta: hello\ntags:\n- mine\n---\n# Card: ---\n---\nmine\n"])
def test_the_text_of_a_model_card_that_exists_stays(directory: Path, text: str) -> None:
    (directory / "README.md").write_text(text)
    for _ in range(2):
        adapted().save_pretrained(directory)
    card = (directory / "README.md").read_text()
    front, body = re.fullmatch(r"---\n(.*?)\n---\n(.*)", card, re.DOTALL).groups()  # type: ignore[union-attr]
    data = yaml.safe_load(front)
    assert body == text.rpartition("- mine\n---\n")[2]
    assert data["library_name"] == "peft" and {"lora", "minipeft", "transformers"} <= set(data["tags"])
    assert ("mine" in data["tags"]) == (data.get("meta") == "hello") == ("meta" in text)


def test_a_model_card_says_what_a_hub_wants(tmp_path: Path) -> None:
    found = {}
    for lib in (minipeft, peft):
        model = tiny_llama()
        model.name_or_path = model.config._name_or_path = str(tmp_path)
        model = lib.get_peft_model(model, lib.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.save_pretrained(tmp_path / lib.__name__)
        card = (tmp_path / lib.__name__ / "README.md").read_text()
        found[lib] = yaml.safe_load(card.split("---\n")[1])
        found[lib]["tags"] = set(found[lib]["tags"]) - {"minipeft"}
    assert found[minipeft] == found[peft]


def test_a_model_card_with_damaged_metadata_is_named(directory: Path) -> None:
    (directory / "README.md").write_text("---\n- a list\n---\nmine\n")
    with pytest.warns(UserWarning, match="README.md is left as it is: it begins with .*a list"):
        adapted().save_pretrained(directory)
    assert (directory / "README.md").read_text().endswith("mine\n")


def test_fields_of_newer_versions_pass_while_they_ask_for_nothing(directory: Path) -> None:
    edit_config(directory, brand_new=None, another=False, third={}, fourth=[], peft_version="9.0")
    assert load(directory).peft_config["default"].r == 4


def test_fields_of_newer_versions_that_ask_for_something_are_ignored_with_a_warning_as_in_peft(directory: Path) -> None:
    edit_config(directory, brand_new=3, lora_alphas=5)
    ignored = r"Unexpected keyword arguments \['brand_new', 'lora_alphas'\] for class LoraConfig, these are ignored"
    with pytest.warns(UserWarning, match=ignored):
        theirs = peft.PeftConfig.from_pretrained(directory)
    with pytest.warns(minipeft.PeftWarning, match=ignored + r".*'lora_alphas' may mean 'lora_alpha'"):
        ours = load(directory).peft_config["default"]
    assert ours.lora_alpha == theirs.lora_alpha
    assert "brand_new" not in ours.to_dict()


def test_a_file_of_something_else_is_no_adapter_s_config(directory: Path) -> None:
    (directory / CONFIG).write_text('{"foo": "bar", "baz": 123}')
    for config_class in (LoraConfig, PeftConfig):
        with pytest.raises(
            TypeError, match=rf"The {config_class.__name__} config .* missing required keys: .'peft_type'"
        ):
            config_class.from_pretrained(directory)
    assert not minipeft.helpers.check_if_peft_model(directory)


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"use_qalora": True}, r"adapter_config\.json: the adapter was made with use_qalora=True"),
        ({"peft_type": "IA3"}, r"peft_type 'IA3' is not a method that minipeft has"),
        ({"r": 0}, "r must be a positive integer"),
        ({"target_modules": ["nope"]}, "'nope' matches no module"),
        ({"r": 8}, r"lora_A\.weight has shape \(4, 64\), expected \(8, 64\)"),
        ({"target_modules": ["q_proj"]}, r"unknown tensors base_model.*v_proj\.lora_A"),
        ({"target_modules": ["q_proj", "v_proj", "k_proj"]}, r"missing tensors base_model.*k_proj\.lora_A"),
        ({"use_dora": True}, "missing tensors .*lora_magnitude_vector"),
    ],
)
def test_config_that_does_not_fit_is_refused_by_name(directory: Path, values: dict[str, Any], complaint: str) -> None:
    edit_config(directory, **values)
    assert_refused(directory, ValueError, complaint)


def test_config_that_is_no_json_object_is_refused(directory: Path) -> None:
    for text, complaint in (("{", "not valid JSON"), ("[]", "expected a JSON object, got list")):
        (directory / CONFIG).write_text(text)
        assert_refused(directory, ValueError, complaint)


def test_tensors_that_do_not_fit_are_refused_by_name(directory: Path) -> None:
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    edit_tensors(directory, lambda t: t.update({name: torch.zeros(4, 32)}))
    assert_refused(directory, ValueError, r"q_proj\.lora_A\.weight has shape \(4, 32\), expected \(4, 64\)")
    edit_tensors(directory, lambda t: t.pop(name))
    assert_refused(directory, ValueError, f"missing tensors {name}")
    edit_tensors(directory, lambda t: t.update({name: torch.zeros(4, 64), "extra": torch.zeros(1)}))
    assert_refused(directory, ValueError, "unknown tensors extra")


def test_adapter_of_a_deeper_model_is_refused(tmp_path: Path) -> None:
    deep = get_peft_model(tiny_llama(num_hidden_layers=3), LoraConfig(target_modules=["q_proj"]))
    deep.save_pretrained(tmp_path)
    assert_refused(tmp_path, ValueError, r"unknown tensors .*layers\.2\.self_attn\.q_proj")


def test_truncated_file_is_refused(directory: Path) -> None:
    data = (directory / WEIGHTS).read_bytes()
    for length in (0, 5, len(data) // 2, len(data) - 1):
        (directory / WEIGHTS).write_bytes(data[:length])
        assert_refused(directory, ValueError, "is damaged or not a safetensors file")


def test_missing_files_are_said_to_be_missing(directory: Path) -> None:
    (directory / WEIGHTS).unlink()
    assert_refused(directory, FileNotFoundError, "no adapter weights at")
    (directory / "adapter_model.bin").write_bytes(b"")
    assert_refused(
        directory, FileNotFoundError, "is a pickle, which minipeft does not open; .* convert it with: python"
    )
    (directory / CONFIG).unlink()
    assert_refused(directory, FileNotFoundError, "Can't find 'adapter_config.json'")


def test_the_command_that_converts_a_pickle_works(directory: Path) -> None:
    torch.save(load_file(directory / WEIGHTS), directory / "adapter_model.bin")
    (directory / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError) as raised:
        load(directory)
    command = str(raised.value).split("convert it with: ")[1].replace("python", sys.executable, 1)
    assert os.system(command) == 0
    assert torch.equal(load(directory)(some_ids()).logits, adapted()(some_ids()).logits)


def test_saving_to_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="it is a file"):
        adapted().save_pretrained(tmp_path / "file")


def test_config_survives_the_round_trip(tmp_path: Path) -> None:
    config = LoraConfig(
        r=3, target_modules=["q_proj"], rank_pattern={"q_proj": 5}, use_dora=True, task_type="CAUSAL_LM"
    )
    get_peft_model(tiny_llama(), config).save_pretrained(tmp_path)
    again = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(again, LoraConfig)
    config.inference_mode, config.peft_version = True, again.peft_version
    assert again == config
    assert minipeft.get_peft_config(again.to_dict()) == again


def test_a_config_is_saved_alone_as_peft_does(tmp_path: Path) -> None:
    settings = {"r": 3, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    ours = LoraConfig(**settings, runtime_config=minipeft.LoraRuntimeConfig(ephemeral_gpu_offload=False))
    ours.save_pretrained(tmp_path / "ours")
    peft.LoraConfig(**settings).save_pretrained(str(tmp_path / "theirs"))
    files = [json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("ours", "theirs")]
    assert files[0] == files[1]
    assert LoraConfig.from_pretrained(tmp_path / "theirs", revision="main") == LoraConfig.from_pretrained(
        tmp_path / "ours"
    )
    assert not ours.is_prompt_learning and minipeft.PrefixTuningConfig(num_virtual_tokens=1).is_prompt_learning
    # Such settings are about one run: no file has them, and one that has them all the same is read without.
    ours.runtime_config.ephemeral_gpu_offload = True
    assert "runtime_config" not in ours.to_dict()
    edit_config(tmp_path / "theirs", runtime_config={"ephemeral_gpu_offload": True})
    assert LoraConfig.from_json_file(tmp_path / "theirs" / "adapter_config.json") == ours.to_dict()
    assert not LoraConfig.from_pretrained(tmp_path / "theirs").runtime_config.ephemeral_gpu_offload
    with pytest.raises(ValueError, match="runtime_config must be a LoraRuntimeConfig"):
        LoraConfig(runtime_config={"ephemeral_gpu_offload": True})


def test_a_config_is_read_before_any_method_is_used(directory: Path) -> None:
    code = "import sys, minipeft; print(type(minipeft.PeftConfig.from_pretrained(sys.argv[1])).__name__)"
    done = run_process([sys.executable, "-c", code, str(directory)], check=True)
    assert done.stdout == "LoraConfig\n"


def test_an_adapter_is_pushed_as_it_is_saved(monkeypatch: Any, tmp_path: Path) -> None:
    calls: dict[str, Any] = {}

    class Api:
        def __init__(self, token: Any) -> None:
            calls["token"] = token

        def create_repo(self, repo_id: str, **options: Any) -> Any:
            return type("Url", (), {"repo_id": f"me/{repo_id}"})

        def upload_folder(self, repo_id: str, folder_path: str, **options: Any) -> str:
            shutil.copytree(folder_path, tmp_path / repo_id)
            return "commit"

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    model = adapted()
    assert model.push_to_hub("mine", token="secret") == "commit" and calls["token"] == "secret"
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "me" / "mine")
    assert torch.equal(loaded(some_ids()).logits, model(some_ids()).logits)
