"""Fine-tuning on one's own data: records, batches, loop, checkpoints, evaluation.

`prepare_data` reads, `Trainer` trains, `evaluate_loss` and `classify` measure. Each name is imported when it
is first used, so that a command line can show its help without waiting for torch and transformers.
"""

import importlib
from typing import Any

_HOME = {
    "Accuracy": "minipeft.training.evaluation",
    "Batch": "minipeft.training.batches",
    "Batches": "minipeft.training.batches",
    "CheckpointError": "minipeft.training.errors",
    "Classification": "minipeft.training.evaluation",
    "ConfigError": "minipeft.training.errors",
    "DataError": "minipeft.training.errors",
    "EncodedDataset": "minipeft.training.encoding",
    "EvalResult": "minipeft.training.evaluation",
    "Example": "minipeft.training.encoding",
    "MissingExtraError": "minipeft.training.errors",
    "ModelLoadError": "minipeft.training.errors",
    "NonFiniteError": "minipeft.training.errors",
    "OutputDirError": "minipeft.training.errors",
    "Record": "minipeft.training.records",
    "TrainConfig": "minipeft.training.config",
    "TrainResult": "minipeft.training.result",
    "Trainer": "minipeft.training.loop",
    "TrainingError": "minipeft.training.errors",
    "TrainingInterrupted": "minipeft.training.errors",
    "accuracy": "minipeft.training.evaluation",
    "add_config_arguments": "minipeft.training.config_flags",
    "check_output_dir": "minipeft.training.rundir",
    "classify": "minipeft.training.evaluation",
    "config_values": "minipeft.training.config_flags",
    "encode_pair": "minipeft.training.encoding",
    "encode_prompt": "minipeft.training.encoding",
    "encode_records": "minipeft.training.encoding",
    "evaluate_loss": "minipeft.training.evaluation",
    "list_checkpoints": "minipeft.training.checkpoint",
    "load_base_model": "minipeft.training.models",
    "load_position_limit": "minipeft.training.models",
    "load_tokenizer": "minipeft.training.models",
    "make_records": "minipeft.training.records",
    "model_position_limit": "minipeft.training.positions",
    "pad_id_of": "minipeft.training.batches",
    "plot_loss_curve": "minipeft.training.plots",
    "prepare_data": "minipeft.training.data",
    "read_jsonl": "minipeft.training.records",
    "read_log": "minipeft.training.metrics",
    "resolve_device": "minipeft.training.models",
    "resolve_max_length": "minipeft.training.positions",
    "seed_everything": "minipeft.training.models",
    "split_examples": "minipeft.training.encoding",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'minipeft.training' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
