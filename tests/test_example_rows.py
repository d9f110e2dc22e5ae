"""Rows that a search is given, of numpy, with tools, with mistakes; and how their answers are generated."""

from __future__ import annotations

import json
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

from peft_svf import AdaptiveMixture
from peft_svf.adaptation import LogLikelihoodObjective, RewardObjective, WeightedObjective
from peft_svf.adaptation.examples import load_examples
from peft_svf.adaptation.in_context import with_demonstrations
from peft_svf.scoring import text_of

USER, SAID = {"role": "user", "content": "what"}, {"role": "assistant", "content": "cat"}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "look"}}]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "completion": None}, "Example 1 has the completion None; expected text, or messages"),
        ({"prompt": "a", "completion": 4}, "Example 1 has the completion 4; expected text"),
        ({"prompt": 5, "completion": "a"}, "Example 1 has the prompt 5; expected text"),
        ({"prompt": ["a", "b"], "completion": "a"}, "Example 1 has the prompt .'a', 'b'.; expected text"),
        ({"prompt": [{"content": "a"}], "completion": "a"}, "Example 1 has the prompt .* messages with a 'role'"),
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
    mixture.search(rows, reward, generation_kwargs={"max_new_tokens": 2}, num_generations=1, population_size=2)
    assert {type(value) for value in seen} == {int, float}
    assert text_of(np.int64(3)) == "3"


@pytest.mark.parametrize("completion", [[CALL], {"role": "assistant"}, [], None])
def test_a_message_without_text_is_no_answer(completion: Any) -> None:
    with pytest.raises(ValueError, match="messages with text"):
        text_of(completion)
    assert text_of([{"role": "assistant", "content": [{"type": "text", "text": "yes"}]}]) == "yes"


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
