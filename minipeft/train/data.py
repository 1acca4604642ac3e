"""The data of a run, from its config: read, check, tokenize, hold out."""

from __future__ import annotations

from typing import Any

from minipeft.train.config import TrainConfig
from minipeft.train.encoding import EncodedDataset, encode_records, split_examples
from minipeft.train.positions import resolve_max_length
from minipeft.train.records import read_jsonl


def prepare_data(
    config: TrainConfig, tokenizer: Any, position_limit: int | None, virtual: int = 0
) -> tuple[EncodedDataset, EncodedDataset | None]:
    """Training data and, where the config asks for it, evaluation data.

    Needs no model, so that bad data is found before one is loaded.

    Args:
        position_limit: the longest sequence the model can take, see `positions.model_position_limit`.
        virtual: how many of these positions the adapter's virtual tokens take.

    Raises:
        DataError: a bad record, with file and line; an empty data set.
        ConfigError: max_length exceeds what the model can take.
    """
    max_length = resolve_max_length(config.max_length, position_limit, virtual)
    data = encode_records(read_jsonl(config.data), tokenizer, max_length, config.too_long)
    if config.eval_data is not None:
        records = read_jsonl(config.eval_data)
        return data, encode_records(records, tokenizer, max_length, config.too_long)
    if config.eval_fraction:
        notices = data.notices
        data, held_out = split_examples(data, config.eval_fraction, config.seed)
        data.notices = notices
        return data, held_out
    return data, None
