"""TRL's trainers take our configs and models for PEFT's, and train them to the same losses."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import peft
import pytest
import torch
import trl
from tiny_folder import save_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import DPOTrainer, GRPOTrainer, KTOTrainer, RewardTrainer, RLOOTrainer, SFTTrainer

import minipeft
from minipeft import NF4Config

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("_quiet")]


@pytest.fixture
def _quiet() -> Any:
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


def words(i: int, number: int = 4) -> str:
    return " ".join("abcdefghij"[(i * 7 + j) % 10] * 2 for j in range(number))


def rows(*columns: str, longer: int = 1) -> datasets.Dataset:
    """Sixteen rows; each column's texts differ, and so do their lengths where `longer` is greater than 1."""
    return datasets.Dataset.from_list(
        [{name: words(i + at, 4 + i % longer) for at, name in enumerate(columns)} for i in range(16)]
    )


PAIRS = rows("prompt", "chosen", "rejected")
LABELLED = rows("prompt", "completion").add_column("label", [i % 2 == 0 for i in range(16)])
# The first token of a text has no target here where a prompt stands before it: so a question comes first.
TALKS = rows("prompt", "completion", longer=5)


def reward(completions: list[str], **others: Any) -> list[float]:
    return [float(len(set(text))) for text in completions]


# Name -> (trainer, config, the config's fields, further arguments).
TRAINERS: dict[str, tuple[Any, Any, dict[str, Any], dict[str, Any]]] = {
    "sft": (SFTTrainer, trl.SFTConfig, {}, {"train_dataset": TALKS}),
    "sft-packed": (SFTTrainer, trl.SFTConfig, {"packing": True, "max_length": 64}, {"train_dataset": TALKS}),
    "sft-padding-free": (
        SFTTrainer,
        trl.SFTConfig,
        {"padding_free": True, "max_length": None},
        {"train_dataset": TALKS},
    ),
    # TRL's default, which costs time here.
    "sft-checkpointed": (SFTTrainer, trl.SFTConfig, {"gradient_checkpointing": True}, {"train_dataset": TALKS}),
    "dpo": (DPOTrainer, trl.DPOConfig, {"beta": 0.5}, {"train_dataset": PAIRS}),
    "dpo-checkpointed": (
        *(DPOTrainer, trl.DPOConfig, {"beta": 0.5, "gradient_checkpointing": True}),
        {"train_dataset": PAIRS},
    ),
    "dpo-precomputed": (
        *(DPOTrainer, trl.DPOConfig, {"beta": 0.5, "precompute_ref_log_probs": True}),
        {"train_dataset": PAIRS},
    ),
    "kto": (KTOTrainer, trl.KTOConfig, {"beta": 0.5}, {"train_dataset": LABELLED}),
    "grpo": (
        *(GRPOTrainer, trl.GRPOConfig, {"beta": 0.1, "max_completion_length": 6, "num_generations": 4}),
        {"reward_funcs": reward, "train_dataset": rows("prompt")},
    ),
    "rloo": (
        *(RLOOTrainer, trl.RLOOConfig, {"beta": 0.1, "max_completion_length": 6, "num_generations": 4}),
        {"reward_funcs": reward, "train_dataset": rows("prompt")},
    ),
    "reward": (RewardTrainer, trl.RewardConfig, {}, {"train_dataset": rows("chosen", "rejected")}),
}

METHODS: dict[str, Callable[[Any, str], Any]] = {
    "lora": lambda of, task: of.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type=task),
    "all-linear": lambda of, task: of.LoraConfig(
        r=4, target_modules="all-linear", use_rslora=True, lora_bias=True, task_type=task
    ),
    "dora": lambda of, task: of.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], use_dora=True, task_type=task),
    "saved-head": lambda of, task: of.LoraConfig(
        r=4, target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"], task_type=task
    ),
    "parameters": lambda of, task: of.LoraConfig(r=4, target_modules=[], target_parameters=["q_proj.weight"]),
    "lora-and-tokens": lambda of, task: of.LoraConfig(
        r=4, target_modules=["q_proj"], trainable_token_indices=[70, 71, 72], task_type=task
    ),
    "tokens": lambda of, task: of.TrainableTokensConfig(token_indices=[70, 71, 72], task_type=task),
    "prefix": lambda of, task: of.PrefixTuningConfig(num_virtual_tokens=4, task_type=task),
    "prompt": lambda of, task: of.PromptTuningConfig(num_virtual_tokens=4, task_type=task),
}


def base(folder: Path, name: str) -> Any:
    torch.manual_seed(2)  # a reward model's head is new
    if name == "reward":
        return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    return AutoModelForCausalLM.from_pretrained(folder)


def trained_adapter(of: Any, model: Any, config: Any) -> Any:
    """`model` with an adapter of `config` that does something: the same whichever library `of` makes it."""
    model = of.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(0)
    state = sorted(of.get_peft_model_state_dict(model).items())
    values = {key: 0.3 * torch.randn(value.shape, generator=generator) + 0.1 for key, value in state}
    of.set_peft_model_state_dict(model, values)
    return model


def trainer_for(model: Any, name: str, folder: Path, output: Path, **arguments: Any) -> Any:
    trainer, config, settings, others = TRAINERS[name]
    settings = {
        **{"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1, "seed": 1},
        **{"report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "bf16": False},
        **{"gradient_checkpointing": False, **settings},
    }
    torch.manual_seed(4)
    made = trainer(
        model, args=config(str(output), **settings), processing_class=AutoTokenizer.from_pretrained(folder),
        **others, **arguments,
    )  # fmt: skip
    return made


def losses(trainer: Any) -> list[float]:
    torch.manual_seed(5)
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def losses_of(of: Any, name: str, method: str, given: str, folder: Path, output: Path, **arguments: Any) -> list[float]:
    """Three losses of the trainer `name`, given a config or an adapted model of the library `of`."""
    model = base(folder, name)
    torch.manual_seed(3)
    config = METHODS[method](of, "SEQ_CLS" if name == "reward" else "CAUSAL_LM")
    if given == "config":
        trainer = trainer_for(model, name, folder, output, peft_config=config, **arguments)
    else:
        trainer = trainer_for(trained_adapter(of, model, config), name, folder, output, **arguments)
    assert isinstance(trainer.model, of.PeftModel)
    return losses(trainer)


def assert_same(name: str, method: str, given: str, folder: Path, output: Path, **arguments: Any) -> None:
    theirs, ours = (losses_of(of, name, method, given, folder, output, **arguments) for of in (peft, minipeft))
    assert len(ours) == 3 and len(set(ours)) > 1 and all(map(math.isfinite, ours))
    assert ours == pytest.approx(theirs, abs=1e-5)


@pytest.mark.parametrize("given", ["config", "adapted"])
@pytest.mark.parametrize("name", TRAINERS)
def test_every_trainer_has_pefts_losses_with_lora(name: str, given: str, folder: Path, tmp_path: Path) -> None:
    assert_same(name, "lora", given, folder, tmp_path)


@pytest.mark.parametrize("name", ["sft", "dpo", "kto", "grpo"])
@pytest.mark.parametrize("method", [name for name in METHODS if name != "lora"])
def test_every_method_has_pefts_losses(method: str, name: str, folder: Path, tmp_path: Path) -> None:
    assert_same(name, method, "adapted", folder, tmp_path)


@pytest.mark.parametrize("method", ["prefix", "prompt", "dora", "lora-and-tokens"])
def test_a_reward_model_has_pefts_losses(method: str, folder: Path, tmp_path: Path) -> None:
    assert_same("reward", method, "adapted", folder, tmp_path)


@pytest.mark.parametrize("given", ["config", "adapted"])
def test_dpo_with_a_reference_model_of_its_own(given: str, folder: Path, tmp_path: Path) -> None:
    assert_same("dpo", "lora", given, folder, tmp_path, ref_model=base(folder, "dpo"))


@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_packed_texts_stay_apart_behind_virtual_tokens(method: str, folder: Path, tmp_path: Path) -> None:
    # PEFT drops the positions by which texts of one row are told apart, with a warning, and so is no oracle here.
    apart, together = (
        losses_of(minipeft, name, method, "adapted", folder, tmp_path) for name in ("sft", "sft-padding-free")
    )
    assert together == pytest.approx(apart, abs=1e-5)


@pytest.mark.parametrize("method", ["lora", "prefix", "prompt", "bottleneck"])
def test_a_new_adapters_reference_is_the_base_and_a_trained_ones_is_itself(
    method: str, folder: Path, tmp_path: Path
) -> None:
    configs = {**METHODS, "bottleneck": lambda of, task: of.BottleneckConfig(reduction_factor=8, task_type=task)}
    config = configs[method](minipeft, "CAUSAL_LM")
    new = trainer_for(base(folder, "dpo"), "dpo", folder, tmp_path, peft_config=config)
    assert "ref" not in new.model.peft_config
    if method in ("lora", "bottleneck"):  # whose start is the base
        assert losses(new)[0] == pytest.approx(math.log(2), abs=1e-5)
    model = trained_adapter(minipeft, base(folder, "dpo"), configs[method](minipeft, "CAUSAL_LM"))
    again = trainer_for(model, "dpo", folder, tmp_path)
    assert set(again.model.peft_config) == {"default", "ref"}
    start = minipeft.get_peft_model_state_dict(again.model, adapter_name="ref")
    start = {key: value.clone() for key, value in start.items()}
    first, *later = losses(again)
    assert first == pytest.approx(math.log(2), abs=1e-5) and later[0] != first
    end = minipeft.get_peft_model_state_dict(again.model, adapter_name="ref")
    assert all(torch.equal(end[key], start[key]) for key in start)
    assert again.model.active_adapter == "default"


@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_a_packed_base_trains(name: str, folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=NF4Config())
    config = METHODS["lora"](minipeft, "CAUSAL_LM")
    trainer = trainer_for(model, name, folder, tmp_path, peft_config=config)
    packed = {key: value.clone() for key, value in trainer.model.state_dict().items() if value.dtype == torch.uint8}
    found = losses(trainer)
    assert packed and len(set(found)) == 3 and all(map(math.isfinite, found))
    assert all(torch.equal(trainer.model.state_dict()[key], packed[key]) for key in packed)


def test_what_a_trainer_saves_is_an_adapter_that_loads(folder: Path, tmp_path: Path) -> None:
    trainer = trainer_for(
        base(folder, "sft"), "sft", folder, tmp_path, peft_config=METHODS["dora"](minipeft, "CAUSAL_LM")
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        expected = trainer.model.eval()(ids).logits
        for of in (peft, minipeft):
            loaded = of.PeftModel.from_pretrained(base(folder, "sft"), tmp_path / "adapter").eval()
            torch.testing.assert_close(loaded(ids).logits, expected)
