"""On a CPU: the dtype of a model loaded by name, the rows of the output layer, and folding before a `generate`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import IDS, adapted, base_model, logits, make_tokenizer, randomise, save_expert, svf_layers, tiny_llama

from peft_svf import (
    AdaptiveMixture,
    ExpectedRewardObjective,
    LogLikelihoodObjective,
    NearestDispatcher,
    PromptDispatcher,
    RewardObjective,
    SelfAdaptiveModel,
    SVFConfig,
    SVFLayer,
)
from peft_svf.scoring.prefix import last_logits, last_logits_of_generate, read_prefix
from peft_svf.tuner.fold import Fold
from peft_svf.tuner.forecast import present_forecast
from peft_svf.utils.dtypes import loading_dtype

PROMPTS = ["1 + 2 = ", "what is 30 + 4?", "ab"]
TOKENIZER = make_tokenizer()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model in bf16 and in fp32, and two experts of it."""
    folder = tmp_path_factory.mktemp("world")
    half = base_model().bfloat16()
    half.save_pretrained(folder / "bf16")
    half.float().save_pretrained(folder / "fp32")
    TOKENIZER.save_pretrained(folder / "bf16")
    TOKENIZER.save_pretrained(folder / "fp32")
    for seed, name in enumerate(("a", "b")):
        save_expert(folder / name, SVFConfig(target_modules="all-linear"), seed, base=base_model().bfloat16())
    return folder


@pytest.fixture(scope="module")
def mixture(world: Path) -> AdaptiveMixture:
    return load(world, "bf16", dtype=torch.bfloat16)


def load(world: Path, base: str, **kwargs: Any) -> AdaptiveMixture:
    return AdaptiveMixture.from_pretrained(str(world / base), {name: str(world / name) for name in "ab"}, **kwargs)


# --------------------------------------------------------------------------------------------------------------- dtype


def test_files_in_16_bit_are_loaded_in_fp32(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda *_: False)
    assert load(world, "bf16").model.dtype == torch.float32
    assert load(world, "bf16", dtype="auto").model.dtype == torch.float32
    assert load(world, "bf16", dtype="bfloat16").model.dtype == torch.bfloat16
    assert load(world, "bf16", torch_dtype=torch.bfloat16).model.dtype == torch.bfloat16
    assert loading_dtype(world / "bf16", device_map="auto") == torch.float32
    for base in ("bf16", "fp32"):
        assert loading_dtype(world / base, torch.float16) == torch.float16


def test_other_devices_and_quantized_models_keep_the_dtype_of_the_files(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = world / "bf16"
    assert loading_dtype(world / "fp32") == "auto"
    assert loading_dtype(path, quantization_config=object()) == "auto"
    monkeypatch.setattr(torch.accelerator, "is_available", lambda *_: True)
    assert loading_dtype(path) == loading_dtype(path, device_map="auto") == "auto"
    for device_map in ("cpu", torch.device("cpu"), {"": "cpu"}, {"model": torch.device("cpu"), "lm_head": "cpu"}):
        assert loading_dtype(path, device_map=device_map) == torch.float32
    assert loading_dtype(path, device_map={"model": 0, "lm_head": "cpu"}) == "auto"


@pytest.mark.parametrize("given", [[], ["--dtype", "bfloat16"]])
def test_the_command_line_says_the_dtype(given: list[str], world: Path) -> None:
    testing = pytest.importorskip("typer.testing")
    from peft_svf.cli.app import app

    words = ["generate", "--model_name_or_path", str(world / "bf16"), "--expert", f"a={world / 'a'}", "--json"]
    done = testing.CliRunner().invoke(app, [*words, "--dispatch", "mixture", "--prompt", "1 + 2", *given])
    assert done.exit_code == 0, done.output
    assert ("float32 on the CPU" in done.stderr) == (not given and not torch.accelerator.is_available())


# -------------------------------------------------------------------------------------------------------- output layer


@contextmanager
def hidden_states(model: Any) -> Iterator[list[torch.Tensor]]:
    """What the output layer gets."""
    seen: list[torch.Tensor] = []
    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        yield seen
    finally:
        hook.remove()


def rewards(completions: list[str], **_: Any) -> list[float]:
    return [float(len(text)) for text in completions]


EXAMPLES: list[dict[str, Any]] = [
    {"prompt": prompt, "completion": f"{i}" * (i + 1)} for i, prompt in enumerate(PROMPTS)
]
LABELS = {"a": "sums", "b": "words"}


def _adaptive(mixture: AdaptiveMixture) -> SelfAdaptiveModel:
    return SelfAdaptiveModel(mixture.model, TOKENIZER, mixture)


def _tokens(prompts: list[str]) -> Any:
    return TOKENIZER(prompts, padding=True, padding_side="left", return_tensors="pt", return_token_type_ids=False)


WAYS: dict[str, Callable[[AdaptiveMixture], Any]] = {
    "reward": lambda m: RewardObjective(EXAMPLES, rewards, TOKENIZER, generation_kwargs={"max_new_tokens": 2})(m.model),
    "log-likelihood": lambda m: LogLikelihoodObjective(EXAMPLES, TOKENIZER)(m.model),
    "expected reward": lambda m: ExpectedRewardObjective(
        [{**row, "answers": [([20, 2], 1.0)]} for row in EXAMPLES], TOKENIZER
    ).read(m.model, range(3)),
    "prefix": lambda m: read_prefix(m.model, list(range(4, 20)), 2),
    "prompt dispatch": lambda m: PromptDispatcher(m.model, TOKENIZER, LABELS)(PROMPTS),
    "nearest": lambda m: NearestDispatcher(m.model, TOKENIZER, {"a": PROMPTS, "b": PROMPTS[:2]}),
    "chat": lambda m: _adaptive(m).chat(PROMPTS, max_new_tokens=2),
    "generate": lambda m: _adaptive(m).generate(**_tokens(PROMPTS), max_new_tokens=2),
    "mixture": lambda m: m.generate(**_tokens(PROMPTS), max_new_tokens=2),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_output_layer_gets_one_block_of_memory(way: str, mixture: AdaptiveMixture) -> None:
    """Torch multiplies other inputs row by row, in 16 bit with a copy of the weight for each row."""
    with hidden_states(mixture.model) as seen:
        WAYS[way](mixture)
    assert seen
    assert all(x.is_contiguous() for x in seen)


def test_positions_give_the_same_logits() -> None:
    model = tiny_llama()
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    for count in (1, 3):
        assert torch.allclose(logits(model, **last_logits(model, count)), logits(model)[:, -count:], atol=1e-6)
    plain = model.generate(**inputs, do_sample=False, max_new_tokens=4)
    assert torch.equal(model.generate(**inputs, do_sample=False, max_new_tokens=4, **last_logits(model)), plain)


def test_models_that_take_a_number_get_a_number() -> None:
    class Number(torch.nn.Module):
        device = torch.device("cpu")

        def forward(self, input_ids: Any, logits_to_keep: int = 0) -> None: ...

    class Neither(torch.nn.Module):
        def forward(self, input_ids: Any) -> None: ...

    class Accelerated(torch.nn.Module):
        device = torch.device("cuda")

        def forward(self, input_ids: Any, logits_to_keep: int | torch.Tensor = 0) -> None: ...

    assert last_logits(Number(), 2) == last_logits(Accelerated(), 2) == {"logits_to_keep": 2}
    assert last_logits(Neither()) == {}


def test_generate_keeps_what_repeats_its_arguments() -> None:
    model = tiny_llama()
    assert set(last_logits_of_generate(model, {})) == {"logits_to_keep"}
    for options in ({"num_beams": 2}, {"num_return_sequences": 3}, {"logits_to_keep": 5}, {"assistant_model": model}):
        assert last_logits_of_generate(model, options) == {}
    model.generation_config.num_beams = 2
    assert last_logits_of_generate(model, {}) == {}


# ------------------------------------------------------------------------------------------------------------- folding


ANY = list(range(64))  # all tokens


def folded(model: Any) -> set[bool]:
    return {layer.fold.weight is not None for layer in svf_layers(model).values()}


def generated(model: Any, new_tokens: int, **options: Any) -> torch.Tensor:
    mask = torch.ones_like(IDS)
    found: torch.Tensor = model.generate(
        input_ids=IDS, attention_mask=mask, do_sample=False, max_new_tokens=new_tokens, **options
    )
    return found


def two_experts() -> Any:
    """Large enough that folding costs as much as 6 or more calls of the gate."""
    model = adapted(tiny_llama(hidden_size=128, intermediate_size=256)).eval()
    model.add_adapter("other", SVFConfig(target_modules="all-linear"))
    return randomise(model, "other", seed=2)


@pytest.mark.parametrize("options", [{}, {"adapter_names": ["default"] * 2}])
def test_layers_fold_before_a_long_generate(options: dict[str, Any]) -> None:
    model = two_experts()
    with torch.no_grad():
        generated(model, 2, **options)
        assert folded(model) == {False}
        generated(model, 100, eos_token_id=ANY, **options)  # of which the first ends it
    assert folded(model) == {True}
    assert present_forecast() is None


@pytest.mark.parametrize("per_row", [True, False])
def test_experts_that_take_turns_fold_once(per_row: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they do in a `generate` that switches adapters, and in two threads."""
    model, folds, call = two_experts(), [], SVFLayer.effective_weight
    monkeypatch.setattr(SVFLayer, "effective_weight", lambda *args: (folds.append(args[0]), call(*args))[1])

    def switch(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        name = ["default", "other"][ids.shape[1] % 2]
        if per_row:  # of a batch in another thread
            with ThreadPoolExecutor(1) as pool:
                pool.submit(torch.no_grad()(logits), model, adapter_names=[name] * 2).result()
        else:
            model.set_adapter(name)
        return scores

    options = {"adapter_names": ["default"] * 2} if per_row else {}
    with torch.no_grad():
        generated(model, 40, min_new_tokens=40, logits_processor=[switch], **options)
    assert len(folds) == len(svf_layers(model))


def test_the_generation_config_forecasts_too() -> None:
    from transformers import GenerationConfig

    model = two_experts()
    config = GenerationConfig(max_new_tokens=100, do_sample=False, eos_token_id=ANY)
    with torch.no_grad():
        model.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), generation_config=config)
    assert folded(model) == {True}


def test_a_weight_folded_early_is_used_by_later_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    model = two_experts()
    with torch.no_grad():
        expected = logits(model)
        generated(model, 100, eos_token_id=ANY)
        assert folded(model) == {True}
        before = [layer.fold.weight for layer in svf_layers(model).values()]
        assert torch.allclose(logits(model), expected, atol=1e-4)
        assert torch.allclose(logits(model, adapter_names=["default"] * 2), expected, atol=1e-4)
        assert all(a is layer.fold.weight for a, layer in zip(before, svf_layers(model).values(), strict=True))

        def refuse(*_: Any) -> None:
            raise AssertionError("the slow way")

        monkeypatch.setattr(Fold, "find", refuse)
        logits(model)
        logits(model, adapter_names=["default"] * 2)
        with pytest.raises(AssertionError):  # another expert has another weight
            logits(model, adapter_names=["other"] * 2)
        monkeypatch.undo()
        other = logits(model, adapter_names=["other"] * 2)
        randomise(model, seed=5)
        changed = logits(model, adapter_names=["default"] * 2)
        model.set_adapter("other")
        assert torch.allclose(logits(model), other, atol=1e-4)
    assert not torch.allclose(changed, expected, atol=1e-3)
