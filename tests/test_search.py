"""The search behind `AdaptiveMixture`: batches of candidates, racing, validation, limits, checkpoints, optimizers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from test_adaptation import (
    EXAMPLES,
    EXPERTS,
    IDS,
    Distance,
    base_model,
    count_letters,
    logits,
    save_expert,
)
from test_adaptation import experts as experts
from test_adaptation import mixture as mixture
from test_adaptation import tokenizer as tokenizer
from transformers import GenerationConfig, GPTNeoConfig, GPTNeoForCausalLM, MptConfig, MptForCausalLM

from peft_svf import (
    AdaptiveMixture,
    Evaluator,
    GradientDescent,
    LogLikelihoodObjective,
    Optimizer,
    RewardObjective,
    SearchConfig,
    SVFConfig,
    SVFLayer,
    WeightedObjective,
    WeightSpace,
)
from peft_svf.scoring import read_prefix
from peft_svf.scoring.prefix import common_prefix
from peft_svf.search.in_context import answer_of, with_demonstrations
from peft_svf.search.loop import run_search
from peft_svf.search.optimizers import make_optimizer
from peft_svf.search.selection import ranked
from peft_svf.search.statistics import compared, interval
from peft_svf.search.validated import ValidatedSearch
from peft_svf.search.validation import Split, split_examples

ROWS = EXAMPLES[:4]
TARGET = {"all": 0.6, "narrow": 0.2, "last": 0.9}


class RandomSearch(Optimizer):
    """Candidates drawn evenly from a box."""

    def __init__(self, dim: int = 3, population_size: int = 32) -> None:
        self.dim, self.population_size, self.rng = dim, population_size, np.random.default_rng(0)

    def ask(self) -> np.ndarray:
        return self.rng.uniform(0, 1, self.dim)

    def tell(self, solutions: Sequence[tuple[np.ndarray, float]], gradients: Any = None) -> None:
        pass


def modules(mixture: AdaptiveMixture) -> list[str]:
    return [m.module_name for m in mixture.model.modules() if isinstance(m, SVFLayer)]


def letters(**kwargs: Any) -> Callable[[Any], RewardObjective]:
    return lambda tokenizer: RewardObjective(
        ROWS, count_letters, tokenizer, generation_kwargs={"max_new_tokens": 6, **kwargs}
    )


OBJECTIVES: dict[str, Callable[[Any], Any]] = {
    "reward": letters(),
    "log-likelihood": lambda tokenizer: LogLikelihoodObjective(EXAMPLES, tokenizer),
    "both": lambda tokenizer: WeightedObjective(
        [letters()(tokenizer), LogLikelihoodObjective(ROWS, tokenizer)], [1.0, 0.01]
    ),
}


# ------------------------------------------------------------------------------------------ candidates in batches


@pytest.mark.parametrize("batch_size", [1, 7, 64])
@pytest.mark.parametrize("granularity", ["expert", "layer", "module"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_scores_in_batches_are_those_of_the_mixtures_one_by_one(
    name: str, granularity: Any, batch_size: int, mixture: AdaptiveMixture, tokenizer: Any
) -> None:
    objective = OBJECTIVES[name](tokenizer)
    space = WeightSpace(mixture.experts, modules(mixture), granularity)
    rng = np.random.default_rng(0)
    candidates = [rng.uniform(0, 1, space.dim) for _ in range(4)]
    found = Evaluator(mixture.model, space, objective, batch_size=batch_size).scores(
        candidates, range(len(objective.examples))
    )
    for x, scores in zip(candidates, found, strict=True):
        mixture.set_weights(space.weights(x), space.group_of)
        assert scores == pytest.approx(objective(mixture.model), abs=1e-4)
    assert len({scores.tobytes() for scores in found}) > 1


def test_batched_answers_are_those_of_the_mixtures_one_by_one(mixture: AdaptiveMixture, tokenizer: Any) -> None:
    texts: list[str] = []

    def spy(completions: list[str], **kwargs: Any) -> list[float]:
        texts.extend(completions)
        return [0.0] * len(completions)

    objective = RewardObjective(ROWS, spy, tokenizer, generation_kwargs={"max_new_tokens": 12})
    space = WeightSpace(mixture.experts, modules(mixture))
    candidates = [*np.random.default_rng(1).uniform(0, 1, (5, 3))]
    Evaluator(mixture.model, space, objective).scores(candidates, [0])
    together = texts.copy()
    texts.clear()
    for x in candidates:
        mixture.set_weights(x)
        objective.score(mixture.model, [0])
    assert together == texts
    assert len(set(texts)) > 1


LED = [{**row, "prompt": "a system message " + row["prompt"]} for row in EXAMPLES]  # what all of them begin with


def of_led(name: str, tokenizer: Any, spy: Any = count_letters, **kwargs: Any) -> Any:
    kwargs = {"max_new_tokens": 8, **kwargs}
    reward = RewardObjective(LED, spy, tokenizer, generation_kwargs=kwargs)
    likelihood = LogLikelihoodObjective(LED, tokenizer)
    return {"reward": reward, "log-likelihood": likelihood, "both": WeightedObjective([reward, likelihood], [1, 0.1])}[
        name
    ]


@pytest.mark.parametrize("batch_size", [2, 7, 64])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_common_prefix_is_read_once_for_each_candidate(
    name: str, batch_size: int, mixture: AdaptiveMixture, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts: list[str] = []

    def spy(completions: list[str], **kwargs: Any) -> list[float]:
        texts.extend(completions)
        return [float(len(set(text))) for text in completions]

    objective = of_led(name, tokenizer, spy)
    assert tokenizer.decode(objective.prefix_ids) == "a system message "
    space = WeightSpace(mixture.experts, modules(mixture), "layer")
    candidates = [*np.random.default_rng(0).uniform(0, 1, (4, space.dim))]
    seen: list[tuple[int, int]] = []
    forward = type(mixture.model).forward

    def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(tuple(kwargs["input_ids"].shape))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(mixture.model), "forward", counting)
    evaluator = Evaluator(mixture.model, space, objective, batch_size=batch_size)
    found = evaluator.scores(candidates, range(len(LED)))
    prefix_rows = sum(rows for rows, tokens in seen if tokens == len(objective.prefix_ids))
    assert prefix_rows == 4 if batch_size >= 4 else prefix_rows > 4  # no more are kept than a batch has rows
    monkeypatch.undo()
    together = sorted(texts)
    texts.clear()
    for x, scores in zip(candidates, found, strict=True):
        mixture.set_weights(space.weights(x), space.group_of)
        assert scores == pytest.approx(objective(mixture.model), abs=1e-5)
    assert together == sorted(texts)
    assert len({scores.tobytes() for scores in found}) > 1


def test_sampled_answers_do_not_depend_on_whether_the_beginning_is_shared(
    mixture: AdaptiveMixture, tokenizer: Any
) -> None:
    space = WeightSpace(mixture.experts, modules(mixture))
    candidates = [*np.random.default_rng(0).uniform(0, 1, (3, 3))]

    def scores(share: bool) -> list[list[float]]:
        objective = of_led("reward", tokenizer, do_sample=True)
        if not share:
            objective.prefix_ids = []
        return Evaluator(mixture.model, space, objective).scores(candidates, range(len(LED))).tolist()

    assert scores(True) == scores(False)


def model_with_local_attention() -> GPTNeoForCausalLM:
    config = GPTNeoConfig(
        vocab_size=47,
        hidden_size=16,
        num_layers=2,
        num_heads=2,
        attention_types=[[["global", "local"], 1]],
        window_size=4,
        max_position_embeddings=64,
    )
    return GPTNeoForCausalLM(config).eval()


@pytest.mark.parametrize("local", [False, True])
def test_models_that_count_places_share_no_beginning(local: bool, tokenizer: Any) -> None:
    if local:
        model: Any = model_with_local_attention()
    else:
        config = MptConfig(vocab_size=47, d_model=16, n_heads=2, n_layers=2, max_seq_len=64)
        model = MptForCausalLM(config).eval()
    assert read_prefix(model, list(range(5, 15)), 2) is None


def test_beams_of_the_model_s_own_settings(mixture: AdaptiveMixture, tokenizer: Any) -> None:
    space, x = WeightSpace(mixture.experts, modules(mixture)), np.array([0.5, 0.2, 0.9])
    for kwargs in ({}, {"generation_config": GenerationConfig(num_beams=2, pad_token_id=3, eos_token_id=2)}):
        objective = of_led("reward", tokenizer, **kwargs)
        if not kwargs:
            mixture.model.generation_config.num_beams = 2
        found = Evaluator(mixture.model, space, objective).scores([x], range(len(LED)))[0]
        mixture.set_weights(x)
        assert found.tolist() == objective(mixture.model)
        mixture.model.generation_config.num_beams = None
    several = of_led("reward", tokenizer, generation_config=GenerationConfig(num_return_sequences=2, num_beams=2))
    with pytest.raises(ValueError, match="num_return_sequences"):
        several.score(mixture.model, [0])


def test_a_subclass_with_another_score_declares_what_it_can_do(mixture: AdaptiveMixture, tokenizer: Any) -> None:
    class Plain(RewardObjective):
        def score(self, model: Any, indices: Sequence[int]) -> list[float]:  # type: ignore[override]
            return super().score(model, indices)

    class Sharing(RewardObjective):
        shares_prefix = True

        def score(self, model: Any, indices: Sequence[int], prefix: Any = None) -> list[float]:
            shared.append(prefix is not None)
            return super().score(model, indices, prefix)

    class Renamed(Sharing):
        name = "renamed"

    class Smooth(LogLikelihoodObjective):
        def score(self, model: Any, indices: Sequence[int]) -> list[float]:  # type: ignore[override]
            return super().score(model, indices)

    assert (Plain.shares_prefix, Plain.rewards_answers, Plain.differentiable) == (False, False, False)
    assert (Sharing.shares_prefix, Sharing.rewards_answers) == (True, False)
    assert (Renamed.shares_prefix, Renamed.rewards_answers) == (True, False)
    assert not Smooth.differentiable
    shared: list[bool] = []
    for kind in (Plain, Renamed):
        objective = kind(LED, count_letters, tokenizer, generation_kwargs={"max_new_tokens": 2})
        assert objective.prefix_ids
        space = WeightSpace(mixture.experts, [])
        Evaluator(mixture.model, space, objective).scores([np.zeros(3)], range(3))
    assert shared == [True]


@pytest.mark.parametrize("kwargs", [{"num_beams": 2}, {"cache_implementation": "static"}, {"use_cache": False}])
def test_ways_to_generate_that_cannot_share_a_beginning(
    kwargs: dict[str, Any], mixture: AdaptiveMixture, tokenizer: Any
) -> None:
    objective = of_led("reward", tokenizer, **kwargs)
    assert objective.prefix_ids == []
    space = WeightSpace(mixture.experts, modules(mixture))
    x = np.array([0.5, 0.2, 0.9])
    found = Evaluator(mixture.model, space, objective).scores([x], range(len(LED)))[0]
    mixture.set_weights(x)
    assert found.tolist() == objective(mixture.model)


def test_a_model_that_keeps_a_window_shares_no_beginning(mixture: AdaptiveMixture, tokenizer: Any) -> None:
    config = mixture.model.get_base_model().config
    config.layer_types = ["sliding_attention"] * config.num_hidden_layers
    config.sliding_window = 4
    assert read_prefix(mixture.model, list(range(5, 15)), 2) is None
    objective = of_led("log-likelihood", tokenizer)
    x = np.array([0.5, 0.2, 0.9])
    evaluator = Evaluator(mixture.model, WeightSpace(mixture.experts, modules(mixture)), objective)
    found = evaluator.scores([x], range(len(LED)))[0]
    mixture.set_weights(x)
    assert found == pytest.approx(objective(mixture.model), abs=1e-5)


@given(st.lists(st.lists(st.integers(0, 2), min_size=1), min_size=1, max_size=4), st.lists(st.integers(0, 2)))
def test_the_common_prefix_is_one_and_leaves_a_token(sequences: list[list[int]], begin: list[int]) -> None:
    sequences = [[*begin, *rest] for rest in sequences]
    found = common_prefix(sequences)
    shortest = min(map(len, sequences))
    assert all(ids[: len(found)] == found for ids in sequences)
    assert len(found) < shortest
    longer = {tuple(ids[: len(found) + 1]) for ids in sequences}
    assert (len(longer) > 1 or len(found) + 1 == shortest) if found else len(begin) < 8 + 1


def test_no_pair_is_evaluated_twice(mixture: AdaptiveMixture) -> None:
    seen: list[int] = []

    class Counting(Distance):
        def score(self, model: Any, indices: Sequence[int]) -> list[float]:
            seen.extend(indices)
            return super().score(model, indices)

    evaluator = Evaluator(mixture.model, WeightSpace(mixture.experts, modules(mixture)), Counting(TARGET, 3))
    x, y = np.full(3, 0.5), np.full(3, 0.25)
    first = evaluator.scores([x, y, x], [0, 1])
    assert sorted(seen) == [0, 0, 1, 1]
    assert first[0].tolist() == first[2].tolist() != first[1].tolist()
    evaluator.scores([y, x], [1, 2])
    assert sorted(seen) == [0, 0, 1, 1, 2, 2]
    assert evaluator.usage.evaluations == 6
    assert evaluator.candidates == 2


def test_a_batch_that_does_not_fit_is_halved(mixture: AdaptiveMixture) -> None:
    sizes: list[int] = []

    class Large(Distance):
        def score(self, model: Any, indices: Sequence[int]) -> list[float]:
            sizes.append(len(indices))
            if len(indices) > 3:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return super().score(model, indices)

    space = WeightSpace(mixture.experts, modules(mixture))
    evaluator = Evaluator(mixture.model, space, Large(TARGET, 4), batch_size=16)
    candidates = [*np.random.default_rng(0).uniform(0, 1, (5, 3))]
    expected = Evaluator(mixture.model, space, Distance(TARGET, 4)).scores(candidates, range(4))
    assert np.array_equal(evaluator.scores(candidates, range(4)), expected)
    assert evaluator.batch_size == 2
    assert sizes[:3] == [16, 8, 4]
    assert sum(size for size in sizes if size <= 3) == 20
    assert evaluator.usage.evaluations == 20

    class Larger(Distance):
        def score(self, model: Any, indices: Sequence[int]) -> list[float]:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(torch.OutOfMemoryError):
        Evaluator(mixture.model, space, Larger(TARGET)).scores(candidates, [0])


@pytest.mark.usefixtures("never_fold")
def test_a_search_changes_nothing_but_the_mixture(mixture: AdaptiveMixture) -> None:
    mixture.set_weights([0.1, 0.2, 0.3])
    mixture.apply("kept")
    before = {name: p.clone() for name, p in mixture.model.named_parameters() if ".svf_delta.mixture." not in name}
    mixture.search(ROWS, count_letters, num_generations=2, max_new_tokens=4)
    after = dict(mixture.model.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(layer.rows is None for layer in mixture.model.modules() if isinstance(layer, SVFLayer))


@pytest.mark.parametrize("method", ["cem", "gradient"])
def test_a_search_that_samples_repeats_itself_and_leaves_the_random_numbers_alone(
    method: str, mixture: AdaptiveMixture
) -> None:
    def run(**options: Any) -> dict[str, Any]:
        options |= {"max_new_tokens": 6, "generation_kwargs": {"do_sample": True, "temperature": 2.0}}
        result = mixture.search(ROWS, count_letters, method=method, num_generations=2, population_size=4, **options)
        return {**result.to_dict(), "usage": None}

    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = run(seed=1)
    assert torch.equal(torch.rand(3), expected)
    assert run(seed=1) == first
    assert run(seed=2)["history"] != first["history"]


# ------------------------------------------------------------------------------------------ space


def test_the_baselines_of_a_space(mixture: AdaptiveMixture) -> None:
    space = WeightSpace(["a", "b"], ["model.layers.0.q", "model.layers.1.q"], "layer", (-1.0, 2.0))
    found = {name: space.weights(x).tolist() for name, x in space.baselines().items()}
    assert found == {
        "base": [[0, 0], [0, 0]],
        "a": [[1, 1], [0, 0]],
        "b": [[0, 0], [1, 1]],
        "uniform": [[0.5, 0.5], [0.5, 0.5]],
    }
    assert space.neutral == "uniform"
    assert space.bounds.tolist() == [[-1, 2]] * 4
    with pytest.raises(ValueError, match="Expected 4 finite weights"):
        space.weights(np.zeros(3))


def test_groups_of_modules() -> None:
    names = ["model.layers.0.q", "model.layers.0.up", "model.layers.1.q", "model.layers.1.up"]
    assert WeightSpace(["a"], names, "layer").groups == ["model.layers.0", "model.layers.1"]
    assert WeightSpace(["a"], names, "module").groups == names
    space = WeightSpace(["a", "b"], names, {name: name.split(".")[-1] for name in names})
    assert space.groups == ["q", "up"]
    assert space.group_of == {names[0]: 0, names[1]: 1, names[2]: 0, names[3]: 1}
    assert space.weights(np.array([1.0, 2.0, 3.0, 4.0])).tolist() == [[1.0, 2.0], [3.0, 4.0]]
    assert space.vector([5.0, 6.0]).tolist() == [5.0, 5.0, 6.0, 6.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"granularity": "head"}, "'expert', 'layer', 'module'"),
        ({"granularity": {"q": "x"}}, "no group for 1 modules, the first is 'up'"),
        ({"granularity": {"q": "x", "up": "y", "down": "z"}}, "names 'down', which is not an adapted module"),
        ({"bounds": (0.1, 1.0)}, "`bounds` must be .* with 0 between them"),
        ({"bounds": (0.0, 0.0)}, "`bounds`"),
        ({"bounds": (0.0, float("inf"))}, "`bounds`"),
    ],
)
def test_a_space_that_makes_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WeightSpace(["a"], ["q", "up"], **options)


@pytest.mark.parametrize("granularity", ["layer", "module", "groups"])
def test_a_search_with_weights_of_groups(granularity: Any, mixture: AdaptiveMixture, tokenizer: Any) -> None:
    if granularity == "groups":
        granularity = {name: "attention" if "self_attn" in name else "mlp" for name in modules(mixture)}
    result = mixture.search(
        ROWS,
        method="cem",
        granularity=granularity,
        validation=None,
        num_generations=8,
        population_size=16,
        bounds=(-1.0, 1.0),
        one_standard_error=False,
    )
    assert result.improved
    assert len(result.groups) == len(result.alpha["all"]) > 1
    assert result.weights["all"] == pytest.approx(np.mean(result.alpha["all"]))
    assert mixture.weights == result.weights
    objective = LogLikelihoodObjective(ROWS, tokenizer)
    assert np.mean(objective(mixture.model)) == pytest.approx(result.score, abs=1e-5)
    saved = logits(mixture.model)
    mixture.set_weights(result.weights)  # the means alone are another mixture
    assert not torch.allclose(logits(mixture.model), saved)


# ------------------------------------------------------------------------------------------ optimizers


PAPER = {"mean": 1 / 2, "std": 0.5, "min_std": 0.0}  # the cross-entropy method of the paper's code, for two experts


@pytest.mark.parametrize("name", ["gradient", "cem", "cma-es", "paper"])
def test_every_method_finds_a_planted_mixture(name: str, tmp_path: Path, tokenizer: Any) -> None:
    """The answers were sampled from a mixture, so hardly any other makes many of them more likely."""
    names = {
        name: save_expert(tmp_path / name, SVFConfig(target_modules="all-linear"), seed=10 + i)
        for i, name in enumerate(["one", "two"])
    }
    mixture = AdaptiveMixture.from_pretrained(base_model(), names, tokenizer=tokenizer)
    planted = {"one": 0.85, "two": 0.3}
    mixture.set_weights(planted)
    torch.manual_seed(0)
    prompts = torch.randint(4, 40, (64, 4))
    sampled = mixture.generate(
        prompts, attention_mask=torch.ones_like(prompts), do_sample=True, top_k=0, max_new_tokens=24
    )
    answers = [answer.split("</s>")[0] for answer in tokenizer.batch_decode(sampled[:, 4:])]
    rows = [
        {"prompt": prompt, "completion": answer}
        for prompt, answer in zip(tokenizer.batch_decode(prompts), answers, strict=True)
    ]
    truth = np.mean(LogLikelihoodObjective(rows, tokenizer)(mixture.model))
    rough = name == "paper"  # may shrink too soon
    generations = 40 if name == "gradient" else 10
    result = mixture.search(
        rows,
        method="cem" if rough else name,
        optimizer_kwargs=PAPER if rough else {},
        num_generations=generations,
        population_size=12,
        validation=None,
        in_context=False,
    )
    assert result.improved
    assert result.score >= truth - (0.05 if rough else 1e-3) * abs(truth)
    assert mixture.weights == pytest.approx(planted, abs=0.3 if rough else 0.1)


def test_the_gradient_is_that_of_the_score(mixture: AdaptiveMixture, tokenizer: Any) -> None:
    space = WeightSpace(mixture.experts, modules(mixture), "layer")
    evaluator = Evaluator(mixture.model, space, LogLikelihoodObjective(EXAMPLES, tokenizer), batch_size=2)
    x = np.random.default_rng(0).uniform(0.2, 0.8, space.dim)
    value, gradient = evaluator.value_and_gradient(x, range(len(EXAMPLES)))
    assert value == pytest.approx(evaluator.scores([x], range(len(EXAMPLES))).mean(), abs=1e-5)
    for i in range(space.dim):
        step = np.zeros(space.dim)
        step[i] = 1e-2
        high, low = evaluator.scores([x + step, x - step], range(len(EXAMPLES))).mean(axis=1)
        assert gradient[i] == pytest.approx((high - low) / 2e-2, abs=2e-3)


def test_the_gradient_goes_through_the_common_prefix(
    mixture: AdaptiveMixture, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective, read = of_led("log-likelihood", tokenizer), []
    forward = type(mixture.model).forward

    def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
        read.append(kwargs["input_ids"].numel())
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(mixture.model), "forward", counting)
    space = WeightSpace(mixture.experts, modules(mixture), "layer")
    x = np.random.default_rng(0).uniform(0.2, 0.8, space.dim)
    value, gradient = Evaluator(mixture.model, space, objective).value_and_gradient(x, range(len(LED)))
    shared = sum(read)
    begin, objective.prefix_ids = len(objective.prefix_ids), []
    read.clear()
    expected, slope = Evaluator(mixture.model, space, objective).value_and_gradient(x, range(len(LED)))
    assert sum(read) - shared == (len(LED) - 1) * begin
    assert value == pytest.approx(expected, abs=1e-5)
    assert gradient == pytest.approx(slope, abs=1e-5)
    assert np.abs(slope).max() > 1e-3


def test_gradient_descent_minimizes_a_quadratic_within_bounds() -> None:
    optimizer = GradientDescent(np.array([0.5, 0.5]), bounds=np.array([[0.0, 1.0]] * 2))
    target = np.array([0.8, 1.5])
    for _ in range(200):
        x = optimizer.ask()
        optimizer.tell([(x, float(np.square(x - target).sum()))], [2 * (x - target)])
    assert optimizer.ask() == pytest.approx([0.8, 1.0], abs=1e-2)
    with pytest.raises(ValueError, match="needs `gradients`"):
        optimizer.tell([(x, 0.0)])
    assert GradientDescent(np.array([-1.0, 2.0]), bounds=np.array([[0.0, 1.0]] * 2)).ask().tolist() == [0, 1]


def test_a_gradient_needs_an_objective_that_has_one(mixture: AdaptiveMixture, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"'distance' has no gradient\. Use method='cem'"):
        mixture.search(objective=Distance(TARGET), method="gradient")
    with pytest.raises(ValueError, match="'distance' has no gradient"):
        mixture.search(objective=Distance(TARGET), optimizer=GradientDescent(np.zeros(3)))
    with pytest.raises(ValueError, match=r"'reward \+ 0.01 log-likelihood' has no gradient"):
        mixture.search(objective=OBJECTIVES["both"](tokenizer), method="gradient")
    evaluator = Evaluator(mixture.model, WeightSpace(mixture.experts, modules(mixture)), Distance(TARGET))
    with pytest.raises(ValueError, match="'distance' has no gradient"):
        evaluator.value_and_gradient(np.zeros(3), [0])


@pytest.mark.parametrize("name", ["cem", "cma-es"])
def test_optimizers_respect_bounds_and_start_inside(name: str) -> None:
    space = WeightSpace(["a", "b"], ["q"], bounds=(-0.2, 0.3))
    optimizer = make_optimizer(name, space, start=np.zeros(2), population_size=6, seed=0)
    for _ in range(3):
        candidates = [optimizer.ask() for _ in range(6)]
        assert all((space.low <= x).all() and (x <= space.high).all() for x in candidates)
        optimizer.tell([(x, float(x.sum())) for x in candidates])


# ------------------------------------------------------------------------------------------ racing, limits


class Noisy(Distance):
    """Each example adds something of its own, the same for all candidates, and a little that is not."""

    def score(self, model: Any, indices: Sequence[int]) -> list[float]:
        scores = super().score(model, indices)
        return [s + i % 3 + 0.02 * np.sin(1000 * s * (i + 1)) for s, i in zip(scores, indices, strict=True)]


def test_racing_comes_to_the_same_for_less(mixture: AdaptiveMixture) -> None:
    found = {
        racing: mixture.search(objective=Noisy(TARGET, 12), racing=racing, validation=None, num_generations=8)
        for racing in (False, True)
    }
    assert found[True].usage.evaluations < 0.7 * found[False].usage.evaluations
    for result in found.values():
        assert result.searched_weights == pytest.approx(TARGET, abs=0.12)


def test_dropped_candidates_are_told_behind_those_that_were_not(mixture: AdaptiveMixture) -> None:
    told: list[list[tuple[np.ndarray, float]]] = []

    class Spy(RandomSearch):
        num_elites = 1  # a race may drop all but the best

        def tell(self, solutions: Sequence[tuple[np.ndarray, float]], gradients: Any = None) -> None:
            told.append(list(solutions))

    class Misleading(Distance):
        """Example 0 is the only one that says something; the others are the same for all."""

        def score(self, model: Any, indices: Sequence[int]) -> list[float]:
            return [s - 10 * i for s, i in zip(super().score(model, indices), indices, strict=True)]

    space = WeightSpace(mixture.experts, modules(mixture))
    evaluator = Evaluator(mixture.model, space, Misleading(TARGET, 8))
    spy = Spy(population_size=16)
    outcome = run_search(evaluator, spy, range(8), SearchConfig(racing=True), num_generations=1)
    on_all = {tuple(entry["candidate"]): len(entry["examples"]) for entry in evaluator.state_dict()}
    values = np.array([value for _, value in told[0]])
    seen = [on_all[tuple(x)] for x, _ in told[0]]
    assert {size: seen.count(size) for size in (2, 4, 8)} == {2: 8, 4: 4, 8: 4}
    assert max(values[np.array(seen) == 8]) < min(values[np.array(seen) == 4])
    assert max(values[np.array(seen) == 4]) < min(values[np.array(seen) == 2])
    distances = [np.abs(x - list(TARGET.values())).sum() for x, _ in told[0]]
    assert seen[int(np.argmin(distances))] == 8
    assert outcome.finalists[0].tolist() == told[0][int(np.argmin(distances))][0].tolist()


@pytest.mark.parametrize("method", ["cem", "gradient"])
def test_a_search_keeps_to_its_time(
    method: str, mixture: AdaptiveMixture, monkeypatch: pytest.MonkeyPatch, tokenizer: Any
) -> None:
    """A clock that a batch of scores or a step of the gradient moves by one second, and nothing else does."""
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])

    class Slow(LogLikelihoodObjective):
        differentiable = True

        def score(self, model: Any, indices: Sequence[int], prefix: Any = None) -> list[float]:
            clock[0] += 1
            return super().score(model, indices)

        def score_tensor(self, model: Any, indices: Sequence[int], prefix: Any = None) -> torch.Tensor:
            clock[0] += torch.is_grad_enabled()
            return super().score_tensor(model, indices)

    options: dict[str, Any] = {"method": method, "racing": False, "population_size": 4, "num_generations": 99}
    options |= {"in_context": False, "batch_size": 64, "objective": Slow(EXAMPLES * 2, tokenizer)}
    for validation, searches in ((None, 1), (4, 5)):
        result = mixture.search(max_seconds=31, validation=validation, **options)
        assert result.stopped == "max_seconds"
        assert len(result.history) == 30 // searches  # one second for the baselines
        assert result.evaluated_on == ("cross-validation" if validation else "search")
        assert result.seconds <= 31 + 2 * searches + 4  # the choice among the finalists, and the scores of each part
    result = mixture.search(max_seconds=0, validation=None, **options)
    assert (result.stopped, len(result.history)) == ("max_seconds", 1)


def test_a_search_without_progress_stops(mixture: AdaptiveMixture) -> None:
    class AnyExpert(Distance):
        def score(self, model: Any, indices: Sequence[int]) -> list[float]:
            return (self.weights(model, indices).abs().sum(-1) > 0).double().tolist()

    result = mixture.search(objective=AnyExpert(TARGET), patience=3, num_generations=20)
    assert (result.stopped, len(result.history)) == ("patience", 4)


@pytest.mark.parametrize("racing", [False, True])
def test_a_search_in_which_nothing_differs_stops_at_once(racing: bool, mixture: AdaptiveMixture) -> None:
    class Flat(Distance):
        def score(self, model: Any, indices: Sequence[int]) -> list[float]:
            return [0.25] * len(indices)

    with pytest.warns(UserWarning, match=r"all baselines and candidates have the same score, 0\.25"):
        result = mixture.search(objective=Flat(TARGET, examples=8), validation=3, racing=racing, num_generations=20)
    assert (result.stopped, len(result.history), result.evaluated_on) == ("equal_scores", 1, "search")
    assert not result.improved


def test_a_long_search_says_how_long(mixture: AdaptiveMixture, monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    monkeypatch.setattr("peft_svf.search.validated.progress_note", notes.append)
    monkeypatch.setattr("peft_svf.search.validated.LONG", 0)
    mixture.search(objective=Distance(TARGET), num_generations=1)
    assert any("will take up to about 0 min. Shorten it with max_seconds or" in note for note in notes)
    notes.clear()
    mixture.search(objective=Distance(TARGET), num_generations=1, max_seconds=60)
    assert not any("will take" in note for note in notes)


def test_ctrl_c_keeps_the_best_so_far(mixture: AdaptiveMixture) -> None:
    class Interrupted(Distance):
        calls = 0

        def score(self, model: Any, indices: Sequence[int]) -> list[float]:
            self.calls += 1
            if self.calls == 5:
                raise KeyboardInterrupt
            return super().score(model, indices)

    result = mixture.search(objective=Interrupted(TARGET, 6), racing=False)
    assert result.stopped == "interrupted"
    assert result.evaluated_on == "search"  # there was no time for more
    assert len(result.history) == 1  # the second generation was not over
    assert result.score == max(result.scores.values())
    assert mixture.weights == result.weights

    class AtOnce(Interrupted):
        calls = 3

    result = mixture.search(objective=AtOnce(TARGET, 6), racing=False)
    assert (result.stopped, result.history, result.improved) == ("interrupted", [], False)


# ------------------------------------------------------------------------------------------ honest results


class Overfit(Distance):
    """A search can fit the first examples exactly, which says nothing about the others: for those only 0 is good."""

    def __init__(self, fitted: int) -> None:
        super().__init__(TARGET, fitted)
        self.fitted = fitted

    def score(self, model: Any, indices: Sequence[int]) -> list[float]:
        norms = self.weights(model, indices).abs().sum(-1).tolist()
        fits = super().score(model, indices)
        return [fit if i < self.fitted else -norm for fit, norm, i in zip(fits, norms, indices, strict=True)]


def test_a_mixture_that_only_fits_the_examples_of_the_search_is_not_kept(mixture: AdaptiveMixture) -> None:
    held_out = [{"prompt": f"y{i}"} for i in range(6)]
    result = mixture.search(objective=Overfit(4), eval_examples=held_out, num_generations=8, population_size=16)
    assert result.evaluated_on == "validation"
    assert result.history[-1]["best"] > -0.3  # it does fit
    assert (result.choice, result.improved) == ("base", False)
    assert not any(mixture.weights.values())
    assert result.difference[0] < 0
    assert result.certain


def test_cross_validation_scores_each_example_by_a_search_without_it(mixture: AdaptiveMixture) -> None:
    sums: dict[tuple[float, ...], set[int]] = {}

    class Own(Distance):
        """Each example has its own target. Remembers on which examples each candidate was scored."""

        def score(self, model: Any, indices: Sequence[int]) -> list[float]:
            weights = self.weights(model, indices)
            for row, i in zip(weights.round(decimals=3), indices, strict=True):
                sums.setdefault(tuple(row.tolist()), set()).add(i)
            return [-float((row - i / 6).abs().sum()) for row, i in zip(weights, indices, strict=True)]

    result = mixture.search(objective=Own(TARGET, 6), validation=3, num_generations=4, population_size=8, racing=False)
    assert result.evaluated_on == "cross-validation"
    # candidates of the searches without a part, and the one of each that was then scored on the part
    assert {len(examples) for examples in sums.values()} == {4, 6}
    assert result.scores["searched"] <= max(entry["best"] for entry in result.history) + 1e-9


@pytest.mark.parametrize(
    ("scores", "start"),
    [
        ({"base": 1, "all": 2, "narrow": 3, "last": 0, "uniform": 2}, [0, 1, 0]),
        ({"base": 2, "all": 1, "narrow": 2, "last": 2, "uniform": 2}, [0, 1, 0]),
        ({"base": 2, "all": 1, "narrow": 1, "last": 1, "uniform": 2}, [1 / 3, 1 / 3, 1 / 3]),
        ({"base": 2, "all": 1, "narrow": 1, "last": 1, "uniform": 1}, [0, 0, 0]),
        ({"base": 1, "all": 1, "narrow": 1, "last": 1, "uniform": 1}, [1 / 3, 1 / 3, 1 / 3]),
    ],
)
def test_a_search_starts_at_the_best_baseline(
    scores: dict[str, float], start: list[float], mixture: AdaptiveMixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = WeightSpace(mixture.experts, modules(mixture))
    values = {tuple(x.round(3)): scores[name] for name, x in space.baselines().items()}
    starts: list[np.ndarray] = []

    class Known(Distance):
        def score(self, model: Any, indices: Sequence[int]) -> list[float]:
            return [float(values.get(tuple(row), -1)) for row in self.weights(model, indices).numpy().round(3)]

    def spy(name: str, space: Any, *, start: np.ndarray, **kwargs: Any) -> Any:
        starts.append(start)
        return make_optimizer(name, space, start=start, **kwargs)

    monkeypatch.setattr("peft_svf.search.validated.make_optimizer", spy)
    config = SearchConfig(method="cem", num_generations=1, population_size=4, in_context=False)
    split = Split([0, 1, 2, 3])
    ValidatedSearch(mixture.model, Known(TARGET, 4), split, config, lambda granularity: space).run()
    assert starts[-1].tolist() == pytest.approx(start)


def test_the_start_stays_unless_another_is_better_by_one_standard_error(mixture: AdaptiveMixture) -> None:
    space = WeightSpace(mixture.experts, modules(mixture))
    start, mean, best = np.zeros(3), np.full(3, 0.5), np.ones(3)
    scores: dict[float, list[float]] = {}

    class Known(Distance):
        def score(self, model: Any, indices: Sequence[int]) -> list[float]:
            rows = self.weights(model, indices)[:, 0].numpy().round(3).tolist()
            return [scores[row][i] for row, i in zip(rows, indices, strict=True)]

    for of_mean, of_best, expected in (
        ([1, 0, 0, 0], [1, 1, -1, 0], start),  # one of four may be luck
        ([1, 1, 1, 0], [1, 1, 1, 1], mean),
        ([1, 1, 1, 0], [2, 2, 2, 0], best),
        ([1, 0, 0, 0], [1, 1, 1, 0], best),
        ([-1, -1, -1, 0], [0, 0, 0, 0], start),
    ):
        scores |= {0.0: [0.0] * 4, 0.5: [float(x) for x in of_mean], 1.0: [float(x) for x in of_best]}
        evaluator = Evaluator(mixture.model, space, Known(TARGET, 4))
        found = ranked(evaluator, [start, mean], [best], range(4), one_standard_error=True)
        assert found[0] is expected
        assert len(found) == 3
    scores |= {0.5: [1.0, 0, 0, 0], 1.0: [1.0, 0, 0, 0]}
    evaluator = Evaluator(mixture.model, space, Known(TARGET, 4))
    found = ranked(evaluator, [start, mean], [best], range(4), one_standard_error=False)
    assert found[0] is mean


@pytest.mark.parametrize("as_dataset", [False, True])
def test_evaluation_examples(as_dataset: bool, mixture: AdaptiveMixture) -> None:
    rows: Any = Dataset.from_list(ROWS[2:]) if as_dataset else ROWS[2:]
    result = mixture.search(ROWS[:2], eval_examples=rows, method="cem", num_generations=2, population_size=4)
    assert (result.evaluated_on, result.num_evaluated) == ("validation", 2)
    assert len(result.history) == 2
    assert result.settings["examples"] == 4


@pytest.mark.parametrize(
    ("count", "validation", "held_out", "parts"),
    [
        (30, "auto", 10, 0),
        (12, "auto", 0, 3),
        (5, "auto", 0, 0),
        (12, None, 0, 0),
        (10, 0.2, 2, 0),
        (10, 5, 0, 5),
        (3, 3, 0, 3),
    ],
)
def test_which_examples_are_for_what(count: int, validation: Any, held_out: int, parts: int) -> None:
    objective = Distance(TARGET, count)
    split = split_examples(objective, validation, seed=0)
    assert len(split.held_out) == held_out
    assert len(split.parts) == parts
    assert sorted(split.search + split.held_out) == list(range(count))
    if parts:
        assert sorted(i for part in split.parts for i in part) == split.search == split.evaluated
        assert all(sorted(split.rest(part) + part) == split.search for part in split.parts)
    elif held_out:
        assert split.evaluated == split.held_out


def test_the_same_question_is_on_one_side_only(mixture: AdaptiveMixture) -> None:
    objective = Distance(TARGET, 12)
    for i in range(6):  # three of four
        objective.examples[i]["prompt"] = f"q{i % 2}"
    for validation in (3, 0.3, "auto"):
        split = split_examples(objective, validation, seed=0)
        for part in split.parts or [split.held_out]:
            inside = {objective.examples[i]["prompt"] for i in part}
            assert not inside & {objective.examples[i]["prompt"] for i in split.search if i not in part}
    seen: list[str] = []

    def spy(prompts: list[str], completions: list[str], **kwargs: Any) -> list[float]:
        seen.extend(prompt for prompt in prompts if "\n\n" in prompt)
        return [0.0] * len(completions)

    rows = [{"prompt": f"q{i % 3}?", "answer": f"a{i % 3}"} for i in range(6)]
    options: dict[str, Any] = {"method": "cem", "num_generations": 1, "population_size": 2, "max_new_tokens": 1}
    for validation in (None, 3):
        mixture.search(rows, spy, validation=validation, **options)
    assert seen
    for prompt in seen:
        *shown, asked = prompt.split("\n\n")
        assert not any(one.startswith(asked) for one in shown)


@pytest.mark.parametrize("score", [float("nan"), float("-inf")])
def test_a_score_that_is_no_number_is_an_error(score: float, mixture: AdaptiveMixture) -> None:
    class Broken(Distance):
        def score(self, model: Any, indices: Sequence[int]) -> list[float]:
            return [score if i == 1 else 0.0 for i in indices]

    with pytest.raises(ValueError, match=rf"'distance' returned {score} for example 1"):
        mixture.search(objective=Broken(TARGET, 3))


def test_an_answer_ends_at_any_of_the_end_tokens(mixture: AdaptiveMixture, tokenizer: Any) -> None:
    lengths: list[int] = []

    def spy(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        lengths.extend(map(len, completion_ids))
        return [0.0] * len(completion_ids)

    mixture.model.generation_config.eos_token_id = [2, *range(20, 40)]
    objective = RewardObjective(ROWS, spy, tokenizer, generation_kwargs={"max_new_tokens": 12})
    objective.score(mixture.model, range(4))
    together = lengths.copy()
    lengths.clear()
    for i in range(4):
        objective.score(mixture.model, [i])
    assert together == lengths
    assert len(set(lengths)) > 1


def test_evaluation_examples_that_make_no_sense(mixture: AdaptiveMixture) -> None:
    with pytest.raises(ValueError, match="Example 1 of `eval_examples` has the prompt of example 2 of the search"):
        mixture.search(ROWS[:3], eval_examples=[ROWS[3], ROWS[2]])
    with pytest.raises(ValueError, match="`eval_examples` is empty"):
        mixture.search(ROWS, eval_examples=[])
    with pytest.raises(ValueError, match="Pass `eval_examples` or `validation=3`, not both"):
        mixture.search(ROWS[:3], eval_examples=[ROWS[3]], validation=3)
    with pytest.raises(ValueError, match="Example 1 is 'y'; expected rows with a column 'prompt'"):
        mixture.search(objective=Distance(TARGET), eval_examples=["y"])  # type: ignore[list-item]


def test_validation_may_be_a_number_of_numpy() -> None:
    objective = Distance(TARGET, 12)
    config = SearchConfig(validation=np.int64(4))  # type: ignore[arg-type]
    assert len(split_examples(objective, config.validation, seed=0).parts) == 4
    config = SearchConfig(validation=np.float32(0.25))  # type: ignore[arg-type]
    assert len(split_examples(objective, config.validation, seed=0).held_out) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": -1}, "`seed`"),
        ({"seed": None}, "`seed`"),
        ({"seed": 0.5}, "`seed`"),
        ({"population_size": 1}, "`population_size` must be .*at least 2"),
        ({"population_size": 0, "method": "cma-es"}, "`population_size` must be .*at least 2"),
    ],
)
def test_settings_that_make_no_sense(options: dict[str, Any], message: str, mixture: AdaptiveMixture) -> None:
    with pytest.raises(ValueError, match=message):
        mixture.search(objective=Distance(TARGET), **options)


def test_an_optimizer_that_is_none(mixture: AdaptiveMixture) -> None:
    class Half:
        def ask(self) -> np.ndarray:
            return np.zeros(3)

    with pytest.raises(TypeError, match="Half has no `tell`"):
        mixture.search(objective=Distance(TARGET), optimizer=Half())
    with pytest.raises(TypeError, match="str has no `ask`"):
        mixture.search(objective=Distance(TARGET), optimizer="cem")
    with pytest.raises(ValueError, match="`optimizer_kwargs` belong to one method"):
        mixture.search(objective=Distance(TARGET), optimizer=RandomSearch(), optimizer_kwargs={"std": 0.1})


def test_an_optimizer_of_another_library(mixture: AdaptiveMixture) -> None:
    class Foreign:
        """It may have attributes that mean something else than ours, and a method where we have an array."""

        population_size = 3
        num_elites = "many"
        uses_gradient = True

        def ask(self) -> list[float]:
            return [0.5, 0.5, 0.5]

        def tell(self, solutions: list[tuple[np.ndarray, float]]) -> None:
            assert len(solutions) == 3

        def mean(self) -> float:
            return 0.0

        def should_stop(self) -> bool:
            return True

    result = mixture.search(objective=Distance(TARGET, 4), optimizer=Foreign(), num_generations=2)
    assert (result.method, result.stopped, len(result.history)) == ("Foreign", "optimizer", 1)
    with pytest.raises(TypeError, match="is the class Foreign"):
        mixture.search(objective=Distance(TARGET, 4), optimizer=Foreign)
    with pytest.raises(ValueError, match="`population_size` would have no effect"):
        mixture.search(objective=Distance(TARGET, 4), optimizer=Foreign(), population_size=4)
    Foreign.ask = lambda self: [0.5, 0.5]  # type: ignore[assignment, return-value]
    with pytest.raises(ValueError, match=r"shape \[2\], but the search has 3 variables"):
        mixture.search(objective=Distance(TARGET, 4), optimizer=Foreign(), num_generations=2)


def test_one_expert_can_be_searched_by_every_method(experts: dict[str, str], tokenizer: Any) -> None:
    alone = {"all": experts["all"]}
    mixture = AdaptiveMixture.from_pretrained(base_model(), alone, tokenizer=tokenizer)
    for method in ("gradient", "cem", "cma-es"):
        result = mixture.search(ROWS, method=method, num_generations=2, population_size=4)
        assert len(result.history) == 2


def test_several_answers_for_a_prompt_are_refused(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="num_return_sequences"):
        RewardObjective(ROWS, count_letters, tokenizer, generation_kwargs={"num_return_sequences": 2})


def test_tokens_are_counted_by_pair_and_come_back_with_a_checkpoint(mixture: AdaptiveMixture, tokenizer: Any) -> None:
    space, objective = WeightSpace(mixture.experts, modules(mixture)), LogLikelihoodObjective(ROWS, tokenizer)
    evaluator = Evaluator(mixture.model, space, objective, batch_size=3)
    candidates = [*np.random.default_rng(0).uniform(0, 1, (3, 3))]
    evaluator.scores(candidates, range(4))
    assert evaluator.usage.tokens == 3 * sum(objective.lengths())
    other = Evaluator(mixture.model, space, LogLikelihoodObjective(ROWS, tokenizer), batch_size=3)
    other.load_state_dict(evaluator.state_dict())
    assert other.usage.tokens == 0
    found = other.scores(candidates, range(4))
    assert other.usage.tokens == evaluator.usage.tokens
    assert found.tolist() == evaluator.scores(candidates, range(4)).tolist()
    other.value_and_gradient(candidates[0], range(4))
    assert other.usage.tokens == evaluator.usage.tokens + sum(objective.lengths())


def test_a_gradient_that_does_not_fit_is_made_of_parts(mixture: AdaptiveMixture, tokenizer: Any) -> None:
    class Large(LogLikelihoodObjective):
        def score_tensor(self, model: Any, indices: Sequence[int], prefix: Any = None) -> torch.Tensor:
            if len(indices) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return super().score_tensor(model, indices, prefix)

    space, x = WeightSpace(mixture.experts, modules(mixture)), np.array([0.3, 0.5, 0.7])
    value, gradient = Evaluator(mixture.model, space, LogLikelihoodObjective(ROWS, tokenizer)).value_and_gradient(
        x, range(4)
    )
    evaluator = Evaluator(mixture.model, space, Large(ROWS, tokenizer))
    found, slope = evaluator.value_and_gradient(x, range(4))
    assert found == pytest.approx(value, abs=1e-5)
    assert slope == pytest.approx(gradient, abs=1e-5)
    assert evaluator.batch_size == 1


def test_ctrl_c_while_a_part_is_scored_keeps_the_search(mixture: AdaptiveMixture) -> None:
    class Interrupted(Distance):
        """When a single candidate is scored on its part."""

        calls = 0

        def score(self, model: Any, indices: Sequence[int]) -> list[float]:
            self.calls += len(indices) == 2
            if self.calls == 1 and len(indices) == 2:
                raise KeyboardInterrupt
            return super().score(model, indices)

    result = mixture.search(
        objective=Interrupted(TARGET, 6), validation=3, racing=False, num_generations=2, population_size=8
    )
    assert (result.stopped, result.evaluated_on, len(result.history)) == ("interrupted", "search", 2)


@pytest.mark.parametrize("what", ["memory", "template"])
def test_a_search_does_without_in_context_prompting(what: str, mixture: AdaptiveMixture, tokenizer: Any) -> None:
    class Large(LogLikelihoodObjective):
        shares_prefix = True

        def score(self, model: Any, indices: Sequence[int], prefix: Any = None) -> list[float]:
            if what == "memory" and max(self.lengths()[i] for i in indices) > 30:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return super().score(model, indices, prefix)

    tokenizer = copy.deepcopy(tokenizer)
    rows = ROWS
    if what == "template":
        tokenizer.chat_template = (
            "{% if messages | length > 2 %}{{ raise_exception('too many turns') }}{% endif %}"
            "{% for m in messages %}{{ m['content'] }}{% endfor %}"
        )
        rows = [
            {
                "prompt": [{"role": "user", "content": row["prompt"]}],
                "completion": [{"role": "assistant", "content": row["completion"]}],
            }
            for row in ROWS
        ]
    with pytest.warns(UserWarning, match="In-context prompting was left out"):
        result = mixture.search(objective=Large(rows, tokenizer), num_generations=1, population_size=2)
    assert "in-context" not in result.scores


def test_ctrl_c_while_the_result_is_evaluated_keeps_it(mixture: AdaptiveMixture) -> None:
    class Interrupted(Distance):
        """At the first call for held-out examples after the one for the baselines."""

        calls = 0

        def score(self, model: Any, indices: Sequence[int]) -> list[float]:
            self.calls += set(indices) <= {4, 5}
            if self.calls == 2:
                self.calls += 1
                raise KeyboardInterrupt
            return super().score(model, indices)

    result = mixture.search(
        objective=Interrupted(TARGET, 4),
        eval_examples=[{"prompt": "y"}, {"prompt": "z"}],
        racing=False,
        num_generations=3,
    )
    assert (result.stopped, result.evaluated_on, len(result.history)) == ("interrupted", "validation", 3)
    assert mixture.weights == result.weights


@pytest.mark.parametrize("validation", [0.0, 1.0, 0.01, 1, 13, True, "yes", []])
def test_a_validation_that_makes_no_sense(validation: Any) -> None:
    with pytest.raises(ValueError, match="validation"):
        split_examples(Distance(TARGET, 12), validation, seed=0)


@given(st.lists(st.floats(-5, 5), min_size=3, max_size=30), st.floats(-3, 3))
@settings(max_examples=30, deadline=None)
def test_an_interval_holds_the_mean_and_moves_with_the_scores(values: list[float], shift: float) -> None:
    low, high = interval(values)
    assert low - 1e-9 <= np.mean(values) <= high + 1e-9
    assert interval([value + shift for value in values]) == pytest.approx((low + shift, high + shift), abs=1e-6)


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    hits = sum(low <= 0.3 <= high for low, high in (interval(rng.random(100) < 0.3) for _ in range(200)))
    assert 175 <= hits <= 198


@pytest.mark.parametrize(("count", "quantile"), [(6, 2.571), (12, 2.201), (30, 2.045), (1000, 1.962)])
def test_the_interval_is_as_wide_as_students(count: int, quantile: float) -> None:
    values = np.random.default_rng(0).normal(size=count)
    low, high = interval(values)
    assert (high - low) / 2 == pytest.approx(quantile * values.std(ddof=1) / np.sqrt(count), rel=0.08)


def test_ties_go_to_the_baseline() -> None:
    scores = {"base": np.array([0.0, 1.0]), "math": np.array([1.0, 0.0]), "searched": np.array([0.5, 0.5])}
    assert compared(scores, ["base", "math"])[:2] == ("base", False)
    scores["searched"] = np.array([0.5, 0.6])
    best, beaten, (mean, low, high) = compared(scores, ["base", "math"])
    assert (best, beaten) == ("base", True)
    assert mean == pytest.approx(0.05)
    assert low < 0 < high  # nobody knows


def test_a_tie_is_not_broken_by_rounding() -> None:
    values = np.array([0.1, 0.2, 0.3, 0.7, 0.15, 0.25, 0.35])
    for seed in range(20):  # the same numbers in another order, and with another last digit
        paired = np.random.default_rng(seed).permutation(values) + 1e-16
        _, beaten, difference = compared({"base": values, "searched": paired}, ["base"])
        assert not beaten
        assert difference[0] == 0
    assert compared({"base": values, "searched": values + 1e-16}, ["base"])[2] == (0, 0, 0)


def test_a_search_that_ends_at_a_baseline_names_it(mixture: AdaptiveMixture) -> None:
    """The searches without a part find something good, but the search on all examples ends at an expert."""
    target = {"all": 0.6, "narrow": 0.3, "last": 0.9}
    told: list[int] = []

    class Scripted(RandomSearch):
        """Copied for each search: the second to fourth end at the target."""

        def __init__(self) -> None:
            super().__init__(population_size=2)

        def __deepcopy__(self, memo: Any) -> Any:
            return type(self)()

        def ask(self) -> np.ndarray:
            return np.array([0.0, 1.0, 0.0] if len(told) < 2 else list(target.values()))

        def tell(self, solutions: Sequence[tuple[np.ndarray, float]], gradients: Any = None) -> None:
            told.append(len(solutions))

    result = mixture.search(
        objective=Distance(target, 6), optimizer=Scripted(), validation=3, num_generations=2, one_standard_error=False
    )
    baselines = {name: result.scores[name] for name in ("base", "all", "narrow", "last", "uniform")}
    assert not result.improved
    assert result.difference[0] > 0
    assert baselines[result.choice] == max(baselines.values()) == result.score
    assert f"The search on all examples ended at a baseline; {result.choice!r} is kept" in str(result)


def test_the_result_as_text_and_picture(mixture: AdaptiveMixture, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for granularity in ("expert", "module"):
        result = mixture.search(ROWS, method="cem", num_generations=2, population_size=4, granularity=granularity)
        result.plot(tmp_path / "search.png")
        assert (tmp_path / "search.png").read_bytes().startswith(b"\x89PNG")
    assert "Method: cross-entropy method on the objective, one weight per expert and module: as asked." in str(result)
    result.choice, result.difference = "searched", (0.1, 0.05, 0.2)
    result.evaluated_on, result.num_evaluated = "search", 12
    assert "The searched mixture beats every baseline: log-likelihood" in str(result)
    assert "which may be chance" in str(result)
    result.evaluated_on, result.num_evaluated = "validation", 5
    assert "which may be chance" in str(result)
    result.num_evaluated = 12
    assert "chance" not in str(result)
    assert "12 examples held out" in str(result)
    result.difference = (0.1, -0.05, 0.2)
    assert "which may be chance" in str(result)
    result.difference = (0.0, -0.05, 0.2)
    assert "equals the best baseline and has a higher expected reward" in str(result)
    result.expected = {"base": 0.25}
    assert "Expected reward: base 0.250." in str(result)
    result.scores["in-context"] = result.scores["searched"] + 1
    assert "In-context prompting scores higher" in str(result)
    result.choice, result.difference = "base", (-0.1, -0.2, 0.1)
    assert "No searched mixture beats 'base', which is kept" in str(result)


# ------------------------------------------------------------------------------------------ in-context prompting


def test_demonstrations_lead_the_prompt(tokenizer: Any) -> None:
    text = with_demonstrations({"prompt": "x"}, ROWS[:2], tokenizer, 100)
    assert text["prompt"] == "1+1=2\n\nwhat is a cat?an animal\n\nx"
    system, user = {"role": "system", "content": "s"}, {"role": "user", "content": "u"}
    shown = {"prompt": [system, {"role": "user", "content": "a"}], "answer": "b"}
    chat = with_demonstrations({"prompt": [system, user], "level": 3}, [shown], tokenizer, 100)
    assert chat["level"] == 3
    assert [message["content"] for message in chat["prompt"]] == ["s", "a", "b", "u"]
    short = with_demonstrations({"prompt": "x"}, ROWS[:2], tokenizer, 10)
    assert short["prompt"] == "1+1=2\n\nx"  # what fits
    assert with_demonstrations({"prompt": "x"}, ROWS[:2], tokenizer, 2) == {"prompt": "x"}
    assert answer_of({"prompt": "x", "completion": [{"content": "y"}], "answer": "z"}) == "y"
    assert answer_of({"prompt": "x", "answer": 0}) == "0"
    assert answer_of({"prompt": "x"}) is None
    assert answer_of({"prompt": "x", "answer": ["a", "b"]}) is None  # of several, none is the one to show


def test_in_context_prompting_never_shows_the_answer_it_is_asked_for(mixture: AdaptiveMixture) -> None:
    seen: list[str] = []

    def spy(prompts: list[str], completions: list[str], **kwargs: Any) -> list[float]:
        seen.extend(prompts)
        return [0.0] * len(completions)

    rows = [{"prompt": f"q{i}?", "answer": f"a{i}"} for i in range(6)]
    options: dict[str, Any] = {"method": "cem", "num_generations": 1, "population_size": 2, "max_new_tokens": 1}
    for validation in (None, 3, 1 / 3):
        seen.clear()
        result = mixture.search(rows, spy, validation=validation, **options)
        led = {prompt for prompt in seen if "\n\n" in prompt}
        assert len(led) == (2 if validation == 1 / 3 else 6)
        for prompt in led:
            *shown, asked = prompt.split("\n\n")
            assert shown
            assert f"{asked}a{asked[1]}" not in shown
        assert "in-context" in result.scores
    assert "in-context" not in mixture.search(rows, spy, in_context=False, **options).scores
    rows[2].pop("answer")
    rows = [{"prompt": row["prompt"], "level": 1} for row in rows]
    assert "in-context" not in mixture.search(rows, spy, **options).scores


# ------------------------------------------------------------------------------------------ checkpoints


@pytest.mark.parametrize("sampling", [False, True])
@pytest.mark.parametrize("method", ["cem", "cma-es"])
def test_a_resumed_search_ends_as_one_that_was_not_stopped(
    method: str, sampling: bool, mixture: AdaptiveMixture, tokenizer: Any, tmp_path: Path
) -> None:
    calls = 0

    class Counting(RewardObjective):
        def score(self, model: Any, indices: Sequence[int]) -> list[float]:  # type: ignore[override]
            nonlocal calls
            calls += 1
            if calls == stop_at:
                raise RuntimeError("power cut")
            return super().score(model, indices)

    def run(**options: Any) -> dict[str, Any]:
        nonlocal calls
        calls = 0
        kwargs = {"max_new_tokens": 4, "do_sample": sampling}
        objective = Counting(EXAMPLES * 2, count_letters, tokenizer, generation_kwargs=kwargs)
        result = mixture.search(
            objective=objective,
            method=method,
            num_generations=3,
            population_size=8,
            validation=2,
            batch_size=16,
            in_context=False,
            **options,
        )
        found = {**result.to_dict(), "usage": result.usage.evaluations}
        for name in ("checkpoint", "resume"):
            del found["settings"][name]
        return found

    stop_at = -1
    expected = run()
    whole, path = calls, tmp_path / "search.json"
    for stop_at in (8, 20):  # noqa: B007  (the objective looks at it)
        with pytest.raises(RuntimeError, match="power cut"):
            run(checkpoint=path, resume=True)
    stop_at = -1
    assert run(checkpoint=path, resume=True) == expected
    assert calls < whole - 10


def test_a_checkpoint_of_another_search(mixture: AdaptiveMixture, tmp_path: Path) -> None:
    options: dict[str, Any] = {"num_generations": 1, "checkpoint": tmp_path / "search.json"}
    mixture.search(ROWS, **options)
    with pytest.raises(ValueError, match=r"exists. Pass `resume=True`"):
        mixture.search(ROWS, **options)
    with pytest.raises(ValueError, match=r"another search: seed was 0 and is now 1\. Pass another path"):
        mixture.search(ROWS, **options, resume=True, seed=1)
    with pytest.raises(ValueError, match=r"granularity was 'expert' and is now \{"):
        mixture.search(ROWS, **options, resume=True, granularity=dict.fromkeys(modules(mixture), "all"))
    with pytest.raises(ValueError, match="method was 'gradient' and is now 'cem'"):
        mixture.search(ROWS, **options, resume=True, method="cem")
    with pytest.raises(ValueError, match="method was 'gradient' and is now 'RandomSearch'"):
        mixture.search(ROWS, **options, resume=True, optimizer=RandomSearch())
    with pytest.raises(ValueError, match="expected_reward was False and is now True"):
        mixture.search(ROWS, count_letters, **options, resume=True)
    with pytest.raises(ValueError, match="content of the examples was"):
        mixture.search([*ROWS[:3], EXAMPLES[4]], **options, resume=True)
    longer = mixture.search(ROWS, **{**options, "num_generations": 2}, resume=True, method="gradient")
    assert len(longer.history) == 2
    other = {"validation": 2, "patience": 5, "in_context": False, "one_standard_error": False, "batch_size": 3}
    assert mixture.search(ROWS, **options, **other, resume=True).evaluated_on == "cross-validation"
    (tmp_path / "search.json").write_text("{}")
    with pytest.raises(ValueError, match="is no checkpoint of a search"):
        mixture.search(ROWS, **options, resume=True)


def test_a_checkpoint_does_not_survive_another_choice_of_auto(
    mixture: AdaptiveMixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Expected rewards in the file must not be taken for rewards by a search that cannot use a gradient."""
    options: dict[str, Any] = {"num_generations": 1, "max_new_tokens": 3, "checkpoint": tmp_path / "search.json"}
    mixture.search(ROWS, count_letters, **options)
    monkeypatch.setattr("peft_svf.search.method.is_sharded", lambda model: True)
    with pytest.raises(ValueError, match="method was 'gradient' and is now 'cem'"):
        mixture.search(ROWS, count_letters, resume=True, **options)


def test_a_second_stop_loses_nothing(mixture: AdaptiveMixture) -> None:
    space = WeightSpace(mixture.experts, modules(mixture))
    first, second = (Evaluator(mixture.model, space, Distance(TARGET, 4)) for _ in range(2))
    x = np.full(3, 0.5)
    first.scores([x], range(4))
    second.load_state_dict(first.state_dict())
    second.scores([x], [1])  # and is stopped
    assert sorted(second.state_dict()[0]["examples"]) == [0, 1, 2, 3]


# ------------------------------------------------------------------------------------------ objectives


def test_a_weighted_objective_breaks_ties(mixture: AdaptiveMixture, tokenizer: Any) -> None:
    def even(completions: list[str], **kwargs: Any) -> list[float]:
        return [1.0] * len(completions)

    reward = RewardObjective(ROWS, even, tokenizer, generation_kwargs={"max_new_tokens": 2})
    likelihood = LogLikelihoodObjective(ROWS, tokenizer)
    objective = WeightedObjective([reward, likelihood], [1.0, 0.001])
    assert objective.name == "reward + 0.001 log-likelihood"
    assert objective(mixture.model) == pytest.approx([1 + 0.001 * score for score in likelihood(mixture.model)])
    assert objective.tokens == reward.tokens + likelihood.tokens
    assert objective.lengths() == likelihood.lengths()
    result = mixture.search(objective=objective, validation=None, num_generations=3)
    assert result.method == "cem"
    alone = mixture.search(ROWS, method="cem", validation=None, num_generations=3)
    assert result.searched_weights == pytest.approx(alone.searched_weights, abs=1e-6)
    with pytest.raises(ValueError, match="as many weights as objectives"):
        WeightedObjective([reward], [1.0, 2.0])
    with pytest.raises(ValueError, match="different numbers of examples"):
        WeightedObjective([reward, LogLikelihoodObjective(ROWS[:2], tokenizer)], [1.0, 2.0])


def test_a_subclass_stays_what_it_is(mixture: AdaptiveMixture, tokenizer: Any) -> None:
    class Raised(RewardObjective):
        def score(self, model: Any, indices: Sequence[int]) -> list[float]:  # type: ignore[override]
            return [score + 100 for score in super().score(model, indices)]

    objective = Raised(ROWS, count_letters, tokenizer, generation_kwargs={"max_new_tokens": 2})
    for held_out in (None, EXAMPLES[4:]):
        result = mixture.search(objective=objective, eval_examples=held_out, num_generations=1, population_size=2)
        assert result.method == "cem"
        assert "in-context" in result.scores
        assert min(result.scores.values()) >= 100
    both = WeightedObjective([objective, LogLikelihoodObjective(ROWS, tokenizer)], [1.0, 0.1])
    other = both.with_examples(ROWS[:2])
    assert len(other.examples) == 2
    assert len(both.examples) == 4
    assert min(other(mixture.model)) > 90


def test_rewards_have_weights(mixture: AdaptiveMixture, tokenizer: Any) -> None:
    def one(completions: list[str], **kwargs: Any) -> list[float]:
        return [1.0] * len(completions)

    options: dict[str, Any] = {"generation_kwargs": {"max_new_tokens": 1}}
    objective = RewardObjective(ROWS, [one, one], tokenizer, reward_weights=[0.5, 2.0], **options)
    assert objective(mixture.model) == [2.5] * 4
    with pytest.raises(ValueError, match="2 reward functions, but 1 `reward_weights`"):
        mixture.search(ROWS, [one, one], reward_weights=[1.0])
    quick: dict[str, Any] = {"method": "cem", "num_generations": 1, "population_size": 2, "max_new_tokens": 1}
    assert mixture.search(ROWS, [one, one], reward_weights=[0.5, 2.0], **quick).scores["base"] == 2.5


def test_tokens_are_counted(mixture: AdaptiveMixture, tokenizer: Any) -> None:
    objective = RewardObjective(ROWS[:1], count_letters, tokenizer, generation_kwargs={"max_new_tokens": 3})
    objective.score(mixture.model, [0, 0])
    assert 2 * (4 + 1) <= objective.tokens <= 2 * (4 + 3)
    likelihood = LogLikelihoodObjective(ROWS[:1], tokenizer)
    likelihood.score(mixture.model, [0])
    assert likelihood.tokens == 4 + 1 + 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"examples": None}, "needs `examples`, or an `objective`"),
        ({"objective": Distance(TARGET)}, "not all of them"),
        ({"batch_size": 0}, "`batch_size` must be .*at least 1"),
        ({"patience": 0}, "`patience` must be .*at least 1"),
        ({"validation": 99}, "number of cross-validation splits from 2 to 4, got 99"),
        ({"max_new_tokens": 3}, "`max_new_tokens` would have no effect: there are no `reward_funcs`"),
        ({"reward_weights": [1.0]}, "`reward_weights` would have no effect"),
        ({"examples": None, "objective": Distance(TARGET), "generation_kwargs": {"do_sample": True}}, "no effect: the"),
        ({"expected_reward": True}, "`expected_reward` needs rewards .* the objective is 'log-likelihood'"),
    ],
)
def test_arguments_that_make_no_sense(options: dict[str, Any], message: str, mixture: AdaptiveMixture) -> None:
    before = mixture.weights
    with pytest.raises(ValueError, match=message):
        mixture.search(**{"examples": ROWS, **options})
    assert mixture.weights == before


# ------------------------------------------------------------------------------------------ out


def test_an_applied_mixture_is_an_adapter_of_its_own(mixture: AdaptiveMixture) -> None:
    mixture.set_weights([0.7, -0.2, 0.4])
    expected = logits(mixture.model)
    mixture.apply("kept")
    mixture.set_weights([0.0, 0.0, 0.0])
    assert mixture.model.active_adapters == ["mixture"]
    mixture.model.set_adapter("kept")
    assert torch.allclose(logits(mixture.model), expected, atol=1e-6)
    rows = mixture.model.generate(
        IDS, attention_mask=torch.ones_like(IDS), adapter_names=["kept", "__base__"], max_new_tokens=2
    )
    assert len(rows) == 2
    with pytest.raises(ValueError, match="already exists"):
        mixture.apply("kept")
    with pytest.raises(ValueError, match="must not contain dots"):
        mixture.apply("v1.2")


@pytest.mark.usefixtures("never_fold")
def test_grouped_weights_survive_saving(mixture: AdaptiveMixture, tmp_path: Path) -> None:
    result = mixture.search(
        ROWS,
        method="cem",
        granularity="layer",
        validation=None,
        num_generations=3,
        population_size=8,
        bounds=(-1.0, 1.0),
        one_standard_error=False,
    )
    assert result.improved
    mixture.save_pretrained(tmp_path / "mine")
    model = PeftModel.from_pretrained(base_model(), tmp_path / "mine")
    assert torch.equal(logits(model), logits(mixture.model))
    card = (tmp_path / "mine" / "README.md").read_text()
    assert "import peft_svf" in card
    assert "kept: **searched**" in card
    assert f"| searched | {result.scores['searched']:.3f} |" in card
    assert all(f"| {name} | {name} |" in card for name in EXPERTS)  # the folder's name, not its path
    assert str(tmp_path) not in card
