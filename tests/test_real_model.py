"""On SmolLM2-135M-Instruct, all 210 linear layers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import svf_layers
from peft import PeftModel, get_peft_model

from peft_svf import (
    AdaptiveMixture,
    Evaluator,
    LogLikelihoodObjective,
    PromptDispatcher,
    RewardObjective,
    SelfAdaptiveModel,
    SVFConfig,
    WeightSpace,
)
from peft_svf.spectral import effective_weight

EXAMPLES = Path(__file__).parents[1] / "examples"
SHIPPED = sorted(path for path in (EXAMPLES / "experts").iterdir() if path.is_dir())
sys.path.insert(0, str(EXAMPLES))

pytestmark = [pytest.mark.model, pytest.mark.slow]


@pytest.fixture(scope="module", autouse=True)
def module_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One decomposition for all tests of this file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PEFT_SVF_CACHE", str(tmp_path_factory.mktemp("bases")))
        yield os.environ["PEFT_SVF_CACHE"]


@pytest.fixture(autouse=True)
def own_cache(module_cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Instead of the empty cache that other tests start with."""
    monkeypatch.setenv("PEFT_SVF_CACHE", module_cache)


def load() -> tuple[Any, Any]:
    from smollm2 import load_model

    model, tokenizer = load_model()
    return model.eval(), tokenizer


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(100, 140).unsqueeze(0)
    with torch.no_grad():
        return model(input_ids=ids).logits


def adapted(base: Any, scale: float = 0.05) -> PeftModel:
    model = get_peft_model(base, SVFConfig(target_modules="all-linear", task_type="CAUSAL_LM")).eval()
    generator = torch.Generator().manual_seed(3)
    for layer in svf_layers(model).values():
        delta = layer.svf_delta["default"].weight
        delta.data.copy_(torch.randn(delta.shape, generator=generator) * scale)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_adapter_changes_no_bit(dtype: torch.dtype) -> None:
    base = load()[0].to(dtype)
    before = logits(base)
    model = adapted(base, scale=0.0)
    assert len(svf_layers(model)) == 210
    assert torch.equal(logits(model), before)


def test_save_reload_merge_unmerge(tmp_path: Path) -> None:
    model = adapted(load()[0])
    expected = logits(model)
    model.save_pretrained(tmp_path)
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert trainable == 97_920
    assert (tmp_path / "adapter_model.safetensors").stat().st_size <= 4.2 * trainable + 200 * 210

    base, _ = load()
    weights = {name: parameter.clone() for name, parameter in base.named_parameters()}
    before = logits(base)
    reloaded = PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(logits(reloaded), expected)
    assert not torch.allclose(expected, before, atol=0.1)
    reloaded.merge_adapter()
    torch.testing.assert_close(logits(reloaded), expected, rtol=0, atol=1e-3)
    reloaded.unmerge_adapter()
    after = reloaded.unload()
    assert all(torch.equal(parameter, weights[name]) for name, parameter in after.named_parameters())


def test_layers_equal_the_fp64_svd() -> None:
    model = adapted(load()[0], scale=0.3)
    for name, layer in list(svf_layers(model).items())[::23]:
        weight = layer.get_base_layer().weight.detach().double()
        u, s, vt = torch.linalg.svd(weight, full_matrices=False)
        z = 1 + layer.svf_delta["default"]().double()
        expected = u @ torch.diag(s * z) @ vt
        found = effective_weight(layer.get_base_layer().weight, layer.basis, layer.svf_delta["default"]())
        assert ((found - expected).norm() / expected.norm()).item() <= 1e-5, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gate_fold_merged_and_mixed_rows_agree_with_fp64(dtype: torch.dtype) -> None:
    """In fp32 to 1e-5, layer by layer on its own input; in bf16 no further from fp64 than twice the base model is."""
    model = adapted(load()[0].to(dtype), scale=0.05)
    ids = torch.arange(100, 140).unsqueeze(0)
    inputs: dict[str, torch.Tensor] = {}
    some = dict(list(svf_layers(model).items())[::17])
    handles = [
        layer.register_forward_pre_hook(lambda module, args, name=name: inputs.update({name: args[0]}))
        for name, layer in some.items()
    ]
    with torch.no_grad():
        model(input_ids=ids)
    for handle in handles:
        handle.remove()

    def run(fold: str) -> dict[str, torch.Tensor]:
        model.peft_config["default"].runtime_config.fold = fold
        with torch.no_grad():
            found = {name: layer(inputs[name]).double() for name, layer in some.items()}
        assert all((layer.fold.weight is not None) is (fold == "always") for layer in some.values())
        return found

    with torch.no_grad():
        results = {"gate": run("never"), "fold": run("always")}
        with model.base_model.row_mixture([[1.0]]):
            results["mixed rows"] = {name: layer(inputs[name]).double() for name, layer in some.items()}
        base = {name: layer.get_base_layer()(inputs[name]).double() for name, layer in some.items()}
        exact, exact_base = {}, {}
        for name, layer in some.items():
            weight, x = layer.get_base_layer().weight.double(), inputs[name].double()
            u, s, vt = torch.linalg.svd(weight, full_matrices=False)
            exact[name] = x @ (u * (s * (1 + layer.svf_delta["default"]().double())) @ vt).mT
            exact_base[name] = x @ weight.mT
        model.merge_adapter()
        results["merged"] = {name: layer(inputs[name]).double() for name, layer in some.items()}

    for name in some:
        scale = exact[name].norm()
        allowed = 1e-5 if dtype == torch.float32 else 2 * float((base[name] - exact_base[name]).norm() / scale)
        for way, result in results.items():
            assert float((result[name] - exact[name]).norm() / scale) <= allowed, (way, name)


@pytest.mark.parametrize("other", ["one thread", "permuted memory", "fp64 SVD"])
def test_an_adapter_means_the_same_elsewhere(other: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A base that was decomposed in another way gives the same logits."""
    model = adapted(load()[0])
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    monkeypatch.setenv("PEFT_SVF_CACHE", str(tmp_path / "another-cache"))
    base, _ = load()
    threads = torch.get_num_threads()
    if other == "permuted memory":
        for module in base.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.data = module.weight.data.t().contiguous().t()
    torch.set_num_threads(1 if other == "one thread" else threads)
    try:
        elsewhere = PeftModel.from_pretrained(base, tmp_path / "adapter")
    finally:
        torch.set_num_threads(threads)
    if other == "fp64 SVD":
        for layer in svf_layers(elsewhere).values():
            u, _, vt = torch.linalg.svd(layer.get_base_layer().weight.detach().double(), full_matrices=False)
            layer.basis.data.copy_(u if layer.side == "output" else vt.mT)
    torch.testing.assert_close(logits(elsewhere), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("folder", SHIPPED, ids=lambda folder: folder.name)
def test_a_shipped_expert_is_better_at_its_task(folder: Path) -> None:
    from peft_svf.training import greedy_accuracy
    from peft_svf.training.run import find_script_task, parse

    base, tokenizer = load()
    script, training, *_ = parse(["--config", str(EXAMPLES / "recipes" / f"{folder.name}.yaml")])
    task = find_script_task(script)
    assert task is not None
    examples, options = task.examples("test", 48), {"max_new_tokens": training.max_completion_length}
    before = greedy_accuracy(base, tokenizer, examples, task.reward, **options)
    after = greedy_accuracy(PeftModel.from_pretrained(base, folder), tokenizer, examples, task.reward, **options)
    assert after >= before + 0.1


def test_shipped_experts_mix() -> None:
    base, tokenizer = load()
    before = logits(base)
    mixture = AdaptiveMixture.from_pretrained(base, {path.name: str(path) for path in SHIPPED}, tokenizer=tokenizer)
    mixture.set_weights([0.0] * len(SHIPPED))
    assert torch.equal(logits(mixture.model), before)
    mixture.set_weights([1.0] * len(SHIPPED))
    together = logits(mixture.model)
    mixture.model.base_model.set_adapter([path.name for path in SHIPPED])
    torch.testing.assert_close(logits(mixture.model), together, rtol=0, atol=1e-3)


def test_scores_in_batches_are_those_of_mixtures_applied_one_by_one() -> None:
    base, tokenizer = load()
    mixture = AdaptiveMixture.from_pretrained(base, {path.name: str(path) for path in SHIPPED}, tokenizer=tokenizer)
    questions = ["What is 3 + 4?", "What is the last word of this list? cat, river, lamp", "Name a colour.", "8 - 5 ="]
    system = {"role": "system", "content": "Reply with the answer only."}
    rows = [
        {"prompt": [system, {"role": "user", "content": text}], "completion": [{"role": "assistant", "content": "7"}]}
        for text in questions
    ]
    answers: list[str] = []

    def spy(completions: list[Any], **kwargs: Any) -> list[float]:
        answers.extend(completion[0]["content"] for completion in completions)
        return [float(len(completion[0]["content"])) for completion in completions]

    reward = RewardObjective(rows, spy, tokenizer, generation_kwargs={"max_new_tokens": 8})
    likelihood = LogLikelihoodObjective(rows, tokenizer)
    assert len(SHIPPED) >= 4
    assert len(reward.prefix_ids) > 10  # the template and the system message
    space = WeightSpace(mixture.experts, [])
    candidates = [*np.random.default_rng(0).uniform(0, 1, (6, space.dim))]
    lengths = Evaluator(mixture.model, space, reward).scores(candidates, range(4))
    together = sorted(answers)
    answers.clear()
    found = Evaluator(mixture.model, space, likelihood).scores(candidates, range(4))
    for i, x in enumerate(candidates):
        mixture.set_weights(x)
        assert lengths[i].tolist() == reward(mixture.model)
        assert found[i] == pytest.approx(likelihood(mixture.model), abs=1e-4)
    assert together == sorted(answers)
    assert len(set(answers)) > len(questions)  # the mixtures differ


def test_prompts_find_their_expert() -> None:
    """The shipped classification expert, on other questions than in training; the answers are the experts' own."""
    from peft_svf.training.run import recipe_task

    base, tokenizer = load()
    labels = {"sums": "math", "retrieval": "people", "lists": "list", "letters": "words"}
    paths = {name: str(EXAMPLES / "experts" / name) for name in (*labels, "classification")}
    model = AdaptiveMixture.from_pretrained(base, paths, tokenizer=tokenizer).model
    tasks = {name: recipe_task(EXAMPLES / "recipes" / f"{name}.yaml") for name in labels}
    prompts = [row["prompt"] for task in tasks.values() for row in task.examples("test", 4)]
    right = [name for name in tasks for _ in range(4)]
    options = {"labels": labels, "adapter_name": "classification", "other": False}
    dispatcher = PromptDispatcher(model, tokenizer, dict.fromkeys(labels, ""), **options)
    adaptive = SelfAdaptiveModel(model, tokenizer, dispatcher)
    found = adaptive.chat(prompts, return_details=True, max_new_tokens=6, do_sample=False)
    assert sum(a == b for a, b in zip(found.experts, right, strict=True)) >= 15
    for i in range(0, len(prompts), 4):
        text = tokenizer.apply_chat_template(prompts[i], tokenize=False, add_generation_prompt=True)
        inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)
        name = found.experts[i]
        output = model.generate(**inputs, adapter_names=[name], max_new_tokens=6, do_sample=False)
        assert found.texts[i] == tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_quickstart(tmp_path: Path) -> None:
    """The demo from end to end, in its quick form."""
    output = tmp_path / "demo"
    run = subprocess.run(
        [sys.executable, str(EXAMPLES / "quickstart.py"), "--quick", "--output", str(output)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=1500,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    numbers = json.loads((output / "results.json").read_text())
    experts = {"products", "retrieval", "sums"}
    assert set(numbers["accuracy"]) == {*experts, "arithmetic"}
    for row in numbers["accuracy"].values():
        assert set(row) == {"base", *experts, "uniform", "searched"}
    live = numbers["live"]
    assert live["reloaded"] == live["accuracy_after"] == numbers["accuracy"]["products"]["products"]
    assert len([entry for entry in live["history"] if "reward" in entry]) == 4
    assert numbers["search"]["scores"].keys() == {"base", *experts, "uniform", "searched", "in-context"}
    assert (output / "results.png").stat().st_size > 10_000
    base, _ = load()
    PeftModel.from_pretrained(base, output / "mixture")
