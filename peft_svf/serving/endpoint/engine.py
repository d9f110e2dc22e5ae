"""transformers' continuous batching, with an expert or a mixture for each request.

This depends on the following parts of transformers. `docs/lab-notes/endpoint.md` says why on these and not on more.

- `init_continuous_batching`, and of its manager `start`, `stop`, `pause`, `add_request`, `cancel_request` and the
  iteration over results;
- `manager.model`, which it calls with the packed tokens of a step, as `[1, tokens]`;
- `manager.batch_processor.inputs_and_outputs.requests_in_batch`: the requests of the step in the order of their
  tokens.
"""

from __future__ import annotations

import asyncio
import threading
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from packaging.version import Version
from transformers import GenerationConfig

from ...scoring.tokens import context_length, end_tokens
from ...tuner.packed import BASE_SLOT, PackedRows
from .errors import RequestError, unavailable
from .sampling import Sampling, choose, warn_of_unsupported

LARGEST_DELTA = 1e3  # more overflows, and a value that is not finite spreads to all requests through attention
_CPU_CACHE, _CPU_STEP, _PAGE = 16384, 1024, 64  # tokens; a GPU takes what its memory holds
OLDEST = "5.19"  # of transformers; older ones cannot pause, or cannot run other batches beside it


class Engine:
    """
    Continuous batching of requests with different experts.

    Requests join and leave a batch at each token. The engine owns the model: others use it within `paused`.

    Prefix sharing is off: it compares tokens only, so two experts would share the keys and values of one prompt. CUDA
    graphs are off: they would record the δ of one step.

    Args:
        model (`PeftModel`): The model with the experts. It is set to evaluation mode.
        tokenizer: Its tokenizer.
        cache_tokens (`int`, *optional*): Tokens that the cache of keys and values holds. Default: what the memory of a
            GPU holds, 16384 on a CPU.
        step_tokens (`int`, *optional*): Tokens of a step, at most. Default: 1024 on a CPU, transformers' on a GPU.

    Raises:
        ValueError: An adapter cannot be served, see [`PackedRows`], or is merged.
        ImportError: transformers is too old.
        RuntimeError: Continuous batching cannot start.
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, cache_tokens: int | None = None, step_tokens: int | None = None
    ) -> None:
        warn_of_unsupported(model.generation_config)
        self.model, self.rows = model.eval(), PackedRows(model.base_model)
        self.ends = end_tokens(model, tokenizer, {})
        self._slots = _Slots(self.rows)
        self._requests: dict[str, _Request] = {}
        self._manager = _start(model.base_model.model, self._next_tokens, cache_tokens, step_tokens)
        self.context = min(context_length(model.config), _capacity(self._manager))
        self._reader = threading.Thread(target=self._read, name="peft-svf-results", daemon=True)
        self._reader.start()

    # ------------------------------------------------------------------------------------------------ requests

    @property
    def running(self) -> int:
        """Number of requests that are not finished."""
        return len(self._requests)

    @property
    def failure(self) -> str | None:
        """Why the engine is dead; `None` while it works."""
        fatal = self._manager.background_thread_status.fatal_error
        if fatal is not None:
            return f"{type(fatal).__name__}: {fatal}"
        return None if self._manager.is_running() else "it is stopped"

    def uses(self, adapter_name: str) -> bool:
        """Whether a request that is not finished uses an adapter."""
        return self._slots.uses(adapter_name)

    async def generate(
        self,
        ids: Sequence[int],
        weights: Mapping[str, float],
        sampling: Sampling,
        max_new_tokens: int,
        ends: Collection[int],
    ) -> AsyncGenerator[list[int], None]:
        """
        Yield new tokens when they are ready. Closing the iterator ends the request.

        Args:
            ids (`list[int]`): The prompt.
            weights (`dict[str, float]`): α of each adapter. Empty for the base model.
            sampling ([`Sampling`]): How to choose tokens.
            max_new_tokens (`int`): Longest answer.
            ends (`set[int]`): Tokens that end it.

        Raises:
            RequestError: The mixture is too large, the engine is dead, or the model computes values that are not
                finite.
        """
        loop, results = asyncio.get_running_loop(), asyncio.Queue[Any]()
        slot, key, sent, finished = self._slots.take(weights), uuid.uuid4().hex, 0, False

        def deliver(output: Any) -> None:
            if not loop.is_closed():  # its server was killed
                loop.call_soon_threadsafe(results.put_nowait, output)

        self._requests[key] = _Request(slot, sampling, deliver)
        try:
            if self.failure or not self._manager.add_request(
                list(ids), request_id=key, max_new_tokens=max_new_tokens, streaming=True, eos_token_id=[*ends]
            ):
                raise unavailable("The engine has stopped.")
            while not finished:
                output = await results.get()
                if self._requests[key].broken:
                    raise RequestError(500, "The model computed values that are not finite. Use smaller weights.")
                if output is None or output.error is not None:
                    finished = True
                    raise unavailable("The engine has stopped.")
                tokens, finished = output.generated_tokens[sent:], output.is_finished()
                sent += len(tokens)
                if tokens:
                    yield tokens
        finally:
            if not finished:
                self._manager.cancel_request(key)
            del self._requests[key]
            self._slots.leave(weights)

    def _read(self) -> None:
        """Deliver results to their requests, in a thread."""
        for output in self._manager:
            request = self._requests.get(output.request_id)
            if request is not None:
                request.deliver(output)
        for request in list(self._requests.values()):
            request.deliver(None)  # the engine is dead

    # ------------------------------------------------------------------------------------------------ steps

    def _next_tokens(self, model: Any, batch: dict[str, Any]) -> Any:
        """Run a step of the manager: the forward pass with the δ of each token, and the choice of the next tokens."""
        states = self._manager.batch_processor.inputs_and_outputs.requests_in_batch
        # a request can have been cancelled since the step was planned
        requests = [self._requests.get(future.state.request_id, _GONE) for future in states]
        kept = batch.get("logits_to_keep")
        with self.rows.opened([request.slot for request in requests], [s.query_length for s in states], kept):
            output = model(**batch)
        asking = [request for request, future in zip(requests, states, strict=True) if future.has_new_token]
        if asking:
            places = slice(len(asking)) if kept is not None else batch["logits_indices"][: len(asking)]
            tokens, sane = choose(output.logits[0, places].float(), [request.sampling for request in asking])
            for request, is_sane in zip(asking, sane, strict=True):
                request.broken = request.broken or not is_sane
            # the manager takes the largest logit
            one_hot = torch.zeros_like(output.logits[0, : len(asking)]).scatter_(1, tokens[:, None], 1)
            output.logits[0, places] = one_hot
        return output

    # ------------------------------------------------------------------------------------------------ control

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Let no step run, to use the model. Requests go on afterwards.

        During a step, `forward` of transformers writes `is_causal=False` into the config, which all threads share. A
        forward pass of another thread would silently have no causal mask.

        Raises:
            RequestError: The engine is dead.
        """
        if self.failure:
            raise unavailable("The engine has stopped.")
        with self._manager.pause():
            yield

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Let no step run and no request begin, to add or remove adapters.

        Raises:
            RequestError: The engine is dead.
        """
        with self._slots.lock, self.paused():
            yield

    def stop(self) -> None:
        """End the engine. Requests that are not finished get an error."""
        self._manager.stop(block=True, hard_stop=True)
        self._reader.join()


@dataclass
class _Request:
    slot: int
    sampling: Sampling
    deliver: Callable[[Any], Any]
    broken: bool = False


_GONE = _Request(BASE_SLOT, Sampling(), lambda output: None)


class _Slots:
    """The slots of the mixtures in use. Requests for the same mixture share one."""

    def __init__(self, rows: PackedRows) -> None:
        self._rows, self.lock = rows, threading.Lock()
        self._users: dict[frozenset[tuple[str, float]], tuple[int, int]] = {}

    def take(self, weights: Mapping[str, float]) -> int:
        """Return the slot of a mixture, for one more user.

        Raises:
            RequestError: δ is so large that the model would overflow, or an adapter was removed.
        """
        key = frozenset(weights.items())
        with self.lock:
            slot, users = self._users.get(key, (BASE_SLOT, 0))
            if not users:
                if any(name not in self._rows.model.peft_config for name in weights):
                    raise RequestError(404, "The expert was unloaded.", param="model", code="model_not_found")
                slot = self._rows.add(weights)
                if not self._rows.largest(slot) <= LARGEST_DELTA:  # or NaN
                    self._rows.remove(slot)
                    raise RequestError(400, "The mixture is too large. Use smaller weights.", param="model")
            self._users[key] = slot, users + 1
        return slot

    def leave(self, weights: Mapping[str, float]) -> None:
        """Free the slot of a mixture with its last user."""
        key = frozenset(weights.items())
        slot, users = self._users[key]
        if users > 1:
            self._users[key] = slot, users - 1
        else:
            del self._users[key]
            self._rows.remove(slot)

    def uses(self, adapter_name: str) -> bool:
        """Whether a mixture in use has an adapter."""
        return any(name == adapter_name for key in list(self._users) for name, _ in key)


class _Stepped:
    """The model as continuous batching sees it: a call runs a step of the engine."""

    def __init__(self, model: Any, step: Callable[[Any, dict[str, Any]], Any]) -> None:
        self._model, self._step = model, step

    def __call__(self, **batch: Any) -> Any:
        return self._step(self._model, batch)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def _start(
    model: Any, step: Callable[[Any, dict[str, Any]], Any], cache_tokens: int | None, step_tokens: int | None
) -> Any:
    if Version(transformers.__version__).release < Version(OLDEST).release:
        raise ImportError(
            f"Serving needs transformers {OLDEST} or newer, and {transformers.__version__} is installed. Run "
            f'`pip install "transformers>={OLDEST}"`.'
        )
    from transformers import ContinuousBatchingConfig

    if model.device.type == "cpu":  # transformers would take 0.6 of the memory of the machine
        cache_tokens, step_tokens = cache_tokens or _CPU_CACHE, step_tokens or _CPU_STEP
    config = ContinuousBatchingConfig(
        page_size=_PAGE,
        num_blocks=None if cache_tokens is None else -(-cache_tokens // _PAGE),
        max_batch_tokens=step_tokens,
        allow_block_sharing=False,
        use_cuda_graph=False,
        use_async_batching=False,
    )
    greedy = GenerationConfig(do_sample=False, eos_token_id=-1)
    manager = model.init_continuous_batching(generation_config=greedy, continuous_batching_config=config)
    manager.model = _Stepped(model, step)
    manager.start()
    while manager.batch_processor is None:
        if (fatal := manager.background_thread_status.fatal_error) is not None:
            raise RuntimeError(f"Continuous batching cannot start: {fatal}") from fatal
        time.sleep(0.01)
    return manager


def _capacity(manager: Any) -> int:
    """How many tokens one request can have in the cache."""
    from transformers.generation.continuous_batching.model_runner import infer_max_single_request_tokens

    return int(infer_max_single_request_tokens(manager.batch_processor.cache))
