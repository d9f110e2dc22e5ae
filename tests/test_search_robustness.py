"""`AdaptiveMixture.search` in the hands of users: odd settings, interruptions, what was deleted or changed."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_adaptation import EXAMPLES, base_model, count_letters
from test_adaptation import experts as experts
from test_adaptation import mixture as mixture
from test_adaptation import tokenizer as tokenizer
from transformers import GenerationConfig

from peft_svf import AdaptiveMixture, SVFLayer

ROWS = EXAMPLES[:4]

QUICK: dict[str, Any] = {"method": "cem", "num_generations": 2, "population_size": 3}
SHORT: dict[str, Any] = {**QUICK, "max_new_tokens": 3}


def deltas(mixture: AdaptiveMixture) -> list[torch.Tensor]:
    layers = (module for module in mixture.model.modules() if isinstance(module, SVFLayer))
    return [layer.svf_delta["mixture"]().detach().clone() for layer in layers if "mixture" in layer.svf_delta]


def test_a_deleted_expert_is_missed_and_nothing_changes(mixture: AdaptiveMixture) -> None:
    mixture.set_weights([0.5] * len(mixture.experts))
    before, gone = deltas(mixture), mixture.experts[0]
    mixture.model.delete_adapter(gone)
    for attempt in (
        lambda: mixture.search(EXAMPLES, **QUICK),
        lambda: mixture.set_weights([1.0] * len(mixture.experts)),
        lambda: mixture.apply("mine"),
    ):
        with pytest.raises(ValueError, match=f"'{gone}' was deleted from the model"):
            attempt()
    assert all(torch.equal(a, b) for a, b in zip(before, deltas(mixture), strict=True))


def test_disabled_adapters_are_not_searched(mixture: AdaptiveMixture) -> None:
    mixture.set_weights([0.2, 0.5, 0.9])
    with mixture.model.disable_adapter(), pytest.raises(ValueError, match="adapters are disabled"):
        mixture.search(EXAMPLES, **QUICK)
    assert list(mixture.weights.values()) == pytest.approx([0.2, 0.5, 0.9])


def test_a_refused_search_leaves_the_mode_of_the_model(mixture: AdaptiveMixture) -> None:
    def failing(**kwargs: Any) -> list[float]:
        raise RuntimeError("no reward today")

    mixture.model.train()
    with pytest.raises(RuntimeError, match="no reward today"):
        mixture.search(EXAMPLES, failing, **SHORT)
    assert mixture.model.training


def test_another_reward_of_the_same_name_does_not_take_the_scores(mixture: AdaptiveMixture, tmp_path: Path) -> None:
    path, options = tmp_path / "search.json", {"in_context": False, **SHORT}
    mixture.search(EXAMPLES, lambda completions, **k: [float(len(c)) for c in completions], checkpoint=path, **options)
    with pytest.raises(ValueError, match="another search: objective"):
        mixture.search(
            EXAMPLES,
            lambda completions, **k: [-float(len(c)) for c in completions],
            checkpoint=path,
            resume=True,
            **options,
        )


def test_another_chat_template_or_base_does_not_take_the_scores(
    mixture: AdaptiveMixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "search.json"
    mixture.search(EXAMPLES, checkpoint=path, **QUICK)
    monkeypatch.setattr(mixture.tokenizer, "chat_template", "{{ messages }}")
    with pytest.raises(ValueError, match="another search: objective"):
        mixture.search(EXAMPLES, checkpoint=path, resume=True, **QUICK)
    monkeypatch.undo()
    layer = next(module for module in mixture.model.modules() if isinstance(module, SVFLayer))
    with torch.no_grad():
        layer.get_base_layer().weight.mul_(1.5)
    with pytest.raises(ValueError, match="another search: values of the base model"):
        mixture.search(EXAMPLES, checkpoint=path, resume=True, **QUICK)


def test_copies_of_a_question_are_no_more_evidence(mixture: AdaptiveMixture) -> None:
    rows = [
        {"prompt": prompt, "completion": answer} for prompt, answer in (("1+1=", "2"), ("ab", "ba"), ("what", "cat"))
    ]
    result = mixture.search(rows * 8, validation=3, method="cem", num_generations=4, population_size=16)
    assert result.num_evaluated == 3
    assert not result.certain


@pytest.mark.parametrize("validation", [None, 2, 0.4])
def test_ctrl_c_while_prompting_is_scored_keeps_what_is_known(
    validation: Any, mixture: AdaptiveMixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("peft_svf.search.validated.in_context_scores", interrupted)
    result = mixture.search(EXAMPLES, validation=validation, **QUICK)
    assert result.stopped == "interrupted"
    assert set(mixture.experts) < set(result.scores)
    assert result.history == []


def test_ctrl_c_during_cross_validation_keeps_the_search(mixture: AdaptiveMixture) -> None:
    calls = 0

    def interrupted_at(call: int | None) -> Any:
        def reward(completions: list[str], **kwargs: Any) -> list[float]:
            nonlocal calls
            calls += 1
            if calls == call:
                raise KeyboardInterrupt
            return count_letters(completions, **kwargs)

        return reward

    options: dict[str, Any] = {
        "validation": 2,
        "method": "cem",
        "max_new_tokens": 3,
        "generation_kwargs": {"do_sample": True},
        "in_context": False,
        "num_generations": 1,
        "population_size": 3,
    }
    mixture.search(EXAMPLES, interrupted_at(None), **options)
    whole, first = calls, 5  # before, the baselines are scored; without them there is nothing to keep
    assert whole > 2 * first
    for call in range(first, whole + 1):
        calls = 0
        result = mixture.search(EXAMPLES, interrupted_at(call), **options)
        assert result.stopped == "interrupted"


def test_settings_of_numpy_are_settings(mixture: AdaptiveMixture, tmp_path: Path) -> None:
    result = mixture.search(
        EXAMPLES,
        count_letters,
        reward_weights=torch.tensor([1.0]),
        method="cem",
        max_new_tokens=np.int64(3),
        generation_kwargs={"generation_config": GenerationConfig(repetition_penalty=1.5)},
        optimizer_kwargs={"std": np.float32(0.25), "mean": np.full(3, 0.4)},
        num_generations=np.int64(2),
        population_size=np.int64(3),
        validation=np.int64(2),
        bounds=np.array([0, 1], dtype=np.float32),
        temperature=np.float32(0.5),
        max_seconds=np.float64(10_000),
        seed=np.int64(1),
        checkpoint=tmp_path / "search.json",
    )
    settings = json.loads(json.dumps(result.to_dict(), allow_nan=False))["settings"]
    assert (settings["validation"], settings["bounds"], settings["max_seconds"]) == (2, [0, 1], 10_000)
    assert settings["generation_kwargs"]["max_new_tokens"] == 3
    mixture.save_pretrained(tmp_path / "mine")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "cemm"}, "`method` must be one of 'auto', 'gradient', 'cem', 'cma-es', got 'cemm'"),
        ({"population_size": 1}, "`population_size` must be .*at least 2"),
        ({"max_seconds": float("nan")}, "`max_seconds` must be a number of at least 0, got nan"),
        ({"max_seconds": "10"}, "`max_seconds` must be a number of at least 0, got '10'"),
        ({"bounds": (0, 1, 2)}, "`bounds` must be a smallest and a largest weight, with 0 between them, got"),
        ({"bounds": "01x"}, "`bounds` must be a smallest and a largest weight, got '01x'"),
        ({"num_generations": 2.5}, "`num_generations` must be an integer"),
        ({"temperature": 0}, "`temperature` must be above 0"),
        ({"generation_kwargs": 3}, "`generation_kwargs` must be a dict, got 3"),
        ({"method": "cem", "optimizer_kwargs": {"elite_ratio": 2.0}}, "`elite_ratio` must be in"),
        ({"optimizer_kwargs": {"std": 0.1}}, "`optimizer_kwargs` belong to one method"),
        ({"method": "gradient", "expected_reward": False}, "gradient of a reward needs `expected_reward`"),
    ],
)
def test_mistakes_are_told_before_anything_is_generated(
    options: dict[str, Any], message: str, mixture: AdaptiveMixture
) -> None:
    def never(**kwargs: Any) -> list[float]:
        raise AssertionError("too late")

    with pytest.raises(ValueError, match=message):
        mixture.search(EXAMPLES, never, max_new_tokens=3, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"populationsize": 8}, "no setting `populationsize`. Did you mean `population_size`"),
        ({"zzz": 8}, "no setting `zzz`. It has method, granularity"),
        ({"method": "cem", "optimizer_kwargs": {"learning_rate": 0.1}}, "do not fit the method 'cem': .*learning_rate"),
        ({"method": "gradient", "optimizer_kwargs": {"std": 0.1}}, "do not fit the method 'gradient': .*std"),
    ],
)
def test_unknown_settings_are_told_before_anything_is_generated(
    options: dict[str, Any], message: str, mixture: AdaptiveMixture
) -> None:
    def never(**kwargs: Any) -> list[float]:
        raise AssertionError("too late")

    with pytest.raises(TypeError, match=message):
        mixture.search(EXAMPLES, never, **options)


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content | {"scores": [{}]},
        lambda content: content | {"scores": None},
        lambda content: content | {"identity": []},
        lambda content: content | {"seconds": "a"},
        lambda content: content | {"scores": [{**content["scores"][0], "candidate": [0.0]}]},
        lambda content: content | {"scores": [{**content["scores"][0], "scores": [float("nan")]}]},
    ],
)
def test_a_damaged_checkpoint_is_none(change: Any, mixture: AdaptiveMixture, tmp_path: Path) -> None:
    path = tmp_path / "search.json"
    mixture.search(EXAMPLES, checkpoint=path, **QUICK)
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(ValueError, match="is no checkpoint of a search"):
        mixture.search(EXAMPLES, checkpoint=path, resume=True, **QUICK)


def test_a_folder_is_no_checkpoint(mixture: AdaptiveMixture, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a folder"):
        mixture.search(EXAMPLES, checkpoint=tmp_path, resume=True, **QUICK)


def test_the_searched_mixture_is_within_the_bounds(mixture: AdaptiveMixture) -> None:
    for method in ("cem", "gradient", "cma-es"):
        result = mixture.search(
            EXAMPLES, bounds=(0, 0.3), validation=None, **QUICK | {"method": method, "population_size": 4}
        )
        assert max(result.searched_weights.values()) <= 0.3
        assert max(max(entry["incumbent"]) for entry in result.history) <= 0.3


def test_a_plot_is_a_figure(mixture: AdaptiveMixture, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    figure = mixture.search(EXAMPLES, **QUICK).plot()
    assert len(figure.axes) >= 3


def test_the_source_of_an_expert_is_not_overwritten(experts: Any, tokenizer: Any, tmp_path: Path) -> None:
    mixture = AdaptiveMixture.from_pretrained(base_model(), experts, tokenizer=tokenizer)
    name, folder = next(iter(experts.items()))
    before = (Path(folder) / "adapter_model.safetensors").read_bytes()
    with pytest.raises(ValueError, match=f"is the folder of expert '{name}'"):
        mixture.save_pretrained(folder)
    assert (Path(folder) / "adapter_model.safetensors").read_bytes() == before


def test_names_are_checked(mixture: AdaptiveMixture) -> None:
    with pytest.raises(ValueError, match="is given twice"):
        AdaptiveMixture(mixture.model, [mixture.experts[0]] * 2, adapter_name="another")
    nothing: Any = None
    with pytest.raises(ValueError, match="cannot be called None"):
        mixture.apply(nothing)


class Bonus:
    """A reward that is an object, with a parameter and a counter."""

    def __init__(self, bonus: float) -> None:
        self.bonus, self.calls = bonus, 0

    def __call__(self, completions: list[str], **columns: Any) -> list[float]:
        self.calls += 1
        return [len(text) + self.bonus for text in completions]


def with_closure(bonus: float) -> Any:
    calls = 0

    def reward(completions: list[str], **columns: Any) -> list[float]:
        nonlocal calls
        calls += 1
        return [len(text) + bonus for text in completions]

    return reward


def with_default(bonus: float) -> Any:
    def reward(completions: list[str], bonus: float = bonus, **columns: Any) -> list[float]:
        return [len(text) + bonus for text in completions]

    return reward


def with_partial(bonus: float) -> Any:
    def reward(bonus: float, completions: list[str], **columns: Any) -> list[float]:
        return [len(text) + bonus for text in completions]

    return functools.partial(reward, bonus)


@pytest.mark.parametrize("make", [Bonus, with_closure, with_default, with_partial])
def test_a_checkpoint_knows_what_a_reward_function_holds(make: Any, mixture: AdaptiveMixture, tmp_path: Path) -> None:
    options: dict[str, Any] = {"method": "cem", "num_generations": 1, "population_size": 2, "max_new_tokens": 2}
    options |= {"checkpoint": tmp_path / "search.json", "validation": None}
    first = mixture.search(ROWS, make(0.0), **options)
    with pytest.raises(ValueError, match="belongs to another search: objective"):
        mixture.search(ROWS, make(100.0), **options, resume=True)
    again = make(0.0)
    assert mixture.search(ROWS, again, **options, resume=True).scores == first.scores
    assert mixture.search(ROWS, again, **options, resume=True).scores == first.scores  # its counter is no difference


def test_an_equal_reward_on_the_examples_of_the_search_changes_nothing(mixture: AdaptiveMixture) -> None:
    """The expected reward was optimized on them, so it must not decide."""

    def first_letter(completions: list[str], **columns: Any) -> list[float]:
        return [float(text[:1] in "abcdefgh") / 10 for text in completions]

    result = mixture.search(ROWS, first_letter, max_new_tokens=2, validation=None, num_generations=3)
    if result.scores["searched"] <= max(score for name, score in result.scores.items() if name in mixture.experts):
        assert not result.improved
    else:
        assert result.difference[0] > 0


def test_weights_by_group_are_checked_before_any_is_put_in_place(mixture: AdaptiveMixture) -> None:
    before = mixture.weights
    with pytest.raises(ValueError, match=r"`group_of` has no group for \d+ modules, the first is"):
        mixture.set_weights(np.ones((3, 1)), {"model.layers.0.self_attn.q_proj": 0})
    assert mixture.weights == before


@pytest.mark.parametrize("name", ["base", "uniform", "searched", "in-context", "a.b", ""])
def test_a_mixture_has_no_reserved_name(name: str, experts: dict[str, str], tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="cannot be called"):
        AdaptiveMixture.from_pretrained(base_model(), experts, tokenizer=tokenizer, adapter_name=name)


def test_a_checkpoint_that_cannot_be_written_fails_before_the_work(mixture: AdaptiveMixture, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot be written"):
        mixture.search(ROWS, not_called, checkpoint=tmp_path / "file" / "search.json")


def not_called(**columns: Any) -> list[float]:
    raise AssertionError("the search began")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"racing": "no"}, "`racing` must be True or False"),
        ({"expected_reward": "no"}, "`expected_reward` must be True or False"),
        ({"reward_weights": 1.0}, "`reward_weights` must be a list of numbers"),
    ],
)
def test_settings_of_another_kind(settings: dict[str, Any], message: str, mixture: AdaptiveMixture) -> None:
    with pytest.raises(ValueError, match=message):
        mixture.search(ROWS, not_called, **settings)
    with pytest.raises(TypeError, match="must be a SearchConfig"):
        mixture.search(ROWS, not_called, settings)  # type: ignore[arg-type]
