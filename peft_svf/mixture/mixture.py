"""`AdaptiveMixture`: a weighted sum of experts, with weights found from a few examples (Transformer², section 3.2)."""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from ..library import ExpertLibrary
from ..reporting.cards import is_mixture_card, mixture_card
from ..routing.dispatch import Dispatch, fixed_dispatch
from ..scoring.names import BASE
from ..scoring.objectives import LogLikelihoodObjective, Objective, RewardObjective
from ..scoring.prefix import last_logits_of_generate
from ..scoring.rewards import RewardFunc
from ..search.checkpoint import Checkpoint
from ..search.config import SearchConfig
from ..search.identity import description_of, digest_of_base, digest_of_experts, digest_of_rows
from ..search.optimizers import as_optimizer
from ..search.progress import SearchProgress, ignore
from ..search.statistics import IN_CONTEXT, SEARCHED
from ..search.validated import ValidatedSearch
from ..search.validation import hold_out, split_examples
from ..tuner.config import SVFRuntimeConfig
from ..tuner.layer import SVFLayer, svf_layers
from ..tuner.model import SVFModel
from ..tuner.names import check_adapter_name
from ..tuner.sharing import check_groups
from ..utils.dtypes import loading_dtype
from .experts import expert_config
from .result import MixtureResult
from .space import UNIFORM, Granularity, WeightSpace

# Settings that do not change the scores, so that a resumed search may have others.
_NOT_IDENTITY = (
    "checkpoint",
    "resume",
    "batch_size",
    "num_generations",
    "patience",
    "max_seconds",
    "validation",
    "in_context",
    "one_standard_error",
)
# Settings that an `objective` has already.
_OF_REWARDS = ("max_new_tokens", "generation_kwargs", "reward_weights")
_OF_ANSWERS = ("num_samples", "temperature")
# Settings that a custom `optimizer` has already.
_OF_METHODS = ("method", "population_size", "optimizer_kwargs")


class AdaptiveMixture:
    """
    A model whose active adapter is a mixture `δ = Σ_k α_k δ_k` of SVF experts.

    The mixture is an ordinary SVF adapter of the model: it generates, saves, merges and loads like any other.

    Args:
        model (`PeftModel`): A model with SVF adapters.
        experts (`list[str]`): The adapters to mix; all adapters of the model if `None`.
        tokenizer: The model's tokenizer.
        adapter_name (`str`): Name of the mixture.

    Raises:
        ValueError: No experts, an unknown adapter, an adapter of another method, or a name that is taken.

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

    def __repr__(self) -> str:
        """The base model, the weights of the experts (their mean over groups), and what a search kept."""
        base = getattr(self.model.config, "_name_or_path", "") or type(self.model.get_base_model()).__name__
        weights = ", ".join(f"{name} {alpha:.3g}" for name, alpha in self.weights.items())
        groups = self._alpha.shape[1]
        per = f", separate weights for {groups} groups of modules" if groups > 1 else ""
        kept = f", searched: kept {self.result.choice}" if self.result else ""
        return f"AdaptiveMixture({self.adapter_name!r} on {base}: {weights}{per}{kept})"

    def _warn_of_gaps(self) -> None:
        """Warn if the experts do not all adapt the same singular values."""
        ranks_of = {
            name: {layer.module_name: layer.rank(name) for layer in self._layers() if name in layer.svf_delta}
            for name in self.experts
        }
        if all(ranks == ranks_of[self.experts[0]] for ranks in ranks_of.values()):
            return
        sizes = ", ".join(f"{name} {sum(ranks.values())} in {len(ranks)}" for name, ranks in ranks_of.items())
        warnings.warn(
            f"The experts do not adapt the same singular values ({sizes} modules). Where an expert adapts none, it "
            "contributes 0 to the mixture.",
            stacklevel=3,
        )

    @classmethod
    def from_pretrained(
        cls,
        base_model: PreTrainedModel | str | os.PathLike[str],
        experts: Mapping[str, str | os.PathLike[str]] | ExpertLibrary,
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
            experts (`dict[str, str]` or [`ExpertLibrary`]): Name of each expert with its Hub id or folder.
            tokenizer: The tokenizer, which a search needs. By default that of `base_model` if this is a name.
            adapter_name (`str`): Name of the mixture.
            base_check (`str`): What to do when an expert was made for another base model, see [`SVFRuntimeConfig`].
            runtime_config ([`SVFRuntimeConfig`], *optional*): For all experts, in the place of `base_check`. Quantized
                models need its basis pack.
            kwargs: For `AutoModelForCausalLM.from_pretrained`, if `base_model` is a name. `dtype` is `"auto"` by
                default: fp32 on a CPU, otherwise that of the files.

        Raises:
            ValueError: An expert that cannot be read, is no SVF adapter or was made for another base model, a name that
                is not allowed, or a base model with adapters. The base model stays as it was.
        """
        _check_names(list(experts), adapter_name)
        if not isinstance(base_model, (str, os.PathLike)):
            if kwargs:
                raise TypeError(f"`{next(iter(kwargs))}` needs a base model given by name.")
            if isinstance(base_model, PeftModel) or any(isinstance(m, BaseTunerLayer) for m in base_model.modules()):
                raise ValueError(
                    "The base model has adapters already. `unload()` them, load the base model again, or mix the "
                    "adapters that it has: `AdaptiveMixture(peft_model, names)`."
                )
        sources = {name: str(path) for name, path in experts.items()}
        if isinstance(experts, ExpertLibrary):
            sources, experts = experts.sources, experts.paths()
        # read all of them before the model is touched
        configs = {name: expert_config(name, path, base_check, runtime_config) for name, path in experts.items()}
        if isinstance(base_model, (str, os.PathLike)):
            tokenizer = AutoTokenizer.from_pretrained(base_model) if tokenizer is None else tokenizer
            if "torch_dtype" in kwargs:  # the old name, which transformers still takes
                kwargs.setdefault("dtype", kwargs.pop("torch_dtype"))
            kwargs["dtype"] = loading_dtype(base_model, **kwargs)
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
            mixture.sources = sources
            return mixture
        except BaseException:
            if model is not None:
                model.unload()  # leave the base model as it was
            raise

    # ------------------------------------------------------------------------------------------------ weights

    @property
    def weights(self) -> dict[str, float]:
        """α per expert, averaged over groups of modules with different weights. All 0 is the base model."""
        return dict(zip(self.experts, self._alpha.mean(axis=1).tolist(), strict=True))

    def set_weights(
        self,
        weights: Mapping[str, float] | Sequence[float] | np.ndarray,
        group_of: Mapping[str, int] | None = None,
    ) -> None:
        """
        Put other weights in place, and forget the result of a search.

        Args:
            weights: α by expert (the others get 0), `[experts]`, or `[experts, groups]`.
            group_of (`dict[str, int]`, *optional*): Index of the group of each adapted module; one group if `None`.

        Raises:
            ValueError: An unknown expert, another shape, a weight that is not finite, or a merged mixture.
        """
        if isinstance(weights, Mapping):
            if unknown := sorted(set(weights) - set(self.experts)):
                raise ValueError(f"Unknown expert {unknown[0]!r}. The mixture has {', '.join(self.experts)}.")
            weights = [weights.get(name, 0.0) for name in self.experts]
        alpha = np.array(weights, dtype=np.float64)
        names = [] if group_of is None else [layer.module_name for layer in self._layers()]
        if missing := [name for name in names if name not in (group_of or {})]:
            raise ValueError(f"`group_of` has no group for {len(missing)} modules, the first is {missing[0]!r}.")
        groups = 1 if group_of is None else max(group_of.values()) + 1
        by_group = alpha[:, None] if alpha.ndim == groups == 1 else alpha
        if by_group.shape != (len(self.experts), groups) or not np.isfinite(by_group).all():
            wanted = f"{len(self.experts)}{f' × {groups}' if groups > 1 else ''}"
            raise ValueError(f"Expected {wanted} finite weights, got {alpha.tolist()}.")
        self._check_present()
        if group_of is not None:
            check_groups(self._layers(), group_of)
        if any(layer.merged for layer in self._layers()):
            raise ValueError("The model is merged, so other weights have no effect. Call `unmerge_adapter()` first.")
        self._alpha, self._group_of = by_group, group_of
        self._mix(self.adapter_name)
        self.result = None

    def _mix(self, adapter_name: str) -> None:
        """Give an adapter the δ of the mixture."""
        for layer in svf_layers(self.model, adapter_name):
            group = 0 if self._group_of is None else self._group_of[layer.module_name]
            layer.mix(adapter_name, zip(self.experts, self._alpha[:, group].tolist(), strict=True))

    def _check_present(self) -> None:
        for name in (*self.experts, self.adapter_name):
            if name not in self.model.peft_config:
                raise ValueError(
                    f"Adapter {name!r} was deleted from the model, so this mixture cannot change any more. Make a new "
                    "`AdaptiveMixture` from the adapters that are there."
                )

    def _layers(self) -> list[SVFLayer]:
        return svf_layers(self.model, self.adapter_name)

    # ------------------------------------------------------------------------------------------------ search

    def search(
        self,
        examples: Sequence[dict[str, Any]] | None = None,
        reward_funcs: RewardFunc | Sequence[RewardFunc] | None = None,
        config: SearchConfig | None = None,
        *,
        objective: Objective | None = None,
        eval_examples: Sequence[dict[str, Any]] | None = None,
        optimizer: Any = None,
        on_progress: Callable[[SearchProgress], None] | None = None,
        **overrides: Any,
    ) -> MixtureResult:
        """
        Find weights from a few examples, and put them in place (Transformer², section 3.2, "few-shot adaptation").

        The base model, every single expert, the uniform mixture and in-context prompting are scored on the same
        examples. If the searched mixture does not beat the best baseline, the baseline is put in place, and the result
        says so. Ctrl-C ends the search with what it has, once the baselines are scored.

        Args:
            examples (`Sequence[dict]` or `datasets.Dataset`): Examples with a `"prompt"` (text or messages), and a
                `"completion"` if there are no `reward_funcs`.
            reward_funcs (`Callable` or list of them, *optional*): TRL reward functions for generated answers. Without
                them, the objective is the log-likelihood of the `"completion"` column.
            config ([`SearchConfig`], *optional*): The settings.
            objective ([`Objective`], *optional*): In the place of the first two, such as a [`WeightedObjective`].
            eval_examples (`Sequence[dict]`, *optional*): Held-out examples that evaluate the result, in the place of
                `config.validation`.
            optimizer (*optional*): A custom optimizer in the place of `config.method`: an [`Optimizer`], or any object
                with `ask()`, `tell(solutions)` and `population_size` as in the package `cmaes`. It minimizes over
                experts × groups variables.
            on_progress (`Callable`, *optional*): Called with a [`SearchProgress`] after each batch and each generation.
                If it raises `KeyboardInterrupt`, the search ends as with Ctrl-C.
            overrides: Fields of [`SearchConfig`], such as `method="cem"` or `seed=1`.

        Returns:
            [`MixtureResult`]

        Raises:
            ValueError: No examples, a missing column, no tokenizer, a setting out of range, a checkpoint of another
                search, or a reward function that does not return one finite number or `None` per completion.
            TypeError: An unknown setting, or an optimizer without `ask` or `tell`.
        """
        if config is not None and not isinstance(config, SearchConfig):
            raise TypeError(f"`config` must be a SearchConfig, got {config!r}. Pass single settings by name: `seed=1`.")
        config = (config or SearchConfig()).changed(**overrides)
        self._check_present()
        self._check_searchable()
        objective = self._objective(examples, reward_funcs, objective, config)
        if eval_examples is None:
            split = split_examples(objective, config.validation, config.seed)
        elif config.validation in ("auto", None):
            objective, split = hold_out(objective, eval_examples)
        else:
            raise ValueError(f"Pass `eval_examples` or `validation={config.validation!r}`, not both.")
        custom = None if optimizer is None else as_optimizer(optimizer)
        if custom is not None:
            self._check_unused(config, _OF_METHODS, "the `optimizer` has its own")
        modules = [layer.module_name for layer in self._layers()]

        def make_space(granularity: Granularity) -> WeightSpace:
            return WeightSpace(self.experts, modules, granularity, config.bounds)

        checkpoint = None
        if config.checkpoint is not None:
            identity = self._identity(objective, config, modules)
            checkpoint = Checkpoint(config.checkpoint, config.resume, identity)
        trained = self.model.training
        self.model.eval()
        try:
            search = ValidatedSearch(
                self.model, objective, split, config, make_space, custom, checkpoint, on_progress or ignore
            )
            found = search.run()
        except BaseException:
            self.model.train(trained)
            raise
        space: Any = found.space
        chosen, searched = space.weights(found.chosen), space.weights(found.searched)
        self.set_weights(chosen, space.group_of)
        self.activate()
        self.result = MixtureResult(
            **found.about,
            weights=self.weights,
            searched_weights=dict(zip(self.experts, searched.mean(axis=1).tolist(), strict=True)),
            groups=space.groups,
            alpha=dict(zip(self.experts, chosen.tolist(), strict=True)),
        )
        return self.result

    def _check_searchable(self) -> None:
        if getattr(self.model.config, "is_encoder_decoder", False):
            raise ValueError("A search needs a decoder-only model, and this is an encoder-decoder model.")
        if any(layer.disable_adapters for layer in self._layers()):
            raise ValueError(
                "The adapters are disabled, so every mixture would be the base model. Search outside of "
                "`disable_adapter()`, or call `enable_adapter_layers()`."
            )
        if any(layer.merged for layer in self._layers()):
            raise ValueError("The model is merged, so other weights have no effect. Call `unmerge_adapter()` first.")

    def _objective(
        self,
        examples: Sequence[dict[str, Any]] | None,
        reward_funcs: RewardFunc | Sequence[RewardFunc] | None,
        objective: Objective | None,
        config: SearchConfig,
    ) -> Objective:
        if objective is not None:
            if examples is not None or reward_funcs is not None:
                raise ValueError(
                    "Pass `examples` and `reward_funcs`, or an `objective` that has both; not all of them."
                )
            if not isinstance(objective, Objective):
                raise TypeError(f"{type(objective).__name__} is not an objective. Subclass `peft_svf.Objective`.")
            self._check_unused(config, _OF_REWARDS, "the `objective` has its own")
            return objective
        if self.tokenizer is None:
            raise ValueError("A search needs a tokenizer. Pass one when you make the mixture.")
        if examples is None:
            raise ValueError("A search needs `examples`, or an `objective`.")
        if reward_funcs is None:
            self._check_unused(config, _OF_REWARDS + _OF_ANSWERS, "there are no `reward_funcs`")
            return LogLikelihoodObjective(list(examples), self.tokenizer)
        generation = config.generation_kwargs.get("generation_config")
        limited = generation is not None and generation.max_new_tokens is not None
        return RewardObjective(
            list(examples),
            reward_funcs,
            self.tokenizer,
            reward_weights=config.reward_weights,
            generation_kwargs={
                **({} if limited else {"max_new_tokens": config.max_new_tokens}),
                **config.generation_kwargs,
            },
        )

    @staticmethod
    def _check_unused(config: SearchConfig, names: Sequence[str], why: str) -> None:
        default = SearchConfig()
        for name in names:
            if getattr(config, name) != getattr(default, name):
                raise ValueError(f"`{name}` would have no effect: {why}. Leave it out.")

    def _identity(self, objective: Objective, config: SearchConfig, modules: Sequence[str]) -> dict[str, Any]:
        """Return what two searches must have in common for one to use the scores of the other."""
        settings = {name: value for name, value in vars(config).items() if name not in (*_NOT_IDENTITY, *_OF_REWARDS)}
        return {
            **settings,
            "experts": self.experts,
            "values of the experts": digest_of_experts(self.model, self.experts),
            "values of the base model": digest_of_base(self.model),
            "modules": list(modules),
            "objective": description_of(objective),
            "content of the examples": digest_of_rows(objective.examples),
        }

    # ------------------------------------------------------------------------------------------------ use

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model's `generate` with the mixture active."""
        self.activate()
        return self.model.generate(*args, **kwargs, **last_logits_of_generate(self.model, kwargs))

    def __call__(self, prompts: Sequence[Any]) -> Dispatch:
        """Dispatch every prompt to the mixture, so that a mixture is a [`Dispatcher`]."""
        return fixed_dispatch(self.adapter_name, prompts)

    def activate(self) -> None:
        """Make the mixture the active adapter of the model."""
        if self.model.active_adapters != [self.adapter_name]:
            self.model.set_adapter(self.adapter_name, inference_mode=True)

    def apply(self, name: str) -> None:
        """
        Copy the mixture to another adapter of the model, which later weights and searches do not change. The active
        adapter stays the same.

        Raises:
            ValueError: The name is taken or contains a dot.
        """
        self._check_present()
        _check_names([name], self.adapter_name)
        self.model.base_model.add_weighted_adapter(self.experts, [0.0] * len(self.experts), name)
        self._mix(name)

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """
        Save the mixture as an ordinary SVF adapter, which `PeftModel.from_pretrained` loads without the experts.

        `mixture.json` records the experts, the weights and the result of the search. A model card is written unless
        there is one that somebody has edited.

        Raises:
            ValueError: The path is a file, or the folder of one of the experts.
        """
        folder = Path(save_directory)
        if folder.is_file():
            raise ValueError(f"{folder} is a file. Pass a folder to save the mixture in.")
        for expert, source in self.sources.items():
            if folder.resolve() == Path(source).resolve():
                raise ValueError(f"{folder} is the folder of expert {expert!r}. Save the mixture in another folder.")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as scratch:
            # Into a temporary folder, because PEFT puts an adapter that is not called "default" into a subfolder.
            # Without `save_embedding_layers=False`, PEFT would look for the base model's config on the Hub.
            self.model.save_pretrained(scratch, selected_adapters=[self.adapter_name], save_embedding_layers=False)
            about = {
                "weights": self.weights,
                "alpha": dict(zip(self.experts, self._alpha.tolist(), strict=True)),
                "group_of": None if self._group_of is None else dict(self._group_of),
                "result": self.result.to_dict() if self.result else None,
            }
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
                    continue  # somebody has edited it
                os.replace(path, folder / path.name)


def _check_names(experts: Sequence[str], adapter_name: str) -> None:
    if not experts:
        raise ValueError("No experts: a mixture needs at least one.")
    if repeated := [name for name in experts if list(experts).count(name) > 1]:
        raise ValueError(f"Expert {repeated[0]!r} is given twice.")
    if adapter_name in experts:
        raise ValueError(f"An expert and the mixture are both called {adapter_name!r}. Pass another `adapter_name`.")
    reserved = (BASE, UNIFORM, SEARCHED, IN_CONTEXT)
    for name in (*experts, adapter_name):
        what = "The mixture" if name == adapter_name else "An expert"
        check_adapter_name(name, what)
        if name in reserved:
            raise ValueError(f"{what} cannot be called {name!r}: results use {', '.join(map(repr, reserved))}.")
