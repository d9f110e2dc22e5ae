"""`peft-svf search`: a mixture from a file of examples."""

from __future__ import annotations

import csv
import inspect
import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import pytest
import torch
from peft import PeftModel
from test_adaptation import EXAMPLES, base_model, logits, make_tokenizer, save_expert

from peft_svf import SearchConfig, SVFConfig, load_examples

testing = pytest.importorskip("typer.testing")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, two experts, and examples."""
    folder = tmp_path_factory.mktemp("world")
    base_model().save_pretrained(folder / "base")
    make_tokenizer().save_pretrained(folder / "base")
    for seed, name in enumerate(("one", "two")):
        save_expert(folder / name, SVFConfig(target_modules="all-linear"), seed)
    rows = [{"question": row["prompt"], "solution": row["completion"]} for row in EXAMPLES[:4]]
    (folder / "shots.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    with (folder / "shots.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["question", "solution"])
        writer.writeheader()
        writer.writerows(rows)
    return folder


def search(world: Path, output: Path, *more: str, **options: Any) -> Any:
    from peft_svf.cli.app import app

    return testing.CliRunner().invoke(app, words_of_a_search(world, output, *more, **options))


def words_of_a_search(
    world: Path, output: Path, *more: str, examples: str = "shots.jsonl", **options: Any
) -> list[str]:
    chosen = {
        "model_name_or_path": world / "base",
        "examples": world / examples,
        "output_dir": output,
        "prompt_column": "question",
        "reward": "contains",
        "method": "cem",
        "max_new_tokens": 3,
        "num_generations": 2,
        "population_size": 4,
        **options,
    }
    words = [word for name, value in chosen.items() if value is not None for word in (f"--{name}", str(value))]
    if not any(word == "--expert" for word in more):
        more = ("--expert", f"one={world / 'one'}", "--expert", f"two={world / 'two'}", *more)
    return ["search", *words, *more]


def one_line(result: Any) -> str:
    """What an error says."""
    assert result.exit_code == 1, result.output
    return " ".join(result.stderr.split())


@pytest.mark.parametrize("reward", [f"{Path(__file__).parent / 'test_adaptation.py'}:count_letters", "loglik"])
@pytest.mark.parametrize("examples", ["shots.jsonl", "shots.csv"])
def test_a_search_leaves_an_ordinary_adapter(reward: str, examples: str, world: Path, tmp_path: Path) -> None:
    result = search(world, tmp_path / "mine", examples=examples, reward=reward, validation="none")
    assert result.exit_code == 0, result.output
    assert "saved in" in result.stdout
    assert "uniform" in result.stdout
    model = PeftModel.from_pretrained(base_model(), tmp_path / "mine")
    about = json.loads((tmp_path / "mine" / "mixture.json").read_text())
    kept = about["result"]
    assert kept["objective"] == ("log-likelihood" if reward == "loglik" else "reward")
    assert kept["settings"]["examples"] == 4
    assert not (tmp_path / "mine" / "search-checkpoint.json").exists()
    if kept["choice"] == "base":
        assert torch.equal(logits(model), logits(base_model()))


def talkative(completions: list[str], **columns: Any) -> list[float]:
    print("a reward function may print")
    return [float(len(text)) for text in completions]


def test_what_a_reward_function_prints_is_not_in_the_json(world: Path, tmp_path: Path) -> None:
    result = search(world, tmp_path / "mine", "--json", reward="test_cli_search.talkative", validation="none")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["objective"] == "reward"
    assert "a reward function may print" in result.stderr


def test_the_result_as_json(world: Path, tmp_path: Path) -> None:
    result = search(world, tmp_path / "mine", "--json", reward="loglik", validation="2")
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    assert content["evaluated_on"] == "cross-validation"
    assert content["settings"]["method"] == "cem"
    assert list(content["weights"]) == ["one", "two"]


def never(completions: list[str], **columns: Any) -> list[float]:
    return [0.0] * len(completions)


@pytest.mark.parametrize("reward", ["contains", "test_cli_search.never"])
def test_equal_scores_end_a_search_and_show_answers(reward: str, world: Path, tmp_path: Path) -> None:
    options = {"reward": reward, "validation": "2", "num_generations": 5}
    with pytest.warns(UserWarning, match="all baselines and candidates have the same score, 0"):
        result = search(world, tmp_path / "mine", **options)
    said = one_line(result)
    assert said.count("prompt: ") == said.count("answer: ") == said.count("reference: ") == 3
    assert "Nothing is saved, because no mixture is better than another" in said
    assert f"--reward {reward}" in said
    assert not (tmp_path / "mine").exists() or not list((tmp_path / "mine").iterdir())


def test_answers_are_shown_on_request(world: Path, tmp_path: Path) -> None:
    options = {"reward": "test_adaptation.count_letters", "validation": "none"}
    result = search(world, tmp_path / "mine", **options, show_answers=2)
    assert result.exit_code == 0, result.output
    assert result.stderr.count("answer: ") == 2


@pytest.mark.slow
def test_two_processes_leave_one_mixture(world: Path, tmp_path: Path) -> None:
    words = words_of_a_search(world, tmp_path / "mine", "--json", reward="loglik", validation="2")
    # what `accelerate launch --multi_gpu` calls; accelerate itself has no launcher for several CPU processes
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, "-m", "peft_svf", *words],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    together = json.loads(done.stdout)
    alone = search(world, tmp_path / "alone", "--json", reward="loglik", validation="2")
    assert together["weights"] == pytest.approx(json.loads(alone.stdout)["weights"])
    names = {path.name for path in (tmp_path / "mine").iterdir()}
    assert names == {path.name for path in (tmp_path / "alone").iterdir()}


def test_the_default_is_the_gradient_of_a_reward(world: Path, tmp_path: Path) -> None:
    """In 12 steps; the reason is on standard error."""
    options = {"reward": "test_adaptation.count_letters", "validation": "none"}
    result = search(world, tmp_path / "mine", "--json", **options, method=None, num_generations=None)
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    assert (content["method"], content["objective"]) == ("gradient", "reward")
    assert content["reason"].startswith("gradient of the expected reward, one weight per expert:")
    assert content["expected"].keys() == content["scores"].keys() - {"in-context"}
    assert len(content["history"]) == 12
    assert content["settings"]["max_new_tokens"] == 3
    with_ties = search(world, tmp_path / "other", **options, method="gradient", tie_break=0.1)
    assert "The objective 'reward + 0.1 log-likelihood' has no gradient. Use method='cem'" in one_line(with_ties)


def test_options_reach_the_search(world: Path, tmp_path: Path) -> None:
    options = {"granularity": "layer", "tie_break": 0.01, "seed": 3, "limit": 3}
    more = ("--bounds", "-1", "1", "--no_racing", "--json", "--optimizer_kwargs", '{"elite_ratio": 0.5}')
    more += ("--generation_kwargs", '{"num_beams": 2}', "--no_in_context")
    (tmp_path / "held_out.csv").write_text("question,solution\ndog,cat\ncat,dog\nx,y\ny,x\n")
    result = search(world, tmp_path / "mine", *more, **options, validation=str(tmp_path / "held_out.csv"))
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    assert content["objective"] == "reward + 0.01 log-likelihood"
    assert len(content["groups"]) == 2
    assert (content["evaluated_on"], content["num_evaluated"]) == ("validation", 4)
    assert "in-context" not in content["scores"]
    expected = {
        "method": "cem",
        "seed": 3,
        "racing": False,
        "bounds": [-1, 1],
        "optimizer_kwargs": {"elite_ratio": 0.5},
    }
    expected |= {"in_context": False, "examples": 7, "max_new_tokens": 3, "granularity": "layer"}
    assert {name: content["settings"][name] for name in expected} == expected
    assert content["settings"]["generation_kwargs"]["num_beams"] == 2


def test_a_dict_of_groups_as_json(world: Path, tmp_path: Path) -> None:
    from peft_svf import AdaptiveMixture, svf_layers

    mixture = AdaptiveMixture.from_pretrained(base_model(), {"one": str(world / "one")})
    groups = {layer.module_name: "ab"["mlp" in layer.module_name] for layer in svf_layers(mixture.model)}
    options = {"reward": "loglik", "validation": "none", "num_generations": 1, "granularity": json.dumps(groups)}
    result = search(world, tmp_path / "mine", "--json", **options)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["groups"] == ["a", "b"]


def test_the_checkpoint_of_an_interrupted_search_stays(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft_svf import Evaluator

    plain, steps = Evaluator.value_and_gradient, [0]

    def stopping(self: Any, *args: Any) -> Any:
        steps[0] += 1
        if steps[0] == 2:
            raise KeyboardInterrupt
        return plain(self, *args)

    monkeypatch.setattr(Evaluator, "value_and_gradient", stopping)
    options = {"reward": "test_adaptation.count_letters", "method": "gradient", "validation": "none"}
    stopped = search(world, tmp_path / "mine", "--json", **options, num_generations=3)
    assert stopped.exit_code == 0, stopped.output
    assert "`--resume` continues from" in stopped.output
    assert (tmp_path / "mine" / "search-checkpoint.json").exists()
    again = search(world, tmp_path / "mine", "--json", "--resume", **options, num_generations=3)
    assert again.exit_code == 0, again.output
    assert len(json.loads(again.stdout)["history"]) == 3
    assert not (tmp_path / "mine" / "search-checkpoint.json").exists()


def test_an_interrupted_search_goes_on(world: Path, tmp_path: Path) -> None:
    first = search(world, tmp_path / "mine", "--json", reward="loglik", validation="none")
    assert first.exit_code == 0
    # as if it had been stopped before it could save
    from peft_svf import AdaptiveMixture, LogLikelihoodObjective

    mixture = AdaptiveMixture.from_pretrained(
        str(world / "base"), {name: str(world / name) for name in ("one", "two")}, dtype="auto"
    )
    rows = load_examples(str(world / "shots.jsonl"), prompt_column="question")
    path = tmp_path / "mine" / "search-checkpoint.json"
    mixture.search(
        objective=LogLikelihoodObjective(rows, mixture.tokenizer),
        method="cem",
        validation=None,
        num_generations=1,
        population_size=4,
        checkpoint=path,
    )
    refused = search(world, tmp_path / "mine", "--json", reward="loglik", validation="none")
    assert "exists. Pass `resume=True` (`--resume`) to continue that search" in one_line(refused)
    again = search(world, tmp_path / "mine", "--json", "--resume", reward="loglik", validation="none")
    assert again.exit_code == 0, again.output
    found, expected = json.loads(again.stdout), json.loads(first.stdout)
    assert found["alpha"] == expected["alpha"]
    assert found["history"] == expected["history"]
    assert not path.exists()


@pytest.mark.parametrize(
    ("more", "options", "message"),
    [
        (("--expert", "one"), {}, "--expert must be NAME=PATH, such as math=experts/math, got 'one'"),
        (("--expert", "one=a", "--expert", "one=b"), {}, "--expert one is given twice, as 'a' and 'b'"),
        (("--expert", "one=nowhere"), {}, "nowhere"),
        ((), {"reward": "nubmer"}, "There is no reward function 'nubmer'"),
        ((), {"method": "cme"}, "--method must be auto, gradient, cem or cma-es, got 'cme'"),
        ((), {"optimizer_kwargs": "std=1"}, "--optimizer_kwargs must be JSON, got 'std=1'"),
        ((), {"optimizer_kwargs": "[1]"}, "`optimizer_kwargs` must be a dict, got [1]"),
        ((), {"granularity": '{"a": "b"'}, "--granularity must be JSON"),
        ((), {"num_generations": "0"}, "`num_generations` must be an integer of at least 1, got 0"),
        ((), {"validation": "nowhere.csv"}, "There is no file nowhere.csv"),
        ((), {"granularity": "head"}, "`granularity` must be"),
        ((), {"validation": "some"}, "`validation` must be"),
        ((), {"base_check": "perhaps"}, "--base_check must be error, warn or ignore"),
        ((), {"prompt_column": "prompt"}, "row 1 has no 'prompt'; it has 'question', 'solution'"),
        ((), {"answer_column": "anwser"}, "row 1 has no 'anwser'"),
        ((), {"model_name_or_path": "./nowhere"}, "nowhere"),
    ],
)
def test_mistakes_are_errors_in_a_line(
    more: tuple[str, ...], options: dict[str, Any], message: str, world: Path, tmp_path: Path
) -> None:
    assert message in one_line(search(world, tmp_path / "mine", *more, **options))
    assert not (tmp_path / "mine" / "adapter_model.safetensors").exists()


# ------------------------------------------------------------------------------------------ options


def test_each_setting_is_an_option_with_its_default() -> None:
    from peft_svf.cli.search import search as command

    hints = get_type_hints(SearchConfig)
    options = inspect.signature(command).parameters
    for field in fields(SearchConfig):
        if field.name in ("checkpoint", "reward_weights"):  # made of --output_dir, and of several functions
            assert field.name not in options
            continue
        default = getattr(SearchConfig(), field.name)
        found = options[field.name].default
        assert found == (None if default == {} else default), field.name
        kind = get_args(options[field.name].annotation)[0]
        if get_origin(hints[field.name]) is not Union and hints[field.name] in (bool, int, float, str):
            assert kind is hints[field.name]


def help_of_search(option: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    from peft_svf.cli.app import app

    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERMINAL_WIDTH", "120")
    result = testing.CliRunner().invoke(app, ["search", option])
    assert result.exit_code == 0, result.output
    return [line.rstrip() for line in result.stdout.splitlines()]


def test_help_fits_on_a_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = help_of_search("--help", monkeypatch)
    assert len(lines) <= 42
    assert max(map(len, lines)) <= 80
    shown = [field.name for field in fields(SearchConfig) if f"--{field.name}" in "\n".join(lines)]
    hidden = [field.name for field in fields(SearchConfig) if field.metadata["advanced"]]
    assert not set(shown) & set(hidden)
    assert {"method", "max_new_tokens", "validation", "seed"} < set(shown)
    text = " ".join(" ".join(lines).replace("│", " ").split())
    assert "auto or none. Or a file of held-out examples." in text
    assert "Default: layer for the gradient of a reward, else expert." in text


def test_help_all_shows_every_option(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft_svf.cli.search import search as command

    text = "\n".join(help_of_search("--help_all", monkeypatch))
    assert not [
        name for name in inspect.signature(command).parameters if f"--{name.replace('as_json', 'json')}" not in text
    ]
    assert "--expected_reward" in text
    assert "--help_all" in "\n".join(help_of_search("--help", monkeypatch))


def test_a_missing_option_is_a_matter_of_usage(world: Path, tmp_path: Path) -> None:
    result = search(world, tmp_path / "mine", model_name_or_path=None)
    assert result.exit_code == 2
    assert "model_name_or_path" in result.output


# ------------------------------------------------------------------------------------------ examples


def test_answers_are_there_for_rewards_and_likelihood(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    chat = [{"role": "user", "content": "a"}]
    path.write_text(json.dumps([{"q": "a", "completion": "b", "level": 1}, {"q": chat, "answer": 2}, {"q": "c"}]))
    text, messages, none = load_examples(str(path), prompt_column="q")
    assert text == {"prompt": "a", "answer": "b", "completion": "b", "level": 1}
    assert messages == {"prompt": chat, "answer": "2", "completion": [{"role": "assistant", "content": "2"}]}
    assert none == {"prompt": "c"}
    led = load_examples(str(path), prompt_column="q", system_prompt="s", limit=1)
    assert [message["content"] for message in led[0]["prompt"]] == ["s", "a"]
    assert led[0]["completion"] == [{"role": "assistant", "content": "b"}]


def test_a_dataset_in_the_place_of_a_file(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text('{"prompt": "a", "answer": "b"}\n')
    assert load_examples(str(tmp_path / "data"))[0]["completion"] == "b"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", "holds no examples"),
        ("a.csv", "prompt,answer\n", "holds no examples"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": \n', "line 2 is not valid JSON"),
        ("a.json", "[", "is not valid JSON"),
        ("a.json", '{"prompt": "a"}', "must hold a list of examples, got dict"),
        ("a.jsonl", '"a"\n', "row 1 must be a mapping"),
        ("a.jsonl", '{"prompt": "a"}\n{"text": "a"}\n', "row 2 has no 'prompt'; it has 'text'"),
        ("a.csv", "prompt,answer\na,b\na,b,c\n", "line 3 has 3 fields, its header 2"),
        ("a.csv", 'prompt,answer\na,"b"c\n', "line 2 is not valid CSV"),
        ("a.txt", "a", "must be a .jsonl, .json, .csv, .parquet file"),
    ],
)
def test_malformed_files(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        load_examples(str(tmp_path / name))
    assert name in str(error.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no file .*a\.csv"):
        load_examples(str(tmp_path / "a.csv"))


def test_characters_that_look_like_ends_of_lines(tmp_path: Path) -> None:
    odd = "a\u2028b\x85c"
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": odd}, ensure_ascii=False) + "\r\n", encoding="utf-8")
    (tmp_path / "a.csv").write_text(f'prompt,answer\r\n"{odd}\n",d\r\n', encoding="utf-8", newline="")
    assert load_examples(str(tmp_path / "a.jsonl"))[0]["prompt"] == odd
    assert load_examples(str(tmp_path / "a.csv"))[0]["prompt"] == odd + "\n"


def test_a_file_in_another_encoding(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes('{"prompt": "é"}'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"a\.jsonl is no UTF-8 text"):
        load_examples(str(tmp_path / "a.jsonl"))


def test_a_file_has_no_other_splits(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "a"}\n')
    with pytest.raises(ValueError, match="has no split 'dev'; it has train, all"):
        load_examples(str(tmp_path / "a.jsonl"), split="dev")
    with pytest.raises(ValueError, match="is a file, which has no configurations"):
        load_examples(str(tmp_path / "a.jsonl"), config="main")


def test_the_system_prompt_leads_messages_that_have_none(tmp_path: Path) -> None:
    user, system = {"role": "user", "content": "u"}, {"role": "system", "content": "mine"}
    (tmp_path / "a.json").write_text(json.dumps([{"prompt": [user]}, {"prompt": [system, user]}]))
    first, second = load_examples(str(tmp_path / "a.json"), system_prompt="s")
    assert first["prompt"] == [{"role": "system", "content": "s"}, user]
    assert second["prompt"] == [system, user]
