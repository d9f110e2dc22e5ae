"""What the commands have in common: help, version, completion, choices, output folders, and errors in a line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from helpers import base_model, make_tokenizer, save_expert

from peft_svf import SVFConfig
from peft_svf.utils.version import __version__

testing = pytest.importorskip("typer.testing")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, another one, an expert, and files that are not what they should be."""
    folder = tmp_path_factory.mktemp("world")
    for seed, name in enumerate(("base", "other")):
        base_model(seed).save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
    save_expert(folder / "expert", SVFConfig(target_modules="all-linear", task_type="CAUSAL_LM"), 0)
    config = json.loads((folder / "expert" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(folder / "base")
    (folder / "expert" / "adapter_config.json").write_text(json.dumps(config))
    (folder / "file").write_text("x")
    (folder / "bad.yaml").write_text("a: [1\nb: }")
    (folder / "list.yaml").write_text("- 1\n")
    (folder / "wrong.yaml").write_text("learning_rate: [1, 2]\ntask: reasoning_gym:chain_sum\nmax_steps: 1\n")
    (folder / "syntax.py").write_text("def (")
    (folder / "shots.jsonl").write_text('{"prompt": "a", "answer": "b"}\n{"prompt": "c", "answer": "d"}\n')
    (folder / "cut").mkdir()
    for path in (folder / "base").iterdir():
        (folder / "cut" / path.name).write_bytes(b"xx" if path.suffix == ".safetensors" else path.read_bytes())
    return folder


@pytest.fixture(autouse=True)
def in_world(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world)


def run(*words: Any, **options: Any) -> Any:
    from peft_svf.cli.app import app

    return testing.CliRunner().invoke(app, [str(word) for word in words], **options)


def refused(*words: Any) -> str:
    """What the error of a command says. It is one line, without a traceback."""
    result = run(*words)
    assert result.exit_code == 1, (result.output, result.exception)
    assert isinstance(result.exception, SystemExit), result.exception
    assert "Traceback" not in result.stderr
    return " ".join(result.stderr.split())


def command_line(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `peft-svf` as the console script does."""
    code = "import sys; sys.argv = ['peft-svf', *sys.argv[1:]]; from peft_svf.cli.app import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, env={**os.environ, **environment}
    )


# ------------------------------------------------------------------------------------------ help


def test_the_version() -> None:
    assert run("--version").stdout == f"peft-svf {__version__}\n"


def test_the_help_of_train_is_one_screen_and_true(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft_svf.cli.training_options import OPTIONS
    from peft_svf.training.recipe import parse

    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERMINAL_WIDTH", "120")
    shown = run("train", "--help")
    lines = shown.stdout.splitlines()
    assert len(lines) <= 45
    assert max(map(len, lines)) <= 80
    values: dict[str, Any] = {}
    for part in parse([])[:4]:
        values |= {each.name: getattr(part, each.name) for each in fields(part)}
    for name, metavar, default, _ in OPTIONS:
        assert f"  --{name} {metavar} " in shown.stdout  # not cut
        if name in ("config", "data"):  # an option of TRL's parser, and an alias
            continue
        if default.startswith("all"):
            assert values[name] is None
        elif default:
            assert default == str(getattr(values[name], "value", values[name])), name
    assert {"--overwrite", "--json", "--help_all"} < set(shown.stdout.split())


def test_completion_knows_commands_options_and_choices() -> None:
    def completed(line: str) -> set[str]:
        done = command_line(
            _PEFT_SVF_COMPLETE="complete_bash", COMP_WORDS=line, COMP_CWORD=str(len(line.split(" ")) - 1)
        )
        return set(done.stdout.split())

    assert {"train"} == completed("peft-svf tr")
    assert {"--model_name_or_path", "--max_steps", "--max_completion_length"} <= completed("peft-svf train --m")
    assert completed("peft-svf generate --dispatch ne") == {"nearest"}


# ------------------------------------------------------------------------------------------ choices


def test_the_choices_are_those_of_the_library() -> None:
    from peft_svf.cli import choices
    from peft_svf.evaluation.dispatchers import DISPATCHERS
    from peft_svf.playground.setup import CHOOSERS
    from peft_svf.scoring import REWARDS
    from peft_svf.training.arguments import OBJECTIVES

    assert choices.DISPATCHERS == DISPATCHERS
    assert choices.CHOOSERS == CHOOSERS
    assert [*choices.OBJECTIVES] == [*OBJECTIVES]
    assert [*choices.REWARDS] == [*REWARDS]


SEARCH = ("search", "--model_name_or_path", "base", "--expert", "a=expert", "--examples", "shots.jsonl")
SEARCH = (*SEARCH, "--max_new_tokens", "2", "--num_generations", "1", "--population_size", "2", "--method", "cem")
EXPERT = ("--model_name_or_path", "nowhere", "--expert", "a=b")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["generate", *EXPERT, "--dispatch", "neerest"], "got 'neerest'. Did you mean nearest?"),
        (["chat", *EXPERT, "--dispatch", "Prompt"], "got 'Prompt'. Did you mean prompt?"),
        (["evaluate", *EXPERT, "--task", "a=b", "--output_dir", "o", "--strategy", "mix"], "--strategy must be prompt"),
        (["train", "--objective", "grop"], "--objective must be"),
        (["train", "--objective=ppo"], "got 'ppo'"),
        (["search", *EXPERT, "--examples", "e", "--output_dir", "o", "--reward", "nubmer"], "Did you mean number?"),
        (["search", *EXPERT, "--examples", "e", "--output_dir", "o", "--method", "cmaes"], "Did you mean cma-es?"),
        (["import", "x", *EXPERT[:2], "--output_dir", "o", "--parametrization", "sigmod"], "Did you mean sigmoid?"),
        (["export", "lora", "x", "--output_dir", "o", "--base_check", "warning"], "Did you mean warn?"),
        (["export", "merged", "x", "--output_dir", "file"], "is a file. Pass a folder."),
        (["train", "--config", "bad.yaml"], "The recipe bad.yaml is not valid YAML: while parsing a flow sequence"),
        (["train", "--config", "list.yaml"], "must be a YAML mapping of options, got list"),
        (["train", "--config", "nowhere.yaml"], "No such file or directory: 'nowhere.yaml'"),
        (["train", "--output_dir", "expert"], "expert exists and holds an adapter of type SVF. Pass --overwrite"),
    ],
)
def test_mistakes_are_refused_before_torch_is_imported(words: list[str], message: str) -> None:
    code = (
        "import sys; words = sys.argv[1:]; sys.argv[:] = ['peft-svf']\n"
        "from typer.testing import CliRunner; from peft_svf.cli.app import app\n"
        "result = CliRunner().invoke(app, words)\n"
        "print(result.stderr)\n"
        "assert result.exit_code == 1 and 'torch' not in sys.modules, (result.exit_code, result.exception)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert message in " ".join(done.stdout.split())


# ------------------------------------------------------------------------------------------ output folders


def merged(*more: Any) -> list[Any]:
    return ["export", "merged", "expert", "--output_dir", *more]


def test_nothing_is_replaced_without_being_asked_for(world: Path, tmp_path: Path) -> None:
    made = [
        ["export", "lora", "expert", "--rank", 2, "--output_dir", tmp_path / "lora"],
        merged(tmp_path / "model"),
        [*SEARCH, "--reward", "loglik", "--validation", "none", "--output_dir", tmp_path / "mixture"],
    ]
    for words in made:
        folder = words[-1]
        assert run(*words).exit_code == 0
        (folder / "notes.txt").write_text("mine")
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        message = refused(*words)
        assert str(folder) in message
        assert "--overwrite" in message
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
        (folder / "adapter_model.safetensors").unlink(missing_ok=True)
        (folder / "model.safetensors").unlink(missing_ok=True)
        assert run(*words, "--overwrite").exit_code == 0
        assert {path.name for path in folder.iterdir()} == {*before}
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_overwriting_replaces_only_the_same_kind(world: Path, tmp_path: Path) -> None:
    assert "holds a model, which is not replaced by an adapter" in refused(
        "export", "lora", "expert", "--output_dir", "base", "--overwrite"
    )
    assert "holds an adapter, which is not replaced by a model" in refused(*merged("expert", "--overwrite"))
    assert "is the folder of the base model" in refused(*merged("base", "--overwrite"))
    assert "model.safetensors" in os.listdir(world / "base")


def test_training_anew_discards_the_checkpoints_of_the_old_run(world: Path, tmp_path: Path) -> None:
    from peft_svf.cli.training_options import check_words

    (tmp_path / "run" / "checkpoint-3").mkdir(parents=True)
    (tmp_path / "run" / "adapter_config.json").write_text("{")  # damaged, and an adapter nevertheless
    (tmp_path / "recipe.yaml").write_text(f"output_dir: {tmp_path / 'run'}\nobjective: rloo\n")
    words = ["--config", str(tmp_path / "recipe.yaml")]
    with pytest.raises(ValueError, match=r"run exists and holds an adapter\. Pass --overwrite"):
        check_words(words, False)
    check_words([*words, "--resume_from_checkpoint", "true"], False)
    check_words([*words, "--resume_from_checkpoint", "true"], True)
    assert (tmp_path / "run" / "checkpoint-3").is_dir()
    check_words(words, True)
    assert not (tmp_path / "run" / "checkpoint-3").exists()


def test_a_failed_export_leaves_the_old_model(world: Path, tmp_path: Path) -> None:
    assert run(*merged(tmp_path / "model")).exit_code == 0
    old = (tmp_path / "model" / "model.safetensors").read_bytes()
    assert "another base model" in refused(
        *merged(tmp_path / "model", "--overwrite", "--model_name_or_path", world / "other")
    )
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == old


def test_a_pack_of_another_model_is_not_replaced(world: Path, tmp_path: Path) -> None:
    words = ["--output_dir", tmp_path / "pack", "--r", 2]
    assert run("decompose", "base", *words).exit_code == 0
    assert run("decompose", "base", *words).exit_code == 0  # complete, and verified
    assert "holds a basis pack" in refused("decompose", "other", *words)
    assert run("decompose", "other", *words, "--overwrite").exit_code == 0


def test_a_folder_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)  # root may write anywhere
    assert f"no permission to write to {tmp_path}" in refused(*merged(tmp_path / "a" / "b"))


# ------------------------------------------------------------------------------------------ errors in a line


def broken(completions: list[Any], **columns: Any) -> list[float]:
    raise KeyError("gold")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            [*SEARCH, "--output_dir", "out", "--reward", "test_cli_common.broken"],
            "Reward function 'broken' raised KeyError: 'gold'",
        ),
        (
            [*SEARCH, "--output_dir", "out", "--reward", "syntax.f"],
            "'syntax.f' could not be imported: invalid syntax (syntax.py, line 1)",
        ),
        (["decompose", "base", "--output_dir", "p", "--device", "gpu9"], "--device 'gpu9' cannot be used"),
        (["decompose", "base", "--output_dir", "p", "--dtype", "int8"], "--dtype must be auto or a torch dtype"),
        (["decompose", "nowhere", "--output_dir", "p"], "There is no folder nowhere"),
        (["inspect", "expert", "--model_name_or_path", "cut"], "damaged or cut short"),
        (["export", "lora", "expert", "--output_dir", "o", "--model_name_or_path", "cut"], "deserializing header"),
        (["train", "--nothing", "1"], "There is no option --nothing. `peft-svf train --help_all`"),
        (["train", "--obejctive", "grpo"], "There is no option --obejctive. Did you mean --objective?"),
        (["train", "--config", "wrong.yaml", "--model_name_or_path", "base", "--output_dir", "t"], "TypeError"),
    ],
)
def test_mistakes_of_any_kind(words: list[str], message: str) -> None:
    pytest.importorskip("trl")
    assert message in refused(*words)


def test_a_value_of_the_wrong_type_is_two_lines(capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("trl")
    result = run("train", "--model_name_or_path", "base", "--max_steps", "many")
    assert result.exit_code == 2
    assert len(result.stderr.strip().splitlines()) == 2
    assert "invalid int value: 'many'" in result.stderr


def test_an_adapter_without_weights(tmp_path: Path, world: Path) -> None:
    (tmp_path / "adapter_config.json").write_bytes((world / "expert" / "adapter_config.json").read_bytes())
    for words in (["inspect", tmp_path], ["export", "merged", tmp_path, "--output_dir", tmp_path / "m"]):
        assert f"{tmp_path} holds no adapter_model.safetensors" in refused(*words)


def test_inspection_of_a_wrong_model_or_a_broken_adapter_fails(world: Path, tmp_path: Path) -> None:
    assert run("inspect", "expert", "--model_name_or_path", "base").exit_code == 0
    for more in ([], ["--json"]):
        wrong = run("inspect", "expert", "--model_name_or_path", "other", *more)
        assert wrong.exit_code == 1
        assert "differ" in wrong.stdout
    import torch
    from safetensors.torch import load_file, save_file

    for path in (world / "expert").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    next(iter(tensors.values()))[0] = torch.nan
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    assert run("inspect", tmp_path).exit_code == 1
