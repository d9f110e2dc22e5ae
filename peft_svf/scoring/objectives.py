"""What a model is scored by: the reward of generated text, the likelihood of reference answers, or a weighted sum.

An objective scores a model as it is, with the adapter or the mixtures already in place. It returns one score per
example; higher is better. `score` is one batch, in which each row may have its own mixture.
"""

from __future__ import annotations

import asyncio
import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

import torch

from .examples import check_examples
from .prefix import Prefix, common_prefix, generates_from_prefix, last_logits_of_generate
from .rewards import RewardFunc, checked
from .tokens import (
    answer_logps,
    continuation_ids,
    end_tokens,
    joined,
    padded,
    prompt_ids,
    prompt_text,
    until_end,
    with_pad_token,
)

# Called with the indices of examples, the tokens of the answers, and their rewards.
AnswerCallback = Callable[[Sequence[int], list[list[int]], list[float]], None]


class Objective:
    """
    Base class of objectives. A custom one sets `examples` and implements `lengths` and `score`.

    What an objective can do is declared by class attributes. A subclass with its own `score` falls back to `False` for
    `shares_prefix`, `rewards_answers` and `differentiable`, unless it declares them itself.

    Attributes:
        name: What messages and results call it.
        examples: The examples that it scores.
        deterministic: Whether the same model gets the same score again.
        differentiable: Whether `score_tensor` has a gradient with respect to the mixture weights.
        shares_prefix: Whether `score` takes `prefix`, the keys and values of `prefix_ids`.
        rewards_answers: Whether a score is the reward of one generated answer, so that answers can be collected.
        reads_prompts: Whether prompts are read first, for several batch rows per example. See
            [`ExpectedRewardObjective`].
        prefix_ids: Tokens that all prompts begin with.
        generation_kwargs: How answers are generated; empty if none are.
        tokens: Number of tokens that the model has read and written for this objective so far.
    """

    name: str = "objective"
    deterministic: bool = True
    differentiable: ClassVar[bool] = False
    shares_prefix: ClassVar[bool] = False
    rewards_answers: ClassVar[bool] = False
    reads_prompts: ClassVar[bool] = False

    examples: list[dict[str, Any]]
    tokenizer: Any = None
    prefix_ids: Sequence[int] = ()
    generation_kwargs: Mapping[str, Any] = {}
    batch_size: int = 16
    tokens: int = 0

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "score" in cls.__dict__:
            for name in ("shares_prefix", "rewards_answers", "differentiable"):
                if name not in cls.__dict__:
                    setattr(cls, name, False)

    def __call__(self, model: Any) -> list[float]:
        """Score all examples with one model, `batch_size` at a time."""
        count = range(len(self.examples))
        return [
            score
            for start in count[:: self.batch_size]
            for score in self.score(model, count[start : start + self.batch_size])
        ]

    def lengths(self) -> list[int]:
        """Return the number of tokens of each example, so that examples of similar length share a batch."""
        raise NotImplementedError

    def score(self, model: Any, indices: Sequence[int]) -> list[float]:
        """Score these examples, which form one batch in this order. An example may occur repeatedly."""
        raise NotImplementedError

    def batch_rows(self, index: int) -> int:
        """Return how many batch rows an example takes."""
        return 1

    def with_examples(self, examples: Sequence[dict[str, Any]]) -> Any:
        """Return the same objective for other examples."""
        other = self.changed()
        other.take(examples)
        return other

    def description(self) -> dict[str, Any]:
        """Return what decides the scores apart from examples and generation: numbers, `reward_funcs`, `objectives`."""
        return {}

    def take(self, examples: Sequence[dict[str, Any]]) -> None:
        """Make these the examples.

        Raises:
            ValueError: An example lacks a column; the message names both.
        """
        self.examples = check_examples(examples, [])

    def changed(self, **attributes: Any) -> Any:
        """Return a copy, of the same class, with other attributes."""
        other = copy.copy(self)
        other.__dict__.pop("tokens", None)  # counted from 0 again
        other.__dict__.update(attributes)
        return other


class RewardObjective(Objective):
    """
    Reward of generated answers, the paper's objective. Decoding is greedy unless `generation_kwargs` say otherwise.

    Args:
        examples (`Sequence[dict]`): Examples with a `"prompt"` (text or messages). All other columns except
            `"completion"` reach the reward functions by name.
        reward_funcs (`Callable` or list of them): TRL reward functions; several are summed. A function returns `None`
            for an example that it does not apply to. Coroutines are awaited. Reward models are not supported.
        tokenizer: The model's tokenizer.
        reward_weights (`Sequence[float]`, *optional*): A factor for each function, 1 by default.
        batch_size (`int`): Prompts per `generate` call, when the objective is called for all examples.
        generation_kwargs (`dict`): For `generate`; `max_new_tokens` is 256 by default, as in TRL.
        deterministic (`bool`, *optional*): Whether the same model gets the same rewards again. By default `True` for
            greedy decoding. Pass `False` if a reward function itself is random, such as a judge that samples.

    Raises:
        ValueError: No reward function, another number of weights, a `max_length`, several returned sequences, or an
            example without a prompt.
        TypeError: A reward function that cannot be called, or a reward model.
    """

    name = "reward"
    shares_prefix = True
    rewards_answers = True
    _on_answers: AnswerCallback | None = None

    def __init__(
        self,
        examples: Sequence[dict[str, Any]],
        reward_funcs: RewardFunc | Sequence[RewardFunc],
        tokenizer: Any,
        *,
        reward_weights: Sequence[float] | None = None,
        batch_size: int = 16,
        generation_kwargs: dict[str, Any] | None = None,
        deterministic: bool | None = None,
    ) -> None:
        self.reward_funcs = [reward_funcs] if callable(reward_funcs) else list(reward_funcs)
        if not self.reward_funcs:
            raise ValueError("`reward_funcs` is empty. Pass at least one function, or None for the log-likelihood.")
        for function in self.reward_funcs:
            if not callable(function) or isinstance(function, torch.nn.Module):
                raise TypeError(
                    f"{function!r} is not a reward function. Expected a function; reward models are not supported."
                )
        self.reward_weights = [1.0] * len(self.reward_funcs) if reward_weights is None else list(reward_weights)
        if len(self.reward_weights) != len(self.reward_funcs):
            raise ValueError(
                f"There are {len(self.reward_funcs)} reward functions, but {len(self.reward_weights)} `reward_weights`."
            )
        self.tokenizer = with_pad_token(tokenizer)
        self.batch_size = batch_size
        given = generation_kwargs or {}
        config = given.get("generation_config")
        said = {**({} if config is None else config.to_diff_dict()), **given}
        in_config = said.get("max_length") is not None and said.get("max_new_tokens") is None
        if given.get("max_length") is not None or in_config:
            raise ValueError("`max_length` counts the prompt, and prompts differ; pass `max_new_tokens`.")
        defaults = {"max_new_tokens": said.get("max_new_tokens", 256), "do_sample": said.get("do_sample", False)}
        self.generation_kwargs = {**defaults, **given}
        if (self.generation_kwargs.get("num_return_sequences") or 1) > 1:
            raise ValueError("`num_return_sequences` must be 1: an example has one score.")
        self.deterministic = not self.generation_kwargs["do_sample"] if deterministic is None else deterministic
        self.take(examples)

    def take(self, examples: Sequence[dict[str, Any]]) -> None:
        self.examples = check_examples(examples, ["prompt"])
        passed = ["prompts", "completions", "completion_ids"]
        passed += [name for function in self.reward_funcs for name in _of_a_trainer(function)]
        if taken := [name for name in passed if name in self.examples[0]]:
            raise ValueError(
                f"The examples have a column {taken[0]!r}, but reward functions get an argument of that name already. "
                "Rename the column."
            )
        self.prompts = [prompt_ids(row["prompt"], self.tokenizer) for row in self.examples]
        self.prefix_ids = common_prefix(self.prompts) if generates_from_prefix(self.generation_kwargs) else []

    def description(self) -> dict[str, Any]:
        return {"reward_funcs": self.reward_funcs, "reward_weights": list(map(float, self.reward_weights))}

    def lengths(self) -> list[int]:
        return [len(ids) for ids in self.prompts]

    def score(self, model: Any, indices: Sequence[int], prefix: Prefix | None = None) -> list[float]:
        answers = self.answers(model, indices, prefix)
        rewards = self.rewards(indices, answers)
        if self._on_answers is not None:
            self._on_answers(indices, answers, rewards)
        return rewards

    def with_callback(self, on_answers: AnswerCallback) -> Any:
        """Return the same objective with a callback, called with each batch of answers and their rewards."""
        return self.changed(_on_answers=on_answers)

    def sampling(self, temperature: float = 1.0) -> Any:
        """Return the same objective with answers sampled at a temperature, from the model's whole distribution."""
        plain = {
            "do_sample": True,
            "temperature": temperature,
            "top_k": 0,
            "top_p": 1.0,
            "min_p": 0.0,
            "typical_p": 1.0,
        }
        plain |= {"epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "repetition_penalty": 1.0, "num_beams": 1}
        return self.changed(generation_kwargs={**self.generation_kwargs, **plain}, deterministic=False)

    @torch.no_grad()
    def answers(self, model: Any, indices: Sequence[int], prefix: Prefix | None = None) -> list[list[int]]:
        """Generate answers to these examples; return the tokens of each, with its end token if it has one."""
        if not generates_from_prefix(self.generation_kwargs, getattr(model, "generation_config", None)):
            prefix = None
        inputs = padded([self.prompts[i] for i in indices], "left", prefix, self.tokenizer, model.device)
        options = {**self.generation_kwargs, "return_dict_in_generate": False}
        options |= last_logits_of_generate(model, options)
        output = model.generate(**inputs, pad_token_id=self.tokenizer.pad_token_id, **options)
        if len(output) != len(indices):
            raise ValueError("`num_return_sequences` must be 1: an example has one score.")
        ends = end_tokens(model, self.tokenizer, self.generation_kwargs)
        pad = self.tokenizer.pad_token_id
        found = [until_end(ids, ends, pad) for ids in output[:, inputs["input_ids"].shape[1] :].tolist()]
        if stops := self._stop_strings():
            found = [self._until_stop(ids, ends, stops) for ids in found]
        self.tokens += sum(len(self.prompts[i]) for i in indices) + sum(map(len, found))
        return found

    def _stop_strings(self) -> list[str]:
        config = self.generation_kwargs.get("generation_config")
        given = self.generation_kwargs.get("stop_strings") or getattr(config, "stop_strings", None) or []
        return [given] if isinstance(given, str) else list(given)

    def _until_stop(self, ids: list[int], ends: set[int], stops: list[str]) -> list[int]:
        """Drop an end token that is the padding after a stop string."""
        if ids and ids[-1] in ends and any(stop in self.tokenizer.decode(ids[:-1]) for stop in stops):
            return ids[:-1]
        return ids

    def rewards(self, indices: Sequence[int], completion_ids: list[list[int]]) -> list[float]:
        """Return the weighted sum of the rewards for one answer to each of these examples."""
        rows = [self.examples[i] for i in indices]
        prompts = [row["prompt"] for row in rows]
        texts = self.tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
        completions = [
            text if isinstance(row["prompt"], str) else [{"role": "assistant", "content": text}]
            for row, text in zip(rows, texts, strict=True)
        ]
        columns = {key: [row[key] for row in rows] for key in self.examples[0] if key not in ("prompt", "completion")}
        totals = [0.0] * len(rows)
        for function, weight in zip(self.reward_funcs, self.reward_weights, strict=True):
            rewards: Any = checked(function)(
                prompts=prompts,
                completions=completions,
                completion_ids=completion_ids,
                **columns,
                **_of_a_trainer(function),
            )
            if inspect.isawaitable(rewards):
                rewards = _result_of(rewards)
            for i, reward in enumerate(rewards):
                totals[i] += weight * (reward or 0.0)
        return totals


class LogLikelihoodObjective(Objective):
    """
    Mean log-probability per token of the reference answers, end token included. It needs no decoding and has a
    gradient.

    Args:
        examples (`Sequence[dict]`): Examples with `"prompt"` and `"completion"`, both text or both messages.
        tokenizer: The model's tokenizer.
        batch_size (`int`): Sequences per forward, when the objective is called for all examples.
    """

    name = "log-likelihood"
    differentiable = True
    shares_prefix = True

    def __init__(self, examples: Sequence[dict[str, Any]], tokenizer: Any, *, batch_size: int = 16) -> None:
        self.tokenizer = with_pad_token(tokenizer)
        self.batch_size = batch_size
        self.take(examples)

    def take(self, examples: Sequence[dict[str, Any]]) -> None:
        self.examples = check_examples(examples, ["prompt", "completion"])
        self._rows = [self._encode(row) for row in self.examples]
        self.prefix_ids = common_prefix([ids[:length] for ids, length in self._rows])

    def _encode(self, row: dict[str, Any]) -> tuple[list[int], int]:
        """Return the tokens of prompt and answer, and the number of tokens of the prompt."""
        prompt = prompt_text(row["prompt"], self.tokenizer)
        if isinstance(row["prompt"], str):
            answer = row["completion"] + (self.tokenizer.eos_token or "")
        else:
            whole = self.tokenizer.apply_chat_template(joined(row["prompt"], row["completion"]), tokenize=False)
            if not whole.startswith(prompt):
                raise ValueError(
                    f"The chat template does not continue the prompt with its completion in this example: {row}"
                )
            answer = whole[len(prompt) :]
        before = prompt_ids(row["prompt"], self.tokenizer)
        return before + continuation_ids(row["prompt"], answer, self.tokenizer), len(before)

    def lengths(self) -> list[int]:
        return [len(ids) for ids, _ in self._rows]

    @torch.no_grad()
    def score(self, model: Any, indices: Sequence[int], prefix: Prefix | None = None) -> list[float]:
        scores: list[float] = self.score_tensor(model, indices, prefix).tolist()
        return scores

    def score_tensor(self, model: Any, indices: Sequence[int], prefix: Prefix | None = None) -> torch.Tensor:
        """As `score`, as a tensor with a gradient: `[examples]`."""
        rows = [self._rows[i] for i in indices]
        self.tokens += sum(len(ids) for ids, _ in rows)
        return torch.stack([logps.mean() for logps in answer_logps(model, rows, self.tokenizer, prefix)])


class WeightedObjective(Objective):
    """
    Weighted sum of objectives over the same examples.

    The log-likelihood with a small weight breaks ties between candidates of equal reward, as in the paper's code:
    `WeightedObjective([reward, log_likelihood], [1.0, 0.001])`.

    Args:
        objectives (`Sequence[Objective]`): Objectives with the same examples.
        weights (`Sequence[float]`): One weight per objective.

    Raises:
        ValueError: Different numbers of weights or examples, different prompts, or an expected reward.
        TypeError: A part is no [`Objective`].
    """

    shares_prefix = True

    def __init__(self, objectives: Sequence[Any], weights: Sequence[float]) -> None:
        for objective in objectives:
            if not isinstance(objective, Objective):
                raise TypeError(f"{type(objective).__name__} is no objective. Subclass `peft_svf.Objective`.")
            if objective.reads_prompts:
                raise ValueError(f"The objective {objective.name!r} cannot be part of a sum. Use it alone.")
        if not objectives or len(objectives) != len(weights):
            raise ValueError(f"Expected as many weights as objectives, got {len(objectives)} and {len(weights)}.")
        if len({len(objective.examples) for objective in objectives}) > 1:
            raise ValueError("The objectives have different numbers of examples; give all of them the same rows.")
        for i, rows in enumerate(zip(*(objective.examples for objective in objectives), strict=True)):
            prompts = [row["prompt"] for row in rows if "prompt" in row]  # an objective may do without
            if any(prompt != prompts[0] for prompt in prompts):
                raise ValueError(f"The objectives have different prompts in row {i}; give all of them the same rows.")
        self.objectives, self.weights = list(objectives), [float(weight) for weight in weights]
        # with the columns of all objectives, because `with_examples` starts from these
        self.examples = [
            {name: value for row in rows for name, value in row.items()}
            for rows in zip(*(objective.examples for objective in objectives), strict=True)
        ]
        self.batch_size = objectives[0].batch_size
        self.tokenizer = next((each.tokenizer for each in objectives if each.tokenizer is not None), None)
        self.generation_kwargs = next((each.generation_kwargs for each in objectives if each.generation_kwargs), {})
        self.deterministic = all(objective.deterministic for objective in objectives)

    @property
    def name(self) -> str:  # type: ignore[override]
        pairs = zip(self.weights, self.objectives, strict=True)
        return " + ".join(
            objective.name if weight == 1 else f"{weight:g} {objective.name}" for weight, objective in pairs
        )

    @property
    def tokens(self) -> int:  # type: ignore[override]
        return sum(objective.tokens for objective in self.objectives)

    def take(self, examples: Sequence[dict[str, Any]]) -> None:
        self.objectives = [objective.with_examples(examples) for objective in self.objectives]
        self.examples = self.objectives[0].examples

    @property
    def prefix_ids(self) -> list[int]:  # type: ignore[override]
        if not all(objective.shares_prefix for objective in self.objectives):
            return []
        return common_prefix([[*objective.prefix_ids, -1] for objective in self.objectives])

    def description(self) -> dict[str, Any]:
        return {"objectives": self.objectives, "weights": self.weights}

    def lengths(self) -> list[int]:
        return [max(lengths) for lengths in zip(*(objective.lengths() for objective in self.objectives), strict=True)]

    def score(self, model: Any, indices: Sequence[int], prefix: Prefix | None = None) -> list[float]:
        given = {} if prefix is None else {"prefix": prefix}
        parts = [objective.score(model, indices, **given) for objective in self.objectives]
        return [
            sum(weight * score for weight, score in zip(self.weights, scores, strict=True))
            for scores in zip(*parts, strict=True)
        ]


def _of_a_trainer(function: RewardFunc) -> dict[str, Any]:
    """Return stand-ins for the arguments that only a trainer can pass, where a function asks for them by name."""
    try:
        wanted = inspect.signature(function).parameters
    except ValueError:  # some that are written in C have none
        return {}
    stand_ins = {"trainer_state": None, "log_extra": _log_nothing, "log_metric": _log_nothing}
    return {name: value for name, value in stand_ins.items() if name in wanted}


def _log_nothing(*_: Any, **__: Any) -> None:
    pass


def _result_of(awaitable: Any) -> Any:
    """Wait for a coroutine in another thread, as a notebook has a running event loop in this one."""

    async def wait() -> Any:
        return await awaitable

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, wait()).result()
