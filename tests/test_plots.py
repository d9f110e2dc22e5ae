"""What the plots show: scales that begin at 0, digits that can be read, and labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peft_svf import Evaluation
from peft_svf.reporting import plots

colors = pytest.importorskip("matplotlib.colors")


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that a test draws."""
    figures, original = [], plots.figure
    monkeypatch.setattr(plots, "figure", lambda *size: figures.append(original(*size)) or figures[-1])
    return figures


def labels(axes: Any) -> list[str]:
    return list(axes.get_legend_handles_labels()[1])


def test_a_small_difference_of_delta_is_drawn_small(drawn: list[Any], tmp_path: Path) -> None:
    names = [f"model.layers.{layer}.mlp.{kind}" for layer in range(4) for kind in ("up", "down")]
    rng = np.random.default_rng(0)
    deltas = {name: rng.normal(0, 0.01 * (1 + i / 200), 64).astype(np.float32) for i, name in enumerate(names)}
    deltas["model.layers.0.mlp.gate"] = np.full(3, 0.01, np.float32)  # fewer values than parts of the spectrum
    plots.plot_deltas(deltas, tmp_path / "delta.png")
    left, right = drawn[0].axes[:2]
    assert left.images[0].get_clim()[0] == 0
    assert right.get_ylim()[0] == 0
    assert labels(right) == ["80 % of the modules", "median module"]  # not a curve per kind of module
    assert np.isfinite(right.get_ylim()[1])


def test_curves_have_labels_the_accuracy_before_and_whole_steps(drawn: list[Any], tmp_path: Path) -> None:
    history = [{"step": i, "reward": i / 4, "loss": 0.0} for i in (1, 2, 3)] + [{"step": 3, "eval_accuracy": 0.5}]
    plots.plot_curves(history, tmp_path / "curve.png", accuracy_before=0.25)
    (axes,) = drawn[0].axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("step", "reward and accuracy")
    assert labels(axes)[-1] == "accuracy before, on test: 0.25"
    assert list(axes.lines[-1].get_ydata()) == [0.25, 0.25]
    assert axes.get_ylim() == pytest.approx((-0.02, 1.02))
    assert all(float(tick).is_integer() for tick in axes.get_xticks())


def test_the_second_panel_is_the_kl_or_the_loss_without_rewards(drawn: list[Any], tmp_path: Path) -> None:
    plots.plot_curves([{"step": 1, "reward": 5.0, "kl": -0.1}, {"step": 2, "kl": 0.1}], tmp_path / "kl.png")
    plots.plot_curves(
        [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}, {"step": 2, "eval_loss": 1.5}], tmp_path / "loss.png"
    )
    assert [figure.axes[1].get_ylabel() for figure in drawn] == ["KL to the base model, per token", "loss"]
    assert labels(drawn[1].axes[1]) == ["training", "validation"]
    assert drawn[0].axes[1].get_ylim()[0] <= -0.1
    assert drawn[0].axes[0].get_ylim()[1] > 1


def test_digits_are_readable_on_every_colour(drawn: list[Any], tmp_path: Path) -> None:
    counts = {"a": {"a": 9, "b": 1}, "b": {"a": 4, "b": 6}, "c": {"c": 5, "a": 5}}
    found = Evaluation(
        ["t"],
        {"prompt": {"t": 1.0, "all": 1.0}},
        {"prompt": {"t": (0.7, 1.0), "all": (0.7, 1.0)}},
        {},
        {"prompt": counts},
    )
    plots.plot_evaluation(found, tmp_path / "evaluation.png")
    image = drawn[0].axes[1].images[0]
    for text in drawn[0].axes[1].texts:
        x, y = text.get_position()
        below = image.cmap(image.norm(image.get_array()[int(y), int(x)]))
        brightness = [np.dot(colors.to_rgb(each), (0.299, 0.587, 0.114)) for each in (below[:3], text.get_color())]
        assert abs(brightness[0] - brightness[1]) > 0.4, (text.get_text(), brightness)
