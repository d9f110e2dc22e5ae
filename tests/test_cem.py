"""The cross-entropy method as an optimizer, apart from any model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_svf import CrossEntropyMethod

Function = Callable[[np.ndarray], float]


def generation(optimizer: CrossEntropyMethod, function: Function) -> list[tuple[np.ndarray, float]]:
    """Ask for a generation, tell it, and return it."""
    candidates = [optimizer.ask() for _ in range(optimizer.population_size)]
    solutions = [(x, float(function(x))) for x in candidates]
    optimizer.tell(solutions)
    return solutions


def sphere(x: np.ndarray) -> float:
    return float(np.square(x - 0.3).sum())


@pytest.mark.parametrize("dim", [1, 3, 8])
@pytest.mark.parametrize("seed", range(3))
def test_minimizes_a_quadratic(dim: int, seed: int) -> None:
    target, scale = np.linspace(-1, 2, dim), np.linspace(1, 5, dim)
    optimizer = CrossEntropyMethod(np.zeros(dim), 1.0, population_size=80, smoothing=0.5, seed=seed)
    for _ in range(60):
        generation(optimizer, lambda x: float((scale * np.square(x - target)).sum()))
    assert np.abs(optimizer.mean - target).max() < 1e-3
    assert np.abs(optimizer.incumbent - target).max() < 1e-3


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    box=st.lists(st.tuples(st.floats(-5, 5), st.floats(0.01, 5)), min_size=1, max_size=4),
    mean=st.floats(-10, 10),
    std=st.floats(0.01, 100),
    seed=st.integers(0, 1000),
)
def test_candidates_respect_the_bounds(box: list[tuple[float, float]], mean: float, std: float, seed: int) -> None:
    bounds = np.array([(low, low + width) for low, width in box])
    optimizer = CrossEntropyMethod(np.full(len(box), mean), std, bounds=bounds, population_size=4, seed=seed)
    for _ in range(3):
        for x, _ in generation(optimizer, lambda x: float(x.sum())):
            assert x.shape == (len(box),)
            assert (x >= bounds[:, 0]).all()
            assert (x <= bounds[:, 1]).all()


def test_an_optimum_on_a_bound_is_found() -> None:
    optimizer = CrossEntropyMethod(np.full(2, 0.5), 0.5, bounds=np.array([[0.0, 1.0]] * 2), population_size=20, seed=0)
    for _ in range(20):
        generation(optimizer, lambda x: x[0] - x[1])
    assert optimizer.mean == pytest.approx([0, 1], abs=0.02)


@pytest.mark.parametrize("smoothing", [0.0, 0.25])
def test_refit_is_the_mean_and_unbiased_std_of_the_elites(smoothing: float) -> None:
    """Population 10, ratio 0.35: three elites, which are here (1, 0), (2, 0), (6, 3) by value."""
    optimizer = CrossEntropyMethod(
        np.array([4.0, 8.0]), np.array([2.0, 1.0]), population_size=10, elite_ratio=0.35, smoothing=smoothing
    )
    elites = [(np.array([6.0, 3.0]), -1.0), (np.array([1.0, 0.0]), -3.0), (np.array([2.0, 0.0]), -2.0)]
    optimizer.tell([(np.array([100.0, 100.0]), float(i)) for i in range(7)] + elites)
    # means (3, 1); squared deviations 4+1+9 and 1+1+4, over 3 - 1
    mean, std = np.array([3.0, 1.0]), np.sqrt([7.0, 3.0])
    assert optimizer.mean == pytest.approx((1 - smoothing) * mean + smoothing * np.array([4.0, 8.0]))
    assert optimizer.std == pytest.approx((1 - smoothing) * std + smoothing * np.array([2.0, 1.0]))
    assert optimizer.incumbent.tolist() == [1.0, 0.0]
    assert optimizer.incumbent_value == -3.0
    assert optimizer.generation == 1


@pytest.mark.parametrize(
    ("population_size", "elite_ratio", "elites"), [(32, 0.2, 6), (10, 0.01, 2), (10, 1.0, 10), (2, 0.5, 2)]
)
def test_number_of_elites(population_size: int, elite_ratio: float, elites: int) -> None:
    optimizer = CrossEntropyMethod(np.zeros(1), 1.0, population_size=population_size, elite_ratio=elite_ratio)
    optimizer.tell([(np.array([float(i)]), float(i)) for i in range(population_size)])
    assert optimizer.mean == pytest.approx([(elites - 1) / 2])


def test_the_std_has_a_floor_and_the_search_stops_without_one() -> None:
    same = [(np.array([1.0, 2.0]), 0.0)] * 4
    floored = CrossEntropyMethod(np.zeros(2), 1.0, population_size=4, min_std=0.05)
    collapsed = CrossEntropyMethod(np.zeros(2), 1.0, population_size=4)
    for optimizer in (floored, collapsed):
        assert not optimizer.should_stop()
        optimizer.tell(same)
    assert floored.std.tolist() == [0.05, 0.05]
    assert not floored.should_stop()
    assert collapsed.std.tolist() == [0.0, 0.0]
    assert collapsed.should_stop()


def test_one_live_dimension_keeps_the_search_going() -> None:
    optimizer = CrossEntropyMethod(np.zeros(2), 1.0, population_size=2)
    optimizer.tell([(np.array([1.0, 2.0]), 0.0), (np.array([1.0, 3.0]), 0.0)])
    assert not optimizer.should_stop()


def test_the_incumbent_is_asked_first_and_evaluated_again() -> None:
    """A candidate whose first score was luck is the incumbent for one generation."""
    optimizer = CrossEntropyMethod(np.zeros(2), 1.0, population_size=6, seed=3)
    first = [optimizer.ask() for _ in range(6)]
    optimizer.tell([(x, -100.0 if i == 4 else 1.0) for i, x in enumerate(first)])
    assert optimizer.incumbent.tolist() == first[4].tolist()

    second = [optimizer.ask() for _ in range(6)]
    assert second[0].tolist() == first[4].tolist()
    assert len({tuple(x) for x in second}) == 6, "only once in a generation"
    second[0][:] = np.nan  # the caller's copy
    assert optimizer.incumbent.tolist() == first[4].tolist()
    optimizer.tell([(x, 5.0 - i) for i, x in enumerate([first[4], *second[1:]])])
    assert optimizer.incumbent.tolist() == second[5].tolist()
    assert optimizer.incumbent_value == 0.0


def test_the_seed_decides_everything() -> None:
    def run(seed: int) -> list[list[float]]:
        optimizer = CrossEntropyMethod(np.zeros(3), 1.0, bounds=np.array([[-1.0, 1.0]] * 3), seed=seed)
        return [x.tolist() for _ in range(3) for x, _ in generation(optimizer, sphere)]

    assert run(5) == run(5)
    assert run(5) != run(6)


def test_arguments_are_not_shared_with_the_caller() -> None:
    mean, std, bounds = np.zeros(2), np.ones(2), np.array([[-1.0, 1.0]] * 2)
    generation(CrossEntropyMethod(mean, std, bounds=bounds, population_size=4, seed=0), sphere)
    assert (mean.tolist(), std.tolist(), bounds.tolist()) == ([0, 0], [1, 1], [[-1, 1], [-1, 1]])


nan, inf = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("mean", []),
        ("mean", 1.0),
        ("mean", [[0.0, 1.0]]),
        ("mean", [0.0, nan]),
        ("mean", [0.0, inf]),
        ("std", 0.0),
        ("std", -1.0),
        ("std", nan),
        ("std", inf),
        ("std", [1.0, 0.0]),
        ("std", [1.0, 1.0, 1.0]),
        ("bound", [[0.0, 1.0]]),
        ("bound", [0.0, 1.0]),
        ("bound", [[0.0, 1.0], [1.0, 1.0]]),
        ("bound", [[0.0, 1.0], [2.0, 1.0]]),
        ("bound", [[0.0, 1.0], [0.0, nan]]),
        ("population_size", 1),
        ("population_size", 0),
        ("population_size", 2.5),
        ("elite_ratio", 0.0),
        ("elite_ratio", 1.1),
        ("elite_ratio", nan),
        ("smoothing", -0.1),
        ("smoothing", 1.0),
        ("smoothing", nan),
        ("min_std", -0.1),
        ("min_std", nan),
        ("min_std", inf),
    ],
)
def test_bad_arguments_are_named(argument: str, value: Any) -> None:
    arguments = {"mean": [0.0, 0.5], "std": 1.0, "bounds" if argument == "bound" else argument: value}
    with pytest.raises(ValueError, match=argument):
        CrossEntropyMethod(**arguments)


@pytest.mark.parametrize("count", [0, 3, 5])
def test_tell_wants_a_whole_generation(count: int) -> None:
    optimizer = CrossEntropyMethod(np.zeros(2), 1.0, population_size=4)
    with pytest.raises(ValueError, match=f"Expected 4 solutions, got {count}"):
        optimizer.tell([(np.zeros(2), 0.0)] * count)


def test_tell_refuses_nan_and_is_as_before() -> None:
    optimizer, other = (CrossEntropyMethod(np.zeros(2), 1.0, population_size=4, seed=0) for _ in range(2))
    with pytest.raises(ValueError, match="Candidate 2 has the value NaN"):
        optimizer.tell([(np.zeros(2), value) for value in (0.0, 1.0, nan, nan)])
    assert (optimizer.mean.tolist(), optimizer.std.tolist(), optimizer.generation) == ([0, 0], [1, 1], 0)
    for _ in range(2):
        found, expected = generation(optimizer, sphere), generation(other, sphere)
        assert [x.tolist() for x, _ in found] == [x.tolist() for x, _ in expected]


def test_infinite_values_lose() -> None:
    """What a candidate that must not be chosen is told with."""
    optimizer = CrossEntropyMethod(np.zeros(1), 1.0, population_size=4)
    optimizer.tell([(np.array([x]), value) for x, value in ((9.0, inf), (1.0, 0.0), (9.0, inf), (2.0, -1.0))])
    assert optimizer.mean == pytest.approx([1.5])
    assert optimizer.incumbent.tolist() == [2.0]


def test_few_of_many_variables_lie_on_a_bound() -> None:
    box = np.array([[0.0, 1.0]] * 200)
    optimizer = CrossEntropyMethod(np.full(200, 0.2), 0.5, bounds=box, population_size=4, seed=0)
    drawn = np.array([optimizer.ask() for _ in range(4)])
    assert ((drawn > 0) & (drawn < 1)).all()
