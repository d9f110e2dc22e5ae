"""Between text, messages and the tokens that a model reads."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile
from typing import Any

import torch

from .prefix import Prefix, last_logits


def joined(prompt: Sequence[Mapping[str, Any]], completion: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the messages of prompt and completion. A completion continues an answer that the prompt has begun."""
    if completion and prompt and prompt[-1]["role"] == "assistant" == completion[0]["role"]:
        whole = {**completion[0], "content": _one_content(prompt[-1].get("content"), completion[0].get("content"))}
        return [*prompt[:-1], whole, *completion[1:]]
    return [*prompt, *completion]


def _one_content(begun: Any, rest: Any) -> Any:
    """Join two message contents. Each may be text, parts, or `None` in a tool call."""
    if not begun or not rest:
        return begun or rest
    if isinstance(begun, str) and isinstance(rest, str):
        return begun + rest
    return [part for content in (begun, rest) for part in _parts(content)]


def _parts(content: Any) -> Sequence[Any]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def prompt_text(prompt: Any, tokenizer: Any) -> str:
    """Return the text that the model reads: text unchanged, messages through the chat template. A last message of the
    assistant is continued."""
    if isinstance(prompt, str):
        return prompt
    begun = prompt[-1]["role"] == "assistant"
    text: str = tokenizer.apply_chat_template(
        prompt, tokenize=False, add_generation_prompt=not begun, continue_final_message=begun
    )
    return text


def text_for_trl(messages: Any, tokenizer: Any) -> str:
    """Return messages as text without the beginning-of-sequence token that a tokenizer adds, as TRL adds it again."""
    text = prompt_text(messages, tokenizer)
    if tokenizer.bos_token_id is not None and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]:
        return text.removeprefix(tokenizer.bos_token)
    return text


def prompt_ids(prompt: Any, tokenizer: Any) -> list[int]:
    """Return the tokens of a prompt, as TRL makes them. Text gets the tokenizer's special tokens; messages get those of
    the chat template."""
    ids: list[int] = tokenizer(prompt_text(prompt, tokenizer), add_special_tokens=isinstance(prompt, str))["input_ids"]
    return ids


def continuation_ids(prompt: Any, answer: str, tokenizer: Any) -> list[int]:
    """Return the tokens of an answer as they follow the prompt, because some tokenizers put a space before a separate
    text. Where prompt and answer would merge into one token, the answer is tokenized alone."""
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
    """Return the log-probabilities of the tokens of answers, `[tokens]` for each row.

    Args:
        model: The model.
        rows: The tokens of prompt and answer, and the number of tokens of the prompt.
        tokenizer: A tokenizer with a pad token.
        prefix: The tokens that all rows begin with, already read.
        temperature: Divides the logits.
    """
    batch = padded([ids for ids, _ in rows], "right", prefix, tokenizer, model.device)
    length = batch["input_ids"].shape[1]
    first = min(prompt_length for _, prompt_length in rows) - 1
    # logits of the answers only: each position has one logit per word of a large vocabulary
    read = {"input_ids": batch["input_ids"][:, 0 if prefix is None else len(prefix) :]}
    logits = model(**{**batch, **read}, **last_logits(model, length - first)).logits
    offset = length - logits.shape[1]
    targets = batch["input_ids"][:, offset + 1 :]
    logps = log_probabilities(logits[:, :-1], targets, temperature)
    return [logps[i, n - 1 - offset : len(ids) - 1 - offset] for i, (ids, n) in enumerate(rows)]


def log_probabilities(logits: torch.Tensor, targets: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return the log-probabilities of `targets` `[rows, tokens]` from logits `[rows, tokens, vocabulary]`, in fp32."""
    scaled = logits.float() if temperature == 1 else logits.float() / temperature  # a copy as large as the logits
    return scaled.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def padded(
    sequences: list[list[int]], side: str, prefix: Prefix | None, tokenizer: Any, device: torch.device
) -> dict[str, Any]:
    """Return the inputs of a model for these sequences: tokens, attention mask, and the kept prefix."""
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
    """Return the tokenizer, or a copy that pads with its end token if it has no pad token."""
    if tokenizer.pad_token is None:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def end_tokens(model: Any, tokenizer: Any, generation_kwargs: Mapping[str, Any]) -> set[int]:
    """Return all tokens on which `generate` ends a row; many models have several."""
    given = generation_kwargs.get("eos_token_id")
    for config in (generation_kwargs.get("generation_config"), getattr(model, "generation_config", None)):
        if given is None:
            given = getattr(config, "eos_token_id", None)
    ends = given if isinstance(given, (list, tuple)) else [given]
    return {int(end) for end in (*ends, tokenizer.eos_token_id) if end is not None}


def until_end(ids: list[int], ends: set[int], pad: int) -> list[int]:
    """Cut after the first end token, and drop the padding that follows in a batch."""
    ended = next((ids[: i + 1] for i, token in enumerate(ids) if token in ends), ids)
    while ended and ended[-1] == pad and pad not in ends:
        ended = ended[:-1]
    return ended


def context_length(config: Any, default: int = 2048) -> int:
    """Return how many tokens a model can read, or `default` if its config does not say."""
    return int(getattr(config.get_text_config(), "max_position_embeddings", None) or default)


def user_turns(tokenizer: Any) -> Callable[[Any], str]:
    """
    Return a function that reads the user's turns from the token ids of a prompt, joined by newlines.

    A first pass that gets token ids then sees the same text as one that gets the messages. The chat template is
    rendered once with known texts, which shows the markers around a turn. Prompts without these markers give their
    whole decoded text, as do all prompts where there is no template, or one without distinct markers.

    A system message that the template puts into the user's turn without markers (Gemma, Mistral) stays in the text.

    Args:
        tokenizer: The tokenizer of the prompts.
    """
    special = [re.escape(token) for token in sorted(tokenizer.all_special_tokens, key=len, reverse=True)]
    markers = _user_markers(tokenizer, special)

    def read(ids: Any) -> str:
        if markers is not None:
            opening, system, endings = markers
            pieces = _decoded(tokenizer, ids).split(opening)[1:]
            if pieces:
                turns = [_turn(piece, system, endings) for piece in pieces]
                return "\n".join(re.sub("|".join(special), "", turn).strip() for turn in turns)
        text: str = tokenizer.decode(ids, skip_special_tokens=True)
        return text

    return read


def _turn(piece: str, system: tuple[str, str], endings: list[str]) -> str:
    begin, end = system
    if end and piece.startswith(begin):
        piece = piece.partition(end)[2] or piece
    return next((piece.partition(ending)[0] for ending in endings if ending in piece), piece)


def _user_markers(tokenizer: Any, special: list[str]) -> tuple[str, tuple[str, str], list[str]] | None:
    """What opens a user's turn, what stands around a system message inside it, and what may end it."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    from jinja2.exceptions import TemplateError

    failures = (TemplateError, TypeError, ValueError)  # a template may refuse two turns, or text as the content
    first, answer, second, system = (f"{word}x7q" for word in ("first", "answer", "second", "system"))
    messages = [
        {"role": "user", "content": first},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": second},
    ]

    def rendered(messages: list[dict[str, str]], asks: bool) -> list[str]:
        """The prompt, cut at the texts of its messages.

        Raises:
            ValueError: A text is missing, or they are in another order.
        """
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=asks)
        text = _decoded(tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"])
        contents = [message["content"] for message in messages]
        if re.findall("|".join(contents), text) != contents:
            raise ValueError
        return re.split("|".join(contents), text)

    def units(text: str) -> list[str]:
        """Special tokens are whole, or `<s>` and `</s>` would have an end in common."""
        return re.findall("|".join([*special, "."]), text, re.DOTALL)

    def common(one: str, other: str, step: int) -> str:
        """What both begin with (`step=1`) or end with (`step=-1`)."""
        pairs = zip(units(one)[::step], units(other)[::step], strict=False)
        return "".join([a for a, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)][::step])

    try:
        before, after_first, before_second, end = rendered(messages, asks=False)
        asked = rendered(messages, asks=True)[-1]
    except failures:
        return None
    opening = common(before, before_second, -1)
    try:
        head, inner, *_ = rendered([{"role": "system", "content": system}, *messages], asks=False)
    except failures:
        head, inner = "", opening
    around = ("", "")
    if opening and opening in head:  # the message is inside the turn
        around = (head.rpartition(opening)[2], inner if inner.strip() else "")
    elif inner:
        opening = common(opening, inner, -1)
    # A turn ends with `short`. If this is whitespace, which may also occur in a text, the header of the answer follows.
    short, long = common(after_first, end, 1), common(after_first, asked, 1)
    endings = [ending for ending in (short, long) if ending.strip()]
    opening = opening.removeprefix(short) or opening  # a first turn follows no other
    return (opening, around, endings) if opening.strip() and endings else None


def _decoded(tokenizer: Any, ids: Any) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text
