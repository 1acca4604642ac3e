"""Kinds of arguments, for argparse."""

from __future__ import annotations

import argparse

from minipeft.train.config import SEED_END


def positive(text: str) -> int:
    """A whole number above 0."""
    return whole_number(text, least=1)


def seed(text: str) -> int:
    """A whole number that torch and numpy take as a seed."""
    if len(text) > 19 or whole_number(text, least=0) >= SEED_END:
        raise argparse.ArgumentTypeError(f"must be a whole number of 0 or greater and below 2**63, got {text!r}")
    return int(text)


def whole_number(text: str, least: int) -> int:
    """A whole number, or argparse's error."""
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"must be a whole number of {least} or greater, got {text!r}")
    return int(text)
