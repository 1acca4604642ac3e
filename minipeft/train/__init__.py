"""Fine-tuning on one's own data: records, batches, loop, checkpoints, evaluation.

`prepare_data` reads, `Trainer` trains, `evaluate_loss` and `classify` measure. Each name is imported when it
is first used, so that a command line can show its help without waiting for torch and transformers.
"""

import importlib
from typing import Any

_HOME = {
    "Accuracy": "minipeft.train.evaluation",
    "Batch": "minipeft.train.batches",
    "Batches": "minipeft.train.batches",
    "CheckpointError": "minipeft.train.errors",
    "Classification": "minipeft.train.evaluation",
    "ConfigError": "minipeft.train.errors",
    "DataError": "minipeft.train.errors",
    "EncodedDataset": "minipeft.train.encoding",
    "EvalResult": "minipeft.train.evaluation",
    "Example": "minipeft.train.encoding",
    "MissingExtraError": "minipeft.train.errors",
    "ModelLoadError": "minipeft.train.errors",
    "NonFiniteError": "minipeft.train.errors",
    "OutputDirError": "minipeft.train.errors",
    "Record": "minipeft.train.records",
    "TrainConfig": "minipeft.train.config",
    "TrainResult": "minipeft.train.report",
    "Trainer": "minipeft.train.loop",
    "TrainingError": "minipeft.train.errors",
    "TrainingInterrupted": "minipeft.train.errors",
    "accuracy": "minipeft.train.evaluation",
    "add_config_arguments": "minipeft.train.config",
    "check_output_dir": "minipeft.train.run",
    "classify": "minipeft.train.evaluation",
    "config_values": "minipeft.train.config",
    "encode_pair": "minipeft.train.encoding",
    "encode_prompt": "minipeft.train.encoding",
    "encode_records": "minipeft.train.encoding",
    "evaluate_loss": "minipeft.train.evaluation",
    "list_checkpoints": "minipeft.train.checkpoint",
    "load_base_model": "minipeft.train.models",
    "load_position_limit": "minipeft.train.models",
    "load_tokenizer": "minipeft.train.models",
    "make_records": "minipeft.train.records",
    "model_position_limit": "minipeft.train.models",
    "pad_id_of": "minipeft.train.batches",
    "plot_loss_curve": "minipeft.train.report",
    "prepare_data": "minipeft.train.encoding",
    "read_jsonl": "minipeft.train.records",
    "read_records": "minipeft.train.records",
    "read_log": "minipeft.train.report",
    "resolve_device": "minipeft.train.models",
    "resolve_max_length": "minipeft.train.models",
    "seed_everything": "minipeft.train.models",
    "split_examples": "minipeft.train.encoding",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'minipeft.train' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
