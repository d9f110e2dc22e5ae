"""Plots of a training run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from .._figures import figure


def plot_curves(history: Sequence[Mapping[str, float]], path: str | Path, *, title: str = "") -> None:
    """
    Draw mean reward, KL and greedy accuracy per step.

    Args:
        history: A trainer's `state.log_history`.
        path: The image file to write.
        title (`str`): What to write above.

    Raises:
        ImportError: matplotlib is not installed.
    """
    kl = _series(history, "kl")
    picture = figure(9 if kl else 5, 3.2)
    axes = picture.subplots(1, 2 if kl else 1, squeeze=False)
    left = axes[0, 0]
    reward, accuracy = _series(history, "reward"), _series(history, "eval_accuracy")
    if reward:
        left.plot(*zip(*reward, strict=True), label="mean reward of the samples")
    if accuracy:
        left.plot(*zip(*accuracy, strict=True), "o-", c="tab:green", label="greedy accuracy, validation")
    left.set(xlabel="step", title=title)
    if reward or accuracy:
        left.legend(fontsize="small")
    if kl:
        axes[0, 1].plot(*zip(*kl, strict=True), c="tab:red")
        axes[0, 1].set(xlabel="step", ylabel="KL to the base model, per token", title="KL")
    picture.savefig(path, dpi=110)


def _series(history: Sequence[Mapping[str, float]], key: str) -> list[tuple[float, float]]:
    return [(entry.get("step", i), entry[key]) for i, entry in enumerate(history) if key in entry]
