"""The loss curve: what is drawn, not how it looks."""

import pytest
from matplotlib.figure import Figure

from minipeft.train import report
from minipeft.train.report import plot_loss_curve, running_mean


@pytest.fixture
def drawn(monkeypatch):
    """The axes that a plot was drawn on."""
    found = []
    original = Figure.add_subplot
    monkeypatch.setattr(Figure, "add_subplot", lambda self: found.append(original(self)) or found[-1])
    return found


def rows(losses, **evaluations):
    made = [{"step": step, "loss": loss} for step, loss in enumerate(losses, 1)]
    return made + [{"step": int(step[1:]), "eval_loss": loss} for step, loss in evaluations.items()]


def test_running_mean_is_centred():
    assert running_mean([0, 0, 10, 0, 0, 5]) == pytest.approx([10 / 3, 2.5, 2, 3, 3.75, 5 / 3])
    assert running_mean([]) == []


def test_a_long_run_shows_its_mean_and_its_rows(drawn, tmp_path):
    losses = [2 + step % 2 for step in range(report.FEW_ROWS + 1)]
    assert plot_loss_curve(rows(losses, s0=3.0, s21=2.0), tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    every, mean, evaluation = drawn[0].lines
    assert list(every.get_ydata()) == losses
    assert list(mean.get_ydata()) == running_mean(losses)
    assert list(evaluation.get_xdata()) == [0, 21]


def test_a_short_run_is_drawn_as_it_is(drawn, tmp_path):
    plot_loss_curve([*rows([3.0, 2.0]), {"step": 2, "loss": None}], tmp_path / "a.png")
    assert [list(line.get_ydata()) for line in drawn[0].lines] == [[3.0, 2.0]]


@pytest.mark.parametrize(("losses", "scale"), [([9.0, 0.5], "log"), ([3.0, 0.5], "linear"), ([3.0, 0.0], "linear")])
def test_the_axis_is_logarithmic_where_the_loss_falls_far(losses, scale, drawn, tmp_path):
    plot_loss_curve(rows(losses), tmp_path / "a.png")
    assert drawn[0].get_yscale() == scale


def test_nothing_to_draw_is_an_empty_plot(drawn, tmp_path):
    plot_loss_curve([], tmp_path / "a.png")
    assert not drawn[0].lines and drawn[0].get_legend() is None
