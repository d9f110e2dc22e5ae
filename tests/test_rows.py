"""Mixed batches: each row has an expert (`adapter_names`) or a mixture of experts (`row_mixture`) of its own."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from helpers import tiny_llama
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import (
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from peft_svf import SVFConfig, SVFLayer, SVFRuntimeConfig

BASE = "__base__"
IDS = torch.tensor(
    [
        [3, 17, 5, 42, 8, 60, 11, 23],
        [7, 40, 33, 29, 50, 12, 4, 19],
        [25, 9, 61, 14, 38, 6, 44, 30],
        [18, 55, 27, 10, 36, 22, 13, 47],
    ]
)
NAMES = ["b", BASE, "a", "c"]  # one a row, not in the order of the adapters

ALL = {"target_modules": "all-linear"}
SAME_RANK = [ALL, ALL, ALL]
OTHER_RANKS = [{**ALL, "r": 4}, {**ALL, "r": 9}, ALL]
OTHER_MODULES = [
    {"target_modules": ["q_proj", "down_proj"], "r": 4},
    {"target_modules": ["q_proj", "v_proj", "up_proj"], "r": 9},
    {"target_modules": ["v_proj", "up_proj"], "layers_to_transform": [1]},
]
# a row of zeros, one of a single expert, and two of several
WEIGHTS = torch.tensor([[0.5, -1.0, 1.5], [0.0, 0.0, 0.0], [0.0, 1.0, 0.0], [1.0, 0.25, -0.75]])


def experts(base: nn.Module, *configs: dict[str, Any], std: float = 0.3, **shared: Any) -> Any:
    """A model with adapters "a", "b", … of random δ; "a" is active."""
    names = "abcdeghi"[: len(configs)]  # PEFT warns of an "f", as it is in the prefix "svf_"
    model: Any = None
    for name, config in zip(names, configs, strict=True):
        svf_config = SVFConfig(**{**config, **shared})
        if model is None:
            model = get_peft_model(base, svf_config, name)
        else:
            model.add_adapter(name, svf_config)
    generator = torch.Generator().manual_seed(1)
    for layer in layers(model):
        for name in names:
            if name in layer.svf_delta:
                delta = layer.svf_delta[name].weight
                delta.data.copy_(torch.randn(delta.shape, generator=generator) * std)
    return model.eval()


def layers(model: nn.Module) -> list[SVFLayer]:
    return [module for module in model.modules() if isinstance(module, SVFLayer)]


def llama(**changes: Any) -> PreTrainedModel:
    """With weights large enough that its predictions differ from token to token."""
    return tiny_llama(**{"initializer_range": 0.2, **changes})


def biased(model: PreTrainedModel) -> PreTrainedModel:
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.2)
    return model


def gpt2() -> PreTrainedModel:
    config = GPT2Config(
        vocab_size=64,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        initializer_range=0.2,
    )
    return biased(GPT2LMHeadModel(config).eval())


def t5(initializer_factor: float = 1.0) -> PreTrainedModel:
    """The larger the factor, the more varied its tokens, and the more they magnify rounding."""
    config = T5Config(
        vocab_size=64,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=2,
        initializer_factor=initializer_factor,
    )
    return T5ForConditionalGeneration(config).eval()


class Net(nn.Module):
    """An MLP on rows without a sequence; its first layer has its basis on the input side, the second on the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 20), nn.Linear(20, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).tanh())


class Flattening(Net):
    """As some models do: all tokens of the batch in one dimension."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.flatten(0, 1)).unflatten(0, x.shape[:2])


Call = Callable[..., torch.Tensor]


def logits(model: Any, **kwargs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, **kwargs).logits


def t5_logits(model: Any, **kwargs: Any) -> torch.Tensor:
    return logits(model, decoder_input_ids=IDS[:, :5], **kwargs)


def on(x: torch.Tensor) -> Call:
    """A call with these inputs of a model that answers with a tensor."""

    def call(model: Any, **kwargs: Any) -> torch.Tensor:
        with torch.no_grad():
            return model(x, **kwargs)

    return call


def generate(model: Any, tokens: int = 8, **kwargs: Any) -> torch.Tensor:
    """Tokens, as many for each row."""
    kwargs.setdefault("input_ids", IDS)
    kwargs.setdefault("attention_mask", torch.ones_like(kwargs["input_ids"]))
    return model.generate(
        **{"do_sample": False, "pad_token_id": 0, "min_new_tokens": tokens, "max_new_tokens": tokens, **kwargs}
    )


def generated_logits(model: Any, **kwargs: Any) -> torch.Tensor:
    """`[rows, tokens, vocabulary]`."""
    return torch.stack(generate(model, return_dict_in_generate=True, output_logits=True, **kwargs).logits, dim=1)


def alone(model: Any, name: str, call: Call) -> torch.Tensor:
    """The result with one expert, or with the base model, for all rows."""
    if name == BASE:
        with model.disable_adapter():
            return call(model)
    model.set_adapter(name)
    return call(model)


def assert_every_row_is_as_if_alone(
    model: Any, call: Call, names: Sequence[str] = NAMES, atol: float = 1e-5, per_row: int = 1
) -> None:
    """Each row, or group of rows, equals what its own expert gives, and would not with another expert."""
    active = model.active_adapters
    mixed = call(model, adapter_names=list(names))
    assert_clean(model)
    assert model.active_adapters == active
    expected = {name: alone(model, name, call) for name in {*names, BASE, *model.peft_config}}
    model.set_adapter(active[0])
    assert len(mixed) == per_row * len(names)
    for i, name in enumerate(names):
        rows = slice(i * per_row, (i + 1) * per_row)
        torch.testing.assert_close(mixed[rows], expected[name][rows], rtol=0, atol=atol)
    for i, name in enumerate(expected):
        for other in list(expected)[:i]:
            assert not torch.allclose(expected[name].float(), expected[other].float(), rtol=0, atol=100 * atol)


def assert_clean(model: nn.Module) -> None:
    """Nothing is left of a mixed batch."""
    assert all(layer.rows is None for layer in layers(model))
    assert not [name for name, module in model.named_modules() if module._forward_pre_hooks]


def close(found: torch.Tensor, expected: torch.Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


# ------------------------------------------------------------------------------------- adapter_names: a forward pass


@pytest.mark.parametrize("configs", [SAME_RANK, OTHER_RANKS, OTHER_MODULES], ids=["same", "ranks", "modules"])
@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
@pytest.mark.parametrize("kind", ["llama", "llama-bias"])
def test_every_row_has_the_logits_of_its_expert(
    kind: str, task_type: str | None, configs: list[dict[str, Any]]
) -> None:
    bias = kind == "llama-bias"
    model = experts(biased(llama(attention_bias=bias, mlp_bias=bias)), *configs, task_type=task_type)
    assert_every_row_is_as_if_alone(model, logits)


@pytest.mark.parametrize("configs", [SAME_RANK, OTHER_RANKS], ids=["same", "ranks"])
def test_every_row_has_its_expert_in_a_conv1d(configs: list[dict[str, Any]]) -> None:
    model = experts(gpt2(), *configs, task_type="CAUSAL_LM")
    assert_every_row_is_as_if_alone(model, logits)


@pytest.mark.parametrize("configs", [SAME_RANK, OTHER_RANKS], ids=["same", "ranks"])
@pytest.mark.parametrize("task_type", [None, "SEQ_2_SEQ_LM"])
def test_every_row_has_its_expert_in_encoder_and_decoder(task_type: str | None, configs: list[dict[str, Any]]) -> None:
    assert_every_row_is_as_if_alone(experts(t5(), *configs, task_type=task_type), t5_logits)


def test_rows_of_one_vector() -> None:
    model = experts(Net(), *[{"target_modules": ["first", "second"], "r": r} for r in (None, 3, 5)])
    call = on(torch.randn(7, 6))
    assert_every_row_is_as_if_alone(model, call, ["c", "a", BASE, "b", "b", "a", BASE])
    assert_every_row_is_as_if_alone(model, on(torch.randn(1, 6)), ["c"])


def test_rows_of_images() -> None:
    model = experts(Net(), *[{"target_modules": ["first", "second"], "r": r} for r in (None, 3, 5)])
    assert_every_row_is_as_if_alone(model, on(torch.randn(4, 2, 3, 6)))


def test_rows_whose_tokens_a_layer_sees_in_one_dimension() -> None:
    model = experts(Flattening(), *[{"target_modules": ["first", "second"]}] * 3)
    assert_every_row_is_as_if_alone(model, on(torch.randn(4, 3, 6)))


def test_a_layer_that_sees_the_only_row_without_its_dimension() -> None:
    class Squeezing(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x.squeeze(0))

    model = experts(Squeezing(), *[{"target_modules": ["first", "second"]}] * 2)
    call = on(torch.randn(1, 6))
    expected = alone(model, "b", call)
    assert expected.shape == (5,)
    close(call(model, adapter_names=["b"]), expected)


def test_a_layer_that_sees_the_sequence_first_is_refused() -> None:
    """As LoRA does: its rows are not those of the batch, even if there are twice as many."""

    class SequenceFirst(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x.transpose(0, 1)).transpose(0, 1)

    model = experts(SequenceFirst(), *[{"target_modules": ["first", "second"]}] * 3)
    for length in (6, 8):
        with pytest.raises(ValueError, match=f"{length}"):
            on(torch.randn(4, length, 6))(model, adapter_names=NAMES)


@pytest.mark.usefixtures("never_fold")
def test_every_row_has_its_expert_in_bf16() -> None:
    model = experts(llama(dtype=torch.bfloat16), *SAME_RANK)
    assert_every_row_is_as_if_alone(model, logits, atol=2e-2)


@pytest.mark.usefixtures("never_fold")
def test_every_row_has_its_expert_under_autocast() -> None:
    def call(model: Any, **kwargs: Any) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return logits(model, **kwargs)

    assert_every_row_is_as_if_alone(experts(biased(llama(attention_bias=True)), *SAME_RANK), call, atol=2e-2)


def test_rows_of_the_base_model_keep_every_bit() -> None:
    model = experts(llama(), *OTHER_RANKS)
    expected = alone(model, BASE, logits)
    assert torch.equal(logits(model, adapter_names=[BASE] * 4), expected)
    assert torch.equal(logits(model, adapter_names=NAMES)[1], expected[1])


def test_the_active_adapter_does_not_matter() -> None:
    model = experts(llama(), *OTHER_MODULES)
    results = []
    for active in (["a"], ["c"], ["a", "b", "c"]):
        model.base_model.set_adapter(active)
        results.append(logits(model, adapter_names=NAMES))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_names_may_be_a_tuple_and_inputs_positional() -> None:
    model = experts(llama(), *SAME_RANK)
    expected = logits(model, adapter_names=NAMES)
    with torch.no_grad():
        assert torch.equal(model(IDS, adapter_names=tuple(NAMES)).logits, expected)
        embeddings = model.get_input_embeddings()(IDS)
        assert torch.equal(model(inputs_embeds=embeddings, adapter_names=NAMES).logits, expected)


@pytest.mark.parametrize(
    "extra",
    [
        {"position_ids": torch.arange(8).unsqueeze(0)},
        {"logits_to_keep": torch.tensor([6, 7])},
        {"attention_mask": torch.ones_like(IDS)},
        {"labels": IDS},
        {"pixel_values": torch.zeros(6, 3)},  # as in models that take the patches of all images in one dimension
    ],
    ids=lambda extra: next(iter(extra)),
)
@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_inputs_without_a_row_each_do_not_count(task_type: str | None, extra: dict[str, torch.Tensor]) -> None:
    model = experts(llama(), *SAME_RANK, task_type=task_type)
    columns = extra.get("logits_to_keep", slice(None))
    close(logits(model, adapter_names=NAMES, **extra), logits(model, adapter_names=NAMES)[:, columns])
    with model.base_model.row_mixture(WEIGHTS):
        close(logits(model, **extra), logits(model)[:, columns])


def test_disabled_adapters_are_the_base_model() -> None:
    model = experts(llama(), *SAME_RANK, task_type="CAUSAL_LM")
    expected, tokens = alone(model, BASE, logits), alone(model, BASE, generate)
    with model.disable_adapter():
        assert torch.equal(logits(model, adapter_names=NAMES), expected)
        assert torch.equal(generate(model, adapter_names=NAMES), tokens)
        with model.base_model.row_mixture(WEIGHTS):
            assert torch.equal(logits(model), expected)
    with model.base_model.row_mixture(WEIGHTS), model.disable_adapter():
        assert torch.equal(logits(model), expected)


def test_folded_weights_do_not_get_in_the_way() -> None:
    runtime = SVFRuntimeConfig(fold="always")
    model = experts(biased(llama(attention_bias=True)), *OTHER_RANKS, runtime_config=runtime)
    assert_every_row_is_as_if_alone(model, logits)
    before = alone(model, "a", logits)
    assert all(layer.fold.weight is not None for layer in layers(model))
    assert_every_row_is_as_if_alone(model, logits)
    assert torch.equal(alone(model, "a", logits), before)


@pytest.mark.parametrize("fold", ["auto", "always", "never"])
@pytest.mark.parametrize("configs", [SAME_RANK, OTHER_RANKS, OTHER_MODULES])
def test_a_batch_of_one_expert_folds_and_the_active_one_does_not_notice(
    fold: str, configs: list[dict[str, Any]]
) -> None:
    gated = SVFRuntimeConfig(fold="never")
    expected = {
        name: alone(experts(llama(), *configs, runtime_config=gated), name, logits) for name in ("a", "b", BASE)
    }
    model = experts(llama(), *configs, runtime_config=SVFRuntimeConfig(fold=fold))
    for active in ("a", "b", "a"):
        model.set_adapter(active)
        for name in ("b", "b", BASE, "a", "b", "b"):
            found = logits(model, adapter_names=[name] * len(IDS))
            assert torch.allclose(found, expected[name], atol=1e-4)
            folded = [layer for layer in layers(model) if name in layer.svf_delta and layer.fold.weight is not None]
            assert fold != "always" or name == BASE or folded
            assert torch.allclose(logits(model), expected[active], atol=1e-4)
        model.merge_adapter([active])
        assert torch.allclose(logits(model), expected[active], atol=1e-4)
        model.unmerge_adapter()


def test_rows_of_an_offloaded_model() -> None:
    model = experts(llama(), *OTHER_MODULES)
    expected = logits(model, adapter_names=NAMES)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert layers(model)[0].svf_delta["a"].weight.is_meta
    close(logits(model, adapter_names=NAMES), expected)


def test_gradients_of_a_mixed_batch_are_those_of_each_expert() -> None:
    model = experts(llama(), *OTHER_MODULES)
    for layer in layers(model):
        layer.svf_delta.requires_grad_(True)
    probe = torch.randn(4, 8, 64)
    found = _delta_gradients(model, (model(input_ids=IDS, adapter_names=NAMES).logits * probe).sum())
    for i, name in enumerate(NAMES):
        if name == BASE:
            continue
        model.set_adapter(name)
        expected = _delta_gradients(model, (model(input_ids=IDS[i : i + 1]).logits * probe[i]).sum())
        for layer in expected:
            torch.testing.assert_close(found[layer][name], expected[layer][name], rtol=1e-4, atol=1e-4)


def _delta_gradients(model: Any, loss: torch.Tensor) -> dict[str, dict[str, torch.Tensor]]:
    """By module and adapter, of those that the loss depends on."""
    parameters = [
        (layer.module_name, name, layer.svf_delta[name].weight) for layer in layers(model) for name in layer.svf_delta
    ]
    for *_, parameter in parameters:
        parameter.requires_grad_(True)
        parameter.grad = None
    loss.backward()
    found: dict[str, dict[str, torch.Tensor]] = {}
    for module, name, parameter in parameters:
        if parameter.grad is not None:
            found.setdefault(module, {})[name] = parameter.grad.clone()
    assert found
    return found


# --------------------------------------------------------------------------------------------- adapter_names: generate


@pytest.mark.parametrize("configs", [SAME_RANK, OTHER_RANKS, OTHER_MODULES], ids=["same", "ranks", "modules"])
@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_every_row_generates_as_its_expert_does(task_type: str | None, configs: list[dict[str, Any]]) -> None:
    model = experts(llama(), *configs, task_type=task_type)
    assert_every_row_is_as_if_alone(model, generate, atol=0)
    assert_every_row_is_as_if_alone(model, generated_logits, atol=2e-5)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_every_row_generates_as_its_expert_does_in_other_models(kind: str, beams: int) -> None:
    model = experts(gpt2() if kind == "gpt2" else t5(2.0), *OTHER_RANKS)
    assert_every_row_is_as_if_alone(model, partial(generate, num_beams=beams), atol=0)


@pytest.mark.parametrize("task_type", ["CAUSAL_LM", "SEQ_2_SEQ_LM"])
@pytest.mark.parametrize("search", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}], ids=str)
def test_beams_have_the_expert_of_their_row(search: dict[str, int], task_type: str) -> None:
    model = experts(llama() if task_type == "CAUSAL_LM" else t5(2.0), *OTHER_RANKS, task_type=task_type)
    sequences = search.get("num_return_sequences", 1)
    assert_every_row_is_as_if_alone(model, partial(generate, **search), atol=0, per_row=sequences)


def test_beams_from_the_generation_config_have_the_expert_of_their_row() -> None:
    model = experts(llama(), *SAME_RANK, task_type="CAUSAL_LM")
    expected = generate(model, num_beams=3, adapter_names=NAMES)
    model.generation_config.num_beams = 3
    assert torch.equal(generate(model, adapter_names=NAMES), expected)


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_beams_from_a_generation_config_of_the_call(task_type: str | None) -> None:
    model = experts(llama(), *SAME_RANK, task_type=task_type)
    expected = generate(model, num_beams=3, adapter_names=NAMES)
    mixture = mixed(model, WEIGHTS, partial(generate, num_beams=3))
    config = GenerationConfig(num_beams=3, bos_token_id=1, eos_token_id=2)
    assert torch.equal(generate(model, adapter_names=NAMES, generation_config=config), expected)
    assert torch.equal(mixed(model, WEIGHTS, partial(generate, generation_config=config)), mixture)
    # what a config leaves open comes from that of the model
    model.get_base_model().generation_config.num_beams = 3
    config = GenerationConfig(bos_token_id=1, eos_token_id=2)
    expected = alone(model, "b", partial(generate, generation_config=config))[0]
    assert torch.equal(generate(model, adapter_names=NAMES, generation_config=config)[0], expected)


def test_samples_have_the_expert_of_their_row() -> None:
    model = experts(llama(), *SAME_RANK)
    sampling = {"do_sample": True, "num_return_sequences": 3}
    sampled = generate(model, adapter_names=NAMES, **sampling)
    assert sampled.shape == (12, 16)
    assert torch.equal(sampled[:, :8], IDS.repeat_interleave(3, dim=0))
    cold = generate(model, adapter_names=NAMES, **sampling, temperature=1e-4)
    assert torch.equal(cold, generate(model, adapter_names=NAMES).repeat_interleave(3, dim=0))


def left_padded() -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    prompts = [IDS[0, :3], IDS[1], IDS[2, :1], IDS[3, :6]]
    ids = torch.stack([torch.cat([torch.zeros(8 - len(prompt), dtype=torch.long), prompt]) for prompt in prompts])
    mask = torch.stack([torch.arange(8) >= 8 - len(prompt) for prompt in prompts]).long()
    return {"input_ids": ids, "attention_mask": mask}, prompts


@pytest.mark.parametrize("beams", [1, 3])
def test_prompts_of_different_length_generate_as_alone(beams: int) -> None:
    model = experts(llama(), *OTHER_RANKS, task_type="CAUSAL_LM")
    batch, prompts = left_padded()
    call = partial(generate, **batch, num_beams=beams)
    assert_every_row_is_as_if_alone(model, call, atol=0)
    mixed = call(model, adapter_names=NAMES)
    for row, name, prompt in zip(mixed, NAMES, prompts, strict=True):
        without = alone(model, name, partial(generate, input_ids=prompt.unsqueeze(0), num_beams=beams))
        assert torch.equal(row[8:], without[0, len(prompt) :])


def test_rows_may_end_at_different_times() -> None:
    model = experts(llama(), *SAME_RANK)
    full = generate(model, tokens=12, adapter_names=NAMES)[:, 8:]
    stop = int(full[0, 3])
    ending = {"min_new_tokens": 0, "eos_token_id": stop, "suppress_tokens": [2]}  # as 2 would have ended the others
    stopped = generate(model, tokens=12, adapter_names=NAMES, **ending)[:, 8:]
    assert len({row.tolist().index(stop) if stop in row else -1 for row in full}) > 1
    for row, expected in zip(stopped, full, strict=True):
        end = expected.tolist().index(stop) + 1 if stop in expected else len(expected)
        assert torch.equal(row[:end], expected[:end])
        assert not row[end:].any()


def test_a_prompt_alone_in_its_batch() -> None:
    model = experts(llama(), *SAME_RANK, task_type="CAUSAL_LM")
    for name in (BASE, "a", "b"):
        expected = alone(model, name, partial(generate, input_ids=IDS[:1]))
        assert torch.equal(generate(model, input_ids=IDS[:1], adapter_names=[name]), expected)


# -------------------------------------------------------------------------------------- adapter_names: modules_to_save


def with_saved_modules(task_type: str | None, *saved: list[str] | None) -> Any:
    """Experts that bring modules of their own, all of them different."""
    targets = ["q_proj", "v_proj", "down_proj"]  # for "all-linear", PEFT finds the layers in saved modules, too
    configs = [{"target_modules": targets, "modules_to_save": modules} for modules in saved]
    model = experts(llama(), *configs, task_type=task_type)
    for i, (name, parameter) in enumerate(model.named_parameters()):
        if ".modules_to_save." in name:
            generator = torch.Generator().manual_seed(i)
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
@pytest.mark.parametrize("modules", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens"]], ids=str)
def test_rows_have_the_saved_modules_of_their_expert(modules: list[str], task_type: str | None) -> None:
    model = with_saved_modules(task_type, modules, modules, modules)
    assert_every_row_is_as_if_alone(model, logits)
    assert_every_row_is_as_if_alone(model, generate, atol=0)
    call = partial(generate, num_beams=4, num_return_sequences=2)
    assert_every_row_is_as_if_alone(model, call, atol=0, per_row=2)


@pytest.mark.parametrize("active", ["a", "b", "c"])
def test_only_some_experts_have_saved_modules(active: str) -> None:
    """As with one expert for all rows: without modules of its own it has those of the base model."""
    model = with_saved_modules("CAUSAL_LM", ["lm_head"], None, ["embed_tokens"])
    model.set_adapter(active)
    assert_every_row_is_as_if_alone(model, logits)


def test_a_saved_module_of_a_kind_that_peft_cannot_mix() -> None:
    class Recurrent(Net):
        def __init__(self) -> None:
            super().__init__()
            self.recurrent = nn.GRU(5, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.recurrent(super().forward(x))[0]

    model = experts(Recurrent(), *[{"target_modules": ["first"], "modules_to_save": ["recurrent"]}] * 2)
    call = on(torch.randn(2, 6))
    with pytest.raises(TypeError, match="Mixed batching is only supported for"):
        call(model, adapter_names=["a", "b"])
    assert_clean(model)


def test_rows_of_a_classifier() -> None:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=2,
        num_labels=3,
        initializer_range=0.2,
    )
    model = experts(LlamaForSequenceClassification(config).eval(), *SAME_RANK, task_type="SEQ_CLS")
    for name, parameter in model.named_parameters():
        if ".modules_to_save." in name:
            nn.init.normal_(parameter)
    assert len([name for name, _ in model.named_parameters() if ".modules_to_save." in name]) == 3
    assert_every_row_is_as_if_alone(model, logits)


# ------------------------------------------------------------------------------------------- adapter_names: bad input


@pytest.fixture
def model() -> Any:
    return experts(llama(), *SAME_RANK, task_type="CAUSAL_LM")


LENGTH = r"Length of `adapter_names` should be the same as the number of inputs, but got {} and 4 respectively"


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
@pytest.mark.parametrize("call", [logits, generate, partial(generate, num_beams=2)])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 8])
def test_another_number_of_names_than_rows(count: int, call: Call, task_type: str | None) -> None:
    model = experts(llama(), *SAME_RANK, task_type=task_type)
    before = logits(model)
    with pytest.raises(ValueError, match=LENGTH.format(count)):
        call(model, adapter_names=["a", "b", BASE, "c", "a", "b", "c", "a"][:count])
    assert_clean(model)
    close(logits(model), before)


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_a_model_that_generates_with_beams_has_none_in_a_forward_pass(task_type: str | None) -> None:
    model = experts(llama(), *SAME_RANK, task_type=task_type)
    model.get_base_model().generation_config.num_beams = 2
    with pytest.raises(ValueError, match=LENGTH.format(2)):
        logits(model, adapter_names=["a", "b"])
    with pytest.raises(ValueError, match=r"Length of the mixture weights .* got 2 and 4"):
        mixed(model, WEIGHTS[:2], logits)
    assert_clean(model)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 8])
@pytest.mark.parametrize("keyword", [False, True])
def test_another_number_of_names_than_rows_of_one_vector(keyword: bool, count: int) -> None:
    """Also where the inputs have names that transformers does not use."""
    model = experts(Net(), *[{"target_modules": ["first", "second"]}] * 2)
    inputs = [] if keyword else [torch.randn(4, 6)]
    named = {"x": torch.randn(4, 6)} if keyword else {}
    with pytest.raises(ValueError, match=LENGTH.format(count)):
        model(*inputs, **named, adapter_names=["a", "b"] * (count // 2) + ["a"] * (count % 2))
    assert_clean(model)
    if count:
        message = f"Length of the mixture weights should be .* got {count} and 4"
        with pytest.raises(ValueError, match=message), model.base_model.row_mixture(torch.zeros(count, 2)):
            model(*inputs, **named)
        assert_clean(model)


@pytest.mark.parametrize("call", [logits, generate])
def test_a_name_that_no_adapter_has(model: Any, call: Call) -> None:
    with pytest.raises(ValueError, match=r"non-existing adapter\(s\): nope, other"):
        call(model, adapter_names=["a", "other", "nope", BASE])
    assert_clean(model)


@pytest.mark.parametrize("call", [logits, generate])
@pytest.mark.parametrize("names", ["a", "abca", BASE, {"a": 1}])
def test_names_that_are_no_list(model: Any, call: Call, names: Any) -> None:
    with pytest.raises(TypeError, match="`adapter_names` must be a list with one name for each row") as caught:
        call(model, adapter_names=names)
    assert repr(names) in str(caught.value)
    assert_clean(model)


@pytest.mark.parametrize("call", [logits, generate])
def test_names_in_training_mode(model: Any, call: Call) -> None:
    model.train()
    with pytest.raises(ValueError, match=r"Cannot pass `adapter_names` when the model is in training mode\."):
        call(model, adapter_names=NAMES)
    assert_clean(model)


@pytest.mark.parametrize("call", [logits, generate])
def test_names_while_adapters_are_merged(model: Any, call: Call) -> None:
    expected = logits(model, adapter_names=NAMES)
    model.merge_adapter(["a"])
    message = "Cannot pass `adapter_names` when there are merged adapters"
    with pytest.raises(ValueError, match=message + r".*`unmerge_adapter`"):
        call(model, adapter_names=NAMES)
    assert_clean(model)
    model.unmerge_adapter()
    assert torch.equal(logits(model, adapter_names=NAMES), expected)


@pytest.mark.parametrize("call", [logits, generate])
def test_names_within_a_row_mixture(model: Any, call: Call) -> None:
    with model.base_model.row_mixture(WEIGHTS):
        expected = call(model)
        with pytest.raises(ValueError, match="Cannot pass `adapter_names` within `row_mixture`"):
            call(model, adapter_names=NAMES)
        assert torch.equal(call(model), expected)
    assert_clean(model)


# ---------------------------------------------------------------------------------------------------------------- state


def failing_at(model: Any, name: str) -> Any:
    def fail(*_: Any) -> None:
        raise RuntimeError("stopped")

    return model.get_submodule(name).register_forward_hook(fail)


@pytest.mark.usefixtures("never_fold")
@pytest.mark.parametrize("call", [logits, generate])
def test_nothing_is_left_after_an_error(model: Any, call: Call) -> None:
    before, names, weights = logits(model), logits(model, adapter_names=NAMES), mixed(model, WEIGHTS, logits)
    handle = failing_at(model, "base_model.model.model.layers.1.mlp")
    with pytest.raises(RuntimeError, match="stopped"):
        call(model, adapter_names=NAMES)
    assert_clean(model)
    with pytest.raises(RuntimeError, match="stopped"), model.base_model.row_mixture(WEIGHTS):
        call(model)
    assert_clean(model)
    handle.remove()
    assert torch.equal(logits(model), before)
    assert torch.equal(logits(model, adapter_names=NAMES), names)
    assert torch.equal(mixed(model, WEIGHTS, logits), weights)


def test_an_error_within_the_context_leaves_it_in_place(model: Any) -> None:
    expected = mixed(model, WEIGHTS, logits)
    with model.base_model.row_mixture(WEIGHTS):
        with pytest.raises(ValueError, match="Length of the mixture weights"):
            generate(model, input_ids=IDS[:3])
        assert torch.equal(logits(model), expected)
    assert_clean(model)


def test_beams_leave_no_trace_in_the_context(model: Any) -> None:
    """Neither when all goes well nor after an error: the model without PEFT's wrapper has a row for each row."""
    expected = mixed(model, WEIGHTS, logits)
    inner = model.get_base_model()
    with model.base_model.row_mixture(WEIGHTS):
        for path in (None, "base_model.model.model.layers.1.mlp"):
            if path is None:
                generate(model, num_beams=2)
            else:
                handle = failing_at(model, path)
                with pytest.raises(RuntimeError, match="stopped"):
                    generate(model, num_beams=2)
                handle.remove()
            assert torch.equal(logits(inner), expected)
            with pytest.raises(ValueError, match=r"\b8\b"), torch.no_grad():
                inner(input_ids=IDS.repeat(2, 1))
    assert_clean(model)


@pytest.mark.usefixtures("never_fold")
def test_nothing_is_left_of_saved_modules_after_an_error() -> None:
    model = with_saved_modules("CAUSAL_LM", ["lm_head"], ["lm_head"])
    before = logits(model)
    handle = failing_at(model, "base_model.model.model.norm")
    with pytest.raises(RuntimeError, match="stopped"):
        generate(model, adapter_names=["a", "b", "a", BASE])
    handle.remove()
    assert_clean(model)
    assert torch.equal(logits(model), before)


@pytest.mark.usefixtures("never_fold")
def test_a_mixed_batch_leaves_single_adapters_as_they_were(model: Any) -> None:
    before = {name: alone(model, name, logits) for name in ("b", "c", BASE, "a")}
    logits(model, adapter_names=NAMES)
    mixed(model, WEIGHTS, generate)
    assert_clean(model)
    for name, expected in before.items():
        assert torch.equal(alone(model, name, logits), expected)
    assert model.training is False
    trainable = {name.rpartition("svf_delta.")[-1] for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {"a.weight"}


def test_names_alternate_with_single_adapters(model: Any) -> None:
    other = ["c", "c", "b", BASE]
    first, second = logits(model, adapter_names=NAMES), logits(model, adapter_names=other)
    close(first[3], alone(model, "c", logits)[3])
    assert torch.equal(logits(model, adapter_names=other), second)
    with torch.no_grad():
        layers(model)[0].svf_delta["c"].weight.add_(0.5)
    changed = logits(model, adapter_names=NAMES)
    assert not torch.allclose(changed[3], first[3], atol=1e-3)
    close(changed[3], alone(model, "c", logits)[3])
    assert torch.equal(changed[:3], first[:3])


# ---------------------------------------------------------------------------------------------- row_mixture: what it is


def mixed(model: Any, weights: Any, call: Call, *args: Any, **kwargs: Any) -> torch.Tensor:
    with model.base_model.row_mixture(weights, *args, **kwargs):
        return call(model)


def activate_by_hand(
    model: Any, row: torch.Tensor, groups: Mapping[str, int] | None = None, names: Sequence[str] = "abc"
) -> None:
    """Write the δ that a row should have into an adapter "mix" and activate it. Weights `[experts]`, or
    `[experts, groups]` with groups."""
    if "mix" not in model.peft_config:
        model.add_weighted_adapter(list(names), [0.0] * len(names), "mix")
    for layer in layers(model):
        if "mix" in layer.svf_delta:
            total = torch.zeros_like(layer.svf_delta["mix"].weight)
            for name, weight in zip(names, row, strict=True):
                if name in layer.svf_delta:
                    delta = layer.svf_delta[name].weight.detach()
                    total[: len(delta)] += (weight if groups is None else weight[groups[layer.module_name]]) * delta
            layer.svf_delta["mix"].weight.data.copy_(total)
    model.set_adapter("mix")


def by_hand(
    model: Any,
    weights: torch.Tensor,
    call: Call,
    groups: Mapping[str, int] | None = None,
    names: Sequence[str] = "abc",
) -> torch.Tensor:
    """What `mixed` should give, one row after the other."""
    active = model.active_adapters[0]
    results = []
    for i, row in enumerate(weights):
        activate_by_hand(model, row, groups, names)
        results.append(call(model)[i])
    model.set_adapter(active)
    model.delete_adapter("mix")
    return torch.stack(results)


@pytest.mark.parametrize("configs", [SAME_RANK, OTHER_RANKS, OTHER_MODULES], ids=["same", "ranks", "modules"])
@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_a_row_is_its_weighted_adapter(task_type: str | None, configs: list[dict[str, Any]]) -> None:
    model = experts(llama(), *configs, task_type=task_type)
    names = ["c", "a", "b"]
    found = mixed(model, WEIGHTS, logits, names)
    tokens = mixed(model, WEIGHTS, generate, names)
    beams = mixed(model, WEIGHTS, partial(generate, num_beams=3), names)
    assert_clean(model)
    for i, weights in enumerate(WEIGHTS):
        model.add_weighted_adapter(names, weights.tolist(), "mix")
        model.set_adapter("mix")
        close(found[i], logits(model)[i])
        assert torch.equal(tokens[i], generate(model)[i])
        assert torch.equal(beams[i], generate(model, num_beams=3)[i])
        model.set_adapter("a")
        model.delete_adapter("mix")


@pytest.mark.parametrize(
    ("base", "call"), [(gpt2, logits), (t5, t5_logits), (Net, on(torch.linspace(-1, 1, 24).view(4, 6)))]
)
def test_a_row_is_its_weighted_adapter_in_other_models(base: Callable[[], nn.Module], call: Call) -> None:
    targets = ["first", "second"] if base is Net else "all-linear"
    model = experts(base(), *[{"target_modules": targets, "r": r} for r in (3, None, 7)])
    close(mixed(model, WEIGHTS, call), by_hand(model, WEIGHTS, call))


@pytest.mark.usefixtures("never_fold")
def test_a_row_is_its_weighted_adapter_in_bf16() -> None:
    model = experts(llama(dtype=torch.bfloat16), *SAME_RANK)
    close(mixed(model, WEIGHTS, logits), by_hand(model, WEIGHTS, logits), atol=2e-2)


def test_a_mixture_of_one_expert_is_the_expert(model: Any) -> None:
    picked = torch.tensor([[0, 1, 0], [0, 0, 0], [1, 0, 0], [0, 0, 1]])  # integers
    close(mixed(model, picked, logits), logits(model, adapter_names=NAMES))
    assert torch.equal(mixed(model, picked, generate), generate(model, adapter_names=NAMES))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_rows_of_zeros_are_the_base_model(kind: str) -> None:
    base, call = {"llama": (llama(), logits), "gpt2": (gpt2(), logits), "t5": (t5(), t5_logits)}[kind]
    model = experts(base, *OTHER_RANKS)
    expected = alone(model, BASE, call)
    assert torch.equal(mixed(model, torch.zeros(4, 3), call), expected)
    assert torch.equal(mixed(model, WEIGHTS, call)[1], expected[1])
    grouped = WEIGHTS.unsqueeze(-1).expand(-1, -1, 4 if kind == "t5" else 2)
    assert torch.equal(mixed(model, grouped, call, groups="layer")[1], expected[1])


def test_experts_stand_in_the_order_in_which_they_were_added() -> None:
    model = experts(llama(), *SAME_RANK)
    model.add_adapter("0 first by name", SVFConfig(target_modules=["q_proj"], init_weights=False))
    weights = torch.cat([WEIGHTS, torch.tensor([[0.5], [1.0], [-1.0], [0.0]])], dim=1)
    expected = mixed(model, weights, logits, ["a", "b", "c", "0 first by name"])
    assert torch.equal(mixed(model, weights, logits), expected)
    order = [3, 1, 0, 2]
    names = [["a", "b", "c", "0 first by name"][i] for i in order]
    close(mixed(model, weights[:, order], logits, names), expected)


def test_some_of_the_experts() -> None:
    model = experts(llama(), *OTHER_MODULES)
    without = torch.tensor([[0.5, -1.0], [2.0, 0.0], [0.0, 0.0], [-0.5, 1.0]])
    close(mixed(model, without, logits, ["c", "a"]), by_hand(model, without, logits, names=["c", "a"]))


def test_weights_may_be_lists_or_doubles(model: Any) -> None:
    expected = mixed(model, WEIGHTS, logits)
    assert torch.equal(mixed(model, WEIGHTS.tolist(), logits), expected)
    assert torch.equal(mixed(model, WEIGHTS.double(), logits), expected)
    assert torch.equal(mixed(model, WEIGHTS.half(), logits), expected)
    assert torch.equal(mixed(model, WEIGHTS.numpy(), logits), expected)
    assert torch.equal(mixed(model, WEIGHTS, logits, ("a", "b", "c")), expected)


def test_the_active_adapter_does_not_matter_to_a_mixture() -> None:
    model = experts(llama(), *OTHER_MODULES)
    expected = mixed(model, WEIGHTS, logits)
    model.base_model.set_adapter(["b", "c"])
    assert torch.equal(mixed(model, WEIGHTS, logits), expected)


def test_beams_and_samples_have_the_mixture_of_their_row(model: Any) -> None:
    search = {"num_beams": 4, "num_return_sequences": 2}
    picked = torch.tensor([[0.0, 1, 0], [0, 0, 0], [1, 0, 0], [0, 0, 1]])
    expected = generate(model, adapter_names=NAMES, **search)
    assert torch.equal(mixed(model, picked, partial(generate, **search)), expected)
    greedy = mixed(model, WEIGHTS, generate)
    cold = {"do_sample": True, "temperature": 1e-4, "num_return_sequences": 3}
    assert torch.equal(mixed(model, WEIGHTS, partial(generate, **cold)), greedy.repeat_interleave(3, dim=0))


def test_prompts_of_different_length_in_a_mixture(model: Any) -> None:
    batch, _ = left_padded()
    call = partial(generate, **batch)
    assert torch.equal(mixed(model, WEIGHTS, call), by_hand(model, WEIGHTS, call))


def test_encoder_and_decoder_have_the_mixture_of_their_row() -> None:
    model = experts(t5(2.0), *OTHER_RANKS, task_type="SEQ_2_SEQ_LM")
    for beams in (1, 3):
        call = partial(generate, num_beams=beams)
        assert torch.equal(mixed(model, WEIGHTS, call), by_hand(model, WEIGHTS, call))


def test_forward_and_generate_in_one_context(model: Any) -> None:
    with model.base_model.row_mixture(WEIGHTS):
        first = logits(model)
        tokens = generate(model, num_beams=2)
        second = logits(model)
    assert torch.equal(first, second)
    assert torch.equal(tokens, mixed(model, WEIGHTS, partial(generate, num_beams=2)))


@lru_cache(maxsize=1)
def experts_without_cache() -> Any:
    runtime = SVFRuntimeConfig(use_cache=False)
    return experts(tiny_llama(initializer_range=0.2), *OTHER_MODULES, runtime_config=runtime)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), rows=st.integers(1, 4), groups=st.sampled_from([None, "layer", "module"]))
def test_any_weights_are_those_of_weighted_adapters(data: st.DataObject, rows: int, groups: str | None) -> None:
    model = experts_without_cache()
    modules = adapted_modules(model)
    of = {None: None, "layer": layer_of(modules), "module": {name: i for i, name in enumerate(modules)}}[groups]
    size = rows * 3 * (1 if of is None else max(of.values()) + 1)
    values = data.draw(st.lists(st.floats(-2, 2, width=32), min_size=size, max_size=size))
    weights = torch.tensor(values).view(rows, 3) if of is None else torch.tensor(values).view(rows, 3, -1)

    def call(model: Any) -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=IDS[:rows]).logits

    found = mixed(model, weights, call, ["a", "b", "c"], groups)
    close(found, by_hand(model, weights, call, of), atol=5e-5)
    assert_clean(model)


# ------------------------------------------------------------------------------------------------- row_mixture: groups


def adapted_modules(model: nn.Module) -> list[str]:
    return [layer.module_name for layer in layers(model)]


def layer_of(modules: Sequence[str]) -> dict[str, int]:
    return {name: int(re.findall(r"\d+", name)[0]) for name in modules}


@pytest.mark.parametrize("configs", [SAME_RANK, OTHER_RANKS, OTHER_MODULES], ids=["same", "ranks", "modules"])
def test_weights_for_each_module(configs: list[dict[str, Any]]) -> None:
    model = experts(llama(), *configs)
    modules = adapted_modules(model)
    weights = torch.randn(4, 3, len(modules))
    groups = {name: i for i, name in enumerate(modules)}
    close(mixed(model, weights, logits, groups="module"), by_hand(model, weights, logits, groups))
    tokens = mixed(model, weights, generate, groups="module")
    assert torch.equal(tokens, by_hand(model, weights, generate, groups))


@pytest.mark.parametrize("configs", [SAME_RANK, OTHER_RANKS, OTHER_MODULES], ids=["same", "ranks", "modules"])
def test_weights_for_each_layer(configs: list[dict[str, Any]]) -> None:
    model = experts(llama(), *configs)
    weights = torch.randn(4, 3, 2)
    groups = layer_of(adapted_modules(model))
    assert set(groups.values()) == {0, 1}
    close(mixed(model, weights, logits, groups="layer"), by_hand(model, weights, logits, groups))
    beams = mixed(model, weights, partial(generate, num_beams=3), groups="layer")
    assert torch.equal(beams, by_hand(model, weights, partial(generate, num_beams=3), groups))


def test_the_layers_of_encoder_and_decoder_are_groups_of_their_own() -> None:
    model = experts(t5(), *SAME_RANK)
    modules = adapted_modules(model)
    groups = {name: layer_of([name])[name] + 2 * name.startswith("decoder") for name in modules}
    assert set(groups.values()) == {0, 1, 2, 3}
    weights = torch.randn(4, 3, 4)
    close(mixed(model, weights, t5_logits, groups="layer"), by_hand(model, weights, t5_logits, groups))


def test_a_module_outside_the_layers_is_a_group_of_its_own() -> None:
    model = experts(llama(), *[{"target_modules": ["q_proj", "lm_head"]}] * 3)
    modules = adapted_modules(model)
    groups = {name: 2 if name == "lm_head" else layer_of([name])[name] for name in modules}
    assert list(groups.values()) == [0, 1, 2]
    weights = torch.randn(4, 3, 3)
    close(mixed(model, weights, logits, groups="layer"), by_hand(model, weights, logits, groups))


def test_weights_for_groups_of_modules() -> None:
    model = experts(llama(), *OTHER_RANKS)
    groups = {name: 0 if "self_attn" in name else 2 for name in adapted_modules(model)}  # none in group 1
    weights = torch.randn(4, 3, 3)
    close(mixed(model, weights, logits, groups=groups), by_hand(model, weights, logits, groups))
    close(
        mixed(model, weights, logits, groups={**groups, "no.such.module": 7}), by_hand(model, weights, logits, groups)
    )


def test_groups_are_those_of_the_modules_that_the_experts_adapt() -> None:
    model = experts(llama(), *OTHER_MODULES)
    modules = [layer.module_name for layer in layers(model) if "a" in layer.svf_delta]
    weights = torch.randn(4, 1, len(modules))
    groups = {name: i for i, name in enumerate(modules)}
    expected = by_hand(model, weights, logits, groups, names=["a"])
    close(mixed(model, weights, logits, ["a"], "module"), expected)
    close(mixed(model, weights, logits, ["a"], groups), expected)


def test_equal_weights_in_all_groups_are_weights_without_groups(model: Any) -> None:
    expected = mixed(model, WEIGHTS, logits)
    for groups, count in (("layer", 2), ("module", 14), (dict.fromkeys(adapted_modules(model), 0), 1)):
        weights = WEIGHTS.unsqueeze(-1).expand(-1, -1, count)
        assert torch.equal(mixed(model, weights, logits, groups=groups), expected)


# ---------------------------------------------------------------------------------------------- row_mixture: gradients


@pytest.mark.parametrize("groups", [None, "layer", "module"])
@pytest.mark.parametrize("configs", [SAME_RANK, OTHER_MODULES], ids=["same", "modules"])
def test_gradients_reach_the_weights(configs: list[dict[str, Any]], groups: str | None) -> None:
    """Those of row i and expert k: what the δ of the row gets, along the δ of the expert."""
    model = experts(llama(), *configs)
    modules = adapted_modules(model)
    count = {None: 1, "layer": 2, "module": len(modules)}[groups]
    of = {
        None: dict.fromkeys(modules, 0),
        "layer": layer_of(modules),
        "module": {name: i for i, name in enumerate(modules)},
    }[groups]
    weights = torch.randn(4, 3, count)
    probe = torch.randn(4, 8, 64)

    leaf = (weights[..., 0] if groups is None else weights).clone().requires_grad_(True)
    with model.base_model.row_mixture(leaf, groups=groups):
        (model(input_ids=IDS).logits * probe).sum().backward()
    assert leaf.grad is not None

    expected = torch.zeros_like(weights)
    for i in range(4):
        activate_by_hand(model, weights[i], of)
        gradients = _delta_gradients(model, (model(input_ids=IDS[i : i + 1]).logits * probe[i]).sum())
        for layer in layers(model):
            for k, name in enumerate("abc"):
                if name in layer.svf_delta:
                    delta = layer.svf_delta[name].weight.detach()
                    along = gradients[layer.module_name]["mix"][: len(delta)] @ delta
                    expected[i, k, of[layer.module_name]] += along
    assert expected.abs().max() > 1
    torch.testing.assert_close(leaf.grad.view_as(expected), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("groups", [None, "module"])
def test_gradients_are_those_of_finite_differences(groups: str | None) -> None:
    model = experts(Net(), *[{"target_modules": ["first", "second"], "r": r} for r in (None, 3, 5)]).double()
    model.requires_grad_(False)
    x = torch.randn(2, 6, dtype=torch.float64)

    def call(weights: torch.Tensor) -> torch.Tensor:
        with model.base_model.row_mixture(weights, groups=groups):
            return model(x)

    weights = torch.randn(2, 3, *([] if groups is None else [2]), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(call, (weights,))


def train(model: Any, weights: torch.Tensor, probe: torch.Tensor) -> None:
    """One step on the weights, in the context that is open."""
    weights.grad = None
    (model(input_ids=IDS).logits * probe).sum().backward()
    assert weights.grad is not None
    with torch.no_grad():
        weights -= 0.1 * weights.grad / weights.grad.norm()


@pytest.mark.parametrize("between", [torch.no_grad, torch.inference_mode])
def test_weights_can_be_trained_and_tried_in_one_context(model: Any, between: Callable[[], Any]) -> None:
    probe = torch.randn(4, 8, 64)
    weights = WEIGHTS.clone().requires_grad_(True)
    with model.base_model.row_mixture(weights):
        for _ in range(2):
            train(model, weights, probe)
            with between():
                tried = model(input_ids=IDS).logits.clone()
    close(tried, mixed(model, weights.detach(), logits))
    again = WEIGHTS.clone().requires_grad_(True)
    for _ in range(2):
        with model.base_model.row_mixture(again):
            train(model, again, probe)
    close(weights, again)


def test_gradients_after_generating_in_the_same_context(model: Any) -> None:
    probe = torch.randn(4, 8, 64)
    leaves = [WEIGHTS.clone().requires_grad_(True) for _ in range(2)]
    for generating, weights in zip((False, True), leaves, strict=True):
        with model.base_model.row_mixture(weights):
            if generating:
                generate(model)
            (model(input_ids=IDS).logits * probe).sum().backward()
    assert leaves[1].grad is not None
    close(leaves[1].grad, leaves[0].grad)


def test_a_change_of_the_weights_counts_within_the_context(model: Any) -> None:
    for grad in (False, True):
        weights = WEIGHTS.clone()
        with model.base_model.row_mixture(weights), torch.set_grad_enabled(grad):
            before = model(input_ids=IDS).logits
            weights.mul_(-0.5)
            found = model(input_ids=IDS).logits
        assert not torch.allclose(found, before, atol=1e-3)
        close(found, mixed(model, WEIGHTS * -0.5, logits))


def test_weights_made_in_inference_mode(model: Any) -> None:
    expected = mixed(model, WEIGHTS, logits)
    with torch.inference_mode():
        weights = WEIGHTS.clone()
        assert torch.equal(mixed(model, weights, logits), expected)
    assert torch.equal(mixed(model, weights, logits), expected)


def test_a_change_of_delta_counts_within_the_context(model: Any) -> None:
    with model.base_model.row_mixture(WEIGHTS):
        before = logits(model)
        with torch.no_grad():
            for layer in layers(model):
                layer.svf_delta["b"].weight.mul_(-0.5)
        found = logits(model)
    assert not torch.allclose(found, before, atol=1e-3)
    close(found, mixed(model, WEIGHTS, logits))


# ---------------------------------------------------------------------------------------------- row_mixture: bad input


SHAPE = r"Mixture weights for 3 adapters must have the shape \[rows, 3{}\], got {}"


@pytest.mark.parametrize(
    ("weights", "groups", "message"),
    [
        (torch.zeros(4, 2), None, SHAPE.format("", r"\[4, 2\]")),
        (torch.zeros(4, 4), None, SHAPE.format("", r"\[4, 4\]")),
        (torch.zeros(3), None, SHAPE.format("", r"\[3\]")),
        (torch.tensor(1.0), None, SHAPE.format("", r"\[\]")),
        (torch.zeros(4, 3, 2), None, r"got \[4, 3, 2\]. A third dimension needs `groups`"),
        (torch.zeros(0, 3), None, SHAPE.format("", r"\[0, 3\]")),
        ([], None, SHAPE.format("", r"\[0\]")),
        (torch.zeros(4, 3), "layer", SHAPE.format(", 2", r"\[4, 3\]")),
        (torch.zeros(4, 3, 3), "layer", SHAPE.format(", 2", r"\[4, 3, 3\]")),
        (torch.zeros(4, 3, 2), "module", SHAPE.format(", 14", r"\[4, 3, 2\]")),
        (torch.zeros(0, 3, 2), "layer", SHAPE.format(", 2", r"\[0, 3, 2\]")),
        (torch.zeros(4, 3, 2, 1), "layer", SHAPE.format(", 2", r"\[4, 3, 2, 1\]")),
        (torch.tensor([[0.0, 0, 0], [0, float("nan"), 0]]), None, r"row 1 are not finite: \[0.0, nan, 0.0\]"),
        ([[float("-inf"), 0, 0]], None, r"row 0 are not finite: \[-inf, 0.0, 0.0\]"),
        (torch.full((4, 3, 2), float("inf")), "layer", "row 0 are not finite"),
        (torch.zeros(4, 3, 2), "block", "`groups` must be 'module', 'layer' or a mapping .*got 'block'"),
        (torch.zeros(4, 3, 2), 2, "`groups` must be 'module', 'layer' or a mapping .*got 2"),
    ],
)
def test_weights_that_make_no_sense(model: Any, weights: Any, groups: Any, message: str) -> None:
    before = logits(model)
    with pytest.raises(ValueError, match=message), model.base_model.row_mixture(weights, groups=groups):
        pytest.fail("went in")
    assert_clean(model)
    close(logits(model), before)
    close(mixed(model, WEIGHTS, logits)[1], alone(model, BASE, logits)[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.layers.1.mlp.up_proj": None}, r"no entry for 1 adapted modules, the first is '.*1\.mlp\.up_proj'"),
        ({"model.layers.1.mlp.up_proj": -1}, r"must hold indices, got -1 for '.*1\.mlp\.up_proj'"),
        ({"model.layers.0.mlp.up_proj": "0"}, r"must hold indices, got '0' for '.*0\.mlp\.up_proj'"),
        ({"model.layers.0.mlp.up_proj": 0.0}, r"must hold indices, got 0\.0 for '.*0\.mlp\.up_proj'"),
    ],
)
def test_a_mapping_that_makes_no_sense(model: Any, change: dict[str, Any], message: str) -> None:
    groups = {**dict.fromkeys(adapted_modules(model), 0), **change}
    groups = {name: group for name, group in groups.items() if group is not None}
    with pytest.raises(ValueError, match=message):
        mixed(model, torch.zeros(4, 3, 1), logits, groups=groups)
    assert_clean(model)


def test_an_empty_mapping(model: Any) -> None:
    with pytest.raises(ValueError, match="no entry for 14 adapted modules"):
        mixed(model, torch.zeros(4, 3, 1), logits, groups={})


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a", "nope"], "'nope'.*a, b, c"),
        (["a", BASE], f"'{BASE}'.*a, b, c"),
        (["a", "a"], r"`adapter_names` holds a name twice: \['a', 'a'\]"),
    ],
)
def test_experts_of_a_mixture_that_make_no_sense(model: Any, names: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mixed(model, torch.zeros(4, 2), logits, names)
    assert_clean(model)


@pytest.mark.parametrize("groups", [None, "layer", "module"])
def test_a_mixture_of_no_experts(model: Any, groups: str | None) -> None:
    weights = torch.zeros(4, 0) if groups is None else torch.zeros(4, 0, 1)
    with pytest.raises(ValueError, match="adapter"):
        mixed(model, weights, logits, [], groups)
    assert_clean(model)


def test_experts_of_a_mixture_as_a_string(model: Any) -> None:
    """Which would pass for a list where names are single letters."""
    with pytest.raises((TypeError, ValueError), match=r"`adapter_names`.*'abc'"):
        mixed(model, WEIGHTS, logits, "abc")
    assert_clean(model)


@pytest.mark.parametrize("extra", [{"modules_to_save": ["lm_head"]}, {"bias": "all"}])
def test_a_mixture_of_more_than_delta(extra: dict[str, Any]) -> None:
    model = experts(biased(llama(attention_bias=True)), ALL, {**ALL, **extra})
    with pytest.raises(ValueError, match="'b' has `modules_to_save` or `bias`, which cannot be mixed"):
        mixed(model, torch.zeros(4, 2), logits)
    assert_clean(model)
    close(mixed(model, torch.ones(4, 1), logits, ["a"]), alone(model, "a", logits))


def test_a_mixture_in_training_mode(model: Any) -> None:
    model.train()
    with pytest.raises(ValueError, match=r"mixture weights.*training mode"):
        mixed(model, WEIGHTS, logits)
    assert_clean(model)
    close(mixed(model.eval(), WEIGHTS, logits), by_hand(model, WEIGHTS, logits))


def test_a_mixture_while_adapters_are_merged(model: Any) -> None:
    expected = mixed(model, WEIGHTS, logits)
    model.merge_adapter(["b"])
    with pytest.raises(ValueError, match=r"mixture weights.*merged adapters.*`unmerge_adapter`"):
        mixed(model, WEIGHTS, logits)
    assert_clean(model)
    model.unmerge_adapter()
    assert torch.equal(mixed(model, WEIGHTS, logits), expected)


def test_adapters_that_are_merged_within_the_context(model: Any) -> None:
    expected = mixed(model, WEIGHTS, logits)
    with model.base_model.row_mixture(WEIGHTS):
        model.merge_adapter()
        with pytest.raises(ValueError, match=r"merged"):
            logits(model)
        model.unmerge_adapter()
        assert torch.equal(logits(model), expected)


def test_a_mixture_within_a_mixture(model: Any) -> None:
    with model.base_model.row_mixture(WEIGHTS):
        expected = logits(model)
        with pytest.raises(ValueError, match="`row_mixture` cannot be nested"):
            mixed(model, torch.zeros(4, 3), logits)
        assert torch.equal(logits(model), expected)
    assert_clean(model)


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
@pytest.mark.parametrize("call", [logits, generate, partial(generate, num_beams=2)])
@pytest.mark.parametrize("rows", [1, 2, 3, 8])
def test_a_batch_with_another_number_of_rows_than_weights(rows: int, call: Call, task_type: str | None) -> None:
    model = experts(llama(), *SAME_RANK, task_type=task_type)
    weights = WEIGHTS.repeat(2, 1)[:rows]
    message = f"Length of the mixture weights should be the same as the number of inputs, but got {rows} and 4"
    with pytest.raises(ValueError, match=message):
        mixed(model, weights, call)
    assert_clean(model)


# ------------------------------------------------------------------------------------------------------ the real model


@pytest.mark.model
@pytest.mark.slow
def test_eight_experts_in_one_batch_of_smollm2() -> None:
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
    from smollm2 import load_model

    base, tokenizer = load_model()
    model: PeftModel = experts(base.eval(), *[ALL] * 8, std=0.03, task_type="CAUSAL_LM")
    assert len(layers(model)) == 210
    names = list("hbgacied")
    subjects = ["Paris", "A prime number", "The sum of 17 and 25", "Yesterday"] * 2
    tokenizer.padding_side = "left"
    batch = tokenizer([f"{subject} is" for subject in subjects], return_tensors="pt", padding=True)

    def answer(rows: slice, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        prompts = {key: value[rows] for key, value in batch.items()}
        kwargs.update(return_dict_in_generate=True, output_logits=True)
        output: Any = generate(model, tokens=16, **prompts, **kwargs)
        return output.sequences[:, prompts["input_ids"].shape[1] :], torch.stack(output.logits, dim=1)

    tokens, scores = answer(slice(None), adapter_names=names)
    assert_clean(model)
    assert len({tuple(row.tolist()) for row in tokens}) == 8
    for i, name in enumerate(names):
        model.set_adapter(name)
        expected_tokens, expected_scores = answer(slice(i, i + 1))
        assert torch.equal(tokens[i], expected_tokens[0])
        torch.testing.assert_close(scores[i], expected_scores[0], rtol=1e-4, atol=1e-4)


def test_another_tensor_than_the_batch_may_come_first() -> None:
    class Masked(Net):
        def forward(self, mask: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x * mask[0])

    model = experts(Masked(), *[{"target_modules": ["first", "second"]}] * 2)
    x, mask = torch.randn(4, 6), torch.ones(7, 6)
    close(model(mask=mask, x=x, adapter_names=["a", "b"] * 2), model(x=x, mask=mask, adapter_names=["a", "b"] * 2))


def test_a_name_that_is_no_string(model: Any) -> None:
    with pytest.raises(ValueError, match=r"non-existing adapter\(s\): None"):
        logits(model, adapter_names=["a", None, "b", "c"])


def test_flattened_tokens_of_unequal_rows_are_refused() -> None:
    """Which cannot be told from rows of the same length by their number alone."""

    class Packed(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(torch.cat([x[0, :6], x[1, :2]]))

    model = experts(Packed(), *[{"target_modules": ["first", "second"]}] * 2)
    with pytest.raises(ValueError, match="got 2 and 8"):
        model(torch.randn(2, 6, 6), adapter_names=["a", "b"])


def test_values_written_without_a_version_count(model: Any) -> None:
    weights = WEIGHTS.clone().numpy()
    with model.base_model.row_mixture(weights), torch.no_grad():
        before = logits(model)
        weights *= -0.5
        halved = logits(model)
        for layer in layers(model):
            layer.svf_delta["b"].weight.data.add_(1.0)
        moved = logits(model)
    assert not torch.allclose(before, halved, atol=1e-3)
    close(moved, mixed(model, WEIGHTS * -0.5, logits))


def test_adapters_with_biases_of_their_own() -> None:
    model = experts(Net(), {"target_modules": ["first"], "bias": "all"})
    with pytest.raises(ValueError, match="'a' has `bias`"):
        model(torch.randn(2, 6), adapter_names=["a", "__base__"])
