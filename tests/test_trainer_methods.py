"""transformers' Trainers with every method and task: batches by length, early stopping, the best model, resuming."""

import json
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from tiny_folder import byte_tokenizer

import minipeft

pytestmark = pytest.mark.filterwarnings("ignore")

_ROBERTA: dict[str, Any] = {
    **{"vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "pad_token_id": 0},
    **{"num_attention_heads": 4, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
}
_T5: dict[str, Any] = {
    **{"vocab_size": 128, "d_model": 32, "d_ff": 48, "num_layers": 2, "num_heads": 4, "d_kv": 8, "dropout_rate": 0.0},
    **{"pad_token_id": 0, "decoder_start_token_id": 0, "eos_token_id": 2},
}
MODELS = {
    "SEQ_CLS": lambda: hf.RobertaForSequenceClassification(hf.RobertaConfig(**_ROBERTA, num_labels=3)),
    "TOKEN_CLS": lambda: hf.RobertaForTokenClassification(hf.RobertaConfig(**_ROBERTA, num_labels=3)),
    "QUESTION_ANS": lambda: hf.RobertaForQuestionAnswering(hf.RobertaConfig(**_ROBERTA)),
    "SEQ_2_SEQ_LM": lambda: hf.T5ForConditionalGeneration(hf.T5Config(**_T5)),
}
COLLATORS = {
    "SEQ_CLS": hf.DataCollatorWithPadding,
    "TOKEN_CLS": hf.DataCollatorForTokenClassification,
    "QUESTION_ANS": hf.DataCollatorWithPadding,
    "SEQ_2_SEQ_LM": hf.DataCollatorForSeq2Seq,
}
METHODS: dict[str, Any] = {
    "lora": lambda of, task: of.LoraConfig(
        r=4, target_modules=["q", "v"] if task == "SEQ_2_SEQ_LM" else ["query", "value"], task_type=task
    ),
    "prefix": lambda of, task: of.PrefixTuningConfig(num_virtual_tokens=4, task_type=task),
    "prompt": lambda of, task: of.PromptTuningConfig(num_virtual_tokens=4, task_type=task),
    "bottleneck": lambda of, task: of.BottleneckConfig(reduction_factor=8, task_type=task),
}
# Where PEFT has no prompt tuning that works: its logits are longer than the labels, answers' places are off by P.
NOT_PEFTS = {("TOKEN_CLS", "prompt"), ("QUESTION_ANS", "prompt")}


def rows(task: str) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for index in range(24):
        ids = torch.randint(3, 128, (4 + index * 5 % 9,), generator=generator).tolist()
        labels: dict[str, Any] = {
            "SEQ_CLS": {"labels": ids[0] % 3},
            "TOKEN_CLS": {"labels": [one % 3 for one in ids]},
            "QUESTION_ANS": {"start_positions": 1, "end_positions": 2},
            "SEQ_2_SEQ_LM": {"labels": ids[::-1]},
        }[task]
        # A column that no model takes: Trainer leaves it out by the signature of the forward.
        made.append({"input_ids": ids, "attention_mask": [1] * len(ids), "length": len(ids), **labels})
    return made


def adapted(of: Any, task: str, method: str) -> Any:
    torch.manual_seed(1)
    model = of.get_peft_model(MODELS[task](), METHODS[method](of, task))
    generator = torch.Generator().manual_seed(0)
    state = sorted(of.get_peft_model_state_dict(model).items())
    values = {key: 0.1 * torch.randn(value.shape, generator=generator) for key, value in state}
    of.set_peft_model_state_dict(model, values)
    return model


def trainer_for(of: Any, task: str, method: str, output: Path, **changes: Any) -> Any:
    generates = task == "SEQ_2_SEQ_LM"
    kind, trainer = (
        (hf.Seq2SeqTrainingArguments, hf.Seq2SeqTrainer) if generates else (hf.TrainingArguments, hf.Trainer)
    )
    settings: dict[str, Any] = {
        **{"max_steps": 10, "per_device_train_batch_size": 4, "learning_rate": 3e-2, "seed": 1, "use_cpu": True},
        **{"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "logging_steps": 1, "report_to": []},
        **{"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "disable_tqdm": True},
        **({"predict_with_generate": True, "generation_max_length": 6} if generates else {}),
        "train_sampling_strategy": "group_by_length",
    }
    return trainer(
        adapted(of, task, method),
        kind(str(output), **{**settings, **changes}),
        train_dataset=rows(task),
        eval_dataset=rows(task)[:8],
        data_collator=COLLATORS[task](byte_tokenizer()),
        callbacks=[hf.EarlyStoppingCallback(early_stopping_patience=1)],
        compute_metrics=lambda found: {"rows": len(found.label_ids[0] if task == "QUESTION_ANS" else found.label_ids)},
    )


def report(of: Any, task: str, method: str, output: Path) -> list[tuple[str, float]]:
    """All losses of a run that ends early, of its best model, and of a run that goes on from a checkpoint."""
    trainer = trainer_for(of, task, method, output)
    torch.manual_seed(5)
    trainer.train()
    best = trainer.state.best_metric
    tested = trainer.evaluate(metric_key_prefix="test")
    predicted = trainer.predict(rows(task)[:8], metric_key_prefix="held_out").metrics
    assert tested["test_loss"] == pytest.approx(best) and predicted["held_out_loss"] == pytest.approx(best)
    assert tested["test_rows"] == predicted["held_out_rows"] == 8
    again = trainer_for(of, task, method, output)
    again.train(resume_from_checkpoint=str(output / "checkpoint-2"))
    # A resumed run has other batches: transformers draws their order by length anew.
    history = [*trainer.state.log_history, *again.state.log_history]
    return [(name, row[name]) for row in history for name in ("loss", "eval_loss") if name in row]


CASES = [(task, method) for task in MODELS for method in METHODS]


@pytest.mark.parametrize(("task", "method"), CASES)
def test_a_run_with_all_that_trainer_does_besides(task: str, method: str, tmp_path: Path) -> None:
    ours = report(minipeft, task, method, tmp_path / "ours")
    assert len({value for _, value in ours}) > 4 and all(math.isfinite(value) for _, value in ours)
    if method != "bottleneck" and (task, method) not in NOT_PEFTS:
        theirs = report(peft, task, method, tmp_path / "theirs")
        assert [name for name, _ in ours] == [name for name, _ in theirs]
        assert [value for _, value in ours] == pytest.approx([value for _, value in theirs], abs=1e-5)


def test_early_stopping_stops(tmp_path: Path) -> None:
    trainer = trainer_for(minipeft, "SEQ_CLS", "lora", tmp_path, learning_rate=1.0, lr_scheduler_type="constant")
    trainer.train()
    assert trainer.state.global_step < 10
    best = json.loads((Path(trainer.state.best_model_checkpoint) / "trainer_state.json").read_text())
    assert best["best_metric"] == trainer.state.best_metric
