"""`AdaptiveMixture` and its objectives, on a random Llama with random experts."""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers import IDS, VOCABULARY, base_model, logits, make_tokenizer, save_expert
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedTokenizerFast

from peft_svf import (
    AdaptiveMixture,
    LogLikelihoodObjective,
    Objective,
    Optimizer,
    RewardObjective,
    SVFConfig,
    SVFLayer,
    svf_layers,
)
from peft_svf.scoring import text_of
from peft_svf.scoring.tokens import prompt_ids

EXPERTS = {
    "all": SVFConfig(target_modules="all-linear"),
    "narrow": SVFConfig(target_modules=["q_proj", "up_proj"], r=5),
    "last": SVFConfig(target_modules=r".*\.1\..*(o_proj|down_proj)", r=20),
}
EXAMPLES = [
    {"prompt": "1+1=", "completion": "2"},
    {"prompt": "what is a cat?", "completion": "an animal"},
    {"prompt": "ab", "completion": "abab abab"},
    {"prompt": "count 1 2 3", "completion": "4 5"},
    {"prompt": "x", "completion": ""},
]
MESSAGES = [
    {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "completion": [{"role": "assistant", "content": row["completion"]}],
    }
    for row in EXAMPLES
]
QUICK: dict[str, Any] = {"method": "cem", "num_generations": 2, "population_size": 3}
SHORT: dict[str, Any] = {**QUICK, "max_new_tokens": 3}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Three experts with different `r` and different modules."""
    folder = tmp_path_factory.mktemp("experts")
    return {name: save_expert(folder / name, config, seed) for seed, (name, config) in enumerate(EXPERTS.items())}


@pytest.fixture
def mixture(experts: dict[str, str], tokenizer: PreTrainedTokenizerFast) -> AdaptiveMixture:
    return AdaptiveMixture.from_pretrained(base_model(), experts, tokenizer=tokenizer)


def deltas(mixture: AdaptiveMixture) -> list[torch.Tensor]:
    return [m.svf_delta[mixture.adapter_name]().detach() for m in mixture.model.modules() if isinstance(m, SVFLayer)]


@torch.no_grad()
def weights_of_rows(model: Any, experts: Sequence[str], rows: int) -> torch.Tensor:
    """Return the mixture that each batch row runs with, `[rows, experts]`: what the δ of the rows are made of."""
    alone, mixed = [], []
    for layer in svf_layers(model):
        assert layer.rows is not None
        found = layer.rows(torch.zeros(rows, 1, layer.in_features))
        assert found is not None
        found = found.flatten(1)
        deltas = torch.zeros(len(experts), found.shape[1])
        for i, name in enumerate(experts):
            if name in layer.svf_delta:
                delta = layer.svf_delta[name]()
                deltas[i, : len(delta)] = delta
        alone.append(deltas)
        mixed.append(found)
    whole, given = torch.cat(alone, dim=1).double(), torch.cat(mixed, dim=1).double()
    return torch.linalg.lstsq(whole.T, given.T).solution.T.round(decimals=5)


class Distance(Objective):
    """An objective that looks at the mixture of each row in place of a text: best at `target`."""

    name = "distance"

    def __init__(self, target: dict[str, float], examples: int = 1) -> None:
        self.experts, self.target = list(target), torch.tensor(list(target.values()), dtype=torch.float64)
        self.examples = [{"prompt": f"x{i}"} for i in range(examples)]

    def lengths(self) -> list[int]:
        return [1] * len(self.examples)

    def weights(self, model: Any, indices: Sequence[int]) -> torch.Tensor:
        return weights_of_rows(model, self.experts, len(indices))

    def score(self, model: Any, indices: Sequence[int]) -> list[float]:
        scores: list[float] = (-(self.weights(model, indices) - self.target).abs().sum(-1)).tolist()
        return scores


def count_letters(completions: list[str], **kwargs: Any) -> list[float]:
    return [float(sum(c in "abcdefghijkl" for c in text)) for text in completions]


# ---------------------------------------------------------------------------------------------------- weights


def test_starts_as_the_uniform_mixture(mixture: AdaptiveMixture, experts: dict[str, str]) -> None:
    assert mixture.weights == dict.fromkeys(EXPERTS, pytest.approx(1 / 3))
    mixture.model.base_model.add_weighted_adapter(list(experts), [1 / 3] * 3, "by hand")
    found = logits(mixture.model)
    mixture.model.set_adapter("by hand")
    assert torch.allclose(found, logits(mixture.model), atol=1e-6)


def test_experts_with_gaps_mix_and_that_is_said(experts: dict[str, str], tokenizer: Any) -> None:
    with pytest.warns(UserWarning, match=r"all \d+ in 14, narrow 20 in 4, last \d+ in \d+ modules"):
        AdaptiveMixture.from_pretrained(base_model(), experts, tokenizer=tokenizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        same = {"one": experts["all"], "two": experts["all"]}
        AdaptiveMixture.from_pretrained(base_model(), same, tokenizer=tokenizer)


def test_zero_weights_are_the_base_model_bit_for_bit(mixture: AdaptiveMixture) -> None:
    mixture.set_weights([0, 0, 0])
    assert torch.equal(logits(mixture.model), logits(base_model()))


@pytest.mark.parametrize("name", EXPERTS)
def test_one_hot_weights_are_the_expert(mixture: AdaptiveMixture, experts: dict[str, str], name: str) -> None:
    mixture.set_weights({name: 1})
    alone = logits(PeftModel.from_pretrained(base_model(), experts[name]))
    assert torch.allclose(logits(mixture.model), alone, atol=1e-5)
    assert not torch.allclose(alone, logits(base_model()), atol=1e-2)


def test_weights_by_name_and_in_order(mixture: AdaptiveMixture) -> None:
    mixture.set_weights({"last": -0.5, "all": 2})
    assert mixture.weights == {"all": 2.0, "narrow": 0.0, "last": -0.5}
    by_name = logits(mixture.model)
    mixture.set_weights(np.array([0.3, 0.3, 0.3]))
    assert not torch.allclose(logits(mixture.model), by_name, atol=1e-3)
    mixture.set_weights([2, 0, -0.5])
    assert torch.equal(logits(mixture.model), by_name)


@pytest.mark.usefixtures("never_fold")
@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"all": 1, "unknown": 1}, "'unknown'.*all, narrow, last"),
        ([1, 2], "Expected 3 finite weights, got \\[1.0, 2.0\\]"),
        ([1, 2, 3, 4], "Expected 3 finite weights"),
        ([1, 2, math.nan], "finite.*nan"),
        ({"all": math.inf}, "finite.*inf"),
    ],
)
def test_bad_weights_change_nothing(mixture: AdaptiveMixture, weights: Any, message: str) -> None:
    before, expected = logits(mixture.model), mixture.weights
    with pytest.raises(ValueError, match=message):
        mixture.set_weights(weights)
    assert mixture.weights == expected
    assert torch.equal(logits(mixture.model), before)


def test_generates_with_the_mixture_whatever_is_active(mixture: AdaptiveMixture) -> None:
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "max_new_tokens": 8, "do_sample": False}
    expected = mixture.generate(**inputs)
    mixture.model.set_adapter("narrow")
    assert torch.equal(mixture.generate(**inputs), expected)
    mixture.set_weights([0, 0, 0])
    assert torch.equal(mixture.generate(**inputs), base_model().generate(**inputs))
    assert not torch.equal(mixture.generate(**inputs), expected)


# ---------------------------------------------------------------------------------------------------- loading


def test_loads_the_base_model_and_its_tokenizer_from_a_folder(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, experts: dict[str, str]
) -> None:
    base_model().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    mixture = AdaptiveMixture.from_pretrained(str(tmp_path), experts, adapter_name="mix", dtype=torch.float64)
    assert mixture.model.dtype == torch.float64
    assert mixture.tokenizer.get_vocab() == tokenizer.get_vocab()
    expected = AdaptiveMixture.from_pretrained(base_model(), experts, tokenizer=tokenizer)
    assert torch.allclose(logits(mixture.model).float(), logits(expected.model), atol=1e-5)


def test_wraps_a_model_that_has_experts(experts: dict[str, str]) -> None:
    model = PeftModel.from_pretrained(base_model(), experts["all"], adapter_name="all")
    model.load_adapter(experts["last"], adapter_name="last")
    model.load_adapter(experts["narrow"], adapter_name="narrow")
    with pytest.raises(ValueError, match="'unknown'"):
        AdaptiveMixture(model, ["all", "unknown"])
    with pytest.raises(ValueError, match="'all' already exists"):
        AdaptiveMixture(model, ["last"], adapter_name="all")
    with pytest.raises(ValueError, match="No experts"):
        AdaptiveMixture(model, [])
    assert AdaptiveMixture(model, ["all", "last"]).weights == {"all": 0.5, "last": 0.5}
    assert list(AdaptiveMixture(model, ["all"], adapter_name="second").weights) == ["all"]


@pytest.mark.parametrize("make", [base_model, lambda: get_peft_model(base_model(), LoraConfig())], ids=["bare", "LoRA"])
def test_wraps_nothing_else(make: Callable) -> None:
    with pytest.raises(ValueError, match="SVF adapters"):
        AdaptiveMixture(make())


def test_no_experts() -> None:
    with pytest.raises(ValueError, match="No experts"):
        AdaptiveMixture.from_pretrained(base_model(), {})


@pytest.mark.parametrize("name", ["mixture", "base", "uniform", "searched", "math.v2"])
def test_names_that_an_expert_cannot_have(name: str, experts: dict[str, str], tokenizer: Any) -> None:
    """The mixture's, those that a result needs for the baselines, and what torch refuses as a module's name."""
    model = base_model()
    with pytest.raises(ValueError, match=f"'{name}'"):
        AdaptiveMixture.from_pretrained(model, {"all": experts["all"], name: experts["last"]}, tokenizer=tokenizer)
    assert not any(isinstance(module, SVFLayer) for module in model.modules())


def test_an_expert_that_is_not_there_is_named(tmp_path: Path, experts: dict[str, str], tokenizer: Any) -> None:
    base = base_model()
    with pytest.raises(ValueError, match=r"Expert 'typo' cannot be read from '.*nowhere'"):
        AdaptiveMixture.from_pretrained(base, {**experts, "typo": str(tmp_path / "nowhere")}, tokenizer=tokenizer)
    assert not any(isinstance(module, SVFLayer) for module in base.modules())


def test_a_lora_adapter_is_no_expert(tmp_path: Path, experts: dict[str, str], tokenizer: Any) -> None:
    get_peft_model(base_model(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    model = base_model()
    with pytest.raises(ValueError, match=r"'style'.*lora.*LORA"):
        AdaptiveMixture.from_pretrained(model, {**experts, "style": tmp_path / "lora"}, tokenizer=tokenizer)
    assert torch.equal(logits(model), logits(base_model()))


@pytest.mark.parametrize("position", [0, 1], ids=["first", "second"])
def test_an_expert_for_another_base(position: int, tmp_path: Path, experts: dict[str, str], tokenizer: Any) -> None:
    """An error that leaves the model as it was; a warning if so asked."""
    other = save_expert(tmp_path / "other", SVFConfig(target_modules=["q_proj"]), 7, base=base_model(seed=1))
    names = {"known": experts["all"], "stranger": other}
    if position == 0:
        names = dict(reversed(names.items()))
    model = base_model()
    with pytest.raises(ValueError, match=r"'stranger' was made for another base model.*q_proj"):
        AdaptiveMixture.from_pretrained(model, names, tokenizer=tokenizer)
    assert not any(isinstance(module, SVFLayer) for module in model.modules())
    assert torch.equal(logits(model), logits(base_model()))
    with pytest.warns(UserWarning, match=r"'stranger' was made for another base model.*q_proj"):
        mixture = AdaptiveMixture.from_pretrained(base_model(), names, tokenizer=tokenizer, base_check="warn")
    assert list(mixture.weights) == list(names)


# ---------------------------------------------------------------------------------------------------- objectives


@torch.no_grad()
def log_likelihood_by_hand(model: Any, tokenizer: Any, prompt: str, answer: str) -> float:
    """Mean log-probability of the answer's tokens, one example at a time and without padding."""
    encode = tokenizer.backend_tokenizer.encode
    prompt_ids, answer_ids = encode(prompt).ids, encode(answer).ids
    logps = model(input_ids=torch.tensor([prompt_ids + answer_ids])).logits[0].log_softmax(-1)
    return float(np.mean([logps[len(prompt_ids) + i - 1, token].item() for i, token in enumerate(answer_ids)]))


@pytest.mark.parametrize("batch_size", [1, 2, 16])
@pytest.mark.parametrize("kind", ["text", "messages"])
def test_log_likelihood_equals_a_computation_by_hand(
    mixture: AdaptiveMixture, tokenizer: Any, batch_size: int, kind: str
) -> None:
    rows = EXAMPLES if kind == "text" else MESSAGES
    expected = [
        log_likelihood_by_hand(mixture.model, tokenizer, row["prompt"], row["completion"] + "</s>")
        if kind == "text"
        else log_likelihood_by_hand(
            mixture.model, tokenizer, f"[user]{row['prompt']}\n[assistant]", f"{row['completion']}\n"
        )
        for row in EXAMPLES
    ]
    found = LogLikelihoodObjective(rows, tokenizer, batch_size=batch_size)(mixture.model)
    assert found == pytest.approx(expected, abs=1e-5)
    assert len(set(found)) == len(rows)


def test_a_tokenizer_without_a_pad_token_is_left_as_it_was(mixture: AdaptiveMixture, tokenizer: Any) -> None:
    expected = LogLikelihoodObjective(EXAMPLES, tokenizer)(mixture.model)
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="</s>")
    assert LogLikelihoodObjective(EXAMPLES, bare)(mixture.model) == pytest.approx(expected, abs=1e-6)
    assert bare.pad_token is None


@pytest.mark.parametrize("kind", ["text", "messages"])
def test_reward_functions_are_called_as_by_trl(mixture: AdaptiveMixture, tokenizer: Any, kind: str) -> None:
    """Batches of two; greedy text as generated by hand without padding; all columns but prompt and completion."""
    rows = [
        {**row, "answer": f"answer {i}", "level": i}
        for i, row in enumerate((EXAMPLES if kind == "text" else MESSAGES)[:3])
    ]
    calls: list[dict[str, Any]] = []

    def reward(**kwargs: Any) -> list[float]:
        calls.append(kwargs)
        return [10.0 + level for level in kwargs["level"]]

    objective = RewardObjective(rows, reward, tokenizer, batch_size=2, generation_kwargs={"max_new_tokens": 6})
    assert objective(mixture.model) == [10.0, 11.0, 12.0]
    assert [len(call["prompts"]) for call in calls] == [2, 1]
    assert all(set(call) >= {"prompts", "completions", "completion_ids", "answer", "level"} for call in calls)
    assert not any({"prompt", "completion"} & set(call) for call in calls)

    flat = {key: [value for call in calls for value in call[key]] for key in calls[0]}
    assert flat["prompts"] == [row["prompt"] for row in rows]
    assert flat["answer"] == [row["answer"] for row in rows]
    for i, row in enumerate(EXAMPLES[:3]):
        prompt = row["prompt"] if kind == "text" else f"[user]{row['prompt']}\n[assistant]"
        ids = torch.tensor([tokenizer.backend_tokenizer.encode(prompt).ids])
        output = mixture.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
        by_hand = output[0, ids.shape[1] :].tolist()
        text = tokenizer.decode(by_hand, skip_special_tokens=True)
        assert flat["completions"][i] == (text if kind == "text" else [{"role": "assistant", "content": text}])
        assert flat["completion_ids"][i] == by_hand


def test_the_batch_size_does_not_change_rewards(mixture: AdaptiveMixture, tokenizer: Any) -> None:
    """Also for a reward that looks at the tokens: an answer that ends early is not longer for its neighbours."""
    lengths: dict[int, list[int]] = {}

    def tokens(completions: list[str], completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        lengths[batch_size] = lengths.get(batch_size, []) + [len(text) for text in completions]
        return [float(len(ids) + sum(ids)) for ids in completion_ids]

    rows = [{"prompt": f"{word}?"} for word in ("a", "be", "six", "four", "nine", "eleven", "what is", "who are you")]
    scores = {}
    for batch_size in (1, 3, 8):
        objective = RewardObjective(
            rows, tokens, tokenizer, batch_size=batch_size, generation_kwargs={"max_new_tokens": 24}
        )
        scores[batch_size] = objective(mixture.model)
    assert len(set(lengths[1])) > 1, "some end early"
    assert lengths[1] == lengths[3] == lengths[8]
    assert scores[1] == scores[3] == scores[8]


def test_rewards_add_up_and_none_does_not_count(mixture: AdaptiveMixture, tokenizer: Any) -> None:
    def sometimes(completions: list[str], **kwargs: Any) -> list[float | None]:
        return [None, 1.0, 2.0]

    def always(completions: list[str], **kwargs: Any) -> list[float]:
        return [0.5, 0.5, -0.5]

    objective = RewardObjective(EXAMPLES[:3], [sometimes, always], tokenizer, generation_kwargs={"max_new_tokens": 1})
    assert objective(mixture.model) == [0.5, 1.5, 1.5]


# ---------------------------------------------------------------------------------------------------- search


@pytest.mark.parametrize("reward_funcs", [None, count_letters], ids=["log-likelihood", "reward"])
def test_result_of_a_search(mixture: AdaptiveMixture, tokenizer: Any, reward_funcs: Callable | None) -> None:
    generated = {} if reward_funcs is None else {"max_new_tokens": 5}
    examples = EXAMPLES[:4]  # the last one has no answer to show
    result = mixture.search(
        examples,
        reward_funcs,
        method="cem",
        num_generations=3,
        population_size=4,
        **generated,
        validation=None,
        racing=False,
        one_standard_error=False,
    )
    assert mixture.result is result
    assert mixture.weights == result.weights
    assert result.objective == ("log-likelihood" if reward_funcs is None else "reward")
    assert list(result.scores) == ["base", *EXPERTS, "uniform", "searched", "in-context"]
    in_context = result.scores.pop("in-context")
    assert np.isfinite(in_context)
    assert result.score == result.scores[result.choice] == max(result.scores.values())
    assert result.improved == (result.choice == "searched")
    assert result.candidates == 5 + 3 * 4 - 2 + 1  # the incumbent is asked for twice; the mean comes at the end
    assert result.seconds > 0
    assert [entry["generation"] for entry in result.history] == [0, 1, 2]
    assert result.scores["searched"] >= max(entry["best"] for entry in result.history)
    assert all(entry["best"] == entry["elites"][0] >= entry["mean"] for entry in result.history)
    assert all(0 <= weight <= 1 for weight in result.searched_weights.values())
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False))["weights"] == mixture.weights
    assert all(name in str(result) for name in result.scores)

    # what it says about each is what one measures by hand
    objective = (
        LogLikelihoodObjective(examples, tokenizer)
        if reward_funcs is None
        else RewardObjective(examples, reward_funcs, tokenizer, generation_kwargs=generated)
    )
    weights = {"base": {}, "uniform": dict.fromkeys(EXPERTS, 1 / 3), "searched": result.searched_weights}
    weights |= {name: {name: 1.0} for name in EXPERTS}
    for name, score in result.scores.items():
        mixture.set_weights(weights[name])
        assert np.mean(objective(mixture.model)) == pytest.approx(score, abs=1e-5), name


def test_a_planted_mixture_is_recovered(tmp_path: Path, tokenizer: Any) -> None:
    """The answers were sampled from a mixture, so hardly any other makes many of them more likely."""
    names = {
        name: save_expert(tmp_path / name, SVFConfig(target_modules="all-linear"), seed=10 + i)
        for i, name in enumerate(["one", "two"])
    }
    mixture = AdaptiveMixture.from_pretrained(base_model(), names, tokenizer=tokenizer)
    planted = {"one": 0.9, "two": 0.25}
    mixture.set_weights(planted)
    prompts = torch.randint(4, len(VOCABULARY), (64, 4))
    sampled = mixture.generate(
        prompts, attention_mask=torch.ones_like(prompts), do_sample=True, top_k=0, max_new_tokens=16
    )
    answers = [answer.split("</s>")[0] for answer in tokenizer.batch_decode(sampled[:, 4:])]
    rows = [
        {"prompt": prompt, "completion": answer}
        for prompt, answer in zip(tokenizer.batch_decode(prompts), answers, strict=True)
    ]
    truth = np.mean(LogLikelihoodObjective(rows, tokenizer, batch_size=64)(mixture.model))

    result = mixture.search(rows, method="cem", num_generations=8, population_size=12, batch_size=64)
    assert result.improved
    assert result.score >= truth - 1e-3
    assert mixture.weights == pytest.approx(planted, abs=0.1)


def test_a_planted_reward_is_found(mixture: AdaptiveMixture) -> None:
    target = {"all": 0.6, "narrow": 0.2, "last": 0.9}
    result = mixture.search(objective=Distance(target), num_generations=12, population_size=12)
    assert result.improved
    assert result.method == "cem"
    assert mixture.weights == pytest.approx(target, abs=0.1)


BASELINES = {
    "base": dict.fromkeys(EXPERTS, 0.0),
    "narrow": {"all": 0.0, "narrow": 1.0, "last": 0.0},
    "uniform": dict.fromkeys(EXPERTS, 1 / 3),
}


@pytest.mark.parametrize(("choice", "weights"), BASELINES.items(), ids=BASELINES)
def test_a_baseline_that_nothing_beats_is_kept(
    mixture: AdaptiveMixture, choice: str, weights: dict[str, float]
) -> None:
    result = mixture.search(objective=Distance(weights, 2), num_generations=2, population_size=3)
    assert not result.improved
    assert (result.choice, result.score) == (choice, pytest.approx(0, abs=1e-4))
    assert result.scores["searched"] == result.score  # where it began
    assert mixture.weights == result.weights == pytest.approx(weights)
    assert result.searched_weights == result.weights
    assert repr(choice) in str(result)


def test_of_equals_the_simplest_is_kept(mixture: AdaptiveMixture) -> None:
    result = mixture.search(EXAMPLES[:2], lambda completions, **kwargs: [1.0] * len(completions), **SHORT)
    assert (result.choice, result.improved, set(result.scores.values())) == ("base", False, {1.0})
    assert torch.equal(logits(mixture.model), logits(base_model()))


def test_the_seed_decides(experts: dict[str, str], tokenizer: Any) -> None:
    def run(seed: int) -> dict[str, Any]:
        mixture = AdaptiveMixture.from_pretrained(base_model(), experts, tokenizer=tokenizer)
        result = mixture.search(EXAMPLES, seed=seed, **QUICK).to_dict()
        del result["usage"]["seconds"]
        return result

    assert run(1) == run(1)
    assert run(1)["history"] != run(2)["history"]


def test_a_dataset_is_as_good_as_a_list(mixture: AdaptiveMixture) -> None:
    found = mixture.search(Dataset.from_list(EXAMPLES), num_generations=1)
    assert found.scores == mixture.search(EXAMPLES, num_generations=1).scores


def test_scores_do_not_depend_on_what_was_active_before(mixture: AdaptiveMixture) -> None:
    expected = mixture.search(EXAMPLES, num_generations=1).scores
    mixture.model.set_adapter("narrow")
    assert mixture.search(EXAMPLES, num_generations=1).scores == expected


def test_any_optimizer_with_ask_and_tell(mixture: AdaptiveMixture) -> None:
    class RandomSearch:
        population_size = 4

        def __init__(self) -> None:
            self.random, self.told = np.random.default_rng(0), []

        def ask(self) -> np.ndarray:
            return self.random.uniform(0.0, 1.5, 3)

        def tell(self, solutions: list[tuple[np.ndarray, float]]) -> None:
            self.told.append(solutions)

    optimizer = RandomSearch()
    target = {"all": 1.2, "narrow": 0.9, "last": 0.6}
    result = mixture.search(objective=Distance(target), optimizer=optimizer, bounds=(0.0, 1.5), num_generations=5)
    assert [len(solutions) for solutions in optimizer.told] == [4] * 5
    assert result.candidates == 5 + 5 * 4
    assert result.method == result.settings["method"] == "RandomSearch"
    assert "RandomSearch on the objective" in result.reason
    pairs = [pair for solutions in optimizer.told for pair in solutions]
    for x, value in pairs:  # to be minimized
        assert value == pytest.approx(np.abs(x - list(target.values())).sum(), abs=1e-4)
    best, value = min(pairs, key=lambda pair: pair[1])
    assert list(result.searched_weights.values()) == best.tolist()
    assert result.scores["searched"] == pytest.approx(-value)


def test_a_search_ends_when_the_optimizer_says_so(mixture: AdaptiveMixture) -> None:
    class Impatient(Optimizer):
        population_size = 2

        def ask(self) -> np.ndarray:
            return np.full(3, 0.1)

        def tell(self, solutions: Any, gradients: Any = None) -> None:
            pass

        def should_stop(self) -> bool:
            return True

    result = mixture.search(EXAMPLES, optimizer=Impatient(), num_generations=9)
    assert (result.stopped, len(result.history)) == ("optimizer", 1)


def test_weights_are_put_back_when_a_reward_fails(mixture: AdaptiveMixture) -> None:
    calls = 0

    def fails(completions: list[str], **kwargs: Any) -> list[float]:
        nonlocal calls
        calls += 1
        if calls == 3:  # in the first generation, after the baselines and in-context prompting
            raise ZeroDivisionError("in the reward")
        return [0.0] * len(completions)

    mixture.set_weights([0.1, 0.2, 0.3])
    before, expected = deltas(mixture), mixture.weights
    with pytest.raises(RuntimeError, match="'fails' raised ZeroDivisionError: in the reward"):
        mixture.search(EXAMPLES[:2], fails, **SHORT)
    assert calls >= 3  # the completions of the failed call were tried again, one by one
    assert mixture.weights == expected
    assert mixture.result is None
    assert all(torch.equal(a, b) for a, b in zip(deltas(mixture), before, strict=True))


def returns(value: Any) -> Callable:
    def my_reward(completions: list[str], **kwargs: Any) -> Any:
        return value

    return my_reward


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (returns([1.0]), "'my_reward' returned 1 rewards for 2 completions"),
        (returns([1.0, 2.0, 3.0]), "'my_reward' returned 3 rewards for 2 completions"),
        (returns(None), "'my_reward' returned None for 2 completions"),
        (returns([0.0, math.nan]), "'my_reward' returned nan for completion 1"),
        (returns([-math.inf, 0.0]), "'my_reward' returned -inf for completion 0"),
    ],
)
def test_bad_rewards_are_named(mixture: AdaptiveMixture, reward: Callable, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mixture.search(EXAMPLES[:2], [count_letters, reward], batch_size=2, **SHORT)


@pytest.mark.parametrize(
    ("rows", "reward", "message"),
    [
        ([], None, "examples are empty"),
        ([], count_letters, "examples are empty"),
        ([EXAMPLES[0], {"completion": "x"}], None, "Example 1 has no 'prompt'; it has 'completion'"),
        ([{"question": "x"}], count_letters, "Example 0 has no 'prompt'; it has 'question'"),
        ([EXAMPLES[0], {"prompt": "x"}], None, "Example 1 has no 'completion'; it has 'prompt'"),
        ([{"prompt": "a", "answer": "1"}, {"prompt": "b"}], count_letters, "Example 1 has no 'answer'"),
        # nothing predicts the first token of an answer to an empty prompt
        ([EXAMPLES[0], {"prompt": "", "completion": "x"}], None, "Example 1 .*empty"),
        ([EXAMPLES[0], {"prompt": ""}], count_letters, "Example 1 .*empty"),
    ],
)
def test_bad_examples_are_named(mixture: AdaptiveMixture, rows: list, reward: Callable | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mixture.search(rows, reward, **(QUICK if reward is None else SHORT))


def test_a_search_without_a_tokenizer(experts: dict[str, str]) -> None:
    """Neither given, nor to be found by the name of the model, which has none."""
    model = PeftModel.from_pretrained(base_model(), experts["all"], adapter_name="all")
    with pytest.raises(ValueError, match="tokenizer"):
        AdaptiveMixture(model).search(EXAMPLES)
    with pytest.raises(ValueError, match="tokenizer"):
        AdaptiveMixture.from_pretrained(base_model(), experts).search(EXAMPLES)


# ---------------------------------------------------------------------------------------------------- saving


@pytest.mark.usefixtures("never_fold")
@pytest.mark.parametrize("adapter_name", ["mixture", "default"])
def test_the_saved_mixture_is_an_ordinary_adapter(
    adapter_name: str, tmp_path: Path, experts: dict[str, str], tokenizer: Any
) -> None:
    mixture = AdaptiveMixture.from_pretrained(base_model(), experts, tokenizer=tokenizer, adapter_name=adapter_name)
    mixture.save_pretrained(tmp_path / "new" / "folder")  # before a search
    about = json.loads((tmp_path / "new" / "folder" / "mixture.json").read_text())
    assert about["result"] is None
    assert about["weights"] == pytest.approx(BASELINES["uniform"])

    result = mixture.search(EXAMPLES, **QUICK)
    mixture.save_pretrained(tmp_path / "new" / "folder")  # over the other one
    saved = json.loads((tmp_path / "new" / "folder" / "mixture.json").read_text())["result"]
    assert saved == json.loads(json.dumps(result.to_dict()))
    mixture.set_weights([0.7, -0.2, 0.4])
    mixture.save_pretrained(tmp_path / "new" / "folder")
    folder = tmp_path / "new" / "folder"
    assert {path.name for path in folder.iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "mixture.json",
    }
    about = json.loads((folder / "mixture.json").read_text())
    assert about["weights"] == {"all": 0.7, "narrow": -0.2, "last": 0.4}
    assert about["result"] is None

    model = PeftModel.from_pretrained(base_model(), folder)
    assert list(model.peft_config) == ["default"]
    assert torch.equal(logits(model), logits(mixture.model))
    again = AdaptiveMixture.from_pretrained(base_model(), {"saved": folder, **experts}, tokenizer=tokenizer)
    again.set_weights({"saved": 1})
    assert torch.allclose(logits(again.model), logits(mixture.model), atol=1e-6)


def test_saving_over_a_file_is_an_error(mixture: AdaptiveMixture, tmp_path: Path) -> None:
    path = tmp_path / "thesis.txt"
    path.write_text("do not lose")
    with pytest.raises(ValueError, match=r"thesis\.txt is a file"):
        mixture.save_pretrained(path)
    assert path.read_text() == "do not lose"
    assert list(tmp_path.iterdir()) == [path]


def test_a_search_of_nothing_is_refused(mixture: AdaptiveMixture) -> None:
    with pytest.raises(ValueError, match="num_generations"):
        mixture.search(EXAMPLES, num_generations=0)
    with pytest.raises(ValueError, match="reward_funcs"):
        mixture.search(EXAMPLES, reward_funcs=[])


def test_a_reference_answer_may_be_missing_when_rewards_decide(mixture: AdaptiveMixture) -> None:
    rows = [{"prompt": "ab", "completion": "x", "letter": "a"}, {"prompt": "ba", "letter": "b"}]
    seen: list[str] = []

    def reward(completions: list[str], letter: list[str], **kwargs: Any) -> list[float]:
        seen.extend(letter)
        return [0.0] * len(completions)

    mixture.search(rows, reward, **SHORT)
    assert set(seen) == {"a", "b"}


@pytest.mark.usefixtures("never_fold")
def test_a_second_mixture_on_the_same_model_leaves_the_first(
    mixture: AdaptiveMixture, experts: dict[str, str], tokenizer: PreTrainedTokenizerFast
) -> None:
    """A notebook cell that is run twice."""
    expected = logits(mixture.model)
    for base in (mixture.model, mixture.model.get_base_model()):
        with pytest.raises(ValueError, match="has adapters already"):
            AdaptiveMixture.from_pretrained(base, experts, tokenizer=tokenizer)
    assert torch.equal(logits(mixture.model), expected)


def test_arguments_for_a_name_are_refused_for_a_model(experts: dict[str, str]) -> None:
    with pytest.raises(TypeError, match="basecheck"):
        AdaptiveMixture.from_pretrained(base_model(), experts, basecheck="warn")


def test_a_merged_mixture_keeps_its_weights(mixture: AdaptiveMixture) -> None:
    mixture.model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        mixture.set_weights([0.0] * len(mixture.experts))
    merged = logits(mixture.model)
    mixture.generate(input_ids=IDS, max_new_tokens=1)
    assert torch.equal(logits(mixture.model), merged)  # which a change of adapter would have undone


@pytest.mark.parametrize("bad", ["a-reward-model", object()])
def test_what_is_no_function_is_no_reward(mixture: AdaptiveMixture, bad: Any) -> None:
    with pytest.raises(TypeError, match="reward"):
        mixture.search(EXAMPLES, [bad])


def test_a_coroutine_is_awaited(mixture: AdaptiveMixture) -> None:
    def plain(completions: list[Any], **kwargs: Any) -> list[float]:
        return [float(len(text_of(completion))) for completion in completions]

    async def reward(completions: list[Any], trainer_state: Any, **kwargs: Any) -> list[float]:
        return plain(completions)

    assert mixture.search(EXAMPLES, reward, **SHORT).scores == mixture.search(EXAMPLES, plain, **SHORT).scores


def test_rows_that_are_no_rows(mixture: AdaptiveMixture) -> None:
    with pytest.raises(ValueError, match="Example 0 is 'prompt'"):
        mixture.search({"prompt": ["a"], "completion": ["b"]})


def test_a_lucky_score_is_not_the_result(mixture: AdaptiveMixture) -> None:
    """The best mixture is scored anew."""
    calls = 0

    def once_lucky(completions: list[Any], **kwargs: Any) -> list[float]:
        nonlocal calls
        calls += 1
        return [10.0 if calls == 2 else 0.0] * len(completions)  # after the baselines

    result = mixture.search(
        EXAMPLES,
        once_lucky,
        method="cem",
        num_generations=1,
        population_size=4,
        max_new_tokens=1,
        generation_kwargs={"do_sample": True},
        in_context=False,
        validation=None,
        racing=False,
    )
    assert result.history[0]["best"] == 10.0
    assert result.scores["searched"] == 0.0
    assert not result.improved


def test_setting_weights_forgets_the_result(mixture: AdaptiveMixture, tmp_path: Path) -> None:
    mixture.search(EXAMPLES, num_generations=1)
    assert mixture.result is not None
    mixture.set_weights([0.0] * len(mixture.experts))
    mixture.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "mixture.json").read_text())["result"] is None


def test_an_existing_model_card_is_kept(mixture: AdaptiveMixture, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    mixture.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    assert (tmp_path / "adapter_model.safetensors").exists()


def test_a_card_of_ours_is_written_anew(mixture: AdaptiveMixture, tmp_path: Path) -> None:
    mixture.set_weights({"all": 0.25})
    mixture.save_pretrained(tmp_path)
    assert "| 0.25 |" in (tmp_path / "README.md").read_text()
    mixture.set_weights({"all": 0.75})
    mixture.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "| 0.75 |" in card
    (tmp_path / "README.md").write_text(re.sub("<!-- .* -->", "", card) + "mine")
    mixture.set_weights({"all": 0.5})
    mixture.save_pretrained(tmp_path)
    assert "| 0.75 |" in (tmp_path / "README.md").read_text()


def test_text_prompts_get_the_tokens_that_trl_gives_them(tokenizer: PreTrainedTokenizerFast) -> None:
    class WithStart:
        """A tokenizer that starts text with a token of its own, as Llama's do."""

        def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
            return {"input_ids": [1] * add_special_tokens + [ord(c) for c in text]}

        def apply_chat_template(self, messages: list[dict[str, str]], **kwargs: Any) -> str:
            return messages[0]["content"]

    assert prompt_ids("ab", WithStart()) == [1, 97, 98]
    assert prompt_ids([{"role": "user", "content": "ab"}], WithStart()) == [97, 98]
