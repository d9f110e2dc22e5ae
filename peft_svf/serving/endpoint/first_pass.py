"""The first pass of `model="auto"`: which expert answers a request, for all waiting requests at once."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

from ...routing.dispatch import Dispatch, Dispatcher
from ...scoring.names import BASE
from .errors import RequestError
from .experts import Choice, Experts

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Dispatched:
    """
    The choice of a first pass.

    Attributes:
        choice ([`Choice`]): What answers.
        confidence: Probability of the chosen expert; `None` if the first pass failed.
        seconds: Time from the request to the choice.
    """

    choice: Choice
    confidence: float | None
    seconds: float


class FirstPass:
    """
    Dispatch of requests that arrive one by one. While one batch is dispatched, the next one gathers.

    Args:
        dispatcher ([`Dispatcher`]): Chooses an expert for each prompt.
        experts ([`Experts`]): The experts that can be chosen.
        executor (`Executor`): Runs the dispatcher, in one thread.
        soft (`bool`): Mix the experts by their probabilities.
        max_batch (`int`): Prompts of a batch.
        on_failure (`Callable`): Called once for each failed first pass.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        experts: Experts,
        executor: Executor,
        *,
        soft: bool = False,
        max_batch: int = 32,
        on_failure: Callable[[], Any],
    ) -> None:
        self._dispatcher, self._experts, self._executor = dispatcher, experts, executor
        self._soft, self._max_batch, self._on_failure = soft, max_batch, on_failure
        self._waiting: list[tuple[Any, asyncio.Future[tuple[Choice, float | None]]]] = []
        self._task: asyncio.Task[None] | None = None

    async def __call__(self, prompt: Any) -> Dispatched:
        """Choose the expert of a prompt, text or messages. A prompt without a choice goes to the base model."""
        start, future = time.perf_counter(), asyncio.get_running_loop().create_future()
        self._waiting.append((prompt, future))
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())
        choice, confidence = await future
        return Dispatched(choice, confidence, time.perf_counter() - start)

    async def _run(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting[: self._max_batch], self._waiting[self._max_batch :]
            batch = [(prompt, future) for prompt, future in batch if not future.done()]  # of clients that left
            if not batch:
                continue
            prompts = [prompt for prompt, _ in batch]
            try:
                dispatch = await asyncio.get_running_loop().run_in_executor(self._executor, self._dispatch, prompts)
                choices = [self._chosen(dispatch, i) for i in range(len(prompts))]
            except Exception:
                _log.exception("The first pass failed. The base model answers.")
                choices = [self._failed()] * len(prompts)
            for (_, future), choice in zip(batch, choices, strict=True):
                if not future.done():
                    future.set_result(choice)

    def _dispatch(self, prompts: list[Any]) -> Dispatch:
        with self._experts.engine.paused():
            return self._dispatcher(prompts)

    def _chosen(self, dispatch: Dispatch, i: int) -> tuple[Choice, float | None]:
        if i in dispatch.errors:
            _log.warning("The first pass failed: %s The base model answers.", dispatch.errors[i])
            return self._failed()
        name = dispatch.choices[i]
        probability = dict(zip(dispatch.labels, dispatch.probabilities[i].tolist(), strict=True)).get(name)
        if self._soft and len(dispatch.experts) > 1:
            weights = dict(zip(dispatch.experts, dispatch.soft_weights[i].tolist(), strict=True))
            mixed = {expert: weight for expert, weight in weights.items() if weight}
            return self._experts.mixture(mixed) if mixed else self._experts.base, probability
        if name == BASE:
            return self._experts.base, probability
        try:
            return self._experts.find(name), probability
        except RequestError:  # an adapter of the dispatcher: its mixture
            return Choice(name, {name: 1.0}, "mixture"), probability

    def _failed(self) -> tuple[Choice, float | None]:
        self._on_failure()
        return self._experts.base, None
