"""What the page can do, without the page: load, answer, search, draw."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from ..mixture.mixture import AdaptiveMixture
from ..mixture.result import MixtureResult
from ..reporting.plots import plot_deltas
from ..routing.dispatch import Dispatch, Dispatcher
from ..routing.self_adaptive import SelfAdaptiveModel
from ..scoring.names import BASE
from ..scoring.rewards import find_reward
from ..search.loop import EQUAL_SCORES
from ..search.progress import SearchProgress
from ..tuner.deltas import adapter_deltas
from .jobs import Jobs
from .pasted import pasted_examples
from .setup import AUTO, Setup
from .streaming import RowStreamer, Stopped

MIXTURE = "mixture"  # the answer with the weights of the sliders
LOGLIK = "loglik"  # no reward: the log-likelihood of the answers


@dataclass(frozen=True)
class Turn:
    """
    A question with its answers.

    Attributes:
        question: The text.
        answers: The answer of each column, which grows while it is generated.
        errors: Why a column has no answer.
        probabilities: Of each expert, as `auto` sees the question; empty without `auto`.
        chosen: The expert that `auto` chose.
        weights: The weights of the mixture; empty without it.
        done: Whether the answers are complete.
    """

    question: str
    answers: dict[str, str]
    errors: dict[str, str] = field(default_factory=dict)
    probabilities: dict[str, float] = field(default_factory=dict)
    chosen: str = ""
    weights: dict[str, float] = field(default_factory=dict)
    done: bool = False


@dataclass(frozen=True)
class Searched:
    """
    A search that has ended.

    Attributes:
        result: The result.
        name: The column that answers with the result; `None` if nothing was kept.
    """

    result: MixtureResult
    name: str | None


class Session:
    """
    One model with its experts, and the jobs on it.

    Args:
        options: More arguments of [`load_experts`], such as `dtype`.
    """

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.jobs = Jobs()
        self.loaded: Setup | None = None
        self.loads = 0  # how often a model was loaded
        self.searched: list[str] = []
        self._mixture: AdaptiveMixture | None = None
        self._dispatcher: Dispatcher | None = None

    @property
    def experts(self) -> list[str]:
        """The names of the experts; none before a model is loaded."""
        return [] if self._mixture is None else self._mixture.experts

    @property
    def columns(self) -> list[str]:
        """Everything that can answer a question."""
        return [BASE, *self.experts, MIXTURE, AUTO, *self.searched] if self.experts else []

    def load(self, setup: Setup) -> Iterator[str]:
        """Load a model, and yield a line about it. After an error the model before stays.

        Raises:
            ValueError: See [`Setup.load`].
            OSError: See [`Setup.load`].
        """

        def job(emit: Callable[[Any], None]) -> None:
            self._mixture, self._dispatcher = setup.load(**self.options)
            self.loaded, self.loads, self.searched = setup, self.loads + 1, []
            emit(f"Loaded {setup.model} with {len(self.experts)} experts. auto: {self._dispatcher!r}.")

        return self.jobs.run(job)

    def ask(
        self,
        question: str,
        columns: Sequence[str],
        weights: Mapping[str, float],
        turns: Sequence[Turn] = (),
        *,
        system_prompt: str = "",
        max_new_tokens: int = 256,
    ) -> Iterator[Turn]:
        """
        Answer a question by all columns in one batch, and yield the answers as they grow.

        Args:
            question (`str`): The text.
            columns (`list[str]`): Who answers, of `columns`.
            weights (`dict[str, float]`): The weights of the mixture, by expert.
            turns (`Sequence[Turn]`): The conversation so far. Each column sees its own answers.
            system_prompt (`str`): The first message; none if empty.
            max_new_tokens (`int`): Longest answer, in tokens.

        Raises:
            ValueError: No model is loaded, the question is empty, nothing is to answer, or `auto` cannot choose.
        """
        mixture, dispatcher = self._model()
        if not question.strip():
            raise ValueError("The question is empty. Type a question first.")
        if not columns:
            raise ValueError("Nobody is to answer. Choose at least one of the answers.")
        if gone := [column for column in columns if column not in self.columns]:
            raise ValueError(f"There is no {gone[0]!r} any more. Reload the page.")

        def job(emit: Callable[[Any], None]) -> None:
            asked = [_conversation(turns, column, question) for column in columns]
            turn = Turn(question, dict.fromkeys(columns, ""))
            if MIXTURE in columns:
                mixture.set_weights(weights)
                turn = replace(turn, weights=mixture.weights)
            adapters = {column: column for column in columns} | {MIXTURE: mixture.adapter_name}
            if AUTO in columns:
                found = dispatcher([question])  # not the questions before, which may be of another kind
                if found.errors:
                    raise ValueError(f"auto cannot choose an expert: {found.errors[0]}")
                shares = dict(zip(found.labels, found.probabilities[0].tolist(), strict=True))
                adapters[AUTO] = found.choices[0]
                turn = replace(turn, probabilities=shares, chosen=found.choices[0])
            emit(turn)

            def grown(texts: list[str]) -> None:
                if len(texts) == len(columns):  # otherwise a row failed, and the texts come at the end
                    emit(replace(turn, answers=dict(zip(columns, texts, strict=True))))

            names = [adapters[column] for column in columns]
            rows = Dispatch(names, np.eye(len(names)), names)
            adaptive = SelfAdaptiveModel(mixture.model, mixture.tokenizer, lambda prompts: rows)
            answers = adaptive.chat(
                asked,
                system_prompt=system_prompt.strip() or None,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                streamer=RowStreamer(adaptive.tokenizer, grown),
                stopping_criteria=[Stopped(self.jobs.stopped)],
                return_details=True,
            )
            texts = dict(zip(columns, (text or "" for text in answers.texts), strict=True))
            errors = {columns[i]: reason for i, reason in answers.errors.items()}
            emit(replace(turn, answers=texts, errors=errors, done=True))

        return self.jobs.run(job)

    def search(
        self, examples: str, reward: str, *, system_prompt: str = "", max_new_tokens: int = 64
    ) -> Iterator[SearchProgress | Searched]:
        """
        Search a mixture from pasted examples. Yield the progress, and at last the result, which is a new column.

        Args:
            examples (`str`): See [`pasted_examples`].
            reward (`str`): Name of a reward function, or `"loglik"`.
            system_prompt (`str`): The first message of all prompts; none if empty.
            max_new_tokens (`int`): Longest answer, in tokens.

        Raises:
            ValueError: No model is loaded, the examples are malformed, or the search was stopped too early.
        """
        mixture, _ = self._model()
        chat = bool(getattr(mixture.tokenizer, "chat_template", None))
        rows = pasted_examples(examples, chat=chat, system_prompt=system_prompt.strip() or None)
        settings: dict[str, Any] = {} if reward == LOGLIK else {"max_new_tokens": max_new_tokens}
        function = None if reward == LOGLIK else find_reward(reward)

        def job(emit: Callable[[Any], None]) -> None:
            interrupted = False

            def on_progress(progress: SearchProgress) -> None:
                nonlocal interrupted
                emit(replace(progress, history=list(progress.history)))
                if self.jobs.stopped.is_set() and not interrupted:
                    interrupted = True  # a second one would throw the result away
                    raise KeyboardInterrupt

            try:
                result = mixture.search(rows, function, on_progress=on_progress, **settings)
            except KeyboardInterrupt:
                raise ValueError("The search was stopped before its first scores, so there is no result.") from None
            name = None
            if result.stopped != EQUAL_SCORES:
                taken = mixture.model.peft_config
                name = next(each for i in itertools.count(1) if (each := f"searched-{i}") not in taken)
                mixture.apply(name)
                self.searched.append(name)
            emit(Searched(result, name))

        return self.jobs.run(job)

    def heat_map(self, column: str, weights: Mapping[str, float]) -> Iterator[bytes]:
        """
        Draw δ of an expert, of a searched mixture, or of the mixture with these weights; yield a PNG.

        Raises:
            ValueError: No model is loaded, or there is no such column.
            ImportError: matplotlib is not installed.
        """
        mixture, _ = self._model()
        if column not in self.columns or column in (BASE, AUTO):
            raise ValueError(f"There is no δ of {column!r}. Choose an expert or a mixture.")

        def job(emit: Callable[[Any], None]) -> None:
            if column == MIXTURE:
                mixture.set_weights(weights)
            deltas = adapter_deltas(mixture.model, mixture.adapter_name if column == MIXTURE else column)
            with TemporaryDirectory() as folder:
                path = Path(folder) / "delta.png"
                plot_deltas(deltas, path, title=column)
                emit(path.read_bytes())

        return self.jobs.run(job)

    def _model(self) -> tuple[AdaptiveMixture, Dispatcher]:
        if self._mixture is None or self._dispatcher is None:
            raise ValueError("No model is loaded yet. Choose one under Model.")
        return self._mixture, self._dispatcher


def _conversation(turns: Sequence[Turn], column: str, question: str) -> list[dict[str, str]]:
    """Return the messages that a column has seen, with the new question."""
    answered = [turn for turn in turns if column in turn.answers and column not in turn.errors]
    before = [
        message
        for turn in answered
        for message in (
            {"role": "user", "content": turn.question},
            {"role": "assistant", "content": turn.answers[column]},
        )
    ]
    return [*before, {"role": "user", "content": question}]
