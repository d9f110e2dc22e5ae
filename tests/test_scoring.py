"""Reward functions: what they accept, and what is said when one misbehaves."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Callable
from typing import Any

import pytest
from helpers import tiny_llama
from hypothesis import given
from hypothesis import strategies as st

from peft_svf.scoring import (
    ANSWERS,
    REWARDS,
    LogLikelihoodObjective,
    check_rewards,
    checked,
    classification_prompt,
    find_reward,
    named_category,
    readable,
    text_of,
)
from peft_svf.scoring import rewards as rewards_module
from peft_svf.scoring.rewards import boxed, first_line, first_word, last_number, last_word
from peft_svf.scoring.tokens import answer_logps, joined, prompt_ids, prompt_text, text_for_trl

CASES = [
    ("number", "It is 12.", "12", 1),
    ("number", "3 * 4 = 12, so 12", "#### 12", 1),
    ("number", "1,234", "1234", 1),
    ("number", "12.0", "12", 1),
    ("number", "-3", "3", 0),
    ("number", "no idea", "3", 0),
    ("number", ".5", "0.5", 1),
    ("number", "3,4", "34", 0),
    ("number", "3, 4", "4", 1),
    ("number", "12,345.5 km", "12345.5", 1),
    ("number", "3", "no number", 0),
    ("exact", " Paris. ", "paris", 1),
    ("exact", "Paris, France", "paris", 0),
    ("choice", "B) because it is", "b", 1),
    ("choice", "**logic**\n", "logic", 1),
    ("choice", "the answer is B", "B", 0),
    ("choice", "", "B", 0),
    ("contains", "It is Paris, of course", "paris", 1),
    ("contains", "comparison", "paris", 0),
    ("contains", "a+b", "a+b", 1),
    ("regex", "It is 17!", r"\b1\d\b", 1),
    ("regex", "It is 27!", r"\b1\d\b", 0),
]


@pytest.mark.parametrize(("name", "completion", "reference", "expected"), CASES)
def test_verifiable_rewards(name: str, completion: str, reference: str, expected: float) -> None:
    plain = REWARDS[name](prompts=["?"], completions=[completion], completion_ids=[[1]], answer=[reference])
    chat = REWARDS[name](
        prompts=[[{"role": "user", "content": "?"}]],
        completions=[[{"role": "assistant", "content": completion}]],
        solution=[[{"role": "assistant", "content": reference}]],
    )
    assert plain == chat == [expected]


def test_the_reference_may_be_a_number() -> None:
    assert REWARDS["number"](completions=["12", "13"], answer=[12, 12]) == [1, 0]


def test_without_a_reference_the_columns_are_named() -> None:
    with pytest.raises(ValueError, match=r"expected a column 'answer' or 'solution'.*it has label"):
        REWARDS["exact"](completions=["a"], label=["a"])


def test_math_verify_needs_its_package_or_works() -> None:
    try:
        import math_verify  # noqa: F401
    except ImportError:
        with pytest.raises(ImportError, match=r"math"):
            REWARDS["math_verify"](completions=["$1/2$"], answer=["$0.5$"])
    else:
        assert REWARDS["math_verify"](completions=["$1/2$", "$1/3$"], answer=["$0.5$", "$0.5$"]) == [1, 0]


@given(st.text())
def test_answers_are_taken_out_of_any_text(text: str) -> None:
    for extract in ANSWERS.values():
        assert isinstance(extract(text), str)


@given(st.integers(-(10**9), 10**9))
def test_the_last_number_is_read_with_and_without_separators(value: int) -> None:
    assert int(last_number(f"so 7 and then {value:,}.")) == int(last_number(f"{value}")) == value


def test_other_answers() -> None:
    assert first_word(' "Bob" likes it') == "Bob"
    assert first_word("“lamp”") == last_word("It is «lamp».") == last_word("It is [lamp]") == "lamp"
    assert last_word('\nThe last word is "lamp".\nDone') == last_word("It is lamp .") == "lamp"
    assert first_line("\n\n  a b \nc") == "a b"
    assert boxed(r"\boxed{1} or \boxed{ 2 }") == "2"
    assert boxed("<answer>\n[1, 2]\n</answer>") == "[1, 2]"
    assert boxed("none") == first_word("") == last_word("") == first_line("") == last_number("") == ""


def test_find_reward(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_reward("number") is REWARDS["number"]
    (tmp_path / "their_rewards.py").write_text(
        "def good(completions, **kwargs): return [1.0] * len(completions)\nbad = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert find_reward("their_rewards.good")(completions=["a"]) == [1.0]
    with pytest.raises(ValueError, match=r"'their_rewards.bad' is no function but 3"):
        find_reward("their_rewards.bad")
    with pytest.raises(ValueError, match=r"'their_rewards.missing' could not be imported"):
        find_reward("their_rewards.missing")
    with pytest.raises(ValueError, match=r"'nowhere.at_all' could not be imported"):
        find_reward("nowhere.at_all")
    with pytest.raises(ValueError, match=r"no reward function 'nubmer'. Expected one of number, exact"):
        find_reward("nubmer")


# ------------------------------------------------------------------------------------------------- misbehaviour

COLUMNS: dict[str, Any] = {"prompts": ["p0", "p1", "p2"], "completions": ["c0", "c1", "c2"], "answer": ["a", "b", "c"]}


def returns(value: Any) -> Callable[..., Any]:
    def strange(**columns: Any) -> Any:
        return value

    return strange


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "'strange' returned None for 3 completions"),
        (1.0, "'strange' returned 1.0 for 3 completions"),
        ([1.0, 2.0], "'strange' returned 2 rewards for 3 completions"),
        (
            [1.0, math.nan, 0.0],
            "'strange' returned nan for completion 1 (.|\n)*Completion 1: 'c1'\nto the prompt: 'p1'",
        ),
        ([1.0, 0.0, math.inf], "'strange' returned inf for completion 2"),
        ([1.0, "good", 0.0], "'strange' returned 'good' for completion 1"),
    ],
)
def test_wrong_rewards_name_the_function_and_the_sample(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        checked(returns(value))(**COLUMNS)


def test_none_means_that_a_function_does_not_apply() -> None:
    assert checked(returns([None, 1, True]))(**COLUMNS) == [None, 1.0, 1.0]
    assert checked(returns([None, 1, True])).__name__ == "strange"


def test_an_error_names_the_sample_that_causes_it() -> None:
    def picky(completions: list[str], answer: list[str], **columns: Any) -> list[float]:
        return [1 / (text != "c1") for text in completions]

    with pytest.raises(RuntimeError, match=r"'picky' raised ZeroDivisionError: (.|\n)*Completion 1: 'c1'"):
        checked(picky)(**COLUMNS)

    def stateful(completions: list[str], **columns: Any) -> list[float]:
        if len(completions) > 1:
            raise KeyError("batch")
        return [0.0]

    with pytest.raises(RuntimeError, match=r"failed on a batch of 3 completions, and on none of them alone"):
        checked(stateful)(**COLUMNS)


def test_a_reward_that_blocks_is_an_error() -> None:
    forever = threading.Event()

    def sleepy(completions: list[str], **columns: Any) -> list[float]:
        forever.wait(60)
        return [0.0] * len(completions)

    try:
        with pytest.raises(TimeoutError, match=r"'sleepy' did not return within 0\.05 s for 3 completions"):
            checked(sleepy, timeout=0.05)(**COLUMNS)
    finally:
        forever.set()
    assert checked(returns([1, 2, 3]), timeout=60)(**COLUMNS) == [1, 2, 3]

    def broken(**columns: Any) -> list[float]:
        raise ValueError("x")

    with pytest.raises(RuntimeError, match=r"'broken' raised ValueError: x"):
        checked(broken, timeout=60)(**COLUMNS)


def test_a_timeout_inside_a_reward_is_its_own_error() -> None:
    def offline(**columns: Any) -> list[float]:
        raise TimeoutError("no answer from the judge")

    for timeout in (None, 60):
        with pytest.raises(RuntimeError, match=r"'offline' raised TimeoutError: no answer from the judge"):
            checked(offline, timeout)(**COLUMNS)


def test_looking_for_the_sample_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    forever, culprit = threading.Event(), rewards_module._culprit
    monkeypatch.setattr(rewards_module, "_culprit", lambda function, columns: culprit(function, columns, seconds=0.1))

    def slow_when_alone(completions: list[str], **columns: Any) -> list[float]:
        if len(completions) == 1:
            forever.wait(60)
        raise ValueError("x")

    try:
        with pytest.raises(RuntimeError, match=r"'slow_when_alone' raised ValueError: x$"):
            checked(slow_when_alone)(**COLUMNS)
    finally:
        forever.set()


@pytest.mark.parametrize("bad", [None, ["a", "b"], {}])
def test_a_reference_that_is_no_text(bad: Any) -> None:
    with pytest.raises(ValueError, match=r"Expected text, a number or messages with text, got"):
        REWARDS["exact"](completions=["a"], answer=[bad])


def test_coroutines_stay_coroutines() -> None:
    async def slow(completions: list[str], **columns: Any) -> list[Any]:
        await asyncio.sleep(0)
        return [1.0, None, math.nan] if columns["answer"][0] == "a" else [1.0, None, 0.0]

    with pytest.raises(ValueError, match=r"'slow' returned nan for completion 2"):
        asyncio.run(checked(slow)(**COLUMNS))  # type: ignore[arg-type]
    assert asyncio.run(checked(slow)(**{**COLUMNS, "answer": ["b"] * 3})) == [1.0, None, 0.0]  # type: ignore[arg-type]


def test_check_rewards_takes_arrays() -> None:
    import numpy as np

    assert check_rewards(np.array([1, 0]), returns, ["p", "q"], ["a", "b"]) == [1.0, 0.0]


TURNS = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}|{% endfor %}"


class Templated:
    """As much of a tokenizer as `readable` needs."""

    def __init__(self, chat_template: str | None, bos_token: str | None = None) -> None:
        from test_adaptation import make_tokenizer

        self.inner, self.chat_template, self.bos_token = make_tokenizer(), chat_template, bos_token
        self.bos_token_id = None if bos_token is None else 1
        self.adds_bos = True

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        begin = [1] if self.adds_bos and self.bos_token and add_special_tokens else []
        return {"input_ids": begin + [i for part in text.split("<s>")[:-1] for i in [1]] + [len(text)]}

    def apply_chat_template(self, messages: Any, **kwargs: Any) -> Any:
        return self.inner.apply_chat_template(messages, chat_template=self.chat_template, **kwargs)


@pytest.mark.parametrize(
    ("template", "bos", "expected"),
    [
        (TURNS, None, "[system]Be brief.|[user]x?|[assistant]Category:"),
        ("<s>" + TURNS, "<s>", "[system]Be brief.|[user]x?|[assistant]Category:"),
        (
            "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TURNS,
            None,
            "[user]Be brief.\n\nx?|[assistant]Category:",
        ),
        (None, None, "Be brief.\n\nx?\n\nCategory:"),
    ],
)
def test_an_answer_that_is_begun(template: str | None, bos: str | None, expected: str) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "x?"},
        {"role": "assistant", "content": "Category:"},
    ]
    tokenizer = Templated(template, bos)
    assert text_for_trl(readable(messages, tokenizer), tokenizer) == expected
    if template is None:
        assert readable(messages[:2], tokenizer) == "Be brief.\n\nx?\nAnswer:"


@pytest.mark.parametrize("adds_bos", [True, False])
def test_the_first_token_comes_once_in_training_and_in_dispatch(adds_bos: bool) -> None:
    tokenizer = Templated("<s>" + TURNS, "<s>")
    tokenizer.adds_bos = adds_bos
    messages = readable(classification_prompt("x", ["a", "b"]), tokenizer)
    text = text_for_trl(messages, tokenizer)
    assert tokenizer(text)["input_ids"][:-1] == prompt_ids(messages, tokenizer)[:-1] == [1]
    assert text.startswith("<s>") == (not adds_bos)


def test_a_completion_goes_on_from_what_the_prompt_began() -> None:
    from test_adaptation import make_tokenizer

    tokenizer = make_tokenizer()
    user = {"role": "user", "content": "ab"}
    begun = [user, {"role": "assistant", "content": "c"}]
    assert prompt_text(begun, tokenizer) == "[user]ab\n[assistant]c"
    completion = [{"role": "assistant", "content": " d"}]
    assert joined(begun, completion) == [user, {"role": "assistant", "content": "c d"}]
    assert joined([user], completion) == [user, *completion]
    objective = LogLikelihoodObjective([{"prompt": begun, "completion": completion}], tokenizer)
    before, model = prompt_ids(begun, tokenizer), tiny_llama()
    whole = before + tokenizer(" d\n")["input_ids"]
    (expected,) = answer_logps(model, [(whole, len(before))], tokenizer)
    assert objective.score(model, [0]) == pytest.approx([expected.mean().item()])


def test_classification_prompt() -> None:
    text = classification_prompt("What is 1 + 1?", ["sums", "logic"])
    chat = classification_prompt(
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 1 + 1?"}], ["sums", "logic"]
    )
    assert text == chat
    assert text[0]["content"].endswith("sums or logic.")
    assert "Be brief" not in str(text)
    assert text_of(chat) == text[-1]["content"] == "Category:"
    parts = [{"role": "user", "content": [{"type": "text", "text": "What is 1 + 1?"}]}]
    assert classification_prompt(parts, ["sums", "logic"]) == chat
    with pytest.raises(ValueError, match="no categories"):
        classification_prompt("x", [])


@pytest.mark.parametrize(
    ("text", "category"),
    [
        ("math.", "math"),
        (" people, not math", "people"),
        ("It is about people", None),  # or repeating a prompt that has the label in it would be an answer
        ("Math", "math"),
        ("mathematics", None),
        ("", None),
        ("word list", "word list"),
        ("words", None),
        ("math_", "math"),
        ("aftermath", None),
    ],
)
def test_named_category(text: str, category: str | None) -> None:
    assert named_category(text, ["math", "people", "word", "word list"]) == category
