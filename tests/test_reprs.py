"""What a mixture, a dispatcher and a self-adaptive model say about themselves."""

from __future__ import annotations

from helpers import adapted, base_model, make_tokenizer

from peft_svf import AdaptiveMixture, NearestDispatcher, PromptDispatcher, SelfAdaptiveModel, SVFConfig


def test_each_says_what_it_holds() -> None:
    model = adapted(base_model())
    model.add_adapter("words", SVFConfig(target_modules="all-linear"))
    model.eval()
    tokenizer = make_tokenizer()
    asking = PromptDispatcher(model, tokenizer, {"default": "", "words": ""}, labels={"default": "math"}, threshold=0.5)
    assert repr(asking) == (
        "PromptDispatcher(likelihood of the base model: default as 'math', words, base as 'other'; below 0.5 base)"
    )
    boxed = PromptDispatcher(model, tokenizer, {"words": ""}, adapter_name="default", other=False, method="generate")
    assert repr(boxed) == "PromptDispatcher(generate of the adapter 'default': words)"
    nearest = NearestDispatcher(model, tokenizer, {"words": ["a", "b"]}, threshold=0.25)
    assert repr(nearest) == "NearestDispatcher(cosine similarity in layer 1: words from 0.25; else base)"
    assert repr(SelfAdaptiveModel(model, tokenizer, nearest)) == f"SelfAdaptiveModel({nearest!r})"
    mixture = AdaptiveMixture(model, tokenizer=tokenizer)
    assert repr(mixture) == "AdaptiveMixture('mixture' on LlamaForCausalLM: default 0.5, words 0.5)"
    assert repr(SelfAdaptiveModel(model, tokenizer, mixture, soft=True)) == f"SelfAdaptiveModel({mixture!r}, soft=True)"
    mixture.set_weights({"default": 1.0})
    assert "default 1, words 0)" in repr(mixture)
