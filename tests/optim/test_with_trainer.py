"""A drop-in for torch.optim.AdamW in transformers' Trainer: trains the same, saves, resumes bit for bit."""

from pathlib import Path

import pytest
import torch
from tiny import some_ids, tiny_llama
from transformers import Trainer, TrainingArguments

from minipeft import LoraConfig, PagedAdamW, get_peft_model

ROWS = [{"input_ids": row, "labels": row} for row in some_ids(16, 12)]
PAGE = 4096

pytestmark = [pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")]


def trainer(output: Path, kind, **settings) -> Trainer:
    torch.manual_seed(0)
    model = get_peft_model(tiny_llama(), LoraConfig(r=4, lora_dropout=0.1, target_modules="all-linear"))
    optimizer = kind([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0, **settings)
    arguments = TrainingArguments(
        str(output),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        num_train_epochs=3,
        save_steps=2,
        logging_steps=1,
        seed=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    return Trainer(model, arguments, train_dataset=ROWS, optimizers=(optimizer, None))


def losses(run: Trainer) -> list[float]:
    return [row["loss"] for row in run.state.log_history if "loss" in row]


def trained(run: Trainer) -> dict[str, torch.Tensor]:
    return {n: p.detach() for n, p in run.model.named_parameters() if p.requires_grad}


def test_trainer_trains_saves_and_resumes(tmp_path: Path) -> None:
    memory = {"page_bytes": PAGE, "host_budget": 4 * PAGE, "spill_dir": tmp_path}
    theirs = trainer(tmp_path / "torch", torch.optim.AdamW)
    theirs.train()
    ours = trainer(tmp_path / "paged", PagedAdamW, **memory)
    optimizer = ours.optimizer
    ours.train()
    assert optimizer.memory_stats()["page_ins"] > 0
    assert losses(ours) == pytest.approx(losses(theirs), rel=1e-5) and len(losses(ours)) == 6

    again = trainer(tmp_path / "paged", PagedAdamW, **memory)
    optimizer = again.optimizer
    again.train(resume_from_checkpoint=str(tmp_path / "paged" / "checkpoint-4"))
    assert optimizer.memory_stats()["page_ins"] > 0
    assert losses(again) == losses(ours)
    assert all(torch.equal(p, trained(ours)[name]) for name, p in trained(again).items())


def test_fuse_backward_trains_under_trainer(tmp_path: Path) -> None:
    run = trainer(tmp_path, PagedAdamW, fuse_backward=True)
    run.args.gradient_accumulation_steps, run.args.max_grad_norm, run.args.save_strategy = 1, 0.0, "no"
    run = Trainer(run.model, run.args, train_dataset=ROWS, optimizers=(run.optimizer, None))
    run.train()
    assert losses(run)[-1] < losses(run)[0]
