"""The attacks that need no process of their own, once each."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from faults.attacks import IN_PROCESS, an_output_that_cannot_be_is_one_sentence


@pytest.mark.parametrize("attack", [*IN_PROCESS, an_output_that_cannot_be_is_one_sentence], ids=lambda a: a.__name__)
def test_an_attack(attack: Callable[[random.Random, Path], Any], tmp_path: Path) -> None:
    attack(random.Random(0), tmp_path)
