"""What the processes of `test_several_processes.py` run: importable, since they are processes of their own."""

import os
from pathlib import Path
from typing import Any

import torch
from tiny import tiny_llama
from tiny_families import FAMILIES
from tiny_runs import make_config, make_data

import minipeft
from minipeft import get_peft_model
from minipeft.nf4 import quantize_model
from minipeft.train import Trainer, read_log
from minipeft.train.processes import join

CONFIGS: dict[str, dict[str, Any]] = {
    "LoraConfig": {"r": 4, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False},
    "BottleneckConfig": {"reduction_factor": 8},
    "PrefixTuningConfig": {"num_virtual_tokens": 3},
    "PromptTuningConfig": {"num_virtual_tokens": 3},
}


def a_model(method: str, packed: bool = False, mixture: bool = False, dropout: float = 0.0) -> Any:
    model = FAMILIES["Qwen3-MoE"].build() if mixture else tiny_llama(0)
    torch.manual_seed(0)
    config = {**CONFIGS[method], **({"lora_dropout": dropout} if dropout else {})}
    if mixture:
        config |= {"target_parameters": ["gate_up_proj", "down_proj"], "target_modules": ["q_proj"]}
    base = quantize_model(model) if packed else model
    return get_peft_model(base, getattr(minipeft, method)(task_type="CAUSAL_LM", **config))


def train(output: str, model: dict[str, Any], resume: Any = False, count: int = 23, **settings: Any) -> dict[str, Any]:
    """A run of 7 steps of 4 micro-batches, shared among the processes.

    Returns: the losses of its log, and the trained parameters' bytes.
    """
    processes = join(60)
    adapted = a_model(**model)
    few = {"gradient_accumulation": 4 // processes.count, "save_every": 3, "eval_every": 4, "log_every": 1, **settings}
    trainer = Trainer(
        adapted,
        make_data(count, high=12),
        make_config(Path(output), **few),
        eval_data=make_data(3, seed=5),
        progress_bar=False,
        processes=processes,
    )
    result = trainer.train(resume=resume)
    rows = read_log(result.log_path)
    trained = {name: p.detach().clone().numpy() for name, p in adapted.named_parameters() if p.requires_grad}
    processes.leave()
    return {
        "losses": [row["loss"] for row in rows if "loss" in row],
        "evals": [(row["eval_loss"], row["eval_tokens"]) for row in rows if "eval_loss" in row],
        "trained": trained,
        "drawn": torch.rand(2).tolist(),
        "tokens": result.tokens,
    }


def who_is_there(timeout: float) -> str:
    """Meet the others; the error that says who has not come."""
    from minipeft.train.errors import TrainingError

    if os.environ["RANK"] == "2":
        return "did not come"
    try:
        join(timeout)
    except TrainingError as error:
        return str(error)
    return "all came"
