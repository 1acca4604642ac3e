"""Training the vectors of chosen tokens and nothing else, such as those of tokens that were added to a vocabulary.

The names, arguments and files are those of PEFT's `TrainableTokensConfig`. Beside LoRA the same is
`LoraConfig(trainable_token_indices=...)`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any, ClassVar

from minipeft.adapter import Method, Part, base_modules
from minipeft.config import PeftConfig
from minipeft.stored import check_regex
from minipeft.tokens.find import check_indices, named_rows, row_parts
from minipeft.tokens.layer import DELTA


@dataclasses.dataclass
class TrainableTokensConfig(PeftConfig):
    """PEFT's `TrainableTokensConfig`: the same names, defaults and JSON.

    Args:
        token_indices: The numbers of the tokens whose vectors are trained.
        target_modules: Names or name endings of the embeddings, or a regular expression; None takes the model's input
            embedding. Weights that are tied to an embedding follow it.
        init_weights: Start from the base's vectors; False starts from random ones (for tests).

    Raises ValueError for token numbers that are negative or repeated.
    """

    token_indices: list[int] = dataclasses.field(default_factory=list)
    target_modules: list[str] | str | None = None
    init_weights: bool = True

    mergeable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.token_indices = list(self.token_indices)
        check_indices("token_indices", self.token_indices)
        if isinstance(self.target_modules, str):
            check_regex("target_modules", self.target_modules)

    def check_start(self) -> None:
        if not self.token_indices:
            raise ValueError("token_indices is empty: name the tokens whose vectors are to be trained")

    def fields_of_training(self) -> set[str]:
        return super().fields_of_training() | {"init_weights"}


def check_rows(name: str, config: TrainableTokensConfig) -> None:
    """Nothing to refuse: each row of a batch can go through an adapter of its own."""


def _parts(model: Any, config: TrainableTokensConfig, saved: list[str], targets: list[str]) -> list[Part]:
    names = config.target_modules
    wanted: dict[str, Sequence[int]]
    if isinstance(names, str):
        matching = [path for path, _ in base_modules(model) if path and re.fullmatch(names, path)]
        wanted = dict.fromkeys(matching or [names], config.token_indices)
    elif names:
        wanted = dict.fromkeys(names, config.token_indices)
    else:
        wanted = named_rows(model, config.token_indices)
        config.target_modules = next(iter(wanted))
    random = not config.init_weights
    return row_parts(
        model, wanted, DELTA, saved=saved, random=random, key_of_followers=DELTA, asked=config.target_modules
    )


def _no_targets(model: Any, config: Any, saved: list[str]) -> list[str]:
    """No module is adapted but by its rows."""
    return []


TOKENS = Method(find=_no_targets, mixin_for=lambda module: None, parts=_parts)
