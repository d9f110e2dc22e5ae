"""One way to pass data: files of all kinds, folders, datasets, splits by content, columns by name."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from typing import Any

import datasets
import pytest
from test_training import base as base
from test_training import script

from peft_svf import load_examples
from peft_svf.scoring.holdout import is_held_out
from peft_svf.scoring.rewards import find_reward
from peft_svf.scoring.sources import place_and_split, read_splits
from peft_svf.training.run import build, parse

ROWS = [{"q": f"What is {n} + 1?", "a": f"{n + 1:03}"} for n in range(50)]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    """Rows as a file of the kind that its name says."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        datasets.Dataset.from_list(rows).to_parquet(path)
    return str(path)


def asked(source: str, **options: Any) -> list[str]:
    return [row["prompt"] for row in load_examples(source, prompt_column="q", answer_column="a", **options)]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_every_kind_of_file_for_search_and_training(suffix: str, base: Path, tmp_path: Path) -> None:
    """The answers stay text: `datasets.load_dataset` would read 007 as 7."""
    source = write(tmp_path / f"rows{suffix}", ROWS)
    rows = load_examples(source, prompt_column="q", answer_column="a")
    assert [(row["prompt"], row["answer"], row["completion"]) for row in rows] == [
        (r["q"], r["a"], r["a"]) for r in ROWS
    ]
    for objective in ("sft", "grpo"):
        more = {"num_generations": None, "reward_funcs": None} if objective == "sft" else {"reward_funcs": "exact"}
        names = {"prompt_column": "q", "answer_column": "a"}
        arguments = script(base, Path(source), tmp_path / "out", objective=objective, **names, **more)
        splits = build(*parse(arguments)[:4])[1]
        assert {row["answer"] for split in splits.values() for row in split} == {row["a"] for row in ROWS}
        assert {*splits["test"]["prompt"]} == {*asked(f"{source}:test")}


def test_the_split_of_a_row_is_a_matter_of_its_question(tmp_path: Path) -> None:
    rows = [*ROWS, *ROWS[:5]]
    random.Random(0).shuffle(rows)
    first, second = (write(tmp_path / name, content) for name, content in (("a.jsonl", ROWS), ("b.csv", rows[10:])))
    test, train = {*asked(f"{first}:test")}, {*asked(f"{first}:train")}
    assert not test & train
    assert len(test | train) == len(ROWS)
    assert {*asked(second, split="test")} <= test
    assert {*asked(second, split="train")} <= train
    assert len(asked(f"{second}:all")) == len(asked(second)) == 45
    plain = {"prompt": "What is  7 + 1?", "answer": "8"}
    asked_otherwise = {"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "what is 7 + 1?"}]}
    talk = {"messages": [*asked_otherwise["prompt"], {"role": "assistant", "content": "8"}]}
    assert len({is_held_out(row) for row in (plain, asked_otherwise, talk)}) == 1
    many = [is_held_out({"prompt": f"question {n}"}) for n in range(2000)]
    assert sum(many) / len(many) == pytest.approx(0.2, abs=0.03)


def test_a_folder_names_its_splits(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "train-00000-of-00002.parquet", ROWS[:10])
    write(tmp_path / "data" / "train-00001-of-00002.parquet", ROWS[10:20])
    write(tmp_path / "data" / "dev.csv", ROWS[20:30])
    (tmp_path / "evaluation").mkdir()
    write(tmp_path / "evaluation" / "rows.jsonl", ROWS[30:])
    write(tmp_path / "dataset_info.json", [])
    (tmp_path / ".cache").mkdir()
    write(tmp_path / ".cache" / "train.json", ROWS)
    splits = read_splits(str(tmp_path))
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 20, "validation": 10, "test": 20}
    assert asked(str(tmp_path)) == [row["q"] for row in ROWS[:20]]
    assert asked(f"{tmp_path}:test") == [row["q"] for row in ROWS[30:]]
    assert len(asked(f"{tmp_path}:all")) == len(ROWS)
    with pytest.raises(ValueError, match="has no split 'tset'; it has train, validation, test, all"):
        asked(f"{tmp_path}:tset")


def test_a_folder_without_names_and_one_of_save_to_disk(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    write(tmp_path / "plain" / "mine.jsonl", ROWS)
    assert asked(str(tmp_path / "plain")) == [row["q"] for row in ROWS]
    assert len(asked(f"{tmp_path / 'plain'}:test")) == len([r for r in ROWS if is_held_out({"prompt": r["q"]})])
    datasets.DatasetDict({"test": datasets.Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "saved")
    assert asked(f"{tmp_path / 'saved'}:test") == [row["q"] for row in ROWS]
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "one")
    assert asked(str(tmp_path / "one")) == [row["q"] for row in ROWS]


def test_the_split_at_the_end_of_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a:b").mkdir()
    expected = {
        "a:b": ("a:b", None),
        "a:b:test": ("a:b", "test"),
        "owner/data:train[:10%]": ("owner/data", "train[:10%]"),
        r"C:\data\rows.csv": (r"C:\data\rows.csv", None),
        "owner/data": ("owner/data", None),
    }
    assert {source: place_and_split(source) for source in expected} == expected


def test_conversations_are_examples(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    write(tmp_path / "a.jsonl", [{"chat": [*turns, *turns]}, {"chat": turns[:1]}])
    whole, open_ended = load_examples(str(tmp_path / "a.jsonl"), messages_column="chat")
    assert whole == {"prompt": [*turns, turns[0]], "completion": [turns[1]], "answer": "b"}
    assert open_ended == {"prompt": turns[:1]}


def test_the_answer_and_what_leads_to_it(tmp_path: Path) -> None:
    """Rewards compare with the answer; the completion is learned."""
    source = write(tmp_path / "a.jsonl", [{"prompt": "p", "completion": "3 + 4 is 7", "answer": 7, "other": "8"}])
    (row,) = load_examples(source)
    assert (row["completion"], row["answer"]) == ("3 + 4 is 7", "7")
    (row,) = load_examples(source, completion_column="other", chat=True)
    assert row["completion"] == [{"role": "assistant", "content": "8"}]
    assert row["prompt"] == [{"role": "user", "content": "p"}]


def test_a_column_of_text_and_numbers(base: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"{n}", "answer": n if n % 2 else f"{n}."} for n in range(20)]
    arguments = script(base, Path(write(tmp_path / "a.jsonl", rows)), tmp_path / "out", reward_funcs="exact")
    arguments = [
        word for word in arguments if word not in ("question", "solution", "--prompt_column", "--answer_column")
    ]
    splits = build(*parse(arguments)[:4])[1]
    assert {answer for split in splits.values() for answer in split["answer"]} == {str(row["answer"]) for row in rows}
    mixed = write(tmp_path / "b.jsonl", [{"prompt": "a", "answer": "b"}, {"prompt": ["c"], "answer": "d"}])
    arguments[arguments.index("--dataset_name") + 1] = mixed
    with pytest.raises(ValueError, match=r"A column of .*b\.jsonl holds values of different types"):
        build(*parse(arguments)[:4])


def test_all_rows_for_training_if_asked_for(base: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [{"question": row["q"], "solution": row["a"]} for row in ROWS])
    more = {"eval_strategy": "no", "reward_funcs": "exact"}
    for name, expected in ((f"{source}:all", {"train": 50}), (source, None)):
        splits = build(*parse(script(base, Path(name), tmp_path / "out", **more))[:4])[1]
        if expected is None:  # nothing is held out for an evaluation that does not run
            assert splits.keys() == {"train", "test"}
            assert len(splits["train"]) + len(splits["test"]) == 50
        else:
            assert {split: len(rows) for split, rows in splits.items()} == expected


def test_the_card_names_the_file_without_its_folder(base: Path, tmp_path: Path) -> None:
    given = parse(script(base, Path(f"{tmp_path / 'pairs.csv'}:all"), tmp_path / "out"))[4]
    assert given["dataset_name"] == "pairs.csv:all"
    assert parse(script(base, Path("owner/data:train"), tmp_path / "out"))[4]["dataset_name"] == "owner/data:train"


def test_a_parquet_file_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_text("no")
    with pytest.raises(ValueError, match=r"a\.parquet is not a valid parquet file"):
        load_examples(str(tmp_path / "a.parquet"))


def test_a_reward_function_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my-rewards.py").write_text("N = 1\ndef one(completions, **_):\n    return [1.0] * len(completions)\n")
    (tmp_path / "broken.py").write_text("def one(:\n")
    assert find_reward(f"{tmp_path / 'my-rewards.py'}:one")(completions=["a"]) == [1.0]
    monkeypatch.chdir(tmp_path)
    assert find_reward("my-rewards.py:one")(completions=["a", "b"]) == [1.0, 1.0]
    for name, message in (
        ("my-rewards.py:two", "could not be imported: module 'my-rewards' has no attribute 'two'"),
        ("my-rewards.py:N", "is no function but 1"),
        ("nowhere.py:one", "could not be imported: .*No such file"),
        ("broken.py:one", "could not be imported: invalid syntax"),
    ):
        with pytest.raises(ValueError, match=message):
            find_reward(name)
