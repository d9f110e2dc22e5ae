"""One model, several threads: every call has the adapters that it asked for."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from helpers import randomise, tiny_llama
from peft import get_peft_model

from peft_svf import SVFConfig, SVFRuntimeConfig
from peft_svf.tuner.layer import svf_layers

BASE = "__base__"
CALLS = 60


@pytest.fixture(autouse=True)
def _frequent_switches() -> Iterator[None]:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


def experts(fold: Any = "auto", **config: Any) -> Any:
    def svf() -> SVFConfig:
        return SVFConfig(target_modules="all-linear", runtime_config=SVFRuntimeConfig(fold=fold), **config)

    model = get_peft_model(tiny_llama(), svf(), "a")
    model.add_adapter("b", svf())
    for seed, name in enumerate("ab"):
        randomise(model, name, seed=seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save.b" in name:
                parameter.mul_(1.5)
    return model.eval()


def ids(seed: int, rows: int) -> torch.Tensor:
    return torch.randint(3, 60, (rows, 7), generator=torch.Generator().manual_seed(seed))


Work = Callable[[], torch.Tensor]


def assert_threads_agree_with_one(works: list[Work], calls: int = CALLS) -> None:
    """Each piece of work gives the same in its own thread as alone."""
    with torch.no_grad():
        expected = [work() for work in works]

    def serve(i: int) -> int:
        with torch.no_grad():
            found = [works[i]() for _ in range(calls)]
        return sum(not torch.allclose(each, expected[i], atol=1e-4) for each in found)

    with ThreadPoolExecutor(len(works)) as pool:
        wrong = list(pool.map(serve, range(len(works))))
    assert wrong == [0] * len(works)


def named(model: Any, *names: str) -> Work:
    return lambda: model(ids(len(names[0]) + ord(names[0][-1]), len(names)), adapter_names=list(names)).logits


def mixed(model: Any, *weights: list[float]) -> Work:
    def work() -> torch.Tensor:
        with model.base_model.row_mixture(list(weights)):
            found: torch.Tensor = model(ids(len(weights), len(weights))).logits
        return found

    return work


@pytest.mark.parametrize("fold", ["auto", "always", "never"])
def test_names_in_four_threads(fold: str) -> None:
    model = experts(fold)
    assert_threads_agree_with_one([named(model, n, n) for n in ("a", "b", "a", BASE)])


def test_rows_of_several_adapters_beside_mixtures_and_plain_calls() -> None:
    model = experts()
    works = [
        named(model, "a", "b", BASE),
        named(model, "b", "a"),
        mixed(model, [0.5, 0.5], [1.0, -0.5]),
        lambda: model(ids(9, 2)).logits,
    ]
    assert_threads_agree_with_one(works)
    assert not model.base_model.open_calls
    assert not any(layer.open_calls for layer in svf_layers(model))


def test_modules_to_save_in_four_threads() -> None:
    model = experts(modules_to_save=["lm_head"])
    assert_threads_agree_with_one([named(model, n, n) for n in ("a", "b", "b", BASE)])


def test_generating_in_four_threads() -> None:
    model = experts()

    def generate(names: list[str], beams: int) -> torch.Tensor:
        options = {"max_new_tokens": 4, "min_new_tokens": 4, "num_beams": beams, "do_sample": False}
        found: torch.Tensor = model.generate(input_ids=ids(3, len(names)), adapter_names=names, **options)
        return found.float()

    works: list[Work] = [
        lambda: generate(["a", "b"], 1),
        lambda: generate(["b", "a"], 2),
        lambda: generate([BASE, "b", "b"], 1),
        lambda: generate(["a", "a", BASE], 3),
    ]
    assert_threads_agree_with_one(works, 8)


def test_a_mixture_in_one_thread_is_none_in_another() -> None:
    """As with `torch.no_grad`, a thread must enter the context itself."""
    model = experts()
    plain = named(model, "b", "b")
    with ThreadPoolExecutor(1) as pool, torch.no_grad():
        expected = plain()
        with model.base_model.row_mixture([[1.0, 0.0], [0.0, 1.0]]):
            torch.testing.assert_close(pool.submit(torch.no_grad()(plain)).result(), expected, atol=1e-5, rtol=0)


def test_a_thread_cannot_disable_the_adapters_of_a_mixed_batch() -> None:
    model = experts()
    with ThreadPoolExecutor(1) as other, torch.no_grad():
        expected = model(ids(0, 2), adapter_names=["a", "b"]).logits

        def disabled() -> Any:
            with model.disable_adapter():
                return model(ids(0, 2)).logits

        def mixed() -> Any:
            with model.base_model.row_mixture([[1.0, 0.0], [0.0, 1.0]]):
                return model(ids(0, 2)).logits

        with model.base_model.row_mixture([[1.0, 0.0], [0.0, 1.0]]):
            with pytest.raises(RuntimeError, match="another thread runs a mixed batch"):
                other.submit(disabled).result()
            torch.testing.assert_close(model(ids(0, 2)).logits, expected)
        with model.disable_adapter():
            base = model(ids(0, 2)).logits
            with pytest.raises(RuntimeError, match="Another thread has disabled the adapters"):
                other.submit(mixed).result()
            with pytest.raises(
                RuntimeError, match="disabled the adapters of this model, so `adapter_names` would have"
            ):
                other.submit(named(model, "a", "b")).result()
            base_rows = model(ids(0, 2), adapter_names=["a", "__base__"]).logits  # as in PEFT
            assert torch.equal(base_rows, base)
        assert torch.equal(other.submit(disabled).result(), base)
        torch.testing.assert_close(model(ids(0, 2), adapter_names=["a", "b"]).logits, expected)


def test_only_one_thread_at_a_time_disables_the_adapters() -> None:
    """The first one would enable them while the second one still needs the base model."""
    model = experts()
    with torch.no_grad(), model.disable_adapter(), ThreadPoolExecutor(1) as other:
        base = model(ids(0, 2)).logits

        def disabled() -> Any:
            with model.disable_adapter():
                return model(ids(0, 2)).logits

        with pytest.raises(RuntimeError, match="another thread has disabled them and may enable them again"):
            other.submit(torch.no_grad()(disabled)).result()
        assert torch.equal(disabled(), base)  # nested in one thread
        assert torch.equal(model(ids(0, 2), adapter_names=["a", "b"]).logits, base)
        with pytest.raises(RuntimeError, match="Another thread has disabled the adapters"):
            other.submit(named(model, "a", "b")).result()
    assert model.base_model.disabled_by is None


def test_base_rows_stay_base_rows_while_another_thread_enables_the_adapters() -> None:
    """In the middle of a call, that thread leaves `disable_adapter`."""
    model = experts()
    inside, enabled = threading.Event(), threading.Event()

    def pause(*_: Any) -> None:
        inside.set()
        assert enabled.wait(10)

    with torch.no_grad(), ThreadPoolExecutor(1) as other:
        call = torch.no_grad()(named(model, BASE, BASE))
        expected = call()
        with model.disable_adapter():
            handle = model.base_model.model.model.layers[0].register_forward_hook(pause)
            pending = other.submit(call)
            assert inside.wait(10)
            handle.remove()
        enabled.set()
        assert torch.equal(pending.result(), expected)
        with model.disable_adapter():  # base rows do not stand in the way
            pass


def test_no_thread_inherits_the_disabled_adapters_of_one_that_has_ended() -> None:
    model = experts()

    def of_new_thread(work: Any) -> Any:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(work).result()

    of_new_thread(model.base_model.disable_adapter_layers)
    for _ in range(3):  # Python gives the identifier of the ended thread again
        with pytest.raises(RuntimeError, match="Another thread has disabled the adapters"):
            of_new_thread(named(model, "a", "b"))
    model.base_model.enable_adapter_layers()
    of_new_thread(named(model, "a", "b"))


def test_a_task_that_outlives_a_mixed_batch_does_not_keep_its_rows() -> None:
    model = experts()
    model.set_adapter("b")

    async def later() -> torch.Tensor:
        await asyncio.sleep(0)
        with torch.no_grad():
            found: torch.Tensor = model(ids(0, 2)).logits
        return found

    async def serve() -> torch.Tensor:
        with model.base_model.row_mixture([[1.0, 0.0]] * 2):
            task = asyncio.create_task(later())  # copies the context
        with model.base_model.row_mixture([[1.0, 0.0]] * 2):
            return await task

    with torch.no_grad():
        expected = model(ids(0, 2)).logits
    torch.testing.assert_close(asyncio.run(serve()), expected)
