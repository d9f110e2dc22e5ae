"""The site and the notebooks: the generated pages are complete, and what the notebooks do exists."""

from __future__ import annotations

import ast
import importlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import tiny_llama
from peft import get_peft_model

import peft_svf
from peft_svf import SVFConfig, SVFRuntimeConfig, svf_layers

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "website"), str(ROOT / "benchmarks"), str(ROOT / "examples")]

import pages  # noqa: E402
import sizes  # noqa: E402

NOTEBOOKS = sorted(pages.NOTEBOOKS.glob("*.ipynb"))


def code_of(path: Path) -> list[str]:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


# ---------------------------------------------------------------------------------------------------- notebooks


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_parses_and_imports_what_exists(path: Path) -> None:
    imported = []
    for cell in code_of(path):
        for node in ast.walk(ast.parse(cell)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(str(node.module))
                assert not [each.name for each in node.names if not hasattr(module, each.name)]
                imported.append(node.module)
    assert "peft_svf" in imported


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_stored_outputs_are_of_one_run_from_top_to_bottom(path: Path) -> None:
    """They are on the site, so a cell that was edited by hand must not keep an old output."""
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert outputs
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]
    assert str(Path.home()) not in path.read_text()


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path) -> None:
    pytest.importorskip("nbclient")
    from notebooks.execute import execute

    notebook = execute(path)  # raises the error of a cell
    assert any(cell.get("outputs") for cell in notebook.cells)


def test_a_notebook_becomes_a_page_with_its_outputs(tmp_path: Path) -> None:
    picture: dict[str, Any] = {
        "output_type": "display_data",
        "data": {"image/png": "iVBORw0=", "text/plain": "<Figure>"},
    }
    cells = [
        {"cell_type": "markdown", "source": ["# Title\n", "text"]},
        {
            "cell_type": "code",
            "source": "draw()",
            "outputs": [{"output_type": "stream", "name": "stdout", "text": ["0.5\n", "0.7\n"]}, picture],
        },
    ]
    (tmp_path / "draw.ipynb").write_text(json.dumps({"cells": cells}))
    text, pictures = pages.notebook_page(tmp_path / "draw.ipynb")
    assert text.startswith("# Title\ntext\n\n```python\ndraw()\n```\n\n``` {.text .output}\n0.5\n0.7\n```\n\n![")
    assert "Figure>" not in text
    assert pictures == {"draw-0.png": b"\x89PNG\r"}


# ---------------------------------------------------------------------------------------------------- pages


def test_every_public_name_is_on_a_page_of_the_api() -> None:
    named = {name for names in pages.public_names().values() for name in names}
    assert named == {name for name in dir(peft_svf) if not name.startswith("_")} & set(peft_svf.__all__)
    rooms = set(re.findall(r"reference/api/(\w+)\.md", (ROOT / "mkdocs.yml").read_text()))
    assert rooms == set(pages.public_names())


def test_every_command_is_on_the_page_of_commands() -> None:
    typer = pytest.importorskip("typer")
    from peft_svf.cli.app import app

    def leaves(command: Any, words: str) -> list[str]:
        below = getattr(command, "commands", {})
        return [leaf for name, each in below.items() for leaf in leaves(each, f"{words} {name}")] or [words]

    page = pages.commands_page()
    found = re.findall(r"^## `(.+)`$", page, flags=re.MULTILINE)
    commands = leaves(typer.main.get_command(app), "peft-svf")
    assert len(commands) > 8
    assert set(commands) <= set(found)
    assert page.count("```text\nUsage: peft-svf") == len(found)
    assert max(map(len, page.splitlines())) <= pages.WIDTH


def test_docstrings_become_readable() -> None:
    pytest.importorskip("griffe")
    from docstrings import readable

    text = (
        "Load.\n\nArgs:\n    config ([`SVFConfig`] or `dict`, *optional*): Why (see `r`): text.\n    **kwargs: More.\n"
    )
    assert readable(text) == text.replace("[`SVFConfig`] or `dict`, *optional*", "SVFConfig or dict, optional")


def test_the_table_of_sizes_is_current_and_true() -> None:
    assert sizes.PAGE.read_text(encoding="utf-8") == sizes.page()
    config = SVFConfig(target_modules="all-linear", runtime_config=SVFRuntimeConfig(use_cache=False))
    model = get_peft_model(tiny_llama(), config)
    layers = svf_layers(model)
    hidden, key_value = model.config.hidden_size, model.config.num_key_value_heads * model.config.head_dim
    shapes = sizes.Decoder(hidden, model.config.intermediate_size, model.config.num_hidden_layers, key_value).shapes
    assert sorted(shapes) == sorted(tuple(layer.get_base_layer().weight.shape) for layer in layers)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    bases = sum(p.numel() for name, p in model.named_parameters() if name.endswith("original_module_basis"))
    assert (sizes.parameters(shapes), sizes.basis_numbers(shapes)) == (trained, bases)
    assert sizes.parameters(sizes.MODELS["SmolLM2-135M"].shapes) == 97_920


def test_the_cost_page_repeats_the_table_of_sizes() -> None:
    cost = (ROOT / "docs/cost.md").read_text(encoding="utf-8")
    for line in sizes.page().splitlines():
        if line.startswith("| ") and not line.startswith("| model"):
            name, _, expert, _, bases, folded, work = line.strip("| ").split(" | ")
            assert f"| {name} | {expert} | {bases} | {folded} | {work}" in cost


def test_the_comparison_with_lora_repeats_measured_numbers() -> None:
    page, measured = (
        (ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("svf-or-lora.md", "results/comparison.md")
    )
    accuracies, forgotten = measured.split("## What was forgotten")
    rows = re.findall(r"^\| ((?:SVF|LoRA|IA3)[^|]*) \| ([\d,]+) \| ([\d.]+) \| ([\d.]+) \|$", page, flags=re.MULTILINE)
    assert [method for method, *_ in rows] == ["SVF", "LoRA r=1", "LoRA r=16", "IA3"]
    for method, parameters, accuracy, perplexity in rows:
        assert re.search(rf"^\| {method.lower()} \| {parameters} \|.* {accuracy} \|", accuracies, flags=re.MULTILINE)
        (exact,) = re.findall(rf"^\| {method.lower()} \|(?:[^|]+\|){{2}} ([\d.]+) ±", forgotten, flags=re.MULTILINE)
        assert f"{float(exact):.2f}" == perplexity
    speed = (ROOT / "docs/results/speed.md").read_text(encoding="utf-8")
    ratios = [
        each
        for row in re.findall(r", time \| (.+) \|$", page, flags=re.MULTILINE)
        for each in re.findall(r"\d\.\d+", row)
    ]
    assert ratios
    assert not [ratio for ratio in ratios if f"| {ratio} |" not in speed]
