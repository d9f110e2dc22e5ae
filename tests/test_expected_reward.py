"""The expected reward over collected answers: its value and gradient, and searches that optimize it."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_adaptation import EXAMPLES, base_model, count_letters
from test_adaptation import experts as experts
from test_adaptation import mixture as mixture
from test_adaptation import tokenizer as tokenizer
from transformers import GPTNeoConfig, GPTNeoForCausalLM

from peft_svf import (
    AdaptiveMixture,
    Evaluator,
    ExpectedRewardObjective,
    LogLikelihoodObjective,
    RewardObjective,
    WeightedObjective,
    WeightSpace,
    svf_layers,
)
from peft_svf.scoring.tokens import prompt_ids
from peft_svf.search.answers import Answers, collect_answers

ROWS = EXAMPLES[:4]
LED = [{**row, "prompt": "a system message " + row["prompt"]} for row in ROWS]  # with a common prefix
SHORT = {"max_new_tokens": 3}


def modules(mixture: AdaptiveMixture) -> list[str]:
    return [layer.module_name for layer in svf_layers(mixture.model, mixture.adapter_name)]


def put(mixture: AdaptiveMixture, space: WeightSpace, x: np.ndarray) -> None:
    """Put the mixture of a vector in place."""
    weights = space.weights(x)
    mixture.set_weights(weights if space.group_of is not None else weights[:, 0], space.group_of)


def probability(model: Any, prompt: list[int], answer: Sequence[int], temperature: float) -> float:
    """One by one, in fp64."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + list(answer)])).logits[0].double()
    logps = (logits / temperature).log_softmax(-1)
    return float(sum(logps[len(prompt) - 1 + i, token] for i, token in enumerate(answer)).exp())


Answered = list[list[tuple[list[int], float]]]


def some_answers(count: Sequence[int], seed: int = 0) -> Answered:
    """So many random answers to each example, of 1 to 5 tokens, none of which begins with another."""
    rng = np.random.default_rng(seed)
    return [
        [
            ([first, *rng.integers(4, 30, rng.integers(0, 5)).tolist()], float(rng.uniform(0.1, 2)))
            for first in rng.permutation(np.arange(4, 30))[:number].tolist()
        ]
        for number in count
    ]


def expected_of(
    rows: list[dict[str, Any]], answers: Answered, tokenizer: Any, **kwargs: Any
) -> ExpectedRewardObjective:
    rows = [{**row, "answers": its} for row, its in zip(rows, answers, strict=True)]
    return ExpectedRewardObjective(rows, tokenizer, **kwargs)


def by_hand(model: Any, objective: ExpectedRewardObjective) -> list[float]:
    return [
        sum(
            reward * probability(model, prompt_ids(row["prompt"], objective.tokenizer), ids, objective.temperature)
            for ids, reward in row["answers"]
        )
        for row in objective.examples
    ]


# ------------------------------------------------------------------------------------------------ mathematics


@pytest.mark.parametrize("rows", [ROWS, LED], ids=["nothing in common", "a common beginning"])
@pytest.mark.parametrize("batch_size", [1, 4, 64])
@pytest.mark.parametrize("granularity", ["expert", "layer"])
def test_the_value_is_the_sum_of_reward_times_probability(
    granularity: Any, batch_size: int, rows: list[dict[str, Any]], mixture: AdaptiveMixture, tokenizer: Any
) -> None:
    objective = expected_of(rows, some_answers([3, 0, 1, 5]), tokenizer)
    space = WeightSpace(mixture.experts, modules(mixture), granularity)
    evaluator = Evaluator(mixture.model, space, objective, batch_size=batch_size)
    x = np.random.default_rng(1).uniform(0.2, 0.8, space.dim)

    def reference(x: np.ndarray) -> float:
        put(mixture, space, x)
        return float(np.mean(by_hand(mixture.model, objective)))

    value, gradient = evaluator.value_and_gradient(x, range(4))
    assert value == pytest.approx(reference(x), rel=1e-5)
    rng = np.random.default_rng(2)
    for _ in range(3):
        along = rng.standard_normal(space.dim) / np.sqrt(space.dim)
        slopes = [(reference(x + h * along) - reference(x - h * along)) / (2 * h) for h in (0.01, 0.02)]
        slope = (4 * slopes[0] - slopes[1]) / 3  # without the error in h²
        assert gradient @ along == pytest.approx(slope, rel=1e-2, abs=1e-2 * np.abs(gradient).max())
    assert np.abs(gradient).max() > 1e-5


@pytest.mark.parametrize("rows", [ROWS, LED], ids=["nothing in common", "a common beginning"])
def test_candidates_share_batches(rows: list[dict[str, Any]], mixture: AdaptiveMixture, tokenizer: Any) -> None:
    """Each with as many rows as the example has answers."""
    objective = expected_of(rows, some_answers([3, 0, 1, 5]), tokenizer)
    space = WeightSpace(mixture.experts, modules(mixture))
    candidates = [*np.random.default_rng(3).uniform(0, 1, (3, space.dim)), np.zeros(space.dim)]
    found = Evaluator(mixture.model, space, objective, batch_size=7).scores(candidates, range(4))
    for x, scores in zip(candidates, found, strict=True):
        mixture.set_weights(x)
        assert scores == pytest.approx(by_hand(mixture.model, objective), rel=1e-4)
        assert scores == pytest.approx(objective(mixture.model), rel=1e-4)
    assert found[:, 1].tolist() == [0.0] * 4


@pytest.mark.parametrize("temperature", [0.3, 1.0])
def test_over_all_answers_it_is_the_expected_reward(
    temperature: float, mixture: AdaptiveMixture, tokenizer: Any
) -> None:
    """And a part of it over some, so that it never promises more than there is."""
    rng, size = np.random.default_rng(0), mixture.model.config.vocab_size
    rewards = rng.uniform(-1, 1, size)
    prompt = torch.tensor([prompt_ids(ROWS[0]["prompt"], tokenizer)])
    with torch.no_grad():
        logits = mixture.model(input_ids=prompt).logits[0, -1].double()
    truth = float(((logits / temperature).softmax(-1) * torch.tensor(rewards)).sum())
    found = []
    for known in (4, 12, size):
        best = np.argsort(rewards)[-known:].tolist()
        answers = [([token], float(rewards[token])) for token in {*best, int(rewards.argmin())}]
        objective = expected_of(ROWS[:1], [answers], tokenizer, max_answers=size, temperature=temperature)
        found += objective.score(mixture.model, [0])
    assert found[0] < found[1] < found[2]
    assert found[1] < truth
    assert found[2] == pytest.approx(truth, abs=1e-5)


def test_no_temperature(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="`temperature` must be positive, got 0"):
        expected_of(ROWS[:1], [[([4], 1.0)]], tokenizer, temperature=0)


def test_prompts_read_once_change_nothing_but_the_cost(mixture: AdaptiveMixture, tokenizer: Any) -> None:
    objective = expected_of(LED, some_answers([3, 2, 1, 5]), tokenizer)
    mixture.set_weights([0.3, 0.5, 0.7])
    with torch.no_grad():
        apart = objective.score(mixture.model, range(4))
        cost, objective.tokens = objective.tokens, 0
        together = objective.score(mixture.model, range(4), objective.read(mixture.model, range(4)))
    assert together == pytest.approx(apart, rel=1e-5)
    lengths = [len(prompt_ids(row["prompt"], tokenizer)) for row in LED]
    saved = sum((count - 1) * length for count, length in zip([3, 2, 1, 5], lengths, strict=True))
    assert cost - objective.tokens == saved + 4  # the last token of a prompt is counted with none


def test_a_model_that_tells_distances_by_places_reads_prompts_with_each_answer(tokenizer: Any) -> None:
    torch.manual_seed(0)
    layers: list[Any] = [[["global", "local"], 1]]
    sizes = {"vocab_size": 47, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "max_position_embeddings": 64}
    model = GPTNeoForCausalLM(GPTNeoConfig(attention_types=layers, window_size=4, **sizes)).eval()
    objective = expected_of(ROWS, some_answers([2, 1, 0, 3]), tokenizer)
    assert objective.read(model, range(4)) is None
    assert objective(model) == pytest.approx(by_hand(model, objective), rel=1e-4)


@pytest.mark.parametrize("length", [1, 2])
def test_short_and_equal_prompts(length: int, mixture: AdaptiveMixture, tokenizer: Any) -> None:
    objective = expected_of([{"prompt": "a" * length}, {"prompt": "b"}], some_answers([2, 2]), tokenizer)
    mixture.set_weights([0.3, 0.5, 0.7])
    with torch.no_grad():
        prompts = objective.read(mixture.model, range(2))
    found = objective.score(mixture.model, range(2), prompts)
    assert found == pytest.approx(by_hand(mixture.model, objective), rel=1e-4)


def test_a_model_that_keeps_nothing_by_default_is_asked_to(tokenizer: Any) -> None:
    model = base_model()
    model.config.use_cache = False
    with torch.no_grad():
        assert expected_of(ROWS, some_answers([1, 1, 1, 1]), tokenizer).read(model, range(4)) is not None


def test_of_many_answers_the_best_count(tokenizer: Any) -> None:
    """The first ones among equals."""
    answers = [([token], float(token % 7)) for token in range(4, 47)]
    best = [([token], 6.0) for token in (6, 13, 20, 27, 34, 41)] + [([token], 5.0) for token in (5, 12)]
    objective = expected_of(ROWS[:1], [answers], tokenizer, max_answers=8)
    assert objective.num_answers(0) == 8
    model = base_model()
    assert objective.score(model, [0]) == expected_of(ROWS[:1], [best], tokenizer).score(model, [0])
    assert objective.score(model, [0]) < expected_of(ROWS[:1], [answers], tokenizer, max_answers=9).score(model, [0])


def test_rewards_count_from_the_lowest_if_that_is_negative(mixture: AdaptiveMixture, tokenizer: Any) -> None:
    """Of an example by itself."""
    answers = [[([4], 1.0), ([5], -1.0)], [([4], 0.5), ([5], 0.0)], []]
    objective = expected_of(ROWS[:3], answers, tokenizer)
    assert [objective.num_answers(i) for i in range(3)] == [1, 1, 0]
    of_four = [probability(mixture.model, prompt_ids(row["prompt"], tokenizer), [4], 1.0) for row in ROWS[:2]]
    assert objective(mixture.model) == pytest.approx([-1 + 2 * of_four[0], 0.5 * of_four[1], 0.0], rel=1e-5)


def test_an_answer_that_begins_with_another_does_not_count(tokenizer: Any) -> None:
    """What is sampled begins with the shorter one in either case."""
    answers = [([4], 1.0), ([4, 5, 6], 1.0), ([5, 4], 0.5), ([], 3.0), ([5, 6], 0.25)]
    counted = [([4], 1.0), ([5, 4], 0.5), ([5, 6], 0.25)]
    objectives = [expected_of(ROWS[:1], [each], tokenizer) for each in (answers, counted)]
    assert [objective.num_answers(0) for objective in objectives] == [3, 3]
    first, second = (objective.score(base_model(), [0]) for objective in objectives)
    assert first == second


# ------------------------------------------------------------------------------------------------ answers


def test_the_answers_are_those_of_the_candidates_with_their_rewards(mixture: AdaptiveMixture, tokenizer: Any) -> None:
    objective = RewardObjective(ROWS, count_letters, tokenizer, generation_kwargs=SHORT)
    space = WeightSpace(mixture.experts, modules(mixture))
    evaluator = Evaluator(mixture.model, space, objective)
    candidates = [*space.baselines().values()]
    found = collect_answers(evaluator, candidates, samples=3, temperature=0.5)
    greedy: list[set[tuple[int, ...]]] = [set() for _ in ROWS]
    for x in candidates:
        mixture.set_weights(x)
        for i, ids in enumerate(objective.answers(mixture.model, range(4))):
            greedy[i].add(tuple(ids))
    for i, known in enumerate(found.rewards):
        assert greedy[i] < set(known)  # and sampled ones
        texts = tokenizer.batch_decode([list(ids) for ids in known], skip_special_tokens=True)
        assert [reward for _, reward in found.means()[i]] == pytest.approx(count_letters(texts))
        assert sum(map(len, known.values())) == len(candidates) * 4
        times = [len(rewards) for rewards in known.values()]
        assert times == sorted(times, reverse=True)
    assert evaluator.usage.evaluations == 4 * len(candidates) * 4
    assert found.usage.evaluations == 4 * len(candidates) * 3
    assert evaluator.usage.tokens > found.usage.tokens > 0
    again = collect_answers(Evaluator(mixture.model, space, objective), candidates, samples=3, temperature=0.5)
    assert again.rewards == found.rewards
    assert Answers.from_state_dict(found.state_dict(), 4, 47).rewards == found.rewards
    with pytest.raises(ValueError, match="answers to 4 examples, not 5"):
        Answers.from_state_dict(found.state_dict(), 5, 47)
    with pytest.raises(ValueError, match="tokens beyond the 10 of the model"):
        Answers.from_state_dict(found.state_dict(), 4, 10)


def test_sampling_ignores_how_the_objective_decodes(tokenizer: Any) -> None:
    given = {"do_sample": True, "temperature": 0.1, "top_p": 0.5, "top_k": 3, "max_new_tokens": 7}
    objective = RewardObjective(ROWS, count_letters, tokenizer, generation_kwargs=given)
    plain = {"do_sample": True, "temperature": 0.7, "top_p": 1.0, "top_k": 0, "num_beams": 1, "max_new_tokens": 7}
    assert plain.items() <= objective.sampling(0.7).generation_kwargs.items()
    assert objective.generation_kwargs == given
    assert not objective.sampling().deterministic


@pytest.mark.parametrize(
    ("answers", "kwargs", "message"),
    [
        (None, {}, 'The "answers" of example 0 are None; expected pairs'),
        ([("text", 1.0)], {}, "expected pairs of tokens and a finite reward"),
        ([([4], float("nan"))], {}, "expected pairs of tokens and a finite reward"),
        ([([4], 1)], {"max_answers": 0}, "`max_answers` must be at least 1, got 0"),
        ([([4], 1)], {"temperature": float("nan")}, "`temperature` must be positive, got nan"),
    ],
)
def test_what_are_no_answers(answers: Any, kwargs: dict[str, Any], message: str, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=message):
        ExpectedRewardObjective([{**ROWS[0], "answers": answers}], tokenizer, **kwargs)


def test_whole_rewards(mixture: AdaptiveMixture, tokenizer: Any) -> None:
    rows = [[([4], 1), ([5], -1)]]
    exact = [[([4], 1.0), ([5], -1.0)]]
    found = [expected_of(ROWS[:1], answers, tokenizer).score(mixture.model, [0]) for answers in (rows, exact)]
    assert found[0] == found[1]


def test_it_is_no_part_of_a_sum(tokenizer: Any) -> None:
    expected = expected_of(ROWS, some_answers([3, 0, 1, 5]), tokenizer)
    with pytest.raises(ValueError, match="'expected reward' cannot be part of a sum"):
        WeightedObjective([expected, LogLikelihoodObjective(ROWS, tokenizer)], [1.0, 0.1])


def test_a_checkpoint_knows_the_temperature(mixture: AdaptiveMixture, tokenizer: Any, tmp_path: Path) -> None:
    def search(temperature: float, **kwargs: Any) -> Any:
        objective = expected_of(ROWS, some_answers([3, 0, 1, 5]), tokenizer, temperature=temperature)
        options = {"method": "cem", "validation": None, "in_context": False, "num_generations": 1}
        return mixture.search(objective=objective, checkpoint=tmp_path / "c.json", **options, **kwargs)

    search(0.5)
    with pytest.raises(ValueError, match="belongs to another search: objective"):
        search(2.0, resume=True)
    options: dict[str, Any] = {**GRADIENT, "validation": None, "num_generations": 1, "checkpoint": tmp_path / "d.json"}
    result = mixture.search(ROWS, count_letters, **options)
    assert (result.settings["temperature"], result.settings["population_size"]) == (0.5, 1)
    with pytest.raises(ValueError, match=r"temperature was 0\.5 and is now 2"):
        mixture.search(ROWS, count_letters, **options, resume=True, temperature=2)


# ------------------------------------------------------------------------------------------------ searches

GRADIENT: dict[str, Any] = {"method": "gradient", "max_new_tokens": 3, "in_context": False}


def test_a_search_optimizes_the_expected_reward(mixture: AdaptiveMixture, tokenizer: Any) -> None:
    options = {**GRADIENT, "validation": None, "granularity": "layer", "num_generations": 15}
    options |= {"bounds": (-2, 2), "one_standard_error": False}
    result = mixture.search(ROWS, count_letters, **options)
    best = [entry["best"] for entry in result.history]
    assert len(best) == 15
    assert best[0] == pytest.approx(max(score for name, score in result.expected.items() if name != "searched"))
    assert best[-1] > best[0] * 1.02
    assert result.expected["searched"] == pytest.approx(max(best), rel=0.1)
    assert result.objective == "reward"
    assert len(result.alpha["all"]) == len(result.groups) > 1
    assert mixture.search(ROWS, count_letters, **options).alpha == result.alpha
    # what it promises is there: sampled answers get that reward, or more
    sampled = {**SHORT, "do_sample": True, "top_k": 0, "temperature": 0.5}
    objective = RewardObjective(ROWS, count_letters, tokenizer, generation_kwargs=sampled)
    torch.manual_seed(0)
    assert np.mean([objective(mixture.model) for _ in range(100)]) > result.expected[result.choice]


def test_gradients_take_12_steps_by_default(mixture: AdaptiveMixture) -> None:
    assert len(mixture.search(ROWS, count_letters, validation=None, **GRADIENT).history) == 12
    assert len(mixture.search(ROWS, method="gradient", validation=None, in_context=False).history) == 12


def test_cross_validation_optimizes_on_the_other_examples(
    mixture: AdaptiveMixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimized: list[tuple[int, ...]] = []
    plain = Evaluator.value_and_gradient

    def spy(self: Evaluator, x: np.ndarray, examples: Sequence[int]) -> tuple[float, np.ndarray]:
        optimized.append(tuple(examples))
        return plain(self, x, examples)

    monkeypatch.setattr(Evaluator, "value_and_gradient", spy)
    result = mixture.search(EXAMPLES, count_letters, validation=3, num_generations=2, **GRADIENT)
    assert result.evaluated_on == "cross-validation"
    assert [len(examples) for examples in dict.fromkeys(optimized)] == [5, 3, 3, 4]
    optimized.clear()
    result = mixture.search(EXAMPLES[:3], count_letters, eval_examples=EXAMPLES[3:], num_generations=2, **GRADIENT)
    assert set(optimized) == {(0, 1, 2)}
    assert (result.evaluated_on, result.num_evaluated) == ("validation", 2)


@pytest.mark.parametrize("validation", [None, 2, "held out"])
def test_it_is_evaluated_by_the_reward_itself(
    validation: Any, mixture: AdaptiveMixture, tokenizer: Any, tmp_path: Path
) -> None:
    rows, evaluated, options = ROWS, ROWS, {"validation": validation}
    if validation == "held out":
        rows, evaluated, options = EXAMPLES[:3], EXAMPLES[3:], {"eval_examples": EXAMPLES[3:]}
    result = mixture.search(rows, count_letters, method="gradient", max_new_tokens=3, num_generations=3, **options)
    assert list(result.scores) == ["base", "all", "narrow", "last", "uniform", "searched", "in-context"]
    assert list(result.expected) == list(result.scores)[:-1]  # of in-context answers nobody knows
    worth = {name: (result.scores[name], expected) for name, expected in result.expected.items()}
    assert worth[result.choice] == max(worth.values())
    assert result.objective == "reward"
    objective = RewardObjective(evaluated, count_letters, tokenizer, generation_kwargs=SHORT)
    for name, x in WeightSpace(mixture.experts, []).baselines().items():
        mixture.set_weights(x)
        assert result.scores[name] == pytest.approx(np.mean(objective(mixture.model)))
    if validation != 2:
        mixture.set_weights(result.searched_weights)
        assert result.scores["searched"] == pytest.approx(np.mean(objective(mixture.model)))
    told = f": base {result.expected['base']:.3f}, all"
    assert f"Expected reward{told}" in str(result)
    mixture.result = result  # which `set_weights` has forgotten
    mixture.save_pretrained(tmp_path / "mine")
    assert f"decides between equals{told}" in (tmp_path / "mine" / "README.md").read_text()


def test_cross_validation_compares_example_by_example(mixture: AdaptiveMixture) -> None:
    def of_the_prompt(prompts: list[Any], **columns: Any) -> list[float]:
        return [float(len(str(prompt)) ** 2) for prompt in prompts]

    for rows in (EXAMPLES, [*EXAMPLES, *EXAMPLES[1:2] * 3]):  # of which some have the same prompt
        with pytest.warns(UserWarning, match="same reward"):
            result = mixture.search(rows, of_the_prompt, validation=3, num_generations=1, **GRADIENT)
        assert result.evaluated_on == "cross-validation"
        assert len({result.scores[name] for name in result.expected}) == 1
        assert result.difference == (0, 0, 0)


def test_a_search_that_was_killed_at_a_step_goes_on(
    mixture: AdaptiveMixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**GRADIENT, "validation": None, "num_generations": 4, "checkpoint": tmp_path / "search.json"}
    whole = mixture.search(ROWS, count_letters, **options | {"checkpoint": None})
    with monkeypatch.context() as patched:
        plain, steps = Evaluator.value_and_gradient, iter([False, False, True])

        def deadly(self: Evaluator, *args: Any) -> Any:
            if next(steps):
                raise MemoryError("killed")
            return plain(self, *args)

        patched.setattr(Evaluator, "value_and_gradient", deadly)
        with pytest.raises(MemoryError):
            mixture.search(ROWS, count_letters, **options)
    resumed = mixture.search(ROWS, count_letters, **options, resume=True)
    assert (resumed.alpha, resumed.scores, resumed.history) == (whole.alpha, whole.scores, whole.history)
    assert resumed.usage.tokens == whole.usage.tokens


@pytest.mark.parametrize("killed_at", [1, 2, 5])
def test_a_search_that_was_killed_goes_on_with_the_same_answers(
    killed_at: int, mixture: AdaptiveMixture, tmp_path: Path
) -> None:
    calls = 0

    def reward(completions: list[str], **columns: Any) -> list[float]:
        nonlocal calls
        calls += 1
        if calls == killed_at:
            raise MemoryError("killed")
        return count_letters(completions)

    options = {**GRADIENT, "validation": None, "num_generations": 4}
    whole = mixture.search(ROWS, count_letters, checkpoint=tmp_path / "whole.json", **options)
    path = tmp_path / "killed.json"
    with pytest.raises(MemoryError):
        mixture.search(ROWS, reward, checkpoint=path, **options)
    resumed = mixture.search(ROWS, reward, checkpoint=path, resume=True, **options)
    assert resumed.alpha == whole.alpha
    assert resumed.scores == whole.scores
    assert (resumed.usage.evaluations, resumed.usage.tokens) == (whole.usage.evaluations, whole.usage.tokens)
    before = calls
    mixture.search(ROWS, reward, checkpoint=path, resume=True, **options)
    assert calls == before  # nobody was asked again


def test_without_a_reward_it_stays_where_it_begins(mixture: AdaptiveMixture) -> None:
    def nothing(completions: list[str], **columns: Any) -> list[float]:
        return [0.0] * len(completions)

    with pytest.warns(UserWarning, match="cannot guide the search: no answer got a reward above the lowest one"):
        result = mixture.search(ROWS, nothing, validation=None, num_generations=3, **GRADIENT)
    assert not result.improved
    assert result.choice == "base"


def test_batches_that_do_not_fit_are_halved(mixture: AdaptiveMixture, tokenizer: Any) -> None:
    rows = [{**row, "answers": its} for row, its in zip(ROWS, some_answers([3, 2, 4, 1]), strict=True)]
    space, x = WeightSpace(mixture.experts, modules(mixture)), np.array([0.3, 0.5, 0.7])

    class Large(ExpectedRewardObjective):
        def score_tensor(self, model: Any, indices: Sequence[int], prompts: Any = None) -> torch.Tensor:
            if sum(map(self.num_answers, indices)) > 4:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return super().score_tensor(model, indices, prompts)

    value, gradient = Evaluator(mixture.model, space, ExpectedRewardObjective(rows, tokenizer)).value_and_gradient(
        x, range(4)
    )
    small = Evaluator(mixture.model, space, Large(rows, tokenizer))
    found, slope = small.value_and_gradient(x, range(4))
    assert found == pytest.approx(value, rel=1e-5)
    assert slope == pytest.approx(gradient, abs=1e-6)
    assert small.batch_size <= 5
    assert small.scores([x], range(4)).mean() == pytest.approx(value, rel=1e-5)


def test_memory_that_never_lasts_is_an_error(mixture: AdaptiveMixture, tokenizer: Any) -> None:
    class Large(ExpectedRewardObjective):
        def read(self, model: Any, indices: Sequence[int], prefix: Any = None) -> Any:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    rows = [{**row, "answers": its} for row, its in zip(ROWS, some_answers([0, 0, 2, 0]), strict=True)]
    evaluator = Evaluator(mixture.model, WeightSpace(mixture.experts, []), Large(rows, tokenizer))
    with pytest.raises(torch.OutOfMemoryError):
        evaluator.value_and_gradient(np.ones(3), range(4))
    with pytest.raises(torch.OutOfMemoryError):
        evaluator.scores([np.ones(3)], range(4))


@pytest.mark.parametrize("count", [1, 5])
def test_batches_have_as_many_rows_as_they_may(count: int, mixture: AdaptiveMixture, tokenizer: Any) -> None:
    seen: list[int] = []

    class Seen(ExpectedRewardObjective):
        def score_tensor(self, model: Any, indices: Sequence[int], prompts: Any = None) -> torch.Tensor:
            seen.append(sum(map(self.num_answers, indices)))
            return super().score_tensor(model, indices, prompts)

    rows = [{**row, "answers": its} for row, its in zip(ROWS, some_answers([count] * 4), strict=True)]
    evaluator = Evaluator(mixture.model, WeightSpace(mixture.experts, []), Seen(rows, tokenizer), batch_size=12)
    evaluator.scores([np.zeros(3), np.ones(3)], range(4))
    evaluator.value_and_gradient(np.ones(3), range(4))
    assert seen == {1: [8, 4], 5: [10] * 4 + [10] * 2}[count]


def test_answers_that_are_hardly_ever_given_are_told(mixture: AdaptiveMixture) -> None:
    def long(completion_ids: list[list[int]], **columns: Any) -> list[float]:
        return [float(len(ids) == 100) for ids in completion_ids]

    options = {**GRADIENT, "max_new_tokens": 100, "num_generations": 1, "validation": None}
    with pytest.warns(UserWarning, match="next to no probability"):
        mixture.search(ROWS, long, **options)


def test_negative_rewards_do_not_hide_it(mixture: AdaptiveMixture) -> None:
    """Every example has a lowest reward of its own, so that scores differ where no candidate's do."""

    def long(prompts: list[Any], completion_ids: list[list[int]], **columns: Any) -> list[float]:
        return [float(len(ids) == 100) - len(str(prompt)) for prompt, ids in zip(prompts, completion_ids, strict=True)]

    options = {**GRADIENT, "max_new_tokens": 100, "num_generations": 1, "validation": None}
    with pytest.warns(UserWarning, match="next to no probability"):
        mixture.search(ROWS, long, **options)


def test_held_out_examples_without_a_reward_are_no_reason_to_warn(
    mixture: AdaptiveMixture, recwarn: pytest.WarningsRecorder
) -> None:
    held_out = EXAMPLES[3:]
    unrewarded = [row["prompt"] for row in held_out]

    def reward(prompts: list[Any], completions: list[str], **columns: Any) -> list[float]:
        counts = count_letters(completions)
        return [0.0 if prompt in unrewarded else count for prompt, count in zip(prompts, counts, strict=True)]

    mixture.search(EXAMPLES[:3], reward, eval_examples=held_out, num_generations=1, **GRADIENT)
    assert not [warning for warning in recwarn if "expected reward" in str(warning.message)]


def test_questions_count_once(mixture: AdaptiveMixture) -> None:
    rows = [*ROWS, ROWS[0], ROWS[0]]
    result = mixture.search(rows, count_letters, validation=None, num_generations=1, **GRADIENT)
    once = mixture.search(ROWS, count_letters, validation=None, num_generations=1, **GRADIENT)
    assert result.num_evaluated == 4
    assert result.scores["base"] == pytest.approx(once.scores["base"])


def test_all_steps_are_counted(mixture: AdaptiveMixture) -> None:
    result = mixture.search(ROWS, count_letters, validation=None, num_generations=5, **GRADIENT)
    simple = len(WeightSpace(mixture.experts, []).baselines())
    assert simple + 4 <= result.candidates <= simple + 6


@pytest.mark.parametrize("when", ["step", "last rewards"])
def test_an_interrupted_gradient(when: str, mixture: AdaptiveMixture, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, steps = Evaluator.value_and_gradient, [0]

    def stopping(self: Evaluator, *args: Any) -> Any:
        steps[0] += 1
        if when == "step" and steps[0] == 3:
            raise KeyboardInterrupt
        return plain(self, *args)

    def reward(completions: list[str], **columns: Any) -> list[float]:
        if when == "last rewards" and steps[0] == 4:
            raise KeyboardInterrupt
        return count_letters(completions)

    monkeypatch.setattr(Evaluator, "value_and_gradient", stopping)
    options = {**GRADIENT, "validation": None, "num_generations": 4, "bounds": (-2, 2), "one_standard_error": False}
    result = mixture.search(ROWS, reward, granularity="layer", **options)
    assert result.stopped == "interrupted"
    assert "searched" in result.scores
    assert (result.objective, bool(result.expected)) == (
        ("reward", True) if when == "step" else ("expected reward", False)
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda answers: answers | {"decoded": [{}]},
        lambda answers: answers | {"decoded": [{**answers["decoded"][0], "candidate": [0.0]}]},
        lambda answers: answers | {"rewards": [[[[10**6], [1.0]]], *answers["rewards"][1:]]},
        lambda answers: answers | {"rewards": [[[[4], []]], *answers["rewards"][1:]]},
        lambda answers: answers | {"rewards": [[[[4], ["a"]]], *answers["rewards"][1:]]},
    ],
)
def test_damaged_answers_in_a_checkpoint(change: Any, mixture: AdaptiveMixture, tmp_path: Path) -> None:
    path = tmp_path / "search.json"
    options = {**GRADIENT, "validation": None, "num_generations": 1, "checkpoint": path}
    mixture.search(ROWS, count_letters, **options)
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"answers": change(content["answers"])}))
    with pytest.raises(ValueError, match="is no checkpoint of a search"):
        mixture.search(ROWS, count_letters, resume=True, **options)


def test_a_subclass_declares_what_its_score_can(mixture: AdaptiveMixture, tokenizer: Any) -> None:
    class Halved(RewardObjective):
        def score(self, model: Any, indices: Sequence[int], prefix: Any = None) -> list[float]:
            return [0.5 * score for score in super().score(model, indices, prefix)]

    class Declared(Halved):
        rewards_answers = True

    with pytest.raises(ValueError, match=r"'reward' has no gradient\. Use method='cem', or an objective that declares"):
        mixture.search(objective=Halved(ROWS, count_letters, tokenizer), method="gradient")
    declared = Declared(ROWS, count_letters, tokenizer, generation_kwargs=SHORT)
    result = mixture.search(objective=declared, method="gradient", num_generations=1, validation=None)
    assert result.expected


def test_padding_after_a_stop_string_is_no_end(mixture: AdaptiveMixture, tokenizer: Any) -> None:
    """With a tokenizer whose pad token is its end token."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    kwargs = {"max_new_tokens": 12, "stop_strings": ["a", "e", "i", "o"], "tokenizer": tokenizer}
    objective = RewardObjective(EXAMPLES, count_letters, tokenizer, generation_kwargs=kwargs)
    torch.manual_seed(0)
    found = objective.sampling().answers(mixture.model, list(range(5)) * 8)
    stopped = [text for text in map(tokenizer.decode, found) if set(text) & set("aeio")]
    assert len(stopped) > 10
    assert not any("</s>" in text for text in stopped)


def test_what_has_no_gradient(mixture: AdaptiveMixture, tokenizer: Any) -> None:
    reward = RewardObjective(ROWS, count_letters, tokenizer)
    both = WeightedObjective([reward, LogLikelihoodObjective(ROWS, tokenizer)], [1.0, 0.1])
    with pytest.raises(ValueError, match=r"'reward \+ 0.1 log-likelihood' has no gradient"):
        mixture.search(objective=both, method="gradient")
    with pytest.raises(ValueError, match="The gradient of a reward needs `expected_reward`"):
        mixture.search(ROWS, count_letters, method="gradient", expected_reward=False)
    with pytest.raises(ValueError, match="`expected_reward` needs rewards of generated answers"):
        mixture.search(ROWS, expected_reward=True)


# ------------------------------------------------------------------------------------------------ method="auto"

SIX = [*EXAMPLES, {"prompt": "dogs", "completion": "bark"}]
AUTO: dict[str, Any] = {"max_new_tokens": 3, "in_context": False, "validation": None, "num_generations": 1}


def nothing(completions: list[str], **columns: Any) -> list[float]:
    return [0.0] * len(completions)


def test_the_default_for_a_reward_is_the_gradient_per_layer(mixture: AdaptiveMixture) -> None:
    result = mixture.search(SIX, count_letters, **AUTO)
    assert (result.method, result.settings["granularity"], result.settings["expected_reward"]) == (
        "gradient",
        "layer",
        True,
    )
    assert "6 examples, and a backward pass is possible" in result.reason
    asked = mixture.search(SIX, count_letters, **AUTO, method="gradient", granularity="layer", expected_reward=True)
    assert (asked.alpha, asked.scores, asked.history) == (result.alpha, result.scores, result.history)


@pytest.mark.parametrize("held_out", [0, 4])
def test_few_examples_get_one_weight_per_expert(held_out: int, mixture: AdaptiveMixture) -> None:
    """Neither held-out examples nor repeated ones can be searched on."""
    more = [{"prompt": f"{i}", "completion": ""} for i in range(held_out)] or None
    result = mixture.search([*EXAMPLES, EXAMPLES[0]], count_letters, **AUTO, eval_examples=more)
    assert (result.method, result.settings["granularity"]) == ("gradient", "expert")


def test_without_a_signal_the_default_is_cem_on_the_reward(
    mixture: AdaptiveMixture, recwarn: pytest.WarningsRecorder
) -> None:
    result = mixture.search(SIX, nothing, **AUTO)
    assert (result.method, result.settings["granularity"], result.settings["expected_reward"]) == (
        "cem",
        "expert",
        False,
    )
    assert (
        result.reason
        == "cross-entropy method on the objective, one weight per expert: no answer got a reward above the lowest one"
    )
    assert not result.expected
    assert result.groups == ["all"]
    assert not [warning for warning in recwarn if "expected reward" in str(warning.message)]


def test_a_fallback_that_was_killed_goes_on(mixture: AdaptiveMixture, tmp_path: Path) -> None:
    """With the collected answers, and without asking for a known score again."""
    calls, killed_at = 0, [10**9]

    def reward(completions: list[str], **columns: Any) -> list[float]:
        nonlocal calls
        calls += 1
        if calls == killed_at[0]:
            raise MemoryError("killed")
        return nothing(completions)

    options = {**AUTO, "num_generations": 3, "population_size": 4}
    whole = mixture.search(SIX, reward, **options, checkpoint=tmp_path / "whole.json")
    killed_at[0], path = 2 * calls - 1, tmp_path / "killed.json"
    with pytest.raises(MemoryError):
        mixture.search(SIX, reward, **options, checkpoint=path)
    resumed = mixture.search(SIX, reward, **options, checkpoint=path, resume=True)
    assert (resumed.alpha, resumed.scores, resumed.history) == (whole.alpha, whole.scores, whole.history)
    assert (resumed.usage.evaluations, resumed.usage.tokens) == (whole.usage.evaluations, whole.usage.tokens)
    assert calls < killed_at[0] + 6
    before = calls
    mixture.search(SIX, reward, **options, checkpoint=path, resume=True)
    assert calls == before


def test_cem_optimizes_the_expected_reward_without_a_backward_pass(
    mixture: AdaptiveMixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_gradient(*args: Any) -> Any:
        raise AssertionError("a gradient was computed")

    monkeypatch.setattr(Evaluator, "value_and_gradient", no_gradient)
    bands = {name: "low" if ".0." in name else "high" for name in modules(mixture)}
    options = {**AUTO, "method": "cem", "expected_reward": True, "granularity": bands, "num_generations": 3}
    result = mixture.search(SIX, count_letters, **options, population_size=8)
    assert result.groups == ["low", "high"]
    assert result.settings["granularity"] == bands
    assert (result.method, result.objective) == ("cem", "reward")
    assert result.expected.keys() == result.scores.keys()
    best = [entry["best"] for entry in result.history]
    assert max(best) >= max(score for name, score in result.expected.items() if name != "searched") * 0.9
    assert result.reason == "cross-entropy method on the expected reward, one weight per expert and group: as asked"


# ------------------------------------------------------------------------------------------------ settings


def test_a_result_with_any_settings_can_be_saved(mixture: AdaptiveMixture, tokenizer: Any, tmp_path: Path) -> None:
    """Such as a tokenizer for stop strings, and an array."""
    kwargs = {"stop_strings": ["a", "e"], "tokenizer": tokenizer}
    result = mixture.search(
        ROWS,
        count_letters,
        **{**AUTO, "num_generations": 2, "checkpoint": tmp_path / "search.json"},
        generation_kwargs=kwargs,
        method="cem",
        population_size=4,
        optimizer_kwargs={"mean": np.full(3, 0.25), "elite_ratio": 0.5},
    )
    mixture.save_pretrained(tmp_path / "mine")
    settings = json.loads((tmp_path / "mine" / "mixture.json").read_text())["result"]["settings"]
    assert settings == result.settings
    assert settings["optimizer_kwargs"] == {"mean": [0.25] * 3, "elite_ratio": 0.5}
    assert settings["generation_kwargs"]["stop_strings"] == ["a", "e"]
    assert (settings["max_new_tokens"], settings["checkpoint"]) == (3, str(tmp_path / "search.json"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer_kwargs": {"learning_rate": 0.1}}, "`optimizer_kwargs` belong to one method"),
        ({"method": "cem", "optimizer_kwargs": {"seed": 1}}, "Pass `seed` itself, not in `optimizer_kwargs`"),
        ({"method": "cem", "optimizer_kwargs": {"learning_rate": 0.1}}, "do not fit the method 'cem'"),
        ({"method": "gradient", "optimizer_kwargs": {"std": 0.1}}, "do not fit the method 'gradient'"),
    ],
)
def test_wrong_arguments_fail_before_the_work(options: Any, message: str, mixture: AdaptiveMixture) -> None:
    def reward(completions: list[str], **columns: Any) -> list[float]:
        raise AssertionError("an answer was generated")

    with pytest.raises((ValueError, TypeError), match=message):
        mixture.search(SIX, reward, **options)
