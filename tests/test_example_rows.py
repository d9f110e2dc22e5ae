"""Rows that a search is given, of numpy, with tools, with mistakes; and how their answers are generated."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_adaptation import EXAMPLES, count_letters
from test_adaptation import experts as experts
from test_adaptation import mixture as mixture
from test_adaptation import tokenizer as tokenizer
from transformers import GenerationConfig

from peft_svf import (
    AdaptiveMixture,
    LogLikelihoodObjective,
    Objective,
    RewardObjective,
    WeightedObjective,
    load_examples,
)
from peft_svf.scoring import content_text, text_of
from peft_svf.scoring.examples import check_examples
from peft_svf.scoring.tokens import joined
from peft_svf.search.in_context import answer_of, with_demonstrations

USER, SAID = {"role": "user", "content": "what"}, {"role": "assistant", "content": "cat"}
PART = {"type": "text", "text": "cat"}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "look"}}]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "completion": None}, "Example 1 has the completion None; expected text, or messages"),
        ({"prompt": "a", "completion": 4}, "Example 1 has the completion 4; expected text"),
        ({"prompt": 5, "completion": "a"}, "Example 1 has the prompt 5; expected text"),
        ({"prompt": ["a", "b"], "completion": "a"}, "Example 1 has the prompt .'a', 'b'.; expected text"),
        ({"prompt": [{"content": "a"}], "completion": "a"}, "Example 1 has the prompt .* messages with a 'role'"),
        ({"prompt": [{**USER, "role": None}], "completion": "a"}, "Example 1 has the prompt .* messages with a 'role'"),
        ({"prompt": "a", "completion": [SAID]}, "Example 1 has text as its prompt and messages as its completion"),
        ({"prompt": [USER], "completion": "a"}, "Example 1 has messages as its prompt and text as its completion"),
    ],
)
def test_rows_with_mistakes_are_named(row: dict[str, Any], message: str, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=message):
        LogLikelihoodObjective([EXAMPLES[0], row], tokenizer)


@pytest.mark.parametrize("name", ["prompts", "completions", "completion_ids"])
def test_columns_that_rewards_get_otherwise_are_refused(name: str, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=f"a column '{name}'"):
        RewardObjective([{"prompt": "a", name: 1}], count_letters, tokenizer)


@pytest.mark.parametrize("name", ["trainer_state", "log_extra"])
def test_columns_that_a_reward_gets_as_from_a_trainer_are_refused(name: str, tokenizer: Any) -> None:
    def reward(completions: list[Any], trainer_state: Any = None, log_extra: Any = None, **kwargs: Any) -> list[float]:
        return [0.0] * len(completions)

    with pytest.raises(ValueError, match=f"a column '{name}'"):
        RewardObjective([{"prompt": "a", name: 1}], reward, tokenizer)
    assert RewardObjective([{"prompt": "a", name: 1}], count_letters, tokenizer).examples[0][name] == 1


@pytest.mark.parametrize("lacks", [0, 1])
def test_all_rows_have_the_columns_of_any(lacks: int, tokenizer: Any) -> None:
    rows: list[dict[str, Any]] = [{"prompt": "a", "answer": None}, {"prompt": "b", "answer": "c"}]
    assert RewardObjective(rows, count_letters, tokenizer).examples == rows
    del rows[lacks]["answer"]
    with pytest.raises(ValueError, match=f"Example {lacks} has no 'answer'; it has 'prompt'. Others have it; give all"):
        RewardObjective(rows, count_letters, tokenizer)
    only_one_answered = [{"prompt": "a"}, {"prompt": "b", "completion": "c"}]  # which rewards do not need
    assert RewardObjective(only_one_answered, count_letters, tokenizer).examples == only_one_answered


def test_the_rows_of_a_data_frame_are_asked_for(mixture: AdaptiveMixture) -> None:
    pandas = pytest.importorskip("pandas")
    with pytest.raises(ValueError, match=r"`\.to_dict\(\"records\"\)`"):
        mixture.search(pandas.DataFrame(EXAMPLES))


def test_parts_in_arrays_are_lists(tokenizer: Any) -> None:
    parts = [PART, PART]
    said = {"role": "user", "content": np.array(parts, dtype=object)}
    for prompt in ([said], np.array([said], dtype=object)):
        assert check_examples([{"prompt": prompt}], ["prompt"]) == [{"prompt": [{"role": "user", "content": parts}]}]


def test_rows_of_numpy_and_torch_are_rows(mixture: AdaptiveMixture) -> None:
    seen: list[Any] = []

    def reward(completions: list[Any], answer: list[Any], number: list[Any], **kwargs: Any) -> list[float]:
        seen.extend([*answer, *number])
        return [1.0] * len(completions)

    rows = [
        {
            "prompt": np.array([USER, SAID, USER], dtype=object),
            "completion": np.array([SAID], dtype=object),
            "answer": np.int64(0),
            "number": torch.tensor(1.5),
        }
    ] * 2
    mixture.search(rows, reward, method="cem", max_new_tokens=2, num_generations=1, population_size=2)
    assert {type(value) for value in seen} == {int, float}
    assert text_of(np.int64(3)) == "3"


@pytest.mark.parametrize("completion", [[CALL], {"role": "assistant"}, [], None])
def test_a_message_without_text_is_no_answer(completion: Any) -> None:
    with pytest.raises(ValueError, match="messages with text"):
        text_of(completion)
    assert text_of([{"role": "assistant", "content": [{"type": "text", "text": "yes"}]}]) == "yes"


def test_a_call_of_a_tool_has_no_text() -> None:
    assert content_text(None) == ""


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": 5, "answer": "a"}, "row 1 has the 'prompt' 5; expected text"),
        ({"prompt": ["a"], "answer": "a"}, "row 1 has the 'prompt' .'a'.; expected text"),
        ({"prompt": [{"content": "a"}], "answer": "a"}, "row 1 has the 'prompt' .* messages with a 'role'"),
        ({"prompt": "a", "completion": [CALL]}, "row 1 has no answer that can be read: .* messages with text"),
    ],
)
def test_rows_of_a_file_with_mistakes_are_named(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row))
    for system_prompt in (None, "be brief") if isinstance(row["prompt"], list) else (None,):
        with pytest.raises(ValueError, match=message):
            load_examples(str(path), system_prompt=system_prompt)


def test_completions_of_several_messages_stay_as_they_are(tmp_path: Path) -> None:
    completion = [CALL, {"role": "tool", "content": "4"}, SAID]
    rows = [{"prompt": [USER], "completion": completion}, {"prompt": [USER], "completion": [CALL]}]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    first, second = load_examples(str(path))
    assert first["completion"] == completion
    assert first["answer"] == "cat"
    assert second["completion"] == [CALL]
    assert "answer" not in second


def test_demonstrations_go_on_from_an_answer_that_is_begun(tokenizer: Any) -> None:
    begun = [USER, {"role": "assistant", "content": "it is "}]
    row = with_demonstrations({"prompt": begun}, [{"prompt": begun, "answer": "yes"}], tokenizer, 1000)
    assert row["prompt"] == [USER, {"role": "assistant", "content": "it is yes"}, *begun]


@pytest.mark.parametrize(
    ("begun", "rest", "whole"),
    [
        ("it ", "is", "it is"),
        ([PART], "is", [PART, {"type": "text", "text": "is"}]),
        ("it ", [PART], [{"type": "text", "text": "it "}, PART]),
        ([PART], [PART], [PART, PART]),
        ("it ", None, "it "),
        (None, "is", "is"),
    ],
)
def test_a_begun_answer_of_any_kind_is_gone_on_from(begun: Any, rest: Any, whole: Any) -> None:
    said = [{"role": "assistant", "content": content} for content in (begun, rest, whole)]
    assert joined([USER, said[0]], [said[1]]) == [USER, said[2]]


def test_numbers_of_any_kind_are_answers() -> None:
    assert answer_of({"answer": Decimal("1.5")}) == "1.5"


def test_a_generation_config_is_followed(mixture: AdaptiveMixture, tokenizer: Any) -> None:
    lengths: list[int] = []

    def reward(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        lengths.extend(map(len, completion_ids))
        return [0.0] * len(completion_ids)

    def lengths_with(**kwargs: Any) -> list[int]:
        lengths.clear()
        objective = RewardObjective(EXAMPLES[:2], reward, tokenizer, generation_kwargs=kwargs)
        objective.score(mixture.model, [0, 1])
        return lengths

    config = GenerationConfig(max_new_tokens=4, do_sample=True)
    assert max(lengths_with(generation_config=config)) <= 4
    assert not RewardObjective(
        EXAMPLES, reward, tokenizer, generation_kwargs={"generation_config": config}
    ).deterministic
    again = {"generation_config": config, "do_sample": False}
    assert RewardObjective(EXAMPLES, reward, tokenizer, generation_kwargs=again).deterministic
    with pytest.raises(ValueError, match="`max_length` counts the prompt"):
        lengths_with(max_length=24)
    with pytest.raises(ValueError, match="`max_length` counts the prompt"):
        lengths_with(generation_config=GenerationConfig(max_length=24))
    assert max(lengths_with(generation_config=GenerationConfig(max_length=24, max_new_tokens=2))) <= 2
    mixture.model.generation_config.return_dict_in_generate = True
    assert len(lengths_with(max_new_tokens=2)) == 2
    mixture.model.generation_config.return_dict_in_generate = False
    assert len(lengths_with(max_new_tokens=2, return_dict_in_generate=True)) == 2


def test_padding_behind_a_stop_string_is_no_part_of_an_answer(mixture: AdaptiveMixture, tokenizer: Any) -> None:
    alone: list[list[int]] = []
    together: list[list[int]] = []
    into = alone

    def reward(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        into.extend(completion_ids)
        return [0.0] * len(completion_ids)

    options = {"max_new_tokens": 8, "stop_strings": ["a", "e", "1", "t"], "tokenizer": tokenizer}
    objective = RewardObjective(EXAMPLES, reward, tokenizer, generation_kwargs=options)
    for i in range(len(EXAMPLES)):
        objective.score(mixture.model, [i])
    into = together
    objective.score(mixture.model, range(len(EXAMPLES)))
    assert together == alone
    assert len(set(map(len, alone))) > 1


def test_the_parts_of_a_sum_have_the_same_rows(mixture: AdaptiveMixture, tokenizer: Any) -> None:
    asked = [{"prompt": row["prompt"], "answer": row["completion"]} for row in EXAMPLES]
    reward = RewardObjective(asked, count_letters, tokenizer, generation_kwargs={"max_new_tokens": 2})
    with pytest.raises(ValueError, match="different prompts in row 0"):
        WeightedObjective([reward, LogLikelihoodObjective(EXAMPLES[::-1], tokenizer)], [1, 0.1])
    both = WeightedObjective([reward, LogLikelihoodObjective(EXAMPLES, tokenizer)], [1, 0.1])
    turned = both.with_examples(both.examples[::-1])
    assert turned(mixture.model) == pytest.approx(both(mixture.model)[::-1], abs=1e-5)


def test_the_parts_of_a_sum_may_do_without_prompts(tokenizer: Any) -> None:
    class Other(Objective):
        name = "other"
        examples: list[dict[str, Any]] = [{} for _ in EXAMPLES]  # noqa: RUF012

    other = Other()
    likelihood = LogLikelihoodObjective(EXAMPLES, tokenizer)
    assert WeightedObjective([other, likelihood], [1, 1]).examples == EXAMPLES
    assert WeightedObjective([other, other], [1, 1]).examples == other.examples
    with pytest.raises(TypeError, match=r"dict is no objective\. Subclass `peft_svf\.Objective`"):
        WeightedObjective([other, {}], [1, 1])


@pytest.mark.parametrize("answer", ["007", "NA", "7", "2024-01-01", "1e3", "true"])
def test_an_answer_in_a_file_stays_as_it_is_written(answer: str, tmp_path: Path) -> None:
    """The readers of `datasets` make numbers, dates and missing values of these."""
    (tmp_path / "a.csv").write_text(f"prompt,answer\nq,{answer}\n")
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "q", "answer": answer}) + "\n")
    for name in ("a.csv", "a.jsonl"):
        assert load_examples(str(tmp_path / name)) == [{"prompt": "q", "answer": answer, "completion": answer}]
