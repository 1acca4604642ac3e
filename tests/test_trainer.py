"""transformers' Trainer takes the adapted 4-bit model for one of its own: trains, evaluates, saves, resumes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import some_ids, tiny_llama
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from minipeft import LoraConfig, NF4Config, PeftModel, get_peft_model

ROWS = [{"input_ids": row, "labels": row} for row in some_ids(32, 16)]

pytestmark = [
    # Trainer's own data loader and checkpoint code warn about what this machine lacks.
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning"),
]


def base(directory: Path) -> Any:
    if not (directory / "config.json").exists():
        tiny_llama().save_pretrained(directory)
    return AutoModelForCausalLM.from_pretrained(directory, quantization_config=NF4Config())


def adapted(directory: Path) -> Any:
    torch.manual_seed(0)
    return get_peft_model(
        base(directory), LoraConfig(r=4, lora_alpha=16, lora_dropout=0.1, target_modules="all-linear")
    )


def arguments(output: Path, **changes: Any) -> TrainingArguments:
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "num_train_epochs": 2,
        "learning_rate": 1e-2,
        "save_strategy": "steps",
        "save_steps": 4,
        "eval_strategy": "steps",
        "eval_steps": 4,
        "logging_steps": 1,
        "seed": 1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return TrainingArguments(str(output), **{**settings, **changes})


def losses(trainer: Trainer) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def adapter(model: Any) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def test_a_quantized_model_is_trained_only_with_an_adapter(tmp_path: Path) -> None:
    model = base(tmp_path / "base")
    with pytest.raises(ValueError, match="purely quantized"):
        Trainer(model, arguments(tmp_path / "run", eval_strategy="no"))
    adapted_model = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    Trainer(adapted_model, arguments(tmp_path / "run", eval_strategy="no"))
    with pytest.raises(ValueError, match="purely quantized"):
        Trainer(adapted_model.unload(), arguments(tmp_path / "run", eval_strategy="no"))


def test_training_evaluates_saves_the_adapter_alone_and_resumes_exactly(tmp_path: Path) -> None:
    run, model = tmp_path / "run", adapted(tmp_path / "base")
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    trainer = Trainer(model, arguments(run), train_dataset=ROWS, eval_dataset=ROWS[:8])
    trainer.train()
    evaluated = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    assert len(evaluated) == 4 and evaluated[-1] < evaluated[0]
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)

    size = sum(tensor.nbytes for tensor in adapter(model).values())
    for file in ("adapter_model.safetensors", "model.safetensors"):
        stored = load_file(run / "checkpoint-8" / file)
        assert all("lora_" in name for name in stored) and sum(t.nbytes for t in stored.values()) == size

    again = Trainer(adapted(tmp_path / "base"), arguments(run), train_dataset=ROWS, eval_dataset=ROWS[:8])
    again.train(resume_from_checkpoint=str(run / "checkpoint-8"))
    assert losses(again) == losses(trainer)
    assert all(torch.equal(tensor, adapter(model)[name]) for name, tensor in adapter(again.model).items())


def test_best_checkpoint_is_loaded_at_the_end(tmp_path: Path) -> None:
    # A learning rate that ruins the model: the first evaluation is the best.
    settings = arguments(tmp_path / "run", learning_rate=1.0, load_best_model_at_end=True, lr_scheduler_type="constant")
    trainer = Trainer(adapted(tmp_path / "base"), settings, train_dataset=ROWS, eval_dataset=ROWS[:8])
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best is not None
    stored = load_file(Path(best) / "model.safetensors")
    assert all(torch.equal(tensor, stored[name]) for name, tensor in adapter(trainer.model).items())
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric)


def test_a_checkpoint_is_an_adapter_directory(tmp_path: Path) -> None:
    trainer = Trainer(
        adapted(tmp_path / "base"), arguments(tmp_path / "run"), train_dataset=ROWS, eval_dataset=ROWS[:8]
    )
    trainer.train()
    again = PeftModel.from_pretrained(base(tmp_path / "base"), tmp_path / "run" / "checkpoint-16")
    expected = trainer.model.eval()(some_ids()).logits
    assert torch.equal(again.eval()(some_ids()).logits, expected)
