"""What a model is scored by: reward on generated text, likelihood of reference answers, or a sum of such.

An objective looks at the model as it is, with the adapter or mixtures already in place, and returns one score per
example. Higher is better. `score` is one batch, in which each row may have a mixture of its own.
"""

from __future__ import annotations

import asyncio
import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import torch

from .prefix import Prefix, common_prefix, generates_from_prefix, takes
from .rewards import RewardFunc, check_rewards

# gets indices of examples, the tokens of the answers, and their rewards
Heard = Callable[[Sequence[int], list[list[int]], list[float]], None]


class Objective(Protocol):
    """Scores a model on its examples.

    Attributes:
        name: What it is called.
        examples: Its rows.
        deterministic: Whether the same model gets the same score again.
        tokens: How many tokens the model has read and written for it so far.
    """

    name: str
    examples: list[dict[str, Any]]
    deterministic: bool
    tokens: int

    def lengths(self) -> list[int]:
        """Tokens of each example, so that those of like length can share a batch."""
        ...

    def score(self, model: Any, indices: Sequence[int]) -> list[float]:
        """One score for each of these examples, which are one batch in this order; an example may occur repeatedly."""
        ...


class Batched:
    """What objectives have in common."""

    examples: list[dict[str, Any]]
    batch_size: int
    tokens: int = 0

    def __call__(self, model: Any) -> list[float]:
        """One score per example, for a model that is the same for all of them."""
        scores: list[float] = []
        for start in range(0, len(self.examples), self.batch_size):
            scores += self.score(model, range(start, min(start + self.batch_size, len(self.examples))))
        return scores

    def score(self, model: Any, indices: Sequence[int]) -> list[float]:
        raise NotImplementedError

    def _take(self, examples: Sequence[dict[str, Any]]) -> None:
        """Make these the examples."""
        raise NotImplementedError

    def with_examples(self, examples: Sequence[dict[str, Any]]) -> Any:
        """The same objective for other examples."""
        other = self._changed()
        other._take(examples)
        return other

    def _changed(self, **attributes: Any) -> Any:
        """A copy, so that a subclass stays what it is, with other attributes."""
        other = copy.copy(self)
        other.__dict__.pop("tokens", None)  # counted anew
        other.__dict__.update(attributes)
        return other


class RewardObjective(Batched):
    """
    Rewards of generated answers, the paper's objective. Decoding is greedy unless `generation_kwargs` say otherwise.

    Args:
        examples (`Sequence[dict]`): Rows with a `"prompt"` (text or messages); all columns but it and `"completion"`
            reach the reward functions by name.
        reward_funcs (`Callable` or list of them): Called as by TRL's trainers; several are added up. `None` for an
            example means that a function does not apply to it. Coroutines are awaited; reward models,
            TRL's other form, are not taken.
        tokenizer: The model's tokenizer.
        reward_weights (`Sequence[float]`, *optional*): A factor for each function, 1 by default.
        batch_size (`int`): Prompts per `generate` call, when the objective is called for all examples.
        generation_kwargs (`dict`): For `generate`; `max_new_tokens` is 256 by default, as in TRL.
        deterministic (`bool`, *optional*): Whether the same model gets the same rewards again. By default that is so if
            decoding is greedy; say `False` if a reward function itself is random, such as a judge that samples.
    """

    name = "reward"
    _hear: Heard | None = None

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
            raise ValueError("`reward_funcs` is empty; pass at least one function, or None for the log-likelihood.")
        for function in self.reward_funcs:
            if not callable(function) or isinstance(function, torch.nn.Module):
                raise TypeError(f"{function!r} cannot be used as a reward here: expected a function, no model.")
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
        self._take(examples)

    def _take(self, examples: Sequence[dict[str, Any]]) -> None:
        self.examples = check_examples(examples, ["prompt"])
        passed = ["prompts", "completions", "completion_ids"]
        passed += [name for function in self.reward_funcs for name in _of_a_trainer(function)]
        if taken := [name for name in passed if name in self.examples[0]]:
            raise ValueError(
                f"The examples have a column {taken[0]!r}, which reward functions get from elsewhere; "
                "give the column another name."
            )
        self.prompts = [prompt_ids(row["prompt"], self.tokenizer) for row in self.examples]
        self.prefix_ids = common_prefix(self.prompts) if generates_from_prefix(self.generation_kwargs) else []

    def lengths(self) -> list[int]:
        return [len(ids) for ids in self.prompts]

    def score(self, model: Any, indices: Sequence[int], prefix: Prefix | None = None) -> list[float]:
        answers = self.answers(model, indices, prefix)
        rewards = self.rewards(indices, answers)
        if self._hear is not None:
            self._hear(indices, answers, rewards)
        return rewards

    def heard_by(self, function: Heard) -> Any:
        """The same objective, which tells a function the answers: indices of examples, tokens, rewards."""
        return self._changed(_hear=function)

    def sampling(self, temperature: float = 1.0) -> Any:
        """The same objective, but for answers that are sampled from the model's own distribution at a temperature."""
        plain = {
            "do_sample": True,
            "temperature": temperature,
            "top_k": 0,
            "top_p": 1.0,
            "min_p": 0.0,
            "typical_p": 1.0,
        }
        plain |= {"epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "repetition_penalty": 1.0, "num_beams": 1}
        return self._changed(generation_kwargs={**self.generation_kwargs, **plain}, deterministic=False)

    @torch.no_grad()
    def answers(self, model: Any, indices: Sequence[int], prefix: Prefix | None = None) -> list[list[int]]:
        """Tokens of the model's answers to these examples, each with its end if it came to one."""
        if not generates_from_prefix(self.generation_kwargs, getattr(model, "generation_config", None)):
            prefix = None
        inputs = padded([self.prompts[i] for i in indices], "left", prefix, self.tokenizer, model.device)
        options = {**self.generation_kwargs, "return_dict_in_generate": False}
        output = model.generate(**inputs, pad_token_id=self.tokenizer.pad_token_id, **options)
        if len(output) != len(indices):
            raise ValueError("`num_return_sequences` must be 1: an example has one score.")
        ends = _end_tokens(model, self.tokenizer, self.generation_kwargs)
        pad = self.tokenizer.pad_token_id
        found = [_until_end(ids, ends, pad) for ids in output[:, inputs["input_ids"].shape[1] :].tolist()]
        if stops := self._stop_strings():
            found = [self._until_stop(ids, ends, stops) for ids in found]
        self.tokens += sum(len(self.prompts[i]) for i in indices) + sum(map(len, found))
        return found

    def _stop_strings(self) -> list[str]:
        config = self.generation_kwargs.get("generation_config")
        given = self.generation_kwargs.get("stop_strings") or getattr(config, "stop_strings", None) or []
        return [given] if isinstance(given, str) else list(given)

    def _until_stop(self, ids: list[int], ends: set[int], stops: list[str]) -> list[int]:
        """Without an end token that is the padding after a stop string."""
        if ids and ids[-1] in ends and any(stop in self.tokenizer.decode(ids[:-1]) for stop in stops):
            return ids[:-1]
        return ids

    def rewards(self, indices: Sequence[int], completion_ids: list[list[int]]) -> list[float]:
        """The weighted sum of the rewards of an answer to each of these examples."""
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
                totals[i] += weight * (reward or 0.0)
        return totals


class LogLikelihoodObjective(Batched):
    """
    Mean log-probability per token of the reference answers, including the end of the answer. Needs no decoding, is
    never tied, and can be differentiated.

    Args:
        examples (`Sequence[dict]`): Rows with `"prompt"` and `"completion"`, both text or both messages.
        tokenizer: The model's tokenizer.
        batch_size (`int`): Sequences per forward, when the objective is called for all examples.
    """

    name = "log-likelihood"
    deterministic = True

    def __init__(self, examples: Sequence[dict[str, Any]], tokenizer: Any, *, batch_size: int = 16) -> None:
        self.tokenizer = with_pad_token(tokenizer)
        self.batch_size = batch_size
        self._take(examples)

    def _take(self, examples: Sequence[dict[str, Any]]) -> None:
        self.examples = check_examples(examples, ["prompt", "completion"])
        self._rows = [self._encode(row) for row in self.examples]
        self.prefix_ids = common_prefix([ids[:length] for ids, length in self._rows])

    def _encode(self, row: dict[str, Any]) -> tuple[list[int], int]:
        """Token ids of prompt and answer, and the length of the prompt."""
        prompt = prompt_text(row["prompt"], self.tokenizer)
        if isinstance(row["prompt"], str):
            answer = row["completion"] + (self.tokenizer.eos_token or "")
        else:
            whole = self.tokenizer.apply_chat_template(joined(row["prompt"], row["completion"]), tokenize=False)
            if not whole.startswith(prompt):
                raise ValueError(f"The chat template does not continue this prompt with its completion: {row}")
            answer = whole[len(prompt) :]
        before = prompt_ids(row["prompt"], self.tokenizer)
        return before + continuation_ids(row["prompt"], answer, self.tokenizer), len(before)

    def lengths(self) -> list[int]:
        return [len(ids) for ids, _ in self._rows]

    @torch.no_grad()
    def score(self, model: Any, indices: Sequence[int], prefix: Prefix | None = None) -> list[float]:
        scores: list[float] = self.differentiable(model, indices, prefix).tolist()
        return scores

    def differentiable(self, model: Any, indices: Sequence[int], prefix: Prefix | None = None) -> torch.Tensor:
        """As `score`, with a graph: `[rows]`."""
        rows = [self._rows[i] for i in indices]
        self.tokens += sum(len(ids) for ids, _ in rows)
        return torch.stack([logps.mean() for logps in answer_logps(model, rows, self.tokenizer, prefix)])


class WeightedObjective(Batched):
    """
    A weighted sum of objectives of the same examples.

    With a small weight, the log-likelihood decides among candidates of equal reward, as in the paper's code:
    `WeightedObjective([reward, log_likelihood], [1.0, 0.001])`.

    Args:
        objectives (`Sequence[Objective]`): Of as many examples each.
        weights (`Sequence[float]`): Their weights.
    """

    def __init__(self, objectives: Sequence[Any], weights: Sequence[float]) -> None:
        for objective in objectives:
            if hasattr(objective, "count"):
                raise ValueError(f"The objective {objective.name!r} has several rows for an example; it stands alone.")
        if not objectives or len(objectives) != len(weights):
            raise ValueError(f"Expected as many weights as objectives, got {len(objectives)} and {len(weights)}.")
        if len({len(objective.examples) for objective in objectives}) > 1:
            raise ValueError("The objectives have different numbers of examples; give all of them the same rows.")
        for i, rows in enumerate(zip(*(objective.examples for objective in objectives), strict=True)):
            prompts = [row["prompt"] for row in rows if "prompt" in row]  # an objective may do without
            if any(prompt != prompts[0] for prompt in prompts):
                raise ValueError(f"The objectives have different prompts in row {i}; give all of them the same rows.")
        self.objectives, self.weights = list(objectives), [float(weight) for weight in weights]
        # with the columns of all, as these rows are what each is made of anew for others
        self.examples = [
            {name: value for row in rows for name, value in row.items()}
            for rows in zip(*(objective.examples for objective in objectives), strict=True)
        ]
        self.batch_size = getattr(objectives[0], "batch_size", 16)
        self.deterministic = all(objective.deterministic for objective in objectives)

    @property
    def name(self) -> str:
        pairs = zip(self.weights, self.objectives, strict=True)
        return " + ".join(
            objective.name if weight == 1 else f"{weight:g} {objective.name}" for weight, objective in pairs
        )

    @property
    def tokens(self) -> int:  # type: ignore[override]
        """Of all of them."""
        return sum(objective.tokens for objective in self.objectives)

    def _take(self, examples: Sequence[dict[str, Any]]) -> None:
        self.objectives = [objective.with_examples(examples) for objective in self.objectives]
        self.examples = self.objectives[0].examples

    @property
    def prefix_ids(self) -> list[int]:
        """Of all of them."""
        return common_prefix([[*getattr(objective, "prefix_ids", []), -1] for objective in self.objectives])

    def lengths(self) -> list[int]:
        return [max(lengths) for lengths in zip(*(objective.lengths() for objective in self.objectives), strict=True)]

    def score(self, model: Any, indices: Sequence[int], prefix: Prefix | None = None) -> list[float]:
        given = {} if prefix is None else {"prefix": prefix}
        parts = [objective.score(model, indices, **given) for objective in self.objectives]
        return [
            sum(weight * score for weight, score in zip(self.weights, scores, strict=True))
            for scores in zip(*parts, strict=True)
        ]


def check_examples(examples: Sequence[dict[str, Any]], columns: Sequence[str]) -> list[dict[str, Any]]:
    """The examples as a list of rows, which all have these columns and those of each other, and a prompt.

    Raises:
        ValueError: There are none, one lacks a column, its prompt is empty, or it is neither text nor messages.
    """
    rows = list(examples)
    for i, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise ValueError(
                f"Example {i} is {row!r}; expected rows with a column {columns[0]!r}, such as a list of dicts, "
                'or of a DataFrame, `.to_dict("records")`.'
            )
    rows = [{name: _plain(value, name) for name, value in row.items()} for row in rows]
    if not rows:
        raise ValueError("The examples are empty; expected at least one.")
    wanted = dict.fromkeys([*columns, *(column for row in rows for column in row if column != "completion")])
    for i, row in enumerate(rows):
        for column in wanted:
            if column not in row:
                named = f"Example {i} has no {column!r}; it has {', '.join(map(repr, row))}."
                raise ValueError(named if column in columns else f"{named} Others have it; give all the same columns.")
            if column == "prompt" and isinstance(row[column], (str, list, tuple)) and not row[column]:
                raise ValueError(f"Example {i} has an empty {column!r}: {row}.")
        for column in columns:
            if not isinstance(row[column], str) and not are_messages(row[column]):
                raise ValueError(
                    f"Example {i} has the {column} {row[column]!r}; expected text, or messages with a 'role'."
                )
            if isinstance(row[column], str) != isinstance(row["prompt"], str):
                kinds = {True: "text", False: "messages"}
                raise ValueError(
                    f"Example {i} has {kinds[isinstance(row['prompt'], str)]} as its prompt and "
                    f"{kinds[isinstance(row[column], str)]} as its {column}; both must be of one kind."
                )
    return rows


def are_messages(value: Any) -> bool:
    """Whether it is a list of messages, each with the name of a role."""
    return isinstance(value, (list, tuple)) and all(
        isinstance(turn, Mapping) and isinstance(turn.get("role"), str) for turn in value
    )


def _plain(value: Any, column: str) -> Any:
    """What numpy's and torch's kind of rows hold: scalars as Python's, and messages as lists."""
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        return value.item()
    return _as_lists(value) if column in ("prompt", "completion") else value


def _as_lists(value: Any) -> Any:
    """Messages, and the parts of their contents, without arrays."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {name: _as_lists(inner) for name, inner in value.items()}
    return [_as_lists(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def joined(prompt: Sequence[Mapping[str, Any]], completion: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The messages of both; a completion goes on from an answer that the prompt has begun."""
    if completion and prompt and prompt[-1]["role"] == "assistant" == completion[0]["role"]:
        whole = {**completion[0], "content": _one_content(prompt[-1].get("content"), completion[0].get("content"))}
        return [*prompt[:-1], whole, *completion[1:]]
    return [*prompt, *completion]


def _one_content(begun: Any, rest: Any) -> Any:
    """The contents of two messages, of which either may be text, parts, or nothing beside the call of a tool."""
    if not begun or not rest:
        return begun or rest
    if isinstance(begun, str) and isinstance(rest, str):
        return begun + rest
    return [part for content in (begun, rest) for part in _parts(content)]


def _parts(content: Any) -> Sequence[Any]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def prompt_text(prompt: Any, tokenizer: Any) -> str:
    """What the model reads: text as it is, messages through the chat template. It goes on from a last message of the
    assistant."""
    if isinstance(prompt, str):
        return prompt
    begun = prompt[-1]["role"] == "assistant"
    text: str = tokenizer.apply_chat_template(
        prompt, tokenize=False, add_generation_prompt=not begun, continue_final_message=begun
    )
    return text


def text_for_trl(messages: Any, tokenizer: Any) -> str:
    """Messages as a text that has the same tokens once a tokenizer has put its first one before it."""
    text = prompt_text(messages, tokenizer)
    if tokenizer.bos_token_id is not None and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]:
        return text.removeprefix(tokenizer.bos_token)
    return text


def prompt_ids(prompt: Any, tokenizer: Any) -> list[int]:
    """The tokens of a prompt, as TRL makes them: text with the tokenizer's special tokens, which a chat template
    brings by itself."""
    ids: list[int] = tokenizer(prompt_text(prompt, tokenizer), add_special_tokens=isinstance(prompt, str))["input_ids"]
    return ids


def continuation_ids(prompt: Any, answer: str, tokenizer: Any) -> list[int]:
    """The tokens of an answer to a prompt, as they are after it: some tokenizers begin a text of its own with a space.
    By itself where the two would grow together at the seam."""
    before = prompt_ids(prompt, tokenizer)
    whole = tokenizer(prompt_text(prompt, tokenizer) + answer, add_special_tokens=isinstance(prompt, str))["input_ids"]
    if whole[: len(before)] == before:
        return list(whole[len(before) :])
    return list(tokenizer(answer, add_special_tokens=False)["input_ids"])


def answer_logps(
    model: Any,
    rows: Sequence[tuple[list[int], int]],
    tokenizer: Any,
    prefix: Prefix | None = None,
    temperature: float = 1.0,
) -> list[torch.Tensor]:
    """Log-probabilities of the tokens of answers, `[tokens]` for each row.

    Args:
        model: The model.
        rows: Tokens of prompt and answer, and how many of them are the prompt's.
        tokenizer: With a pad token.
        prefix: What all rows begin with.
        temperature: What logits are divided by.
    """
    batch = padded([ids for ids, _ in rows], "right", prefix, tokenizer, model.device)
    length = batch["input_ids"].shape[1]
    first = min(prompt_length for _, prompt_length in rows) - 1
    # logits of the answers only, for there is a large vocabulary of them at each place
    kept = {"logits_to_keep": length - first} if takes(model, "logits_to_keep") else {}
    read = {"input_ids": batch["input_ids"][:, 0 if prefix is None else len(prefix) :]}
    logits = model(**{**batch, **read}, **kept).logits
    offset = length - logits.shape[1]
    targets = batch["input_ids"][:, offset + 1 :]
    logps = log_probabilities(logits[:, :-1], targets, temperature)
    return [logps[i, n - 1 - offset : len(ids) - 1 - offset] for i, (ids, n) in enumerate(rows)]


def log_probabilities(logits: torch.Tensor, targets: torch.Tensor, temperature: float) -> torch.Tensor:
    """Of `targets`, `[rows, tokens]`, with logits `[rows, tokens, vocabulary]`, in fp32."""
    scaled = logits.float() if temperature == 1 else logits.float() / temperature  # a copy as large as the logits
    return scaled.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def padded(
    sequences: list[list[int]], side: str, prefix: Prefix | None, tokenizer: Any, device: torch.device
) -> dict[str, Any]:
    """What a model takes: all tokens, their mask, and what it knows of the first ones."""
    start = 0 if prefix is None else len(prefix)
    batch = tokenizer.pad({"input_ids": [ids[start:] for ids in sequences]}, padding_side=side, return_tensors="pt")
    batch = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
    if prefix is None:
        return batch
    begin = torch.tensor(sequences[0][:start], device=device).expand(len(sequences), -1)
    return {
        "input_ids": torch.cat([begin, batch["input_ids"]], dim=1),
        "attention_mask": torch.cat([torch.ones_like(begin), batch["attention_mask"]], dim=1),
        "past_key_values": prefix.cache(),
    }


def with_pad_token(tokenizer: Any) -> Any:
    """The tokenizer, or a copy that pads with its end token if it has no pad token."""
    if tokenizer.pad_token is None:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _of_a_trainer(function: RewardFunc) -> dict[str, Any]:
    """Stand-ins for what only a trainer has to pass, for functions that ask for it by name."""
    try:
        wanted = inspect.signature(function).parameters
    except ValueError:  # some that are written in C have none
        return {}
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


def _end_tokens(model: Any, tokenizer: Any, generation_kwargs: Mapping[str, Any]) -> set[int]:
    """All tokens on which `generate` ends a row: many models have several."""
    given = generation_kwargs.get("eos_token_id")
    for config in (generation_kwargs.get("generation_config"), getattr(model, "generation_config", None)):
        if given is None:
            given = getattr(config, "eos_token_id", None)
    ends = given if isinstance(given, (list, tuple)) else [given]
    return {int(end) for end in (*ends, tokenizer.eos_token_id) if end is not None}


def _until_end(ids: list[int], ends: set[int], pad: int) -> list[int]:
    """Up to and with the first end token, or the end by `stop_strings`, without the padding that follows in a batch."""
    ended = next((ids[: i + 1] for i, token in enumerate(ids) if token in ends), ids)
    while ended and ended[-1] == pad and pad not in ends:
        ended = ended[:-1]
    return ended
