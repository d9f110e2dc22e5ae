"""`AdaptiveMixture`: a weighted sum of experts, with weights found from a few examples (Transformer², section 3.2)."""

from __future__ import annotations

import copy
import json
import os
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal

import numpy as np
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from ..reporting.mixture_card import is_mixture_card, mixture_card
from ..routing.dispatch import Dispatch, fixed_dispatch
from ..scoring.expected_reward import TEMPERATURE, ExpectedRewardObjective
from ..scoring.objectives import LogLikelihoodObjective, Objective, RewardObjective
from ..scoring.rewards import RewardFunc
from ..search.answers import SAMPLES
from ..search.checkpoint import Checkpoint
from ..search.evaluator import Evaluator, check_differentiable
from ..search.identity import description_of, digest_of_base, digest_of_experts, digest_of_rows
from ..search.loop import Limits, Plan
from ..search.optimizers.optimizer import make_optimizer
from ..search.procedure import Procedure
from ..search.result import MixtureResult
from ..search.space import BASE, UNIFORM, Granularity, WeightSpace
from ..search.statistics import IN_CONTEXT, SEARCHED
from ..search.validation import split_examples
from ..tuner.config import SVFRuntimeConfig
from ..tuner.layer import SVFLayer
from ..tuner.model import SVFModel
from .experts import expert_config

GENERATIONS, STEPS = 6, 12  # by default, and of the gradient


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
        self._warn_of_gaps()
        self._alpha = np.full((len(self.experts), 1), 1 / len(self.experts))
        self._group_of: Mapping[str, int] | None = None
        self.result: MixtureResult | None = None
        self.sources: dict[str, str] = {}  # where the experts were loaded from

    def _warn_of_gaps(self) -> None:
        """Say so if the experts do not all adapt the same numbers."""
        layers = self._mixed_layers(self.adapter_name)
        of_each = {
            name: {layer.module_name: layer.rank(name) for layer in layers if name in layer.svf_delta}
            for name in self.experts
        }
        if all(ranks == of_each[self.experts[0]] for ranks in of_each.values()):
            return
        numbers = ", ".join(f"{name} {sum(ranks.values())} in {len(ranks)}" for name, ranks in of_each.items())
        warnings.warn(
            f"The experts do not adapt the same singular values ({numbers} modules). Where one adapts none, its part "
            "of the mixture is 0.",
            stacklevel=3,
        )

    @classmethod
    def from_pretrained(
        cls,
        base_model: PreTrainedModel | str | os.PathLike[str],
        experts: Mapping[str, str | os.PathLike[str]],
        *,
        tokenizer: Any = None,
        adapter_name: str = "mixture",
        base_check: Literal["error", "warn", "ignore"] = "error",
        runtime_config: SVFRuntimeConfig | None = None,
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
            runtime_config ([`SVFRuntimeConfig`], *optional*): For all experts, such as the basis pack that quantized
                models need; in the place of `base_check`.
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
        configs = {name: expert_config(name, path, base_check, runtime_config) for name, path in experts.items()}
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
            mixture = cls(model, list(experts), tokenizer=tokenizer, adapter_name=adapter_name)
            mixture.sources = {name: str(path) for name, path in experts.items()}
            return mixture
        except BaseException:
            if model is not None:
                model.unload()  # leave the base model as it was
            raise

    # ------------------------------------------------------------------------------------------------ weights

    @property
    def weights(self) -> dict[str, float]:
        """α, per expert; the mean where groups of modules have weights of their own. All 0 is the base model."""
        return dict(zip(self.experts, self._alpha.mean(axis=1).tolist(), strict=True))

    def set_weights(self, weights: Mapping[str, float] | Sequence[float] | np.ndarray) -> None:
        """Put other weights in place: by expert (those left out get 0), or one per expert in order. The result of a
        search is forgotten.

        Raises:
            ValueError: An unknown expert, a wrong number of weights, one that is not finite, or a merged mixture.
        """
        self._put(weights)
        self.result = None

    def _put(self, weights: Mapping[str, float] | Sequence[float] | np.ndarray) -> None:
        if isinstance(weights, Mapping):
            if unknown := sorted(set(weights) - set(self.experts)):
                raise ValueError(f"Unknown expert {unknown[0]!r}; there are {', '.join(self.experts)}.")
            weights = [weights.get(name, 0.0) for name in self.experts]
        alpha = np.array(weights, dtype=np.float64)
        if alpha.shape != (len(self.experts),) or not np.isfinite(alpha).all():
            raise ValueError(f"Expected {len(self.experts)} finite weights, got {alpha.tolist()}.")
        self._put_groups(alpha[:, None], None)

    def _put_groups(self, alpha: np.ndarray, group_of: Mapping[str, int] | None) -> None:
        """α `[experts, groups]`."""
        self._check_present()
        layers = self._mixed_layers(self.adapter_name)
        if any(layer.merged for layer in layers):
            raise ValueError(
                "The model is merged, so other weights would have no effect; call `unmerge_adapter` first."
            )
        self._alpha, self._group_of = alpha, group_of
        self._mix(self.adapter_name)

    def _mix(self, adapter_name: str) -> None:
        """Give an adapter the δ of the mixture."""
        for layer in self._mixed_layers(adapter_name):
            group = 0 if self._group_of is None else self._group_of[layer.module_name]
            layer.mix(adapter_name, zip(self.experts, self._alpha[:, group].tolist(), strict=True))

    def _check_present(self) -> None:
        for name in (*self.experts, self.adapter_name):
            if name not in self.model.peft_config:
                raise ValueError(
                    f"{name!r} was deleted from the model, so that its mixture cannot change any more; make a new "
                    "`AdaptiveMixture` of the experts that are there."
                )

    def _mixed_layers(self, adapter_name: str) -> list[SVFLayer]:
        return [m for m in self.model.modules() if isinstance(m, SVFLayer) and adapter_name in m.svf_delta]

    # ------------------------------------------------------------------------------------------------ search

    def search(
        self,
        examples: Sequence[dict[str, Any]] | None = None,
        reward_funcs: RewardFunc | Sequence[RewardFunc] | None = None,
        *,
        objective: Objective | None = None,
        reward_weights: Sequence[float] | None = None,
        generation_kwargs: dict[str, Any] | None = None,
        validation: Literal["auto"] | float | Sequence[dict[str, Any]] | None = "auto",
        granularity: Granularity = "expert",
        bounds: tuple[float, float] = (0.0, 1.0),
        normalize: bool = False,
        l1: float = 0.0,
        l2: float = 0.0,
        optimizer: Any = "cem",
        num_generations: int | None = None,
        population_size: int = 32,
        racing: bool = True,
        one_standard_error: bool = True,
        patience: int | None = None,
        max_rows: int | None = None,
        max_tokens: int | None = None,
        max_seconds: float | None = None,
        in_context: bool = True,
        batch_size: int | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        resume: bool = False,
        seed: int = 0,
    ) -> MixtureResult:
        """
        Find weights from a few examples, and put them in place (Transformer², section 3.2, "few-shot adaptation").

        The base model, every expert alone and the uniform mixture are scored on the same examples. If the searched
        mixture does not beat them, the best of them is kept and the result says so. In-context prompting is
        scored, too.

        Ctrl-C ends the search with what it found so far, once the simple choices were scored.

        Args:
            examples (`Sequence[dict]` or `datasets.Dataset`): Rows with `"prompt"`; without `reward_funcs` also with
                `"completion"`. Text or messages, as for TRL.
            reward_funcs (`Callable` or list of them, *optional*): TRL reward functions for generated answers. Without,
                the objective is the log-likelihood of the `"completion"` column.
            objective ([`Objective`], *optional*): In the place of the two, such as a [`WeightedObjective`].
            reward_weights (`Sequence[float]`, *optional*): A factor for each reward function.
            generation_kwargs (`dict`, *optional*): For `generate`, such as `max_new_tokens`. Decoding is greedy if it
                does not say otherwise.
            validation (`str`, `float`, `int` or rows, *optional*):
                How to know whether the search was of use. A share below 1 of the examples is held out, or rows of
                their own are given: the mixture that was found is scored on them. A number of folds from 2: the search
                is repeated without each fold, and scored on it. `None`: on the examples of the search. `"auto"`: a
                third held out from 24 examples on, 3 folds from 6 on, which takes four searches, else `None`.
            granularity (`str` or `dict[str, str]`): One α per expert (`"expert"`), per expert and block (`"layer"`),
                per expert and weight matrix (`"module"`), or per expert and group of modules, by
                `SVFLayer.module_name`.
            bounds (`tuple[float, float]`): Smallest and largest α, with 0, the base model, between them.
            normalize (`bool`): Scale α down where `Σ_k |α_k| > 1`.
            l1, l2 (`float`): Penalties on `Σ_k |α_k|` and `Σ_k α_k²`, in units of the score.
            optimizer (`str` or [`Optimizer`]): `"cem"`, `"cem-paper"`, `"cma-es"`, `"sep-cma-es"`, `"random"`,
                `"gradient"`, see [`make_optimizer`]; or an object with `ask()`, `tell()` and `population_size` as in
                the `cmaes` package, over experts × groups variables, which are minimised. The gradient is that of the
                log-likelihood, or with reward functions that of the expected reward: base model, experts and uniform
                mixture answer the examples first, five times each, and what is climbed is the probability of the
                answers that were rewarded, see [`ExpectedRewardObjective`]; the result is judged by the rewards.
                For answers of some tens of tokens at most. Made for `granularity="layer"`.
            num_generations (`int`, *optional*): Generations of a search, at most. By default 6, and of the gradient,
                which has one candidate in each, 12.
            population_size (`int`): Candidates per generation, unless `optimizer` is an object.
            racing (`bool`): Drop candidates that do badly on a part of the examples. About half the work.
            one_standard_error (`bool`): Keep the simple choice that the search began with unless what it found is
                better by more than the standard error of the difference, on its own examples.
            patience (`int`, *optional*): Generations without a better candidate after which a search stops.
            max_rows, max_tokens, max_seconds (*optional*): After the first generation, none is begun that would
                probably go beyond so many pairs of a mixture and an example, tokens, or seconds, in all. The simple
                choices are scored before, and for the gradient of a reward they answer the examples.
            in_context (`bool`): Whether to score in-context prompting, where the examples have answers.
            batch_size (`int`, *optional*): Rows per batch; by default found, see [`Evaluator`].
            checkpoint (path, *optional*): A JSON file for all scores, written after each generation.
            resume (`bool`): Go on from the checkpoint, if there is one. The result is that of a search that was not
                stopped.
            seed (`int`): Of everything that is random.

        Raises:
            ValueError: No examples, a missing column, no tokenizer, an argument out of range, a checkpoint of another
                search, or a reward function that does not return one finite number (or `None`) per completion.
        """
        self._check_present()
        if num_generations is None:
            by_steps = getattr(optimizer, "uses_gradient", optimizer == "gradient")
            num_generations = STEPS if by_steps else GENERATIONS
        num_generations = _whole("num_generations", num_generations, 1)
        one_is_enough = optimizer == "gradient" or not isinstance(optimizer, str)  # which has a number of its own
        population_size = _whole("population_size", population_size, 1 if one_is_enough else 2)
        seed = _whole("seed", seed, 0)
        batch_size, patience, max_rows, max_tokens = (
            None if value is None else _whole(name, value, least)
            for name, value, least in (
                ("batch_size", batch_size, 1),
                ("patience", patience, 1),
                ("max_rows", max_rows, 0),
                ("max_tokens", max_tokens, 0),
            )
        )
        l1, l2 = _positive("l1", l1), _positive("l2", l2)
        max_seconds = None if max_seconds is None else _positive("max_seconds", max_seconds)
        space = WeightSpace(
            self.experts,
            [layer.module_name for layer in self._mixed_layers(self.adapter_name)],
            granularity,
            bounds,
            normalize,
        )
        if getattr(self.model.config, "is_encoder_decoder", False):
            raise ValueError("A search needs a decoder-only model; this one is an encoder-decoder model.")
        if any(layer.disable_adapters for layer in self._mixed_layers(self.adapter_name)):
            raise ValueError(
                "The adapters are disabled, so that every mixture would be the base model; search outside of "
                "`disable_adapter()`, or after `enable_adapter_layers()`."
            )
        for name in () if isinstance(optimizer, str) else ("ask", "tell", "population_size"):
            if not hasattr(optimizer, name):
                raise TypeError(f"The optimizer {type(optimizer).__name__} has no `{name}`; see `Optimizer`.")
        if objective is None:
            objective = self._objective(examples, reward_funcs, reward_weights, generation_kwargs)
        elif examples is not None or reward_funcs is not None:
            raise ValueError("Pass `examples` and `reward_funcs`, or an `objective`, which has both; not all of them.")
        objective, split = split_examples(objective, validation, seed)
        trial = (
            make_optimizer(optimizer, space, population_size=population_size, seed=seed)
            if isinstance(optimizer, str)
            else optimizer
        )
        by_gradient = getattr(trial, "uses_gradient", False)
        plain = isinstance(objective, RewardObjective) and type(objective).score is RewardObjective.score
        by_answers = by_gradient and plain and not hasattr(objective, "differentiable")
        if by_gradient:
            climbed: Any = ExpectedRewardObjective if by_answers else objective
            check_differentiable(climbed, space)
        evaluator = Evaluator(self.model, space, objective, batch_size=batch_size, seed=seed)
        settings = {
            "optimizer": optimizer if isinstance(optimizer, str) else type(optimizer).__name__,
            "population_size": trial.population_size,
            "bounds": [space.low, space.high],
            "normalize": normalize,
            "l1": l1,
            "l2": l2,
            "racing": racing and not by_gradient,
            "one_standard_error": one_standard_error,
            "examples": len(objective.examples),
            "seed": seed,
            **({"sampled_answers": SAMPLES, "temperature": TEMPERATURE} if by_answers else {}),
        }
        budget = {
            "num_generations": num_generations,
            "patience": patience,
            "max_rows": max_rows,
            "max_tokens": max_tokens,
            "max_seconds": max_seconds,
            "granularity": granularity if isinstance(granularity, str) else dict(granularity),
            "validation": (
                getattr(validation, "item", lambda: validation)()  # of numpy's numbers
                if isinstance(validation, (str, Real, type(None)))
                else "rows"
            ),
            "generation_kwargs": _generation_kwargs(objective),
        }
        plan = Plan(
            num_generations,
            racing,
            patience,
            l1,
            l2,
            one_standard_error,
            limits=Limits(max_rows, max_tokens, max_seconds),
            seed=seed,
        )
        procedure = Procedure(
            evaluator,
            split,
            plan,
            (
                lambda seed, start: make_optimizer(
                    optimizer, space, population_size=population_size, seed=seed, start=start
                )
            )
            if isinstance(optimizer, str)
            else (lambda seed, start: copy.deepcopy(optimizer) if split.folds else optimizer),
            in_context,
            None if checkpoint is None else Checkpoint(checkpoint, resume, self._identity(objective, space, settings)),
            by_answers,
        )
        trained = self.model.training
        self.model.eval()
        try:
            result, chosen = procedure(settings | budget)
        except BaseException:
            self.model.train(trained)
            raise
        before = self._alpha, self._group_of
        try:
            self._put_groups(space.weights(chosen), space.group_of)
        except BaseException:
            self._put_groups(*before)
            raise
        self.model.set_adapter(self.adapter_name, inference_mode=True)
        self.result = result
        return result

    def _objective(
        self,
        examples: Sequence[dict[str, Any]] | None,
        reward_funcs: RewardFunc | Sequence[RewardFunc] | None,
        reward_weights: Sequence[float] | None,
        generation_kwargs: dict[str, Any] | None,
    ) -> Objective:
        if self.tokenizer is None:
            raise ValueError("A search needs a tokenizer; pass one when the mixture is made.")
        if examples is None:
            raise ValueError("A search needs `examples`, or an `objective`.")
        if reward_funcs is None:
            return LogLikelihoodObjective(list(examples), self.tokenizer)
        return RewardObjective(
            list(examples),
            reward_funcs,
            self.tokenizer,
            reward_weights=None if reward_weights is None else [float(weight) for weight in reward_weights],
            generation_kwargs=generation_kwargs,
        )

    def _identity(self, objective: Objective, space: WeightSpace, settings: dict[str, Any]) -> dict[str, Any]:
        """What two searches must have in common for one to go on with the scores of the other."""
        return {
            **settings,
            "experts": self.experts,
            "values of the experts": digest_of_experts(self.model, self.experts),
            "values of the base model": digest_of_base(self.model),
            "groups": space.groups,
            "group of each module": space.group_of,
            "objective": description_of(objective),
            "content of the examples": digest_of_rows(objective.examples),
        }

    # ------------------------------------------------------------------------------------------------ use

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """`generate` of the model with the mixture active."""
        self.activate()
        return self.model.generate(*args, **kwargs)

    def __call__(self, prompts: Sequence[Any]) -> Dispatch:
        """Dispatch every prompt to the mixture, so that a mixture is a [`Dispatcher`]."""
        return fixed_dispatch(self.adapter_name, prompts)

    def activate(self) -> None:
        """Make the mixture the model's active adapter, if it is not."""
        if self.model.active_adapters != [self.adapter_name]:
            self.model.set_adapter(self.adapter_name, inference_mode=True)

    def apply(self, name: str) -> None:
        """
        Add the mixture to the model as an ordinary adapter of its own, which later weights and searches leave as it is.
        The active adapter stays the same.

        Raises:
            ValueError: The name is taken, or has a dot.
        """
        self._check_present()
        _check_names([name], self.adapter_name)
        self.model.base_model.add_weighted_adapter(self.experts, [0.0] * len(self.experts), name)
        self._mix(name)

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """
        Save the mixture as an ordinary SVF adapter, which `PeftModel.from_pretrained` loads without the experts.

        `mixture.json` beside it records the experts, the weights and the result of the search, and so does the model
        card, unless there is one.
        """
        folder = Path(save_directory)
        if folder.is_file():
            raise ValueError(f"{folder} is a file; expected a folder to save the mixture in.")
        for expert, source in self.sources.items():
            if folder.resolve() == Path(source).resolve():
                raise ValueError(f"{folder} is where expert {expert!r} came from; save the mixture in another folder.")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as scratch:
            # PEFT puts an adapter that is not called "default" into a subfolder
            # no embedding is trained, so none is looked for, on the hub for one
            self.model.save_pretrained(scratch, selected_adapters=[self.adapter_name], save_embedding_layers=False)
            about = {"weights": self.weights, "result": self.result.to_dict() if self.result else None}
            (Path(scratch) / "mixture.json").write_text(json.dumps(about, indent=2) + "\n")
            base_name = self.model.peft_config[self.adapter_name].base_model_name_or_path
            card = mixture_card(folder.name, base_name, self.sources, self.weights, self.result)
            (Path(scratch) / "README.md").write_text(card)
            for path in Path(scratch).rglob("*.*"):
                if (
                    path.name == "README.md"
                    and (folder / path.name).exists()
                    and not is_mixture_card(folder / path.name)
                ):
                    continue  # somebody's model card
                os.replace(path, folder / path.name)


def _generation_kwargs(objective: Any) -> dict[str, Any] | None:
    """How an objective generates, as JSON-serialisable values."""
    found = [
        part.generation_kwargs
        for part in (objective, *getattr(objective, "objectives", []))
        if hasattr(part, "generation_kwargs")
    ]
    return json.loads(json.dumps(found[0], default=str)) if found else None


def _whole(name: str, value: Any, least: int) -> int:
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        raise ValueError(f"`{name}` must be an integer of at least {least}, got {value!r}.")
    return int(value)


def _positive(name: str, value: Any) -> float:
    if not isinstance(value, Real) or isinstance(value, bool) or not float(value) >= 0:
        raise ValueError(f"`{name}` must be a number of at least 0, got {value!r}.")
    return float(value)


def _check_names(experts: Sequence[str], adapter_name: str) -> None:
    if not experts:
        raise ValueError("No experts: a mixture needs at least one.")
    if "." in adapter_name or not adapter_name:
        raise ValueError(f"The mixture cannot be called {adapter_name!r}: PEFT's names have no dots.")
    if repeated := [name for name in experts if list(experts).count(name) > 1]:
        raise ValueError(f"Expert {repeated[0]!r} is given twice.")
    if adapter_name in experts:
        raise ValueError(f"An expert is called {adapter_name!r} as the mixture is; pass another `adapter_name`.")
    for name in experts:
        if not isinstance(name, str) or not name or "." in name or name in (BASE, UNIFORM, SEARCHED, IN_CONTEXT):
            raise ValueError(
                f"An expert cannot be called {name!r}: PEFT's names have no dots, and {BASE!r}, {UNIFORM!r} and "
                f"{SEARCHED!r} stand for weights in a `MixtureResult`."
            )
