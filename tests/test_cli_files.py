"""`peft-svf inspect`, `export`, `import` and `cache`, and what all commands have in common."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import base_model, logits, make_tokenizer, save_expert
from peft import PeftModel
from test_interop import logit_vectors, save_parameters
from transformers import AutoModelForCausalLM

from peft_svf import SVFConfig
from peft_svf.spectral import BasisPack, list_cache

testing = pytest.importorskip("typer.testing")
COMMANDS = (
    *("train", "search", "generate", "chat", "evaluate", "inspect", "import", "decompose", "push"),
    *("export lora", "export merged", "cache list", "cache clear"),
    *(f"library {name}" for name in ("add", "remove", "dispatch", "list", "check")),
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model and an expert that knows where it is."""
    folder = tmp_path_factory.mktemp("world")
    base_model().save_pretrained(folder / "base")
    base_model(1).save_pretrained(folder / "other")
    make_tokenizer().save_pretrained(folder / "base")
    save_expert(folder / "expert", SVFConfig(target_modules="all-linear", task_type="CAUSAL_LM"), 0)
    config = json.loads((folder / "expert" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(folder / "base")
    (folder / "expert" / "adapter_config.json").write_text(json.dumps(config))
    return folder


def run(*words: Any) -> Any:
    from peft_svf.cli.app import app

    return testing.CliRunner().invoke(app, [str(word) for word in words])


def adapted(world: Path) -> Any:
    base = AutoModelForCausalLM.from_pretrained(world / "base")
    return PeftModel.from_pretrained(base, world / "expert")


def test_help_comes_without_torch_and_with_an_example() -> None:
    code = (
        "import json, sys; sys.argv[0] = 'peft-svf'\n"
        "from typer.testing import CliRunner; from peft_svf.cli.app import app\n"
        "shown = {words: CliRunner().invoke(app, [*words.split(), '--help']) for words in sys.argv[1:]}\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
        "print(json.dumps({words: result.stdout for words, result in shown.items() if result.exit_code == 0}))"
    )
    done = subprocess.run([sys.executable, "-c", code, *COMMANDS], capture_output=True, text=True, check=True)
    shown = json.loads(done.stdout)
    assert set(shown) == set(COMMANDS)
    for command, text in shown.items():
        assert f"peft-svf {command}" in " ".join(text.split())


def test_help_takes_less_than_half_a_second_of_cpu() -> None:
    def spent() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    before = spent()
    shown = subprocess.run([sys.executable, "-m", "peft_svf", "--help"], capture_output=True, text=True, check=True)
    assert "generate" in shown.stdout
    assert spent() - before < 0.5


def test_the_command_line_leaves_out_deprecations_of_other_libraries() -> None:
    code = (
        "import sys, warnings; sys.argv[:] = ['peft-svf', '--help']\n"
        "from peft_svf.cli import app\n"
        "app.app = lambda: None\n"
        "app.main()\n"
        "for module in ('transformers.modeling_utils', 'peft_svf.tuner.layer', 'transformers.training_args'):\n"
        "    warnings.warn_explicit(f'of {module}', FutureWarning, 'file.py', 1, module)\n"
    )
    run = {"capture_output": True, "text": True, "check": True}
    shown = subprocess.run([sys.executable, "-c", code], **run).stderr
    assert "of transformers.modeling_utils" not in shown
    assert "of peft_svf.tuner.layer" in shown
    assert "of transformers.training_args" in shown  # names an option of `train`
    assert (
        "of transformers.modeling_utils" in subprocess.run([sys.executable, "-W", "always", "-c", code], **run).stderr
    )


def test_an_adapter_is_inspected(world: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    shown = run("inspect", world / "expert", "--plot", tmp_path / "delta.png", "--count", 2)
    assert shown.exit_code == 0, shown.output
    assert str(world / "base") in "".join(shown.stdout.split())
    assert (tmp_path / "delta.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads(run("inspect", world / "expert", "--json", "--count", 2).stdout)
    deltas = [p for name, p in adapted(world).named_parameters() if "svf_delta" in name]
    assert found["numbers"] == sum(p.numel() for p in deltas)
    assert found["modules"] == found["fingerprinted"] == len(deltas) == 14
    assert found["rms"] == pytest.approx(float(torch.cat(list(deltas)).square().mean().sqrt()), rel=1e-5)
    sizes = sorted((float(p.square().mean().sqrt()) for p in deltas), reverse=True)
    assert list(found["largest"].values()) == pytest.approx(sizes[:2], rel=1e-5)
    assert found["more"] == []


def test_the_spectrum_is_compared_with_a_model(world: Path, tmp_path: Path) -> None:
    right = run("inspect", world / "expert", "--model_name_or_path", world / "base")
    assert right.exit_code == 0, right.output
    assert "spectrum" in right.stdout
    found = json.loads(run("inspect", world / "expert", "--model_name_or_path", world / "base", "--json").stdout)
    assert found["different"] == {}
    other = AutoModelForCausalLM.from_pretrained(world / "base")
    other.model.layers[1].mlp.up_proj.weight.data *= 1.01
    other.save_pretrained(tmp_path / "other")
    found = json.loads(run("inspect", world / "expert", "--model_name_or_path", tmp_path / "other", "--json").stdout)
    assert list(found["different"]) == ["model.layers.1.mlp.up_proj"]
    assert "1 of 14 weights differ" in " ".join(
        run("inspect", world / "expert", "--model_name_or_path", tmp_path / "other").stdout.split()
    )


def test_an_expert_is_exported_as_lora(world: Path, tmp_path: Path) -> None:
    done = run("export", "lora", world / "expert", "--output_dir", tmp_path / "exact", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["retained"] == pytest.approx(1)
    lora = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(world / "base"), tmp_path / "exact")
    assert torch.allclose(logits(lora), logits(adapted(world)), atol=1e-4)
    done = run("export", "lora", world / "expert", "--rank", 4, "--output_dir", tmp_path / "four")
    assert done.exit_code == 0, done.output
    assert "rank 4" in done.stdout
    done = run("export", "lora", world / "expert", "--output_dir", tmp_path / "out[final][/x]")
    assert done.exit_code == 0, done.output
    assert f"saved in {tmp_path / 'out[final][/x]'}" in done.stdout


def test_an_expert_is_exported_as_a_model(world: Path, tmp_path: Path) -> None:
    done = run("export", "merged", world / "expert", "--output_dir", tmp_path / "model", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == {"folder": str(tmp_path / "model"), "weights": 14, "least_share": 1.0}
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.allclose(logits(merged), logits(adapted(world)), atol=1e-5)


def test_a_released_file_is_imported(world: Path, tmp_path: Path) -> None:
    path = save_parameters(tmp_path / "learnable_params.pt", logit_vectors(base_model()))
    done = run("import", path, "--model_name_or_path", world / "base", "--output_dir", tmp_path / "expert", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["folder"] == str(tmp_path / "expert")
    assert found["numbers"] > 100
    config = json.loads((tmp_path / "expert" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(world / "base")
    shown = run("export", "merged", tmp_path / "expert", "--output_dir", tmp_path / "model")
    assert shown.exit_code == 0, shown.output


def test_a_model_is_decomposed(world: Path, tmp_path: Path) -> None:
    done = run("decompose", world / "base", "--output_dir", tmp_path / "pack", "--r", 4, "--dtype", "float16")
    assert done.exit_code == 0, done.output
    pack = BasisPack(tmp_path / "pack")
    again = run(
        "decompose", world / "base", "--output_dir", tmp_path / "pack", "--r", 4, "--dtype", "float16", "--json"
    )
    found = json.loads(again.stdout)
    assert found == {"folder": str(tmp_path / "pack"), "weights": 14, "size": pack.about["total_size"]}
    assert len(pack.modules) == 14
    assert pack.load(pack.modules[0], 32).vectors.dtype == torch.float16
    failed = run("decompose", world / "base", "--output_dir", tmp_path / "x", "--dtype", "nn")
    assert "--dtype must be auto or a torch dtype" in " ".join(failed.stderr.split())


def test_the_cache_is_listed_and_cleared(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFT_SVF_CACHE", str(tmp_path / "cache"))
    adapted(world)
    entries = list_cache()
    listed = json.loads(run("cache", "list", "--json").stdout)
    assert [row["key"] for row in listed] == [entry.key for entry in entries] != []
    assert {row["model"] for row in listed} == {str(world / "base")}
    monkeypatch.setenv("COLUMNS", "300")
    table = run("cache", "list").stdout
    assert str(world / "base") in table
    assert "float32" in table
    assert str(len(entries)) in table
    elsewhere = run("cache", "clear", "--cache_dir", tmp_path / "elsewhere", "--json")
    assert json.loads(elsewhere.stdout) == {"freed": 0}
    assert len(list_cache()) == len(entries)
    assert "MiB freed" in run("cache", "clear").stdout
    assert list_cache() == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["inspect", "nowhere"], "nowhere"),
        (["export", "lora", "EXPERT", "--output_dir", "x", "--rank", "0"], "`rank` must be at least 1"),
        (["export", "lora", "EXPERT", "--output_dir", "x", "--base_check", "no"], "--base_check must be error"),
        (["export", "lora", "EXPERT", "--output_dir", "x", "--model_name_or_path", "OTHER"], "another base model"),
        (["export", "merged", "EXPERT", "--output_dir", "x", "--model_name_or_path", "OTHER"], "another base model"),
        (
            ["export", "lora", "EXPERT", "--output_dir", "x", "--dtype", "float99"],
            "--dtype must be auto or a torch dtype",
        ),
        (["export", "lora", "EXPERT", "--output_dir", "EXPERT"], "holds an adapter of type SVF"),
        (["import", "x.pt", "--output_dir", "EXPERT", "--model_name_or_path", "OTHER"], "holds an adapter"),
        (["import", "nothing.pt", "--output_dir", "x", "--model_name_or_path", "OTHER"], "There is no file nothing.pt"),
    ],
)
def test_mistakes_are_one_line_and_a_traceback_on_request(words: list[str], message: str, world: Path) -> None:
    words = [{"EXPERT": str(world / "expert"), "OTHER": str(world / "other")}.get(word, word) for word in words]
    failed = run(*words)
    assert failed.exit_code == 1, failed.output
    assert message in " ".join(failed.stderr.split())
    assert "Traceback" not in failed.stderr
    failed = run("--debug", *words)
    assert isinstance(failed.exception, (ValueError, OSError))
    assert not isinstance(failed.exception, SystemExit)
