"""What a model is scored by: reward on generated text, or likelihood of reference answers.

An objective looks at the model as it is, with the adapter or mixture already in place, and returns one score per
example. Higher is better.
"""

from __future__ import annotations

import asyncio
import copy
import inspect
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import torch

from .rewards import RewardFunc, check_rewards


class Objective(Protocol):
    """Scores a model on its examples."""

    name: str

    def __call__(self, model: Any) -> list[float]:
        """One score per example, higher is better."""
        ...


class RewardObjective:
    """
    Rewards of generated answers, the paper's objective. Decoding is greedy unless `generation_kwargs` say otherwise.

    Args:
        examples (`Sequence[dict]`): Rows with a `"prompt"` (text or messages); all columns but it and `"completion"`
            reach the reward functions by name.
        reward_funcs (`Callable` or list of them): Called as by TRL's trainers; several are added up. `None` for an
            example means that a function does not apply to it. Coroutines are awaited; reward models,
            TRL's other form, are not taken.
        tokenizer: The model's tokenizer.
        batch_size (`int`): Prompts per `generate` call.
        generation_kwargs (`dict`): For `generate`; `max_new_tokens` is 256 by default, as in TRL.
    """

    name = "reward"

    def __init__(
        self,
        examples: Sequence[dict[str, Any]],
        reward_funcs: RewardFunc | Sequence[RewardFunc],
        tokenizer: Any,
        *,
        batch_size: int = 16,
        generation_kwargs: dict[str, Any] | None = None,
    ) -> None:
        self.examples = check_examples(examples, ["prompt"])
        self.reward_funcs = [reward_funcs] if callable(reward_funcs) else list(reward_funcs)
        if not self.reward_funcs:
            raise ValueError("`reward_funcs` is empty; pass at least one function, or None for the log-likelihood.")
        for function in self.reward_funcs:
            if not callable(function) or isinstance(function, torch.nn.Module):
                raise TypeError(f"{function!r} cannot be used as a reward here: expected a function, no model.")
        self.tokenizer = with_pad_token(tokenizer)
        self.batch_size = batch_size
        self.generation_kwargs = {"max_new_tokens": 256, "do_sample": False, **(generation_kwargs or {})}

    @torch.no_grad()
    def __call__(self, model: Any) -> list[float]:
        scores: list[float] = []
        for start in range(0, len(self.examples), self.batch_size):
            scores += self._score(model, self.examples[start : start + self.batch_size])
        return scores

    def _score(self, model: Any, rows: list[dict[str, Any]]) -> list[float]:
        prompts = [row["prompt"] for row in rows]
        inputs = self.tokenizer.pad(
            {"input_ids": [prompt_ids(prompt, self.tokenizer) for prompt in prompts]},
            padding_side="left",
            return_tensors="pt",
        ).to(model.device)
        output = model.generate(**inputs, pad_token_id=self.tokenizer.pad_token_id, **self.generation_kwargs)
        completion_ids = [
            _until_end(ids, self.tokenizer.eos_token_id) for ids in output[:, inputs["input_ids"].shape[1] :].tolist()
        ]
        texts = self.tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
        completions = [
            text if isinstance(row["prompt"], str) else [{"role": "assistant", "content": text}]
            for row, text in zip(rows, texts, strict=True)
        ]
        columns = {key: [row[key] for row in rows] for key in self.examples[0] if key not in ("prompt", "completion")}
        totals = [0.0] * len(rows)
        for function in self.reward_funcs:
            rewards = function(
                prompts=prompts,
                completions=completions,
                completion_ids=completion_ids,
                **columns,
                **_of_a_trainer(function),
            )
            if inspect.isawaitable(rewards):
                rewards = _result_of(rewards)
            for i, reward in enumerate(check_rewards(rewards, function, prompts, completions)):
                totals[i] += reward or 0.0
        return totals


class LogLikelihoodObjective:
    """
    Mean log-probability per token of the reference answers, including the end of the answer. Needs no decoding, and is
    never tied.

    Args:
        examples (`Sequence[dict]`): Rows with `"prompt"` and `"completion"`, both text or both messages.
        tokenizer: The model's tokenizer.
        batch_size (`int`): Sequences per forward.
    """

    name = "log-likelihood"

    def __init__(self, examples: Sequence[dict[str, Any]], tokenizer: Any, *, batch_size: int = 16) -> None:
        self.examples = check_examples(examples, ["prompt", "completion"])
        self.tokenizer = with_pad_token(tokenizer)
        self.batch_size = batch_size
        self._rows = [self._encode(row) for row in self.examples]

    def _encode(self, row: dict[str, Any]) -> tuple[list[int], int]:
        """Token ids of prompt and answer, and the length of the prompt."""
        prompt = prompt_text(row["prompt"], self.tokenizer)
        if isinstance(row["prompt"], str):
            answer = row["completion"] + (self.tokenizer.eos_token or "")
        else:
            whole = self.tokenizer.apply_chat_template([*row["prompt"], *row["completion"]], tokenize=False)
            if not whole.startswith(prompt):
                raise ValueError(f"The chat template does not continue this prompt with its completion: {row}")
            answer = whole[len(prompt) :]
        before = prompt_ids(row["prompt"], self.tokenizer)
        return before + self.tokenizer(answer, add_special_tokens=False)["input_ids"], len(before)

    @torch.no_grad()
    def __call__(self, model: Any) -> list[float]:
        scores: list[float] = []
        for start in range(0, len(self._rows), self.batch_size):
            scores += self._score(model, self._rows[start : start + self.batch_size])
        return scores

    def _score(self, model: Any, rows: list[tuple[list[int], int]]) -> list[float]:
        batch = self.tokenizer.pad(
            {"input_ids": [ids for ids, _ in rows]}, padding_side="right", return_tensors="pt"
        ).to(model.device)
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].float()
        targets = batch["input_ids"][:, 1:]
        logps = logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
        return [logps[i, prompt_length - 1 : len(ids) - 1].mean().item() for i, (ids, prompt_length) in enumerate(rows)]


def check_examples(examples: Sequence[dict[str, Any]], columns: Sequence[str]) -> list[dict[str, Any]]:
    """The examples as a list of rows, which all have these columns and those of the first row, and a prompt.

    Raises:
        ValueError: There are none, one lacks a column, or its prompt is empty.
    """
    rows = list(examples)
    for i, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise ValueError(
                f"Example {i} is {row!r}; expected rows with a column {columns[0]!r}, such as a list of dicts."
            )
    rows = [dict(row) for row in rows]
    if not rows:
        raise ValueError("The examples are empty; a search needs at least one.")
    for i, row in enumerate(rows):
        for column in [*columns, *(column for column in rows[0] if column != "completion")]:
            if column not in row:
                raise ValueError(f"Example {i} has no {column!r}; it has {', '.join(map(repr, row))}.")
            if column == "prompt" and not row[column]:
                raise ValueError(f"Example {i} has an empty {column!r}: {row}.")
    return rows


def prompt_text(prompt: Any, tokenizer: Any) -> str:
    """What the model reads: text as it is, messages through the chat template."""
    if isinstance(prompt, str):
        return prompt
    text: str = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    return text


def prompt_ids(prompt: Any, tokenizer: Any) -> list[int]:
    """The tokens of a prompt, as TRL makes them: text with the tokenizer's special tokens, which a chat template
    brings by itself."""
    ids: list[int] = tokenizer(prompt_text(prompt, tokenizer), add_special_tokens=isinstance(prompt, str))["input_ids"]
    return ids


def with_pad_token(tokenizer: Any) -> Any:
    """The tokenizer, or a copy that pads with its end token if it has no pad token."""
    if tokenizer.pad_token is None:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _of_a_trainer(function: RewardFunc) -> dict[str, Any]:
    """Stand-ins for what only a trainer has to pass, for functions that ask for it by name."""
    wanted = inspect.signature(function).parameters
    stand_ins = {"trainer_state": None, "log_extra": _log_nothing, "log_metric": _log_nothing}
    return {name: value for name, value in stand_ins.items() if name in wanted}


def _log_nothing(*_: Any, **__: Any) -> None:
    pass


def _result_of(awaitable: Any) -> Any:
    """Wait for a coroutine, in a thread of its own, as this one may have a running loop (notebooks)."""

    async def wait() -> Any:
        return await awaitable

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, wait()).result()


def _until_end(ids: list[int], end: int | None) -> list[int]:
    """Up to and with the end token, without the padding that follows in a batch."""
    return ids[: ids.index(end) + 1] if end in ids else ids
