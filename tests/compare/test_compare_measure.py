"""The errors of means, against formulas and against drawing again and again."""

import math
import statistics

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_runs import make_data, make_model

from minipeft.compare.plan import parse_names, parse_seeds
from minipeft.compare.run import (
    Losses,
    change,
    measure_losses,
    ratio_error,
)
from minipeft.compare.table import deviation, share_error
from minipeft.compare.task import windows_of
from minipeft.train.batches import Batches
from minipeft.train.evaluation import accuracy, evaluate_loss

VALUES = st.lists(st.floats(-100, 100), min_size=2, max_size=30)


@given(VALUES, st.integers(1, 50))
def test_the_error_over_texts_of_one_length_is_that_of_a_mean(values, tokens):
    expected = statistics.stdev(values) / math.sqrt(len(values)) / tokens
    assert ratio_error(values, [tokens] * len(values)) == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_the_error_over_texts_of_many_lengths_is_what_drawing_again_gives():
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 40, 300)
    sums = tokens * rng.gamma(2.0, 1.0, 300) + rng.normal(0, 2, 300)
    drawn = rng.integers(0, 300, (4000, 300))
    again = sums[drawn].sum(1) / tokens[drawn].sum(1)
    assert ratio_error(sums.tolist(), tokens.tolist()) == pytest.approx(again.std(), rel=0.06)
    # Taking tokens for what is drawn would be far off.
    assert math.isnan(ratio_error([1.0], [2]))


@given(st.lists(st.booleans(), min_size=1, max_size=60))
def test_the_error_of_an_accuracy_is_the_binomial_one(right):
    expected = accuracy(right, [True] * len(right))
    assert share_error(right) == pytest.approx(expected.standard_error, abs=1e-12)


@given(VALUES)
def test_the_deviation_is_the_sample_deviation(values):
    assert deviation(values) == pytest.approx(statistics.stdev(values), abs=1e-9)
    assert deviation(values[:1]) is None


def test_a_change_is_known_better_than_what_changed():
    rng = np.random.default_rng(0)
    tokens = [100] * 50
    before = Losses((300 + 80 * rng.standard_normal(50)).tolist(), tokens)
    after = Losses([loss + 10 + rng.normal() for loss in before.sums], tokens)
    difference, error = change(before, after)
    assert difference == pytest.approx(after.mean - before.mean)
    assert error < 0.05 * before.standard_error and abs(difference - 0.1) < 4 * error
    assert change(before, before) == (0.0, 0.0)
    with pytest.raises(ValueError, match="different texts"):
        change(before, Losses(after.sums, [99] * 50))


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_losses_are_those_of_each_text_alone_and_add_up(batch_size):
    model, data = make_model(), make_data(9)
    losses = measure_losses(model, data.examples, 0, batch_size)
    assert losses.mean == pytest.approx(evaluate_loss(model, Batches(data.examples, 4)).loss, rel=1e-6)
    for example, total, tokens in zip(data.examples, losses.sums, losses.tokens, strict=True):
        ids, labels = torch.tensor([example.input_ids]), torch.tensor([example.labels])
        with torch.no_grad():
            alone = model.eval()(input_ids=ids, labels=labels).loss.item()
        assert total / tokens == pytest.approx(alone, rel=1e-5)


@given(st.integers(4, 60), st.integers(2, 20))
def test_windows_hold_every_token_once(count, width):
    windows = windows_of(list(range(count)), width)
    read = [token for window in windows for token in window.input_ids]
    assert read == list(range(len(read))) and len(read) >= count - 1
    assert len(windows) >= 2 and all(2 <= len(window) <= width for window in windows)


def test_seeds_and_names():
    assert parse_seeds("1") == [0] and parse_seeds("3") == [0, 1, 2]
    assert parse_seeds("7,") == [7] and parse_seeds("2,0") == [2, 0]
    assert parse_names("lora, prompt,") == ["lora", "prompt"]
