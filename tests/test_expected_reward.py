"""The gradient of a reward: what sampled answers give to the expected one, and searches that climb it."""

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
from test_search import LED, ROWS, model_with_local_attention, modules

from peft_svf import AdaptiveMixture, Evaluator, LogLikelihoodObjective, RewardObjective, WeightedObjective, WeightSpace
from peft_svf.scoring import ExpectedRewardObjective
from peft_svf.scoring.expected_reward import TEMPERATURE
from peft_svf.scoring.tokens import prompt_ids
from peft_svf.search.answers import Answers, collect_answers

SHORT = {"max_new_tokens": 3}


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


@pytest.mark.parametrize("rows", [ROWS, LED[:4]], ids=["nothing in common", "a common beginning"])
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
        mixture._put_groups(space.weights(x), space.group_of)
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


@pytest.mark.parametrize("rows", [ROWS, LED[:4]], ids=["nothing in common", "a common beginning"])
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
        objective = expected_of(ROWS[:1], [answers], tokenizer, most=size, temperature=temperature)
        found += objective.score(mixture.model, [0])
    assert found[0] < found[1] < found[2]
    assert found[1] < truth
    assert found[2] == pytest.approx(truth, abs=1e-5)


def test_no_temperature(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="`temperature` must be positive, got 0"):
        expected_of(ROWS[:1], [[([4], 1.0)]], tokenizer, temperature=0)


def test_prompts_read_once_change_nothing_but_the_cost(mixture: AdaptiveMixture, tokenizer: Any) -> None:
    objective = expected_of(LED[:4], some_answers([3, 2, 1, 5]), tokenizer)
    mixture.set_weights([0.3, 0.5, 0.7])
    with torch.no_grad():
        apart = objective.score(mixture.model, range(4))
        cost, objective.tokens = objective.tokens, 0
        together = objective.score(mixture.model, range(4), objective.read(mixture.model, range(4)))
    assert together == pytest.approx(apart, rel=1e-5)
    lengths = [len(prompt_ids(row["prompt"], tokenizer)) for row in LED[:4]]
    saved = sum((count - 1) * length for count, length in zip([3, 2, 1, 5], lengths, strict=True))
    assert cost - objective.tokens == saved + 4  # the last token of a prompt is counted with none


def test_a_model_that_tells_distances_by_places_reads_prompts_with_each_answer(tokenizer: Any) -> None:
    torch.manual_seed(0)
    model = model_with_local_attention()
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
    answers = [([token], float(token % 7)) for token in range(4, 60)]
    objective = expected_of(ROWS[:1], [answers], tokenizer, most=10)
    assert objective.count(0) == 10
    assert [reward for _, reward in objective._answers[0]] == [6.0] * 8 + [5.0] * 2
    assert [ids for ids, _ in objective._answers[0]][:3] == [[6], [13], [20]]  # in the order given


def test_rewards_count_from_the_lowest_if_that_is_negative(mixture: AdaptiveMixture, tokenizer: Any) -> None:
    """Of an example by itself."""
    answers = [[([4], 1.0), ([5], -1.0)], [([4], 0.5), ([5], 0.0)], []]
    objective = expected_of(ROWS[:3], answers, tokenizer)
    assert [objective.count(i) for i in range(3)] == [1, 1, 0]
    of_four = [probability(mixture.model, prompt_ids(row["prompt"], tokenizer), [4], TEMPERATURE) for row in ROWS[:2]]
    assert objective(mixture.model) == pytest.approx([-1 + 2 * of_four[0], 0.5 * of_four[1], 0.0], rel=1e-5)


def test_an_answer_that_begins_with_another_does_not_count(tokenizer: Any) -> None:
    """What is sampled begins with the shorter one in either case."""
    answers = [([4], 1.0), ([4, 5, 6], 1.0), ([5, 4], 0.5), ([], 3.0), ([5, 6], 0.25)]
    objective = expected_of(ROWS[:1], [answers], tokenizer)
    assert objective._answers == [[([4], 1.0), ([5, 4], 0.5), ([5, 6], 0.25)]]


# ------------------------------------------------------------------------------------------------ answers


def test_the_answers_are_those_of_the_candidates_with_their_rewards(mixture: AdaptiveMixture, tokenizer: Any) -> None:
    objective = RewardObjective(ROWS, count_letters, tokenizer, generation_kwargs=SHORT)
    space = WeightSpace(mixture.experts, modules(mixture))
    evaluator = Evaluator(mixture.model, space, objective)
    candidates = [*space.simple().values()]
    found = collect_answers(evaluator, candidates, samples=3)
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
    assert evaluator.usage.rows == 4 * len(candidates) * 4
    assert found.usage.rows == 4 * len(candidates) * 3
    assert evaluator.usage.tokens > found.usage.tokens > 0
    again = collect_answers(Evaluator(mixture.model, space, objective), candidates, samples=3)
    assert again.rewards == found.rewards
    assert Answers.from_state_dict(found.state_dict(), 4).rewards == found.rewards
    with pytest.raises(ValueError, match="answers to 4 examples, not 5"):
        Answers.from_state_dict(found.state_dict(), 5)


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
        ([([4], 1)], {"most": 0}, "`most` must be at least 1, got 0"),
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
    with pytest.raises(ValueError, match="'expected reward' has several rows for an example"):
        WeightedObjective([expected, LogLikelihoodObjective(ROWS, tokenizer)], [1.0, 0.1])


def test_a_checkpoint_knows_the_temperature(mixture: AdaptiveMixture, tokenizer: Any, tmp_path: Path) -> None:
    def search(temperature: float, **kwargs: Any) -> Any:
        objective = expected_of(ROWS, some_answers([3, 0, 1, 5]), tokenizer, temperature=temperature)
        options = {"validation": None, "in_context": False, "num_generations": 1, "population_size": 2}
        return mixture.search(objective=objective, checkpoint=tmp_path / "c.json", **options, **kwargs)

    search(0.5)
    with pytest.raises(ValueError, match="is of another search: objective"):
        search(2.0, resume=True)
    result = mixture.search(ROWS, count_letters, validation=None, num_generations=1, **CLIMB)
    assert result.settings["temperature"] == TEMPERATURE
    assert (result.settings["population_size"], result.settings["racing"]) == (1, False)


# ------------------------------------------------------------------------------------------------ searches

CLIMB: dict[str, Any] = {"optimizer": "gradient", "generation_kwargs": SHORT, "in_context": False}


def test_a_search_climbs_the_expected_reward(mixture: AdaptiveMixture, tokenizer: Any) -> None:
    options = {**CLIMB, "validation": None, "granularity": "layer", "num_generations": 15}
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
    sampled = {**SHORT, "do_sample": True, "top_k": 0, "temperature": TEMPERATURE}
    objective = RewardObjective(ROWS, count_letters, tokenizer, generation_kwargs=sampled)
    torch.manual_seed(0)
    assert np.mean([objective(mixture.model) for _ in range(100)]) > result.expected[result.choice]


def test_gradients_take_12_steps_by_default(mixture: AdaptiveMixture) -> None:
    assert len(mixture.search(ROWS, count_letters, validation=None, **CLIMB).history) == 12
    assert len(mixture.search(ROWS, optimizer="gradient", validation=None, in_context=False).history) == 12


def test_folds_climb_on_their_own_examples(mixture: AdaptiveMixture, monkeypatch: pytest.MonkeyPatch) -> None:
    climbed: list[tuple[int, ...]] = []
    plain = Evaluator.value_and_gradient

    def spy(self: Evaluator, x: np.ndarray, examples: Sequence[int]) -> tuple[float, np.ndarray]:
        climbed.append(tuple(examples))
        return plain(self, x, examples)

    monkeypatch.setattr(Evaluator, "value_and_gradient", spy)
    result = mixture.search(EXAMPLES, count_letters, validation=3, num_generations=2, **CLIMB)
    assert result.judged_on == "cross-validation"
    assert [len(examples) for examples in dict.fromkeys(climbed)] == [5, 3, 3, 4]
    climbed.clear()
    result = mixture.search(EXAMPLES[:3], count_letters, validation=EXAMPLES[3:], num_generations=2, **CLIMB)
    assert set(climbed) == {(0, 1, 2)}
    assert (result.judged_on, result.judged) == ("validation", 2)


@pytest.mark.parametrize("validation", [None, 2, "rows"])
def test_it_is_judged_by_the_reward_itself(
    validation: Any, mixture: AdaptiveMixture, tokenizer: Any, tmp_path: Path
) -> None:
    rows = EXAMPLES[:3] if validation == "rows" else ROWS
    judged = EXAMPLES[3:] if validation == "rows" else ROWS
    result = mixture.search(
        rows,
        count_letters,
        optimizer="gradient",
        generation_kwargs=SHORT,
        validation=EXAMPLES[3:] if validation == "rows" else validation,
        num_generations=3,
    )
    assert list(result.scores) == ["base", "all", "narrow", "last", "uniform", "searched", "in-context"]
    assert list(result.expected) == list(result.scores)[:-1]  # of in-context answers nobody knows
    worth = {name: (result.scores[name], expected) for name, expected in result.expected.items()}
    assert worth[result.choice] == max(worth.values())
    assert result.objective == "reward"
    objective = RewardObjective(judged, count_letters, tokenizer, generation_kwargs=SHORT)
    for name, x in WeightSpace(mixture.experts, []).simple().items():
        mixture.set_weights(x)
        assert result.scores[name] == pytest.approx(np.mean(objective(mixture.model)))
    if validation != 2:
        mixture.set_weights(result.searched_weights)
        assert result.scores["searched"] == pytest.approx(np.mean(objective(mixture.model)))
    told = f": base {result.expected['base']:.3f}, all"
    assert f"Expected reward, as far as known answers tell{told}" in str(result)
    mixture.result = result  # which `set_weights` has forgotten
    mixture.save_pretrained(tmp_path / "mine")
    assert f"decides between equals{told}" in (tmp_path / "mine" / "README.md").read_text()


def test_folds_are_compared_example_by_example(mixture: AdaptiveMixture) -> None:
    def of_the_prompt(prompts: list[Any], **columns: Any) -> list[float]:
        return [float(len(str(prompt)) ** 2) for prompt in prompts]

    for rows in (EXAMPLES, [*EXAMPLES, *EXAMPLES[1:2] * 3]):  # of which some have the same prompt
        with pytest.warns(UserWarning, match="same reward"):
            result = mixture.search(rows, of_the_prompt, validation=3, num_generations=1, **CLIMB)
        assert result.judged_on == "cross-validation"
        assert len({result.scores[name] for name in result.expected}) == 1
        assert result.difference == (0, 0, 0)


def test_a_search_that_was_killed_at_a_step_goes_on(
    mixture: AdaptiveMixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**CLIMB, "validation": None, "num_generations": 4, "checkpoint": tmp_path / "search.json"}
    whole = mixture.search(ROWS, count_letters, **options | {"checkpoint": None})
    with monkeypatch.context() as patched:
        slope, steps = Evaluator._slope, iter([False, False, True])

        def deadly(self: Evaluator, *args: Any) -> Any:
            if next(steps):
                raise MemoryError("killed")
            return slope(self, *args)

        patched.setattr(Evaluator, "_slope", deadly)
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

    options = {**CLIMB, "validation": None, "num_generations": 4, "max_rows": 10**6}
    whole = mixture.search(ROWS, count_letters, checkpoint=tmp_path / "whole.json", **options)
    path = tmp_path / "killed.json"
    with pytest.raises(MemoryError):
        mixture.search(ROWS, reward, checkpoint=path, **options)
    resumed = mixture.search(ROWS, reward, checkpoint=path, resume=True, **options)
    assert resumed.alpha == whole.alpha
    assert resumed.scores == whole.scores
    assert (resumed.usage.rows, resumed.usage.tokens) == (whole.usage.rows, whole.usage.tokens)
    before = calls
    mixture.search(ROWS, reward, checkpoint=path, resume=True, **options)
    assert calls == before  # nobody was asked again


def test_without_a_reward_it_stays_where_it_begins(mixture: AdaptiveMixture) -> None:
    def nothing(completions: list[str], **columns: Any) -> list[float]:
        return [0.0] * len(completions)

    with pytest.warns(UserWarning, match="No answer to the examples got a reward"):
        result = mixture.search(ROWS, nothing, validation=None, num_generations=3, **CLIMB)
    assert not result.improved
    assert result.choice == "base"


def test_batches_that_do_not_fit_are_halved(mixture: AdaptiveMixture, tokenizer: Any) -> None:
    rows = [{**row, "answers": its} for row, its in zip(ROWS, some_answers([3, 2, 4, 1]), strict=True)]
    space, x = WeightSpace(mixture.experts, modules(mixture)), np.array([0.3, 0.5, 0.7])

    class Large(ExpectedRewardObjective):
        def differentiable(self, model: Any, indices: Sequence[int], prompts: Any = None) -> torch.Tensor:
            if sum(map(self.count, indices)) > 4:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return super().differentiable(model, indices, prompts)

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
        def differentiable(self, model: Any, indices: Sequence[int], prompts: Any = None) -> torch.Tensor:
            seen.append(sum(map(self.count, indices)))
            return super().differentiable(model, indices, prompts)

    rows = [{**row, "answers": its} for row, its in zip(ROWS, some_answers([count] * 4), strict=True)]
    evaluator = Evaluator(mixture.model, WeightSpace(mixture.experts, []), Seen(rows, tokenizer), batch_size=12)
    evaluator.scores([np.zeros(3), np.ones(3)], range(4))
    evaluator.value_and_gradient(np.ones(3), range(4))
    assert seen == {1: [8, 4], 5: [10] * 4 + [10] * 2}[count]


def test_answers_that_are_hardly_ever_given_are_told(mixture: AdaptiveMixture) -> None:
    def long(completion_ids: list[list[int]], **columns: Any) -> list[float]:
        return [float(len(ids) == 100) for ids in completion_ids]

    options = {**CLIMB, "generation_kwargs": {"max_new_tokens": 100}, "num_generations": 1, "validation": None}
    with pytest.warns(UserWarning, match="next to no probability"):
        mixture.search(ROWS, long, **options)


def test_negative_rewards_do_not_hide_it(mixture: AdaptiveMixture) -> None:
    """Every example has a lowest reward of its own, so that scores differ where no candidate's do."""

    def long(prompts: list[Any], completion_ids: list[list[int]], **columns: Any) -> list[float]:
        return [float(len(ids) == 100) - len(str(prompt)) for prompt, ids in zip(prompts, completion_ids, strict=True)]

    options = {**CLIMB, "generation_kwargs": {"max_new_tokens": 100}, "num_generations": 1, "validation": None}
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

    mixture.search(EXAMPLES[:3], reward, validation=held_out, num_generations=1, **CLIMB)
    assert not [warning for warning in recwarn if "probability" in str(warning.message)]


def test_questions_count_once(mixture: AdaptiveMixture) -> None:
    rows = [*ROWS, ROWS[0], ROWS[0]]
    result = mixture.search(rows, count_letters, validation=None, num_generations=1, **CLIMB)
    once = mixture.search(ROWS, count_letters, validation=None, num_generations=1, **CLIMB)
    assert result.judged == 4
    assert result.scores["base"] == pytest.approx(once.scores["base"])


def test_all_steps_are_counted(mixture: AdaptiveMixture) -> None:
    result = mixture.search(ROWS, count_letters, validation=None, num_generations=5, **CLIMB)
    simple = len(WeightSpace(mixture.experts, []).simple())
    assert simple + 4 <= result.evaluations <= simple + 6


@pytest.mark.parametrize("when", ["step", "last rewards"])
def test_an_interrupted_climb(when: str, mixture: AdaptiveMixture, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, steps = Evaluator.value_and_gradient, [0]

    def climb(self: Evaluator, *args: Any) -> Any:
        steps[0] += 1
        if when == "step" and steps[0] == 3:
            raise KeyboardInterrupt
        return plain(self, *args)

    def reward(completions: list[str], **columns: Any) -> list[float]:
        if when == "last rewards" and steps[0] == 4:
            raise KeyboardInterrupt
        return count_letters(completions)

    monkeypatch.setattr(Evaluator, "value_and_gradient", climb)
    options = {**CLIMB, "validation": None, "num_generations": 4, "bounds": (-2, 2), "one_standard_error": False}
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
        lambda answers: answers | {"decoded": [{**answers["decoded"][0], "weights": [0.0]}]},
        lambda answers: answers | {"rewards": [[[[10**6], [1.0]]], *answers["rewards"][1:]]},
        lambda answers: answers | {"rewards": [[[[4], []]], *answers["rewards"][1:]]},
        lambda answers: answers | {"rewards": [[[[4], ["a"]]], *answers["rewards"][1:]]},
    ],
)
def test_damaged_answers_in_a_checkpoint(change: Any, mixture: AdaptiveMixture, tmp_path: Path) -> None:
    path = tmp_path / "search.json"
    options = {**CLIMB, "validation": None, "num_generations": 1, "checkpoint": path}
    mixture.search(ROWS, count_letters, **options)
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"answers": change(content["answers"])}))
    with pytest.raises(ValueError, match="is no checkpoint of a search"):
        mixture.search(ROWS, count_letters, resume=True, **options)


def test_a_subclass_with_a_score_of_its_own_is_refused(mixture: AdaptiveMixture, tokenizer: Any) -> None:
    class Mine(RewardObjective):
        def score(self, model: Any, indices: Sequence[int], prefix: Any = None) -> list[float]:
            return [0.5 * score for score in super().score(model, indices, prefix)]

    with pytest.raises(ValueError, match="Mine has a `score` of its own"):
        mixture.search(objective=Mine(ROWS, count_letters, tokenizer), optimizer="gradient")


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
        mixture.search(objective=both, optimizer="gradient")
    with pytest.raises(ValueError, match="`normalize` cannot be differentiated"):
        mixture.search(ROWS, count_letters, normalize=True, **CLIMB)
