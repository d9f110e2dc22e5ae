"""Plots of a search result, an evaluation, a training and the δ of an adapter."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..utils.figures import figure


def plot_result(result: Any, path: str | Path | None = None) -> Any:
    """
    Draw the progress of a search, all scores with their intervals, and α per expert and group.

    Args:
        result ([`MixtureResult`]): The result of the search.
        path (*optional*): The image file to write.

    Returns:
        `matplotlib.figure.Figure`: The figure.

    Raises:
        ImportError: matplotlib is not installed.
    """
    picture = figure(13, max(3.2, 1.2 + 0.28 * len(result.scores)))
    progress, scores, alpha = picture.subplots(1, 3, width_ratios=(1.2, 1.2, 1))
    _progress(progress, result)
    _scores(scores, result)
    _alpha(picture, alpha, result)
    if path is not None:
        picture.savefig(path, dpi=110)
    return picture


def _progress(axes: Any, result: Any) -> None:
    rows = [entry["evaluations"] for entry in result.history]
    for entry in result.history:
        axes.plot([entry["evaluations"]] * len(entry["elites"]), entry["elites"], ".", c="tab:gray", alpha=0.5)
    axes.plot(rows, np.maximum.accumulate([entry["best"] for entry in result.history]), label="best so far")
    axes.plot(rows, [np.mean(entry["elites"]) for entry in result.history], label="mean of the elites")
    axes.set(
        xlabel="evaluations of a mixture on an example",
        ylabel="expected reward" if result.expected else result.objective,
        title="search",
    )
    if result.history:
        axes.legend(fontsize="small")


def _scores(axes: Any, result: Any) -> None:
    names = list(result.scores)
    for place, name in enumerate(names):
        mean, (low, high) = result.scores[name], result.intervals[name]
        colour = "tab:green" if name == result.choice else "tab:gray"
        axes.plot([low, high], [place, place], c=colour, lw=2)
        axes.plot([mean], [place], "o", c=colour)
    axes.set_yticks(range(len(names)), names, fontsize="small")
    axes.invert_yaxis()
    axes.set(xlabel=f"{result.objective}, 95 % interval", title=f"{result.evaluated_on}; chosen: {result.choice}")


def _alpha(picture: Any, axes: Any, result: Any) -> None:
    experts, values = list(result.alpha), np.array(list(result.alpha.values()))
    if len(result.groups) == 1:
        axes.barh(range(len(experts)), values[:, 0])
        axes.set_yticks(range(len(experts)), experts, fontsize="small")
        axes.invert_yaxis()
    else:
        limit = max(np.abs(values).max(), 1e-6)
        image = axes.imshow(values.T, aspect="auto", cmap="coolwarm", vmin=-limit, vmax=limit)
        axes.set_xticks(range(len(experts)), experts, rotation=60, ha="right", fontsize="small")
        step = math.ceil(len(result.groups) / 12)  # what the height has room for
        axes.set_yticks(range(0, len(result.groups), step), result.groups[::step], fontsize="x-small")
        picture.colorbar(image, ax=axes)
    axes.set(title="weights α")


def plot_evaluation(found: Any, path: str | Path) -> None:
    """
    Draw the accuracies by task and strategy with their intervals, and the confusion matrix of each dispatcher.

    Args:
        found ([`Evaluation`]): The evaluation.
        path: The image file to write.

    Raises:
        ImportError: matplotlib is not installed.
    """
    picture = figure(6 + 3.2 * len(found.confusion), 4)
    axes = picture.subplots(1, 1 + len(found.confusion), squeeze=False)[0]
    places, width = np.arange(len(found.tasks) + 1), 0.8 / len(found.accuracy)
    for i, (name, by_task) in enumerate(found.accuracy.items()):
        means = np.array([by_task[task] for task in (*found.tasks, "all")])
        ends = np.array([found.intervals[name][task] for task in (*found.tasks, "all")])
        errors = np.maximum(0, np.abs(ends.T - means))
        left = places + (i - (len(found.accuracy) - 1) / 2) * width
        axes[0].bar(left, means, width, yerr=errors, error_kw={"lw": 1, "ecolor": "dimgray"}, label=name)
    axes[0].set(xticks=places, xticklabels=[*found.tasks, "all"], ylabel="accuracy, 95 % interval", ylim=(0, 1))
    axes[0].tick_params(axis="x", rotation=30)
    # above the bars, which may fill the whole height
    axes[0].legend(fontsize="small", ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False)
    for its, (name, confusion) in zip(axes[1:], found.confusion.items(), strict=True):
        rows = list(confusion)
        columns = list(dict.fromkeys([*rows, *(label for row in confusion.values() for label in row)]))
        counts = np.array([[confusion[row].get(label, 0) for label in columns] for row in rows])
        fractions = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
        its.imshow(fractions, cmap="Blues", vmin=0, vmax=1)
        for (y, x), count in np.ndenumerate(counts):
            colour = "white" if fractions[y, x] > 0.5 else "black"
            its.text(x, y, str(count), ha="center", va="center", c=colour)
        its.set(xticks=range(len(columns)), xticklabels=columns, yticks=range(len(rows)), yticklabels=rows)
        its.set(title=f"questions by {name}", xlabel="chosen expert", ylabel="right expert")
        its.tick_params(axis="x", rotation=30)
    picture.savefig(path, dpi=110)


_BINS = 16  # parts of the spectrum
Deltas = Mapping[str, NDArray[np.float32]]


def plot_deltas(deltas: Deltas, path: str | Path, *, title: str = "") -> None:
    """
    Draw the size of δ by layer and module, and along the spectrum.

    Both scales begin at 0, so that modules with almost the same δ look the same.

    Args:
        deltas: δ by module name, as returned by [`adapter_deltas`].
        path: The image file to write.
        title (`str`): Title of the figure.

    Raises:
        ImportError: matplotlib is not installed.
    """
    layers, kinds, sizes = delta_sizes(deltas)
    picture = figure(11, 1.8 + 0.1 * max(len(layers), 20))
    left, right = picture.subplots(1, 2, width_ratios=(1, 1.2))
    image = left.imshow(sizes, aspect="auto", cmap="viridis", vmin=0)
    left.set_xticks(range(len(kinds)), kinds, rotation=60, ha="right", fontsize="small")
    step = max(1, len(layers) // 15)
    left.set_yticks(range(0, len(layers), step), layers[::step])
    left.set(ylabel="layer", title="rms of δ")
    picture.colorbar(image, ax=left)
    edges = np.linspace(0, 1, _BINS + 1)
    low, middle, high = np.nanquantile(
        [_along_the_spectrum(delta) for delta in deltas.values()], (0.1, 0.5, 0.9), axis=0
    )
    right.stairs(high, edges, baseline=low, fill=True, alpha=0.3, label="80 % of the modules")
    right.stairs(middle, edges, baseline=None, lw=2, label="median module")
    right.set(
        xlabel="singular values, from the largest to the smallest", title="rms of δ along the spectrum", xlim=(0, 1)
    )
    right.set_xticks([0, 0.5, 1], ["largest", "middle", "smallest"])
    right.set_ylim(bottom=0)
    right.legend(fontsize="small")
    if title:
        picture.suptitle(title)
    picture.savefig(path, dpi=110)


def _along_the_spectrum(delta: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the rms of δ in each part of the spectrum, NaN where a short δ has no value."""
    parts = np.array_split(delta.astype(np.float64), _BINS)
    return np.array([np.sqrt(np.mean(np.square(part))) if len(part) else np.nan for part in parts])


def delta_sizes(deltas: Deltas) -> tuple[list[int], list[str], NDArray[np.float64]]:
    """Return the layers, the kinds of modules, and the rms of δ `[layers, kinds]` (NaN for missing modules)."""
    places = {name: _place(name) for name in deltas}
    layers = sorted({layer for layer, _ in places.values()})
    kinds = list(dict.fromkeys(kind for _, kind in places.values()))
    sizes = np.full((len(layers), len(kinds)), np.nan)
    for name, (layer, kind) in places.items():
        sizes[layers.index(layer), kinds.index(kind)] = np.sqrt(np.mean(np.square(deltas[name])))
    return layers, kinds, sizes


def _place(name: str) -> tuple[int, str]:
    """Split a module name into layer and kind: `model.layers.3.mlp.up_proj` → 3, `mlp.up_proj`."""
    found = re.search(r"\.(\d+)\.", f".{name}.")
    return (int(found[1]), f".{name}."[found.end() :].strip(".")) if found else (0, name)


def plot_curves(
    history: Sequence[Mapping[str, float]],
    path: str | Path,
    *,
    title: str = "",
    accuracy_before: float | None = None,
) -> None:
    """
    Draw the mean reward and the greedy accuracy per step, beside the KL divergence, or the loss if there is no reward.

    Args:
        history: A trainer's `state.log_history`.
        path: The image file to write.
        title (`str`): Title of the figure.
        accuracy_before (`float`, *optional*): The accuracy before the training, as a line to compare with.

    Raises:
        ImportError: matplotlib is not installed.
    """
    reward, accuracy = _series(history, "reward"), _series(history, "eval_accuracy")
    held_out = _series(history, "eval_loss")
    other, name, colour = _series(history, "kl"), "KL to the base model, per token", "tab:red"
    if not reward:  # the loss of reinforcement learning says nothing
        other, name, colour = _series(history, "loss"), "loss", "tab:purple"
    picture = figure(9 if other else 5.5, 3.4)
    axes = picture.subplots(1, 2 if other else 1, squeeze=False)[0]
    if reward:
        axes[0].plot(*zip(*reward, strict=True), label="reward in training")
    if accuracy:
        axes[0].plot(*zip(*accuracy, strict=True), "o-", c="tab:green", label="accuracy on validation")
    if accuracy_before is not None:
        label = f"accuracy before, on test: {accuracy_before:.2f}"
        axes[0].axhline(accuracy_before, ls="--", c="dimgray", label=label)
    values = [value for _, value in (*reward, *accuracy)]
    if values and min(values) >= 0 and max(values) <= 1:
        axes[0].set_ylim(-0.02, 1.02)
    axes[0].set(ylabel=" and ".join(["reward"] * bool(reward) + ["accuracy"] * bool(accuracy)) or None, title=title)
    if axes[0].get_legend_handles_labels()[1]:
        axes[0].legend(fontsize="small")
    if other:
        axes[1].plot(*zip(*other, strict=True), c=colour, label="training")
        axes[1].set(ylabel=name)
        if held_out and not reward:
            axes[1].plot(*zip(*held_out, strict=True), "o", c=colour, label="validation")
            axes[1].legend(fontsize="small")
        axes[1].set_ylim(bottom=min(0, *(value for _, value in other)))
    for each in axes:
        each.set(xlabel="step")
        each.xaxis.get_major_locator().set_params(integer=True)
    picture.savefig(path, dpi=110)


def _series(history: Sequence[Mapping[str, float]], key: str) -> list[tuple[float, float]]:
    return [(entry.get("step", i), entry[key]) for i, entry in enumerate(history) if key in entry]
