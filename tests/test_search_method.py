"""Which way of searching `AdaptiveMixture.search` takes: what `method="auto"` decides, and what it falls back to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from test_adaptation import EXAMPLES, Distance, base_model, count_letters, save_expert
from test_adaptation import experts as experts
from test_adaptation import mixture as mixture
from test_adaptation import tokenizer as tokenizer

from peft_svf import (
    AdaptiveMixture,
    GradientDescent,
    LogLikelihoodObjective,
    RewardObjective,
    SearchConfig,
    SVFConfig,
    WeightedObjective,
)
from peft_svf.search.method import Method, choose_method

ROWS = [*EXAMPLES, {"prompt": "dogs", "completion": "bark"}]
QUICK: dict[str, Any] = {"max_new_tokens": 3, "in_context": False, "validation": None, "num_generations": 2}


def reward(tokenizer: Any) -> RewardObjective:
    return RewardObjective(ROWS, count_letters, tokenizer, generation_kwargs={"max_new_tokens": 3})


def likelihood(tokenizer: Any) -> LogLikelihoodObjective:
    return LogLikelihoodObjective(ROWS, tokenizer)


def both(tokenizer: Any) -> WeightedObjective:
    return WeightedObjective([reward(tokenizer), likelihood(tokenizer)], [1.0, 0.01])


def custom(tokenizer: Any) -> Distance:
    return Distance({"all": 1.0}, 6)


class Own(LogLikelihoodObjective):
    """Its score is no longer the one that has the gradient."""

    def score(self, model: Any, indices: Sequence[int]) -> list[float]:  # type: ignore[override]
        return [0.0] * len(indices)


def chosen(objective: Any, model: Any, **settings: Any) -> Method:
    return choose_method(SearchConfig(**settings), objective, len(objective.examples), model)


@pytest.mark.parametrize(
    ("make", "settings", "expected", "reason"),
    [
        (reward, {}, ("gradient", "layer", True), "6 examples, and a backward pass is possible"),
        (reward, {"granularity": "expert"}, ("gradient", "expert", True), "6 examples"),
        (reward, {"expected_reward": False}, ("cem", "expert", False), "`expected_reward` is off"),
        (reward, {"method": "gradient"}, ("gradient", "layer", True), "as asked"),
        (reward, {"method": "cem"}, ("cem", "expert", False), "as asked"),
        (reward, {"method": "cma-es", "expected_reward": True}, ("cma-es", "expert", True), "as asked"),
        (likelihood, {}, ("gradient", "expert", False), "6 examples, and a backward pass is possible"),
        (likelihood, {"granularity": "module"}, ("gradient", "module", False), "6 examples"),
        (both, {}, ("cem", "expert", False), "the objective 'reward + 0.01 log-likelihood' has no gradient"),
        (custom, {}, ("cem", "expert", False), "the objective 'distance' has no gradient"),
        (lambda tokenizer: Own(ROWS, tokenizer), {}, ("cem", "expert", False), "has no gradient"),
    ],
)
def test_what_suits_a_task(
    make: Callable[[Any], Any],
    settings: dict[str, Any],
    expected: tuple[str, str, bool],
    reason: str,
    mixture: AdaptiveMixture,
    tokenizer: Any,
) -> None:
    method = chosen(make(tokenizer), mixture.model, **settings)
    assert (method.name, method.granularity, method.expected_reward) == expected
    assert reason in str(method)


def quantized(model: Any) -> None:
    model.get_base_model().hf_quantizer = SimpleNamespace(is_trainable=False)


def offloaded(model: Any) -> None:
    model.get_base_model().lm_head.weight = torch.nn.Parameter(torch.empty(47, 32, device="meta"))


def of_inference(model: Any) -> None:
    with torch.inference_mode():
        weight = torch.nn.Parameter(torch.zeros(47, 32), requires_grad=False)
    model.get_base_model().lm_head.weight = weight


def zero_3(model: Any) -> None:
    model.get_base_model().lm_head.weight.ds_id = 0


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (quantized, "the quantized weights pass no gradient"),
        (offloaded, "some weights are offloaded or were made in inference mode"),
        (of_inference, "some weights are offloaded or were made in inference mode"),
        (zero_3, "the model is sharded"),
    ],
)
@pytest.mark.parametrize("make", [reward, likelihood])
def test_without_a_backward_pass_there_is_no_gradient(
    make: Callable[[Any], Any], change: Callable[[Any], None], reason: str, mixture: AdaptiveMixture, tokenizer: Any
) -> None:
    change(mixture.model)
    method = chosen(make(tokenizer), mixture.model)
    assert (method.name, method.granularity, method.expected_reward, method.reason) == ("cem", "expert", False, reason)
    if make is reward:
        asked = chosen(make(tokenizer), mixture.model, expected_reward=True)
        assert (asked.name, asked.expected_reward, asked.reason) == ("cem", True, reason)
    assert chosen(make(tokenizer), mixture.model, method="gradient").name == "gradient"  # who asks for it gets it


def test_quantized_weights_that_pass_a_gradient(mixture: AdaptiveMixture, tokenizer: Any) -> None:
    mixture.model.get_base_model().hf_quantizer = SimpleNamespace(is_trainable=True)
    assert chosen(reward(tokenizer), mixture.model).name == "gradient"


def test_a_search_by_the_likelihood_is_one_by_its_gradient(mixture: AdaptiveMixture) -> None:
    result = mixture.search(EXAMPLES, num_generations=3)
    assert (result.method, result.groups, result.expected) == ("gradient", ["all"], {})
    assert (result.settings["population_size"], len(result.history)) == (1, 3)
    assert f"Method: {result.reason}." in str(result)
    assert mixture.search(EXAMPLES, num_generations=3, method="gradient").history == result.history


def test_a_sharded_model_is_searched_without_a_gradient(
    mixture: AdaptiveMixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_gradient(*args: Any) -> Any:
        raise AssertionError("a gradient was computed")

    monkeypatch.setattr("peft_svf.search.method.is_sharded", lambda model: True)
    monkeypatch.setattr("peft_svf.Evaluator.value_and_gradient", no_gradient)
    for settings, objective in (({}, "objective"), ({"expected_reward": True}, "expected reward")):
        result = mixture.search(ROWS, count_letters, **QUICK, **settings)
        assert result.method == "cem"
        assert f"cross-entropy method on the {objective}, one weight per expert: the model is sharded" in str(result)


# ------------------------------------------------------------------------------------------ fallback


def nothing(completions: list[str], **kwargs: Any) -> list[float]:
    return [0.0] * len(completions)


def equal(completions: list[str], **kwargs: Any) -> list[float]:
    return [1.0] * len(completions)


LACKS: dict[str, tuple[Any, dict[str, Any]]] = {
    "no answer got a reward above the lowest one": (nothing, {}),
    "all answers to an example got the same reward": (equal, {}),
    # at a high temperature all tokens are equally likely, and no answer of 16 tokens has a probability
    "the rewarded answers have next to no probability": (
        count_letters,
        {"max_new_tokens": 16, "temperature": 50.0},
    ),
}


@pytest.mark.parametrize("lack", LACKS)
def test_auto_falls_back_to_the_cross_entropy_method(
    lack: str, mixture: AdaptiveMixture, recwarn: pytest.WarningsRecorder
) -> None:
    function, settings = LACKS[lack]
    options = {**QUICK, "racing": False, "population_size": 4, "num_generations": 1, **settings}
    result = mixture.search(ROWS, function, **options)
    assert (result.method, result.groups, result.expected, result.objective) == ("cem", ["all"], {}, "reward")
    assert result.reason.endswith(lack)
    assert [result.settings[name] for name in ("method", "granularity", "expected_reward")] == ["cem", "expert", False]
    assert not [warning for warning in recwarn if "expected reward" in str(warning.message)]
    # 5 baselines answer 1 + 4 times and are looked at once, and are not scored again beside 4 candidates and their mean
    assert result.usage.evaluations == len(ROWS) * (5 * (1 + 4) + 5 + 4 + 1)
    plain = mixture.search(ROWS, function, **{**options, "method": "cem"})
    assert (plain.scores, plain.alpha) == (result.scores, result.alpha)


@pytest.mark.parametrize("lack", LACKS)
@pytest.mark.parametrize(
    "settings",
    [
        {"method": "gradient"},
        {"method": "cem", "expected_reward": True, "population_size": 4},
        {"expected_reward": True},
    ],
)
def test_a_search_of_the_expected_reward_that_was_asked_for_only_warns(
    settings: dict[str, Any], lack: str, mixture: AdaptiveMixture
) -> None:
    function, more = LACKS[lack]
    with pytest.warns(UserWarning, match=f"The expected reward cannot guide the search: {lack}. Use another reward"):
        result = mixture.search(ROWS, function, **{**QUICK, **settings, **more})
    assert result.method == settings.get("method", "gradient")
    assert result.settings["expected_reward"]
    assert result.expected


def test_a_fallback_keeps_the_granularity_that_was_asked_for(mixture: AdaptiveMixture) -> None:
    result = mixture.search(ROWS, nothing, **QUICK, granularity="module", population_size=4)
    assert (result.method, len(result.groups)) == ("cem", 14)


# ------------------------------------------------------------------------------------------ expected reward


@pytest.mark.parametrize("method", ["cem", "cma-es", "gradient", "custom"])
def test_the_expected_reward_finds_a_planted_mixture_without_decoding(
    method: str, tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rewarded answers are those of a mixture, so it gets all rewards, and no baseline does."""
    rows = [{"prompt": f"{a} + {b} = "} for a in range(4) for b in range(6)]
    config = SVFConfig(target_modules="all-linear")
    names = {name: save_expert(tmp_path / name, config, seed=seed) for name, seed in (("one", 10), ("two", 11))}
    mixture = AdaptiveMixture.from_pretrained(base_model(), names, tokenizer=tokenizer)
    planted = {"one": 0.9, "two": 0.5}
    objective = RewardObjective(rows, nothing, tokenizer, generation_kwargs={"max_new_tokens": 2})
    mixture.set_weights(planted)
    answers = dict(zip([row["prompt"] for row in rows], objective.answers(mixture.model, range(24)), strict=True))

    def as_planted(prompts: list[str], completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        return [float(ids == answers[prompt]) for prompt, ids in zip(prompts, completion_ids, strict=True)]

    calls = 0
    generate = type(mixture.model).generate

    def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(type(mixture.model), "generate", counting)
    how: dict[str, Any] = {"method": method, "expected_reward": True}
    if method == "custom":
        how = {"optimizer": GradientDescent(np.full(2, 0.5))}
    result = mixture.search(
        rows,
        as_planted,
        **how,
        granularity="expert",
        num_generations=12,
        **({} if method == "custom" else {"population_size": 16}),
        batch_size=1000,
        max_new_tokens=2,
        validation=None,
        in_context=False,
    )
    assert calls == 1 + 4 + 1  # the baselines' answers, decoded and sampled, and those of the result
    assert result.improved
    assert mixture.weights == pytest.approx(planted, abs=0.15)
    assert result.difference[1] > 0.1
    assert result.expected["searched"] > max(result.expected[name] for name in result.expected if name != "searched")
    assert result.method == ("GradientDescent" if method == "custom" else method)
