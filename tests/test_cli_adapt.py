"""`peft-svf generate`, `chat` and `evaluate`."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from helpers import base_model, make_tokenizer, save_expert

from peft_svf import (
    AdaptiveMixture,
    EvaluationTask,
    NearestDispatcher,
    PromptDispatcher,
    SelfAdaptiveModel,
    SVFConfig,
    evaluate,
    load_examples,
    load_experts,
    svf_layers,
)
from peft_svf.evaluation import make_dispatcher
from peft_svf.mixture.loading import CLASSIFIER
from peft_svf.scoring.rewards import text_of

testing = pytest.importorskip("typer.testing")
RECIPES = Path(__file__).parents[1] / "examples" / "recipes"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, two experts and a classifier."""
    folder = tmp_path_factory.mktemp("world")
    base_model().save_pretrained(folder / "base")
    make_tokenizer().save_pretrained(folder / "base")
    for seed, name in enumerate(("sums", "lists", "classifier")):
        save_expert(folder / name, SVFConfig(target_modules="all-linear"), seed)
    (folder / "sums.txt").write_text("1 + 2\n\n3 + 4\n")
    (folder / "lists.jsonl").write_text('{"prompt": "a cat"}\n{"prompt": "my dog"}\n')
    return folder


def run(world: Path, command: str, *more: str, text: str | None = None) -> Any:
    from peft_svf.cli.app import app

    words = ["--model_name_or_path", str(world / "base")]
    words += ["--expert", f"sums={world / 'sums'}", "--expert", f"lists={world / 'lists'}"]
    if "--max_new_tokens" not in more:
        more = (*more, "--max_new_tokens", "4")
    return testing.CliRunner().invoke(app, [command, *words, *more], input=text)


@pytest.mark.parametrize("dispatch", ["prompt", "classifier", "nearest", "mixture"])
def test_prompts_are_answered(dispatch: str, world: Path) -> None:
    more = ["--dispatch", dispatch, "--classifier", str(world / "classifier"), "--label", "sums=math"]
    more += ["--description", "lists=words", "--weight", "sums=0.5"]
    more += ["--nearest_examples", f"sums={world / 'sums.txt'}", "--nearest_examples", f"lists={world / 'lists.jsonl'}"]
    result = run(world, "generate", *more, "--prompt", "5 + 6", "--file", str(world / "lists.jsonl"), "--json")
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["prompt"] for line in lines] == ["5 + 6", "a cat", "my dog"]
    assert all(isinstance(line["text"], str) for line in lines)
    if dispatch == "mixture":
        assert {line["expert"] for line in lines} == {"mixture"}
    else:
        assert all(line["expert"] in line["probabilities"] for line in lines)
    if dispatch == "classifier":
        assert list(lines[0]["probabilities"]) == ["sums", "lists"]
    plain = run(world, "generate", *more, "--prompt", "5 + 6", "--soft")
    assert plain.exit_code == 0, plain.output
    assert lines[0]["expert"] in plain.stdout


def test_a_conversation(world: Path) -> None:
    result = run(world, "chat", "--dispatch", "prompt", text="a cat\n/clear\n1 + 2\n\n")
    assert result.exit_code == 0, result.output
    assert result.stdout.count("s to answer)") == 2
    assert run(world, "chat", text="").exit_code == 0


def test_a_conversation_with_one_expert(world: Path) -> None:
    said = ["/help", "/expert", "/expert nobody", "/expert lists", "1 + 2", "/expert base", "a", "/expert auto"]
    result = run(world, "chat", "--soft", text="\n".join([*said, "b", "/nothing", "/quit", "never asked", ""]))
    assert result.exit_code == 0, result.output
    shown = " ".join(result.stdout.split())
    for part in ("/expert NAME", "There is no expert 'nobody'. The experts are sums, lists, base, or auto."):
        assert part in shown
    assert "(lists, probability 1.00; " in shown
    assert "(base, probability 1.00; " in shown
    assert "There is no command /nothing." in shown
    assert shown.count("s to answer)") == 3  # the last after `auto`; nothing after /quit


def test_prompt_expert_and_answer_are_apart(world: Path) -> None:
    result = run(world, "generate", "--prompt", "a cat", "--prompt", "1 [bold]+ 2")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["prompt", "expert", "answer", ""] * 2
    assert lines[0] == "prompt: a cat"
    assert lines[4] == "prompt: 1 [bold]+ 2"


@pytest.mark.parametrize(
    ("command", "more", "message"),
    [
        ("generate", [], "nothing to answer"),
        (
            "generate",
            ["--prompt", "x", "--dispatch", "guess"],
            "--dispatch must be prompt, classifier, nearest or mixture, got 'guess'.",
        ),
        ("generate", ["--prompt", "x", "--dispatch", "classifier"], "needs one. Pass its folder or Hub id"),
        ("generate", ["--prompt", "x", "--dispatch", "nearest"], "'sums' has none"),
        ("generate", ["--prompt", "x", "--description", "physics=x"], "'physics' is none of the experts"),
        ("generate", ["--prompt", "x", "--dispatch", "mixture", "--weight", "sums=much"], "NAME=NUMBER"),
        ("generate", ["--prompt", "x", "--weight", "sums"], "--weight must be NAME=NUMBER, got 'sums'"),
        ("generate", ["--file", "nothing.jsonl"], "no file nothing.jsonl"),
        ("evaluate", ["--task", "sums", "--output_dir", "x"], "--task must be EXPERT=DATA, got 'sums'"),
        ("evaluate", ["--task", "other=x.yaml", "--output_dir", "x"], "'other', which is none of the experts"),
        ("evaluate", ["--task", "physics=x.yaml", "--output_dir", "x"], "'physics', which is none of the experts"),
    ],
)
def test_mistakes_are_errors_in_a_line(command: str, more: list[str], message: str, world: Path) -> None:
    result = run(world, command, *more)
    assert result.exit_code == 1, result.output
    assert message in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr


@pytest.mark.skipif(find_spec("reasoning_gym") is None, reason="needs reasoning-gym")
def test_strategies_are_compared(world: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    more = ["--task", f"sums={RECIPES / 'sums.yaml'}", "--task", f"base={RECIPES / 'products.yaml'}"]
    more += ["--task", f"lists={RECIPES / 'lists.yaml'}"]
    more += ["--strategy", "prompt", "--strategy", "nearest", "--strategy", "mixture"]
    more += ["--size", "6", "--shots", "4", "--output_dir", str(tmp_path)]
    result = run(world, "evaluate", *more, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "evaluation.json").read_text())
    assert found == json.loads(result.stdout)
    assert found["tasks"] == ["sums", "products", "lists"]
    assert list(found["accuracy"]) == ["base", "oracle", "prompt", "nearest", "mixture"]
    assert set(found["confusion"]) == {"prompt", "nearest"}
    assert sum(found["confusion"]["prompt"]["sums"].values()) == 6
    assert set(found["seconds"]["mixture"]) == {"first", "second", "prompts"}
    assert (tmp_path / "evaluation.png").read_bytes().startswith(b"\x89PNG")
    again = run(world, "evaluate", *more)
    assert again.exit_code == 1
    assert "exists" in again.stderr
    again = run(world, "evaluate", *more, "--resume")
    assert again.exit_code == 0, again.output
    assert "right, chosen" in again.stdout
    repeated = json.loads((tmp_path / "evaluation.json").read_text())
    assert {**repeated, "seconds": 0} == {**found, "seconds": 0}


def test_data_of_the_user_is_evaluated_and_answered(world: Path, tmp_path: Path) -> None:
    """Of a file the same questions as training holds out, with columns of any name."""
    pairs = tmp_path / "pairs.csv"
    pairs.write_text("q,a\n" + "".join(f"what is {n},{n:03}\n" for n in range(40)))
    held_out = [row["prompt"] for row in load_examples(f"{pairs}:test", prompt_column="q")]
    columns = ["--prompt_column", "q", "--answer_column", "a"]
    more = [
        "--task",
        f"sums={pairs}",
        "--task",
        f"lists={pairs}:all",
        "--strategy",
        "nearest",
        "--shots",
        "3",
        *columns,
    ]
    more += ["--reward", "test_cli_adapt.letters_and_answers", "--chat", "--output_dir", str(tmp_path), "--json"]
    result = run(world, "evaluate", *more)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["confusion"]["nearest"].keys() == {"sums", "lists"}
    assert sum(found["confusion"]["nearest"]["sums"].values()) == len(held_out)
    assert sum(found["confusion"]["nearest"]["lists"].values()) == 40
    answered = run(world, "generate", "--data", f"{pairs}:test", *columns, "--json")
    assert answered.exit_code == 0, answered.output
    assert [json.loads(line)["prompt"] for line in answered.stdout.splitlines()] == held_out
    wrong = run(world, "evaluate", "--task", f"sums={pairs}", "--output_dir", str(tmp_path / "x"))
    assert wrong.exit_code == 1
    assert "row 1 has no 'prompt'; it has 'q', 'a'. Name the right one with prompt_column" in wrong.stderr


def letters_and_answers(completions: list[Any], prompts: list[Any], answer: list[str], **kwargs: Any) -> list[float]:
    assert all(prompt[0]["role"] == "user" for prompt in prompts)
    assert all(len(text) == 3 for text in answer)
    return [float(text_of(completion) > "m") for completion in completions]


# ------------------------------------------------------------------------------------------ evaluation


def length(completions: list[str], **kwargs: Any) -> list[float]:
    return [float(len(text) > 2) for text in completions]


def first_letter(completions: list[str], answer: list[str], **kwargs: Any) -> list[float]:
    return [float(right in text) for text, right in zip(completions, answer, strict=True)]


def test_the_oracle_uses_the_right_expert_and_nothing_is_answered_twice(world: Path, tmp_path: Path) -> None:
    mixture = load_experts(
        str(world / "base"),
        {name: str(world / name) for name in ("sums", "lists")},
        classifier=str(world / "classifier"),
    )
    assert CLASSIFIER in mixture.model.peft_config
    assert mixture.model.active_adapters == ["mixture"]
    asked: list[str] = []

    def counting(prompts: list[str], completions: list[str], answer: list[str], **kwargs: Any) -> list[float]:
        asked.extend(prompts)
        return first_letter(completions, answer)

    tasks = [
        EvaluationTask("a", [{"prompt": f"a {i}", "answer": "a"} for i in range(5)], counting, "sums"),
        EvaluationTask("b", [{"prompt": f"b {i}", "answer": "b"} for i in range(3)], counting),
    ]
    dispatcher = make_dispatcher("prompt", mixture)
    options: dict[str, Any] = {"generation_kwargs": {"max_new_tokens": 8}, "timed_prompts": 0}
    found = evaluate(mixture.model, mixture.tokenizer, tasks, {"prompt": dispatcher}, **options)
    prompts = [row["prompt"] for task in tasks for row in task.examples]
    assert isinstance(dispatcher, PromptDispatcher)
    choices = dispatcher(prompts).choices
    pairs = {(p, "base") for p in prompts} | {(p, "sums") for p in prompts[:5]}
    pairs |= set(zip(prompts, choices, strict=True))
    assert len(asked) == len(pairs)
    hits = [c == right for c, right in zip(choices, ["sums"] * 5 + ["base"] * 3, strict=True)]
    assert found.dispatch_accuracy["prompt"]["all"] == sum(hits) / 8
    assert found.accuracy["oracle"]["b"] == found.accuracy["base"]["b"]
    mixture.set_weights({"sums": 1.0})
    whole = evaluate(mixture.model, mixture.tokenizer, tasks, {"mine": mixture}, **options)
    assert whole.accuracy["mine"]["a"] == whole.accuracy["oracle"]["a"]
    assert whole.confusion == whole.dispatch_accuracy == {}


def test_a_mixture_is_evaluated_as_the_adapter_that_it_is(world: Path) -> None:
    """Whatever its weights per group of modules are: here the first half of the layers has none."""
    mixture = load_experts(str(world / "base"), {name: str(world / name) for name in ("sums", "lists")})
    layers = svf_layers(mixture.model, "mixture")
    for layer in layers[: len(layers) // 2]:
        for delta in layer.delta_weights(["mixture"]):
            delta.data.zero_()
    answered: list[str] = []

    def seeing(completions: list[Any], **kwargs: Any) -> list[float]:
        answered.extend(text_of(completion) for completion in completions)
        return [1.0] * len(completions)

    prompts = [[{"role": "user", "content": f"{i} + {i}"}] for i in range(4)]
    task = EvaluationTask("a", [{"prompt": prompt} for prompt in prompts], seeing, "sums")
    options: dict[str, Any] = {"generation_kwargs": {"max_new_tokens": 6}, "timed_prompts": 0}
    evaluate(mixture.model, mixture.tokenizer, [task], {"mine": mixture}, **options)
    expected = SelfAdaptiveModel(mixture.model, mixture.tokenizer, mixture).chat(prompts, max_new_tokens=6)
    assert answered[-4:] == expected
    assert len({*answered}) > 4  # the base model and the expert answer differently


def test_an_evaluation_goes_on_only_with_what_it_was_about(world: Path, tmp_path: Path) -> None:
    paths = {name: str(world / name) for name in ("sums", "lists")}
    mixture = AdaptiveMixture.from_pretrained(str(world / "base"), paths)

    def run_with(expert: str = "sums", reward: Any = length, threshold: float = 0.0, resume: bool = True) -> Any:
        return evaluate(
            mixture.model,
            mixture.tokenizer,
            [EvaluationTask("a", [{"prompt": f"a {i}"} for i in range(3)], reward, expert)],
            {"prompt": make_dispatcher("prompt", mixture, threshold=threshold)},
            generation_kwargs={"max_new_tokens": 3},
            timed_prompts=0,
            output=tmp_path / "scores.json",
            resume=resume,
        )

    first = run_with(resume=False)
    assert run_with().to_dict() == first.to_dict()
    assert run_with(threshold=1.0).confusion["prompt"] == {"sums": {"base": 3}}  # asked anew
    with pytest.raises(ValueError, match="an evaluation with other experts"):
        run_with(expert="lists")
    with pytest.raises(ValueError, match="an evaluation with other tasks"):
        run_with(reward=first_letter)
    next(p for n, p in mixture.model.named_parameters() if "svf_delta.sums" in n).data.mul_(2)
    with pytest.raises(ValueError, match="an evaluation with other values of the experts"):
        run_with()


def test_evaluations_that_make_no_sense(world: Path) -> None:
    mixture = AdaptiveMixture.from_pretrained(str(world / "base"), {"sums": str(world / "sums")})
    task = EvaluationTask("a", [{"prompt": "a"}], length, "sums")
    with pytest.raises(ValueError, match="different names"):
        evaluate(mixture.model, mixture.tokenizer, [task, task], {})
    with pytest.raises(ValueError, match="different names"):
        evaluate(mixture.model, mixture.tokenizer, [], {})
    with pytest.raises(ValueError, match="'physics' is not loaded"):
        evaluate(mixture.model, mixture.tokenizer, [EvaluationTask("a", task.examples, length, "physics")], {})
    dispatcher = NearestDispatcher(mixture.model, mixture.tokenizer, {"sums": ["a"]})
    with pytest.raises(ValueError, match="cannot be called 'oracle'"):
        evaluate(mixture.model, mixture.tokenizer, [task], {"oracle": dispatcher})


def test_an_evaluation_has_the_answer_length_of_each_task_and_wilson_intervals(world: Path) -> None:
    mixture = load_experts(str(world / "base"), {"sums": str(world / "sums")})
    seen: dict[str, int] = {}

    def noting(name: str, reward: float) -> Any:
        def score(completions: list[Any], **columns: Any) -> list[float]:
            seen[name] = max(seen.get(name, 0), *(len(text_of(each)) for each in completions))
            return [reward] * len(completions)

        return score

    rows = [{"prompt": f"{i} + {i}"} for i in range(6)]
    tasks = [
        EvaluationTask("short", rows, noting("short", 1.0), "sums", max_new_tokens=2),
        EvaluationTask("long", rows, noting("long", 0.25), "sums"),
    ]
    found = evaluate(
        mixture.model, mixture.tokenizer, tasks, {}, generation_kwargs={"max_new_tokens": 9}, timed_prompts=0
    )
    assert seen["short"] <= 2 < seen["long"] <= 9
    low, high = found.intervals["base"]["short"]
    assert high == 1
    assert low == pytest.approx(6 / (6 + 1.959964**2))  # Wilson's for 6 of 6
    assert found.intervals["base"]["long"] == pytest.approx((0.25, 0.25))  # not 0 or 1


def test_the_answer_length_of_a_recipe(tmp_path: Path) -> None:
    from peft_svf.training.recipe import recipe_answer_length

    (tmp_path / "recipe.yaml").write_text("task: reasoning_gym:chain_sum\nmax_completion_length: 17\n")
    assert recipe_answer_length(tmp_path / "recipe.yaml") == 17
