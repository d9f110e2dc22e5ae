"""Reward functions in TRL's protocol, a few verifiable ones, and checks that name what went wrong.

A reward function gets `prompts`, `completions`, `completion_ids` and every other column of the dataset as keyword
arguments, each a list with one entry per completion. It returns one number per completion, or `None` where it does not
apply. The functions here return **1 for right and 0 for wrong**, so that a mean is an accuracy. The paper's REINFORCE
needs −1 and 1; `ReinforceConfig(signed_rewards=True)`, the default, maps 0 and 1 to them.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import math
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Sequence
from numbers import Number
from pathlib import Path
from typing import Any

from ..utils.extras import needs

RewardFunc = Callable[..., Sequence["float | None"]]

# not "completion", which TRL does not pass to reward functions
REFERENCE_COLUMNS = ("answer", "solution")


def content_text(content: Any) -> str:
    """Return the text of a message, whose content may be parts, or `None` in a tool call."""
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content or () if part.get("type") == "text")


def text_of(completion: Any) -> str:
    """Return the text of a completion or reference answer: a string, a number, or the last of several messages.

    Raises:
        ValueError: It is something else, or a message without text, such as a tool call.
    """
    if isinstance(completion, (str, Number)):
        return str(completion)
    try:
        content = completion[-1]["content"]
        text = None if content is None else content_text(content)
    except (TypeError, KeyError, IndexError, AttributeError):
        text = None
    if text is None:
        raise ValueError(f"Expected text, a number or messages with text, got {completion!r}.")
    return text


# ------------------------------------------------------------------------------------------- answers in a text


_MARKS = ".,:;!?\"'*`()[]{}<>“”„‘’«»"


def last_number(text: str) -> str:
    """Return the last number of a text without thousands separators, or `""`. In `1/2` that is 2."""
    numbers = re.findall(r"-?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|-?\.\d+", text)
    return numbers[-1].replace(",", "") if numbers else ""


def first_word(text: str) -> str:
    """Return the first word of a text without punctuation around it, or `""`."""
    words = text.split()
    return words[0].strip(_MARKS) if words else ""


def last_word(text: str) -> str:
    """Return the last word of the first non-empty line without punctuation around it, or `""`."""
    words = [word.strip(_MARKS) for word in first_line(text).split()]
    return next((word for word in reversed(words) if word), "")


def first_line(text: str) -> str:
    """Return the first non-empty line of a text without spaces around it."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def boxed(text: str) -> str:
    r"""Return the content of the last `\boxed{...}` or `<answer>...</answer>` of a text, or `""`."""
    found = re.findall(r"\\boxed\{([^{}]*)\}|<answer>(.*?)</answer>", text, flags=re.DOTALL)
    return (found[-1][0] or found[-1][1]).strip() if found else ""


ANSWERS: dict[str, Callable[[str], str]] = {
    "number": last_number,
    "word": first_word,
    "last_word": last_word,
    "line": first_line,
    "boxed": boxed,
    "text": str.strip,
}


# ------------------------------------------------------------------------------------------- verifiable rewards


def number(completions: list[Any], **columns: Any) -> list[float]:
    """1 if the last number of the completion equals the last one of the reference answer."""

    def right(completion: str, reference: str) -> bool:
        found, wanted = last_number(completion), last_number(reference)
        return bool(found and wanted) and math.isclose(float(found), float(wanted), rel_tol=1e-9)

    return _compare(right, completions, columns)


def exact(completions: list[Any], **columns: Any) -> list[float]:
    """1 if the completion is the reference answer, apart from case and from spaces and punctuation around it."""
    return _compare(lambda completion, reference: _plain(completion) == _plain(reference), completions, columns)


def choice(completions: list[Any], **columns: Any) -> list[float]:
    """1 if the first word of the completion is the reference answer, such as a letter or a label."""
    return _compare(
        lambda completion, reference: _plain(first_word(completion)) == _plain(reference), completions, columns
    )


def contains(completions: list[Any], **columns: Any) -> list[float]:
    """1 if the reference answer occurs in the completion, as whole words in any case."""

    def right(completion: str, reference: str) -> bool:
        return bool(re.search(rf"(?<!\w){re.escape(_plain(reference))}(?!\w)", completion.casefold()))

    return _compare(right, completions, columns)


def regex(completions: list[Any], **columns: Any) -> list[float]:
    """1 if the reference answer, a regular expression, matches somewhere in the completion."""
    return _compare(lambda completion, reference: bool(re.search(reference, completion)), completions, columns)


def math_verify(completions: list[Any], **columns: Any) -> list[float | None]:
    """1 if the completion is mathematically equal to the reference answer: TRL's `accuracy_reward`, which needs the
    package `math-verify`. `None` where the reference cannot be parsed."""
    try:
        from trl.rewards import accuracy_reward
    except ImportError as error:
        raise needs("train", "The reward 'math_verify'", "TRL") from error
    messages = [[{"role": "assistant", "content": text_of(completion)}] for completion in completions]
    found: list[float | None] = accuracy_reward(messages, [text_of(answer) for answer in _references(columns)])
    return found


REWARDS: dict[str, RewardFunc] = {
    function.__name__: function for function in (number, exact, choice, contains, regex, math_verify)
}


def _plain(text: str) -> str:
    return text.strip().strip(_MARKS).casefold()


def _references(columns: dict[str, Any]) -> list[Any]:
    for name in REFERENCE_COLUMNS:
        if name in columns:
            found: list[Any] = columns[name]
            return found
    ours = ("prompts", "completion_ids")
    known = ", ".join(name for name, value in columns.items() if isinstance(value, list) and name not in ours)
    raise ValueError(
        f"There is no reference answer to compare with: expected a column {' or '.join(map(repr, REFERENCE_COLUMNS))} "
        f"in the dataset; it has {known or 'no other columns'}."
    )


def _compare(right: Callable[[str, str], bool], completions: list[Any], columns: dict[str, Any]) -> list[float]:
    answers = [text_of(answer) for answer in _references(columns)]
    return [float(right(text_of(text), answer)) for text, answer in zip(completions, answers, strict=True)]


# ------------------------------------------------------------------------------------------- finding and wrapping


def find_reward(name: str) -> RewardFunc:
    """Return a reward function by name: one of [`REWARDS`], a dotted path such as `my_package.rewards.helpful`, or a
    file and a function, such as `rewards.py:helpful`.

    Raises:
        ValueError: There is no such name, the import fails, or it is no function.
    """
    if name in REWARDS:
        return REWARDS[name]
    in_file = re.fullmatch(r"(.+\.py):(\w+)", name)
    module_name, _, attribute = in_file.group(1, 0, 2) if in_file else name.rpartition(".")
    if not module_name:
        raise ValueError(
            f"There is no reward function {name!r}. Expected one of {', '.join(REWARDS)}, the dotted path of a "
            "function, such as my_package.rewards.helpful, or rewards.py:helpful."
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as TRL's scripts
    try:
        module = _module_of_file(module_name) if in_file else importlib.import_module(module_name)
        function = getattr(module, attribute)
    except Exception as error:  # the module may raise anything
        raise ValueError(f"The reward function {name!r} could not be imported: {error}.") from error
    if not callable(function):
        raise ValueError(f"The reward function {name!r} is no function but {function!r}.")
    return function


def _module_of_file(path: str) -> Any:
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def reward_name(function: Any) -> str:
    """Return the name of a reward function for messages and metrics."""
    return str(getattr(function, "__name__", type(function).__name__))


def check_rewards(rewards: Any, function: Any, prompts: Sequence[Any], completions: Sequence[Any]) -> list[Any]:
    """Return the rewards as a list with one finite number or `None` per completion.

    Raises:
        ValueError: They are something else; the message names the function and the first bad completion.
    """
    name, expected = reward_name(function), len(completions)
    if rewards is None or not hasattr(rewards, "__len__") or len(rewards) != expected:
        found = f"{len(rewards)} rewards" if hasattr(rewards, "__len__") else repr(rewards)
        raise ValueError(
            f"Reward function {name!r} returned {found} for {expected} completions; expected a list with one "
            "number, or None where it does not apply, for each."
        )
    values: list[float | None] = []
    for i, reward in enumerate(rewards):
        try:
            value = None if reward is None else float(reward)
        except (TypeError, ValueError):
            value = math.nan
        if value is not None and not math.isfinite(value):
            raise ValueError(
                f"Reward function {name!r} returned {reward!r} for completion {i} of its batch; expected a finite "
                f"number, or None where it does not apply.\n{_sample(prompts, completions, i)}"
            )
        values.append(value)
    return values


def checked(function: RewardFunc, timeout: float | None = None) -> RewardFunc:
    """
    Wrap a reward function so that errors name the function and the completion.

    Args:
        function: A reward function. A coroutine function stays one.
        timeout (`float`, *optional*): Seconds per call; a longer call is an error. Coroutines have no limit.

    Returns:
        A function of the same name. It raises `ValueError` if the rewards are not one finite number or `None` per
        completion, [`RewardError`] if the function raised, and `TimeoutError`.
    """
    name = reward_name(function)
    if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__):

        @functools.wraps(function)
        async def wrapped_coroutine(**columns: Any) -> list[Any]:
            try:
                rewards = await function(**columns)  # type: ignore[misc]
            except Exception as error:
                raise RewardError(_failed(name, error, "")) from error
            return check_rewards(rewards, function, columns["prompts"], columns["completions"])

        return wrapped_coroutine  # type: ignore[return-value]

    @functools.wraps(function)
    def wrapped(**columns: Any) -> list[Any]:
        prompts, completions = columns["prompts"], columns["completions"]
        try:
            rewards = function(**columns) if timeout is None else _within(timeout, function, columns)
        except _StillRunningError as error:
            raise TimeoutError(
                f"Reward function {name!r} did not return within {timeout:g} s for {len(completions)} completions."
                f"\n{_sample(prompts, completions, 0)}"
            ) from error
        except MemoryError:  # says nothing about a completion
            raise
        except Exception as error:
            raise RewardError(_failed(name, error, _culprit(function, columns))) from error
        return check_rewards(rewards, function, prompts, completions)

    wrapped.__name__ = name
    return wrapped


class RewardError(RuntimeError, ValueError):
    """A reward function raised an error. As a `ValueError` it is a mistake of the user, not of this library."""


class _StillRunningError(Exception):
    """A call took longer than its limit."""


def _within(timeout: float, function: RewardFunc, columns: dict[str, Any]) -> Any:
    """Call a function in a daemon thread: a call that blocks can only be abandoned, and the process can still exit."""
    outcome: dict[str, Any] = {}

    def run() -> None:
        try:
            outcome["rewards"] = function(**columns)
        except BaseException as error:
            outcome["error"] = error

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(timeout)
    if thread.is_alive():
        raise _StillRunningError
    if "error" in outcome:
        raise outcome["error"]
    return outcome["rewards"]


def _failed(name: str, error: Exception, sample: str) -> str:
    return f"Reward function {name!r} raised {type(error).__name__}: {error}" + (f"\n{sample}" if sample else "")


def _culprit(function: RewardFunc, columns: dict[str, Any], seconds: float = 10.0) -> str:
    """Return the first completion on which a function fails alone, after it failed on a batch."""
    prompts, completions = columns["prompts"], columns["completions"]
    columns = {**columns, "log_extra": _ignore, "log_metric": _ignore}
    end = time.monotonic() + seconds
    for i in range(len(completions)):
        one = {
            key: [value[i]] if isinstance(value, list) and len(value) == len(completions) else value
            for key, value in columns.items()
        }
        try:
            _within(end - time.monotonic(), function, one)
        except _StillRunningError:
            return ""
        except Exception:
            return _sample(prompts, completions, i)
    return f"It failed on a batch of {len(completions)} completions, and on none of them alone."


def _ignore(*_: Any, **__: Any) -> None:
    """Stand-in for a logging function."""


def _sample(prompts: Sequence[Any], completions: Sequence[Any], i: int) -> str:
    return f"Completion {i}: {completions[i]!r}\nto the prompt: {prompts[i]!r}"
