"""`AdaptiveMixture`: a weighted sum of experts, with weights found from a few examples (Transformer², section 3.2)."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from .._progress import progress_bar
from ..scoring import LogLikelihoodObjective, Objective, RewardFunc, RewardObjective
from ..tuner import SVFConfig, SVFLayer, SVFModel, SVFRuntimeConfig
from .cem import CrossEntropyMethod

BASE = "base"
UNIFORM = "uniform"
SEARCHED = "searched"


@dataclass
class MixtureResult:
    """What a search found, next to what needs no search.

    Attributes:
        weights: The weights that are now in place, per expert.
        score: Their mean score on the examples.
        choice: Where they come from: `"searched"`, or the name of the simple choice that was at least as good:
            `"base"`, an expert, or `"uniform"`.
        scores: Mean score on the examples of the base model, every expert alone, the uniform mixture, and the best
            searched mixture.
        searched_weights: The best weights that the search found, whether chosen or not.
        history: Per generation: `best`, `mean`, and `incumbent`, the weights of the best candidate.
        objective: `"reward"` or `"log-likelihood"`.
        evaluations: Number of mixtures that were scored, simple choices included.
        seconds: Duration.
    """

    weights: dict[str, float]
    score: float
    choice: str
    scores: dict[str, float]
    searched_weights: dict[str, float]
    objective: str
    evaluations: int
    seconds: float
    history: list[dict[str, Any]] = field(default_factory=list)

    @property
    def improved(self) -> bool:
        """Whether the search beat every simple choice on the examples."""
        return self.choice == SEARCHED

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable."""
        return asdict(self)

    def __str__(self) -> str:
        weights = ", ".join(f"{name} {weight:.2f}" for name, weight in self.weights.items())
        others = ", ".join(f"{name} {score:.3f}" for name, score in self.scores.items())
        verdict = (
            "the searched mixture beat every simple choice"
            if self.improved
            else f"nothing beat {self.choice!r}, which was kept"
        )
        return f"{verdict}: {self.objective} {self.score:.3f} with {weights} (all: {others})"


class AdaptiveMixture:
    """
    A model whose active adapter is a mixture `δ = Σ_k α_k δ_k` of SVF experts.

    The mixture is itself an ordinary SVF adapter of the model: it generates, saves, merges and loads as one.

    Args:
        model (`PeftModel`): A model with SVF adapters.
        experts (`list[str]`): The adapters to mix; all of the model's if `None`.
        tokenizer: The model's tokenizer.
        adapter_name (`str`): What to call the mixture.

    Raises:
        ValueError: No experts, an adapter that is unknown or no SVF adapter, or a name that is taken.

    Example:

        ```py
        >>> mixture = AdaptiveMixture.from_pretrained(base_model, {"math": path, "logic": path}, tokenizer=tokenizer)
        >>> result = mixture.search(examples, reward_funcs=reward)
        >>> mixture.generate(**inputs)
        >>> mixture.save_pretrained(folder)
        ```
    """

    def __init__(
        self,
        model: PeftModel,
        experts: Sequence[str] | None = None,
        *,
        tokenizer: Any = None,
        adapter_name: str = "mixture",
    ) -> None:
        if not isinstance(getattr(model, "base_model", None), SVFModel):
            raise ValueError(f"Expected a PeftModel with SVF adapters, got {type(model).__name__}.")
        self.model = model
        self.experts = list(model.peft_config) if experts is None else list(experts)
        _check_names(self.experts, adapter_name)
        self.tokenizer = tokenizer
        self.adapter_name = adapter_name
        model.base_model.add_weighted_adapter(self.experts, [1 / len(self.experts)] * len(self.experts), adapter_name)
        model.set_adapter(adapter_name, inference_mode=True)
        model.eval()
        self._weights = np.full(len(self.experts), 1 / len(self.experts))
        self.result: MixtureResult | None = None

    @classmethod
    def from_pretrained(
        cls,
        base_model: PreTrainedModel | str | os.PathLike[str],
        experts: Mapping[str, str | os.PathLike[str]],
        *,
        tokenizer: Any = None,
        adapter_name: str = "mixture",
        base_check: Literal["error", "warn", "ignore"] = "error",
        **kwargs: Any,
    ) -> AdaptiveMixture:
        """
        Load experts onto a base model.

        Args:
            base_model (`PreTrainedModel` or `str`): The model, or its Hub id or folder.
            experts (`dict[str, str]`): Names and where to load them from, each a Hub id or folder of an SVF adapter.
            tokenizer: The tokenizer, which a search needs; by default that of `base_model` if this is a name.
            adapter_name (`str`): What to call the mixture.
            base_check (`str`): What to do when an expert was made for another base model, see [`SVFRuntimeConfig`].
            kwargs: For `AutoModelForCausalLM.from_pretrained`, when `base_model` is a name.
        """
        _check_names(list(experts), adapter_name)
        if not isinstance(base_model, (str, os.PathLike)):
            if kwargs:
                raise TypeError(f"`{next(iter(kwargs))}` is only for a base model given by name.")
            if isinstance(base_model, PeftModel) or any(isinstance(m, BaseTunerLayer) for m in base_model.modules()):
                raise ValueError(
                    "The base model already has adapters, perhaps of a mixture made before. `unload()` them, load the "
                    "base model anew, or mix the adapters that it has: `AdaptiveMixture(peft_model, names)`."
                )
        # read all before the model is touched
        configs = {name: _expert_config(name, path, base_check) for name, path in experts.items()}
        if isinstance(base_model, (str, os.PathLike)):
            tokenizer = AutoTokenizer.from_pretrained(base_model) if tokenizer is None else tokenizer
            base_model = AutoModelForCausalLM.from_pretrained(base_model, **kwargs)

        model: Any = None
        try:
            for name, path in experts.items():
                if model is None:
                    model = PeftModel.from_pretrained(base_model, path, adapter_name=name, config=configs[name])
                else:
                    model.add_adapter(name, configs[name])
                    model.load_adapter(path, adapter_name=name)
            return cls(model, list(experts), tokenizer=tokenizer, adapter_name=adapter_name)
        except BaseException:
            if model is not None:
                model.unload()  # leave the base model as it was
            raise

    # ------------------------------------------------------------------------------------------------ weights

    @property
    def weights(self) -> dict[str, float]:
        """α, per expert. All 0 is the base model."""
        return dict(zip(self.experts, self._weights.tolist(), strict=True))

    def set_weights(self, weights: Mapping[str, float] | Sequence[float] | np.ndarray) -> None:
        """Put other weights in place: by expert (those left out get 0), or one per expert in order. The result of a
        search is forgotten.

        Raises:
            ValueError: An unknown expert, a wrong number of weights, one that is not finite, or a merged mixture.
        """
        self._put(weights)
        self.result = None

    def _put(self, weights: Mapping[str, float] | Sequence[float] | np.ndarray) -> None:
        layers = [m for m in self.model.modules() if isinstance(m, SVFLayer) and self.adapter_name in m.svf_delta]
        if any(layer.merged for layer in layers):
            raise ValueError(
                "The model is merged, so other weights would have no effect; call `unmerge_adapter` first."
            )
        if isinstance(weights, Mapping):
            if unknown := sorted(set(weights) - set(self.experts)):
                raise ValueError(f"Unknown expert {unknown[0]!r}; there are {', '.join(self.experts)}.")
            weights = [weights.get(name, 0.0) for name in self.experts]
        alpha = np.array(weights, dtype=np.float64)
        if alpha.shape != (len(self.experts),) or not np.isfinite(alpha).all():
            raise ValueError(f"Expected {len(self.experts)} finite weights, got {alpha.tolist()}.")
        self._weights = alpha
        for layer in layers:
            layer.mix(self.adapter_name, self.weights.items())

    # ------------------------------------------------------------------------------------------------ search

    def search(
        self,
        examples: Sequence[dict[str, Any]],
        reward_funcs: RewardFunc | Sequence[RewardFunc] | None = None,
        *,
        num_generations: int = 10,
        population_size: int = 16,
        optimizer: Any = None,
        batch_size: int = 16,
        generation_kwargs: dict[str, Any] | None = None,
        seed: int = 0,
    ) -> MixtureResult:
        """
        Find weights from a few examples, and put them in place.

        The base model, every expert alone and the uniform mixture are scored on the same examples. If none of the
        searched mixtures beats them, the best of them is kept and the result says so.

        Args:
            examples (`Sequence[dict]` or `datasets.Dataset`): Rows with `"prompt"`; without `reward_funcs` also with
                `"completion"`. Text or messages, as for TRL.
            reward_funcs (`Callable` or list of them, *optional*): TRL reward functions for generated answers. Without,
                the objective is the log-likelihood of the `"completion"` column.
            num_generations (`int`): Generations of the search.
            population_size (`int`): Candidates per generation, unless `optimizer` is given.
            optimizer (*optional*): An object with `ask()`, `tell()` and `population_size` as in the `cmaes` package,
                over as many variables as there are experts; values are minimised. Default: [`CrossEntropyMethod`] with
                α in [0, 1], started at the uniform mixture with std 0.5 as in the paper's code, smoothed by 0.2 and
                floored at std 0.05.
            batch_size (`int`): Examples per forward or `generate` call.
            generation_kwargs (`dict`): For `generate`, such as `max_new_tokens`.
            seed (`int`): Seed of the search, unless `optimizer` is given.

        Raises:
            ValueError: No examples, a missing column, no tokenizer, or a reward function that does not return one
                finite number (or `None`) per completion.
        """
        if self.tokenizer is None:
            raise ValueError("A search needs a tokenizer; pass one when the mixture is made.")
        if num_generations < 1:
            raise ValueError(f"`num_generations` must be at least 1, got {num_generations}.")
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
        if getattr(self.model.config, "is_encoder_decoder", False):
            raise ValueError("A search needs a decoder-only model; this one is an encoder-decoder model.")
        rows = list(examples)
        objective: Objective
        if reward_funcs is None:
            objective = LogLikelihoodObjective(rows, self.tokenizer, batch_size=batch_size)
        else:
            objective = RewardObjective(
                rows, reward_funcs, self.tokenizer, batch_size=batch_size, generation_kwargs=generation_kwargs
            )
        if optimizer is None:
            optimizer = CrossEntropyMethod(
                np.full(len(self.experts), 1 / len(self.experts)),
                0.5,
                bounds=np.array([[0.0, 1.0]] * len(self.experts)),
                population_size=population_size,
                smoothing=0.2,
                min_std=0.05,
                seed=seed,
            )
        before = self._weights
        try:
            self.result = self._search(objective, optimizer, num_generations)
        except BaseException:
            self._put(before)
            raise
        self._put(self.result.weights)
        return self.result

    def _search(self, objective: Objective, optimizer: Any, num_generations: int) -> MixtureResult:
        start = time.perf_counter()
        self.model.set_adapter(self.adapter_name, inference_mode=True)
        self.model.eval()
        simple = self._simple_choices()
        history: list[dict[str, Any]] = []
        best, best_score = np.array(simple[UNIFORM]), -np.inf
        total = len(simple) + num_generations * optimizer.population_size + 1
        with progress_bar(desc=f"Searching the mixture ({objective.name})", total=total, unit="mixture") as bar:

            def evaluate(alpha: np.ndarray) -> float:
                self._put(alpha)
                score = float(np.mean(objective(self.model)))
                bar.update()
                return score

            scores = {name: evaluate(alpha) for name, alpha in simple.items()}
            for generation in range(num_generations):
                candidates = [optimizer.ask() for _ in range(optimizer.population_size)]
                values = [evaluate(alpha) for alpha in candidates]
                optimizer.tell([(alpha, -value) for alpha, value in zip(candidates, values, strict=True)])
                leader = int(np.argmax(values))
                if values[leader] > best_score:
                    best, best_score = candidates[leader], values[leader]
                history.append(
                    {
                        "generation": generation,
                        "best": values[leader],
                        "mean": float(np.mean(values)),
                        "incumbent": candidates[leader].tolist(),
                    }
                )
                bar.set_postfix(best=f"{best_score:.3f}", simple=f"{max(scores.values()):.3f}")
                if hasattr(optimizer, "should_stop") and optimizer.should_stop():
                    break
            # anew, as the best of many scores is a lucky one if decoding samples
            best_score = evaluate(best)

        scores[SEARCHED] = best_score
        # ties go to the earlier, which is the simpler
        choice = max(scores, key=lambda name: scores[name])
        chosen = best if choice == SEARCHED else simple[choice]
        return MixtureResult(
            weights=dict(zip(self.experts, map(float, chosen), strict=True)),
            score=scores[choice],
            choice=choice,
            scores=scores,
            searched_weights=dict(zip(self.experts, map(float, best), strict=True)),
            objective=objective.name,
            evaluations=len(simple) + len(history) * optimizer.population_size + 1,
            seconds=time.perf_counter() - start,
            history=history,
        )

    def _simple_choices(self) -> dict[str, np.ndarray]:
        """The weights that need no search, simplest first."""
        count = len(self.experts)
        alone = dict(zip(self.experts, np.eye(count), strict=True))
        return {BASE: np.zeros(count), **alone, UNIFORM: np.full(count, 1 / count)}

    # ------------------------------------------------------------------------------------------------ use

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """`generate` of the model with the mixture active."""
        if self.model.active_adapters != [self.adapter_name]:
            self.model.set_adapter(self.adapter_name, inference_mode=True)
        return self.model.generate(*args, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """
        Save the mixture as an ordinary SVF adapter, which `PeftModel.from_pretrained` loads without the experts.

        `mixture.json` beside it records the experts, the weights and the result of the search.
        """
        folder = Path(save_directory)
        if folder.is_file():
            raise ValueError(f"{folder} is a file; expected a folder to save the mixture in.")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as scratch:
            # PEFT puts an adapter that is not called "default" into a subfolder
            # no embedding is trained, so none is looked for, on the hub for one
            self.model.save_pretrained(scratch, selected_adapters=[self.adapter_name], save_embedding_layers=False)
            about = {"weights": self.weights, "result": self.result.to_dict() if self.result else None}
            (Path(scratch) / "mixture.json").write_text(json.dumps(about, indent=2) + "\n")
            for path in Path(scratch).rglob("*.*"):
                if path.name == "README.md" and (folder / path.name).exists():
                    continue  # somebody's model card
                os.replace(path, folder / path.name)


def _check_names(experts: Sequence[str], adapter_name: str) -> None:
    if not experts:
        raise ValueError("No experts: a mixture needs at least one.")
    if "." in adapter_name or not adapter_name:
        raise ValueError(f"The mixture cannot be called {adapter_name!r}: PEFT's names have no dots.")
    if adapter_name in experts:
        raise ValueError(f"An expert is called {adapter_name!r} as the mixture is; pass another `adapter_name`.")
    for name in experts:
        if name in (BASE, UNIFORM, SEARCHED) or "." in name or not name:
            raise ValueError(
                f"An expert cannot be called {name!r}: PEFT's names have no dots, and {BASE!r}, {UNIFORM!r} and "
                f"{SEARCHED!r} stand for weights in a `MixtureResult`."
            )


def _expert_config(name: str, path: str | os.PathLike[str], base_check: Any) -> SVFConfig:
    config = SVFConfig.from_pretrained(path)
    if not isinstance(config, SVFConfig):
        raise ValueError(f"Expert {name!r} ({path}) is a {config.peft_type} adapter; only SVF adapters can be mixed.")
    config.runtime_config = SVFRuntimeConfig(base_check=base_check)
    config.inference_mode = True
    return config
