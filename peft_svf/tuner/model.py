"""`SVFModel`: put SVF layers into a model, build their singular bases, and check the base model."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from accelerate.utils import has_offloaded_params
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, onload_layer
from peft.utils import (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    AuxiliaryTrainingWrapper,
    get_quantization_kwargs,
    resolve_quantization_backend,
)
from peft.utils.integrations import _skip_init_on_device
from peft.utils.other import _set_adapter
from torch import nn
from transformers.pytorch_utils import Conv1D

from .base_check import check_base, record_base
from .bases import build_bases
from .batch_layout import Layout
from .checkpoint import Checkpoint
from .config import SVFConfig
from .embeddings import forget_replaced_bases, with_resized_embeddings
from .entries import adapter_entries, as_of_base, check_loadable, foreign_biases, put_back, without_adapter_name
from .fold import SMALLEST_FRACTION
from .forecast import forecasting
from .frozen import frozen_message
from .layer import Linear, SVFLayer, svf_layers, take_out
from .loading import check_before_attaching, check_checkpoint, current_key, prefixed_key, weight_key
from .merged_weights import refuse_merged, remember_merged
from .names import check_adapter_name
from .quantized import is_coarse, keep_order, reorder
from .renames import current_names
from .rows import (
    BASE,
    Groups,
    RowCall,
    RowDeltas,
    batch_size,
    check_may_disable,
    checked_weights,
    expansion_of,
    group_of_each,
    names_and_index,
    names_hook,
    open_call,
    opened,
    uses_rows,
    wrong_length,
)
from .sharing import WholeModel, check_groups, check_no_other_tuner, check_only_owner, first_owners, link, regroup
from .targets import (
    adapted_fraction,
    leave_out_of_all_linear,
    linear_weights,
    unusable_modules,
    warn_about_experts,
)
from .transformers_loading import being_loaded


class SVFModel(BaseTuner):
    """
    A model with SVF adapters (Transformer², https://huggingface.co/papers/2501.06252).

    Args:
        model (`torch.nn.Module`): The model to adapt.
        config ([`SVFConfig`]): The configuration of the first adapter.
        adapter_name (`str`): Its name, `"default"` by default.
        low_cpu_mem_usage (`bool`): Create δ on the meta device, to be loaded from a checkpoint.

    Example:

        ```py
        >>> from transformers import AutoModelForCausalLM
        >>> from peft import get_peft_model
        >>> from peft_svf import SVFConfig

        >>> base = AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct")
        >>> model = get_peft_model(base, SVFConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
        ```
    """

    prefix: str = "svf_"
    tuner_layer_cls = SVFLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    # ------------------------------------------------------------------------------------------------ injection

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Attach an adapter as PEFT does, build the missing singular bases, and check the base model.

        If any step fails, the adapter is removed and the model is unchanged.
        """
        with self._undone_on_error(model, adapter_name):
            check_adapter_name(adapter_name)
            check_no_other_tuner(adapter_name, self.peft_config[adapter_name], model)
            self._kept_order = [*self._kept_order, *keep_order(model)]
            config, self._unusable = self.peft_config[adapter_name], unusable_modules(model)
            if config.base_model_name_or_path is None:  # PEFT sets it after the first save, too late for embeddings
                config.base_model_name_or_path = model.__dict__.get("name_or_path") or None
            checkpoint = being_loaded() or config.checkpoint  # before PEFT resolves `target_modules`
            config.rename_modules(current_names(model, config.expected_fingerprint))
            if checkpoint is not None:
                check_before_attaching(model, adapter_name, checkpoint, config)
            if all_linear := str(config.target_modules).lower() == "all-linear":
                leave_out_of_all_linear(config, model, self._unusable)
            with self._others_as_trainable_as_before(model):
                super().inject_adapter(model, adapter_name, *args, **kwargs)
            for layer in svf_layers(model):
                layer.whole_model = WholeModel(model)
            link(svf_layers(model), adapter_name)
            layers = svf_layers(model, adapter_name)
            refuse_merged(adapter_name, layers)
            build_bases(first_owners(layer for layer in layers if layer.needs_basis()))
            # the other owners of a weight take the basis of the first
            build_bases([layer for layer in layers if layer.needs_basis()])
            if checkpoint is not None:
                forget_replaced_bases(layers, checkpoint)
            check_base(adapter_name, layers)
            if checkpoint is not None:
                check_checkpoint(model, adapter_name, checkpoint)
            if not config.expected_fingerprint:  # a new adapter, not a loaded one
                names = {layer.module_name for layer in layers}
                warn_about_experts(config, model, names, all_linear=all_linear)

    _kept_order: Sequence[Any] = ()
    _unusable: Mapping[str, str] = {}

    def _create_and_replace(
        self,
        svf_config: SVFConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **optional_kwargs: Any,
    ) -> None:
        if current_key is None:
            raise ValueError("Current Key shouldn't be `None`")
        if reason := self._unusable.get(current_key):
            raise ValueError(
                f"Target module {current_key} cannot be adapted: {reason}. Remove it from `target_modules`, or pass "
                '`target_modules="all-linear"`, which leaves it out.'
            )

        if isinstance(target, SVFLayer):
            target.update_layer(adapter_name, config=svf_config)
            return
        new_module = self._create_new_module(
            svf_config, adapter_name, target, name=current_key, **get_quantization_kwargs(self)
        )
        if adapter_name not in self.active_adapters:
            # adding an additional adapter: it is not automatically trainable
            new_module.requires_grad_(False)
        self._replace_module(parent, target_name, new_module, target)

    @staticmethod
    def _create_new_module(
        svf_config: SVFConfig, adapter_name: str, target: nn.Module, *, name: str, **kwargs: Any
    ) -> Linear:
        base_layer = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        plain = type(base_layer) in (nn.Linear, Conv1D) and type(base_layer.weight) is nn.Parameter
        backend = None if plain else resolve_quantization_backend(base_layer, **kwargs)  # imports what is installed
        kind = type(base_layer).__name__
        linear = isinstance(base_layer, (nn.Linear, Conv1D)) or getattr(backend, "layer_type", None) == "linear"
        if not linear or kind.startswith("LayerNorm"):  # Transformer Engine has some that normalize first
            raise TypeError(
                f"Target module {name} is a {kind}, which SVF does not support. Supported are `torch.nn.Linear`, "
                "`transformers.pytorch_utils.Conv1D` and the quantized linear layers that PEFT supports."
            )
        if backend is None and is_coarse(base_layer):
            raise TypeError(
                f"Target module {name} is quantized ({kind}, {base_layer.weight.dtype}) in a way that PEFT cannot "
                "dequantize. Use the full-precision model, or another quantization."
            )
        if svf_config.fan_in_fan_out and not isinstance(base_layer, Conv1D):
            warnings.warn(
                f"fan_in_fan_out is set to True but the target module {name} is `torch.nn.Linear`. Setting "
                "fan_in_fan_out to False.",
                stacklevel=2,
            )
            svf_config.fan_in_fan_out = False
        return Linear(target, adapter_name, config=svf_config, name=name, quantization_backend=backend)

    @contextmanager
    def _others_as_trainable_as_before(self, model: nn.Module) -> Iterator[None]:
        """Keep which parameters of other adapters require gradients, now and once they are enabled again.

        PEFT does, except for modules that are called like the new adapter.
        """
        had_adapters = any(isinstance(module, BaseTunerLayer) for module in model.modules())
        trainable = _trainable(model) if had_adapters else []
        when_enabled = [(layer, layer.trainable_when_enabled) for layer in svf_layers(model)]
        in_wrappers = self._trainable_in_wrappers
        yield
        _restore(trainable)
        self._trainable_in_wrappers = in_wrappers
        for layer, kept in when_enabled:
            layer.trainable_when_enabled = kept

    @contextmanager
    def _undone_on_error(self, model: nn.Module, adapter_name: str) -> Iterator[None]:
        trainable = _trainable(model)
        active = [(layer, layer.active_adapters) for layer in svf_layers(model)]
        try:
            yield
        except BaseException:  # Ctrl-C among them
            with _skip_init_on_device():  # or low_cpu_mem_usage moves the restored base weights to the meta device
                self._take_out(model, adapter_name)
            for layer, names in active:
                layer.set_adapter(names)
            if not active:
                self._let_reorder()
            _restore(trainable)
            raise

    def _let_reorder(self) -> None:
        reorder(self._kept_order)
        self._kept_order = ()

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        found: nn.Module = super()._unload_and_optionally_merge(*args, **kwargs)
        self._let_reorder()
        return found

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT moves the new layer to the device of the base weight: the meta device if accelerate offloads it, where δ
        # loses its values. Of bitsandbytes' int8 weights it moves all of it, which fails for δ on the meta device.
        state, delta = getattr(child, "state", None), getattr(new_module, "svf_delta", None)
        is_meta = delta is not None and any(parameter.is_meta for parameter in delta.parameters())
        base_layer = child.get_base_layer() if isinstance(child, BaseTunerLayer) else child
        if has_offloaded_params(base_layer) or (state is not None and is_meta):
            setattr(parent, child_name, new_module)
            return
        super()._replace_module(parent, child_name, new_module, child)

    def _take_out(self, model: nn.Module, adapter_name: str) -> None:
        self.peft_config.pop(adapter_name, None)
        take_out(model, adapter_name)
        if not self.peft_config and getattr(model, "_hf_peft_config_loaded", False):
            setattr(model, "_hf_peft_config_loaded", False)  # noqa: B010  # transformers sets it before attaching

    # ------------------------------------------------------------------------------------------------ mixed batches

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Let each batch row use its adapter of `adapter_names`; `"__base__"` uses none.

        PEFT enters this context around `forward` and `generate`.
        """
        adapter_names = kwargs.pop("adapter_names", None)
        rows, mixture = batch_size(args, kwargs), open_call(self)
        expansion = expansion_of(kwargs, getattr(self.model, "generation_config", None))
        if self._frozen and torch.is_grad_enabled():
            self._refuse_frozen(args, kwargs)
        if adapter_names is None:
            if mixture is None:
                with forecasting(rows and rows * expansion, kwargs):
                    yield
                return
            if rows is not None and rows != mixture.rows:
                raise wrong_length("the mixture weights", mixture.rows, rows)
            mixture.expansion = expansion
            try:
                yield
            finally:
                mixture.expansion = 1
            return
        if isinstance(adapter_names, str) or not isinstance(adapter_names, Sequence):
            raise TypeError(f"`adapter_names` must be a list with one name for each row, got {adapter_names!r}.")
        if mixture is not None:
            raise ValueError("Cannot pass `adapter_names` within `row_mixture`.")
        if unknown := sorted(set(adapter_names) - {*self.peft_config, BASE}, key=str):
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(map(str, unknown))}")
        if rows is not None and rows != len(adapter_names):
            raise wrong_length("`adapter_names`", len(adapter_names), rows)
        for name, config in self.peft_config.items():
            if config.bias != "none":
                raise ValueError(f"Adapter {name!r} has `bias`, which cannot differ between the rows of a batch.")
        names, index = names_and_index(adapter_names)

        with ExitStack() as stack:
            stack.enter_context(forecasting(rows and rows * expansion, kwargs))
            rows_in = self._rows("`adapter_names`", names, index, lambda _: index)
            call = stack.enter_context(rows_in)
            call.expansion = expansion
            for module in self.model.modules():
                if isinstance(module, AuxiliaryTrainingWrapper):
                    hook = module.register_forward_pre_hook(names_hook(call, adapter_names), with_kwargs=True)
                    stack.callback(hook.remove)
            yield

    @contextmanager
    def row_mixture(
        self,
        weights: torch.Tensor | Sequence[Any],
        adapter_names: Sequence[str] | None = None,
        groups: Groups | None = None,
    ) -> Iterator[None]:
        """
        Use a separate mixture for each batch row: row i runs with δ = Σ_k weights[i, k] · δ_k.

        The active adapters are ignored. A row of zeros is the base model. `generate` repeats the weights of a row for
        its beams and returned sequences. Gradients flow to the weights.

        Args:
            weights (`torch.Tensor`):
                α, `[rows, experts]`, or `[rows, experts, groups]` with `groups`.
            adapter_names (`list[str]`, *optional*):
                The experts, in the order of the weights; all adapters in the order of their addition if `None`.
            groups (`"module"`, `"layer"` or `dict[str, int]`, *optional*):
                Use separate weights for each adapted module, for each block of the model, or for each group of a
                mapping from module names (`SVFLayer.module_name`) to group indices.

        Raises:
            TypeError: `adapter_names` is a string.
            ValueError: The weights have another shape or are not finite. An adapter is unknown, merged, or has more
                than δ (`modules_to_save` or `bias`). The model is in training mode. Or a batch has another number of
                rows.

        Example:

            ```py
            >>> with model.base_model.row_mixture([[0.5, 0.5], [1.0, 0.0]], ["math", "logic"]):
            ...     model.generate(**two_prompts)
            ```
        """
        if isinstance(adapter_names, str):
            raise TypeError(f"`adapter_names` must be a list of names, got {adapter_names!r}.")
        names = list(self.peft_config) if adapter_names is None else list(adapter_names)
        self._check_known(names)
        if not names:
            raise ValueError("`adapter_names` is empty; name at least one adapter.")
        if len(set(names)) < len(names):
            raise ValueError(f"`adapter_names` holds a name twice: {names}.")
        for name in names:
            self._check_only_delta(name)
        layers = [layer for layer in svf_layers(self.model) if any(name in layer.svf_delta for name in names)]
        group = None if groups is None else group_of_each(groups, [layer.module_name for layer in layers])
        count = None if group is None else max(group.values()) + 1
        if group is not None:
            check_groups(layers, group)
        alpha = checked_weights(weights, len(names), count)
        if open_call(self) is not None:
            raise ValueError("`row_mixture` cannot be nested.")
        plain = not (alpha.requires_grad or alpha.any())  # all rows use the base model
        with self._rows(
            "the mixture weights",
            [] if plain else names,
            alpha.detach(),
            lambda layer: alpha[..., 0 if group is None else group.get(layer.module_name, 0)],
        ):
            yield

    @contextmanager
    def _rows(
        self, what: str, names: Sequence[str], of_rows: torch.Tensor, weights: Callable[[SVFLayer], torch.Tensor]
    ) -> Iterator[RowCall]:
        layers = svf_layers(self.model)
        if self.training:
            raise ValueError(f"Cannot pass {what} when the model is in training mode.")
        if any(layer.merged for layer in layers):
            raise ValueError(f"Cannot pass {what} when there are merged adapters, please call `unmerge_adapter` first.")
        if self._layout is None:
            self._layout = Layout(self.model)
        call = RowCall(self, what, of_rows, self._layout, only_base=not names)
        call.deltas = {layer: RowDeltas(call, layer, names, weights(layer)) for layer in layers}

        def check(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
            # other threads call it, too: without `kwargs` while it is being removed
            if kwargs is not None and open_call(self) is call:
                # `generate` calls only the inner model
                call.check_inputs(args, kwargs, expanded=module is not self)

        with ExitStack() as stack:
            # PEFT passes the inputs of `generate` to `_enable_peft_forward_hooks`, but not always those of `forward`.
            # These go through one of the two modules.
            for module in (self, self.model):
                stack.callback(module.register_forward_pre_hook(check, with_kwargs=True).remove)
            stack.enter_context(opened(call))
            yield call

    def uses_rows(self, adapter_names: Sequence[str] | None) -> bool:
        """Return whether the rows of a call count. They do not in the thread that has disabled the adapters.

        Raises:
            RuntimeError: A row names an expert, and another thread has disabled the adapters.
        """
        return uses_rows(self, adapter_names)

    open_calls = 0  # mixed batches that run in any thread
    expert_calls = 0  # those of them that need the adapters
    disabled_by: int | None = None  # the thread that has disabled the adapters, by its number in rows.py
    _layout: Layout | None = None

    def release_folded(self) -> None:
        """Free the folded weights of all layers (`SVFRuntimeConfig.fold`). Layers fold again when it pays off."""
        for layer in svf_layers(self.model):
            layer.fold.release()

    # ------------------------------------------------------------------------------------------------ parameters

    def train(self, mode: bool = True) -> SVFModel:
        """Set the training mode, and warn about δ in 16 bit, which loses small updates.

        TRL casts the trainable parameters of quantized models to bf16 after the adapter was created.
        """
        if mode:
            coarse = sum(
                delta.requires_grad and delta.dtype.itemsize == 2
                for layer in svf_layers(self.model)
                for delta in layer.delta_weights(layer.svf_delta)
            )
            if coarse:
                warnings.warn(
                    f"{coarse} vectors δ are in 16 bit, so training loses small updates. Pass the trainer "
                    "`callbacks=[peft_svf.ExactState()]`, which casts them back to fp32.",
                    stacklevel=2,
                )
        super().train(mode)
        deltas = [delta for layer in svf_layers(self.model) for delta in layer.delta_weights(layer.svf_delta)]
        self._frozen = mode and not any(p.requires_grad for ps in (deltas, self.model.parameters()) for p in ps)
        return self

    _frozen: bool = False  # whether the model was put into training mode without a trainable parameter

    def _refuse_frozen(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Raise for a training loss without a trainable parameter, and warn if only the loss is unknown."""
        self._frozen = not any(parameter.requires_grad for parameter in self.model.parameters())
        inputs = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        if not self._frozen or any(value.requires_grad for value in inputs):
            return
        message = frozen_message(svf_layers(self.model))
        if kwargs.get("labels") is not None:
            raise ValueError(message)
        self._frozen = False  # once is enough
        warnings.warn(message, stacklevel=4)

    def adapted_fraction(self, adapter_name: str | None = None) -> float:
        """Return which fraction of the linear weights an adapter changes; any of the adapters if `None`.

        MoE experts count as linear weights, the output layer does not.
        """
        adapted = {layer.module_name for layer in svf_layers(self.model, adapter_name)}
        return adapted_fraction(linear_weights(self.model), adapted)

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        if not enabled:
            check_may_disable(self)
        # PEFT's version makes the active copies of `modules_to_save` trainable, frozen ones too
        wrappers = [module for module in self.model.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
        if not enabled and self._trainable_in_wrappers is None:
            self._trainable_in_wrappers = _trainable(*wrappers)
        now = _trainable(*wrappers) if self._trainable_in_wrappers is None else self._trainable_in_wrappers
        super()._enable_adapter_layers(enabled)
        if enabled:
            _restore(now)
            self._trainable_in_wrappers = None
            self.disabled_by = None

    _trainable_in_wrappers: list[tuple[nn.Parameter, bool]] | None = None

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        super()._mark_only_adapters_as_trainable(model)
        for layer in svf_layers(model):
            # PEFT freezes parameters outside of tuner layers only, so `model.requires_grad_(True)` would unfreeze it
            if layer.basis is not None:
                layer.basis.requires_grad_(False)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        # δ is created in fp32, so only `autocast_adapter_dtype=False` needs a cast
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if autocast_adapter_dtype:
            return
        for layer in svf_layers(self.model, adapter_name):
            if layer.base_dtype is not None and layer.base_dtype.is_floating_point:  # integers: quantized
                layer.svf_delta[adapter_name].to(layer.base_dtype)

    # ------------------------------------------------------------------------------------------------ checkpoints

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: SVFConfig,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, torch.Tensor]:
        # the config is saved next, and may have been attached to another model in the meantime
        record_base(config, adapter_name, svf_layers(model, adapter_name))
        put_back(model, adapter_name, state_dict, unwanted_adapter_names)
        as_of_base(model, state_dict)
        biases = cls._get_learnable_bias_state_dict(model, state_dict, config)
        in_checkpoint = {key: plain for plain, key in foreign_biases(model, adapter_name).items()}
        biases = {in_checkpoint.get(key, key): value for key, value in biases.items()}
        selected = {**adapter_entries(model, adapter_name, state_dict), **biases}
        return with_resized_embeddings(model, config, state_dict, selected)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return without_adapter_name(key, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: SVFConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        # PEFT would only warn of missing values, and use δ = 0 for them
        state_dict = {
            weight_key(model, prefixed_key(model, current_key(key, {}, adapter_name))): value
            for key, value in state_dict.items()
        }
        checkpoint = Checkpoint.of_tensors(state_dict)
        names = check_checkpoint(model, adapter_name, checkpoint)
        forget_replaced_bases(svf_layers(model, adapter_name), checkpoint)
        state_dict = {current_key(key, names, adapter_name): value for key, value in state_dict.items()}
        remapped: dict[str, torch.Tensor] = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, state_dict
        )
        for plain, key in foreign_biases(model, adapter_name).items():
            for saved in (plain, f"base_model.model.{plain}"):
                if saved in remapped:
                    remapped[key] = remapped.pop(saved)
        check_loadable(model, adapter_name, remapped)
        return remapped

    # ------------------------------------------------------------------------------------------------ arithmetic

    @torch.no_grad()
    def add_weighted_adapter(self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str) -> None:
        """
        Add the adapter with δ = Σ_k weights_k · δ_k (Transformer², section 3.2).

        Unlike for LoRA this is exact, because all adapters of a layer share their basis. A module that an adapter does
        not adapt counts as δ = 0. The new adapter is not active.

        Args:
            adapters (`list[str]`): Names of the adapters to combine; their `r` and their modules may differ.
            weights (`list[float]`): One finite weight per adapter.
            adapter_name (`str`): Name of the new adapter.

        Raises:
            ValueError: A name is unknown, not allowed or already used, the lengths differ, or a weight is not finite.
                Or an adapter has more than δ (`modules_to_save` or `bias`).
        """
        check_adapter_name(adapter_name)
        adapters, weights = list(adapters), [float(weight) for weight in weights]
        if adapter_name in self.peft_config:
            raise ValueError(f"Adapter {adapter_name!r} already exists. Delete it first, or choose another name.")
        if len(adapters) != len(weights) or not adapters:
            raise ValueError(
                f"Expected one weight per adapter, got {len(adapters)} adapters and {len(weights)} weights."
            )
        self._check_known(adapters)
        for adapter, weight in zip(adapters, weights, strict=True):
            if not math.isfinite(weight):
                raise ValueError(f"The weight of adapter {adapter!r} is {weight}. Pass a finite number.")
            self._check_only_delta(adapter)

        configs = [self.peft_config[adapter] for adapter in adapters]
        layers = {
            name: module
            for name, module in self.model.named_modules()
            if isinstance(module, SVFLayer) and any(adapter in module.svf_delta for adapter in adapters)
        }
        self.peft_config[adapter_name] = replace(
            configs[0],
            r=None if any(config.r is None for config in configs) else max(config.r for config in configs),
            target_modules=self._exact_target(list(layers)),
            exclude_modules=None,
            layers_to_transform=None,
            layers_pattern=None,
            base_fingerprint=None,
            base_dtype=None,
            init_weights=True,
            inference_mode=True,
            runtime_config=replace(configs[0].runtime_config),
        )
        self.inject_adapter(self.model, adapter_name)
        for layer in layers.values():
            layer.mix(adapter_name, zip(adapters, weights, strict=True))

    def _exact_target(self, names: list[str]) -> list[str] | str:
        """Return `target_modules` that match exactly these modules."""
        suffixes = tuple(f".{name}" for name in names)
        unwrapped = (name.replace(".base_layer", "") for name, _ in self.model.named_modules())
        if any(name.endswith(suffixes) and name not in names for name in unwrapped):
            return "|".join(re.escape(name) for name in sorted(names))
        return sorted(names)

    # ------------------------------------------------------------------------------------------------ names

    # PEFT ignores unknown names in these three calls, so a typo would silently select the base model

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Activate adapters as PEFT does.

        Raises:
            ValueError: There is no adapter of this name.
        """
        self._check_known(adapter_name)
        self._trainable_in_wrappers = None  # enabling must not undo this choice
        super().set_adapter(adapter_name, inference_mode=inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter as PEFT does. If it was the only active one, another one becomes active, on all layers.

        Raises:
            ValueError: There is no adapter of this name, or it is merged.
        """
        active = [name for name in self.active_adapters if name != adapter_name]
        trainable = _trainable(self.model)
        super().delete_adapter(adapter_name)
        # PEFT lets each layer choose among its own adapters, and makes the new one trainable
        self.active_adapter = active or sorted(self.peft_config)[:1]
        if self.active_adapter:
            _set_adapter(self.model, self.active_adapter)  # of `modules_to_save`
        for layer in svf_layers(self.model):
            layer.activate(list(self.active_adapter))
        _restore(trainable)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge adapters as PEFT does, and warn if 16-bit weights lose too much of the change.

        Adapters of other PEFT methods are left alone. After an error, nothing of this call is merged.

        Raises:
            ValueError: There is no adapter of this name. Or merging would change more than these layers: another module
                uses a weight, or another PEFT method is active on one.
            TypeError: A layer is quantized by a backend that cannot quantize a merged weight.
        """
        with self._merging(adapter_names):
            self._check_merge_allowed()
            layers = first_owners(svf_layers(self.model))
            before = [(layer, list(layer.merged_adapters)) for layer in layers]
            try:
                for layer in layers:
                    with onload_layer(layer):
                        layer.merge(adapter_names=adapter_names, safe_merge=safe_merge)
            except Exception:  # such as NaN
                for layer, names in before:
                    if layer.merged_adapters != names:
                        with onload_layer(layer):
                            layer.unmerge()
                            if names:
                                layer.merge(adapter_names=names)
                raise

    def unmerge_adapter(self) -> None:
        """Restore the base weights.

        Raises:
            ValueError: A merged weight was changed since.
        """
        for layer in first_owners(svf_layers(self.model)):
            with onload_layer(layer):
                layer.unmerge()

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """Merge adapters and return the base model; warnings and errors as `merge_adapter`."""
        if safe_merge:  # first, because this undoes an error half way
            self.merge_adapter(adapter_names, safe_merge=True)
        with self._merging(adapter_names), warnings.catch_warnings():
            if safe_merge:
                warnings.filterwarnings("ignore", message="All adapters are already merged")
            layers = svf_layers(self.model)
            merged: nn.Module = super().merge_and_unload(progressbar=progressbar, adapter_names=adapter_names)
        remember_merged(layers)
        return merged

    @contextmanager
    def _merging(self, adapter_names: Sequence[str] | None) -> Iterator[None]:
        self._check_known(adapter_names or [])
        layers = [
            layer
            for layer in svf_layers(self.model)
            if any(name in layer.svf_delta for name in adapter_names or layer.active_adapters)
        ]
        for layer in layers:  # all of them before the first one is changed
            layer.check_mergeable()
        regroup(svf_layers(self.model))
        check_only_owner(self.model, layers, adapter_names)
        before = [(layer, len(layer.merged_adapters)) for layer in layers]
        for layer in layers:
            layer.merge_state.checked = True
        try:
            yield
        finally:
            for layer in layers:
                layer.merge_state.checked = False
        changed = [layer for layer, merged in before if len(layer.merged_adapters) > merged]
        lossy = sorted(
            (layer.merged_fraction, layer.module_name) for layer in changed if layer.merged_fraction < SMALLEST_FRACTION
        )
        if lossy:
            warnings.warn(
                f"{len(lossy)} of {len(changed)} merged weights are too coarse for the change: {lossy[0][0]:.0%} of ΔW "
                f"is left in {lossy[0][1]} (median {median(fraction for fraction, _ in lossy):.0%}). Keep the adapter "
                "unmerged, or merge it into the base model in float32.",
                stacklevel=4,
            )

    def _check_only_delta(self, adapter_name: str) -> None:
        config = self.peft_config[adapter_name]
        if config.modules_to_save or config.bias != "none":
            raise ValueError(f"Adapter {adapter_name!r} has `modules_to_save` or `bias`, which cannot be mixed.")

    def _check_known(self, adapter_names: str | Sequence[str]) -> None:
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            if name not in self.peft_config:
                raise ValueError(f"Adapter {name!r} not found; there are {', '.join(self.peft_config) or 'none'}.")


def _trainable(*modules: nn.Module) -> list[tuple[nn.Parameter, bool]]:
    return [(parameter, parameter.requires_grad) for module in modules for parameter in module.parameters()]


def _restore(trainable: Sequence[tuple[nn.Parameter, bool]]) -> None:
    for parameter, requires_grad in trainable:
        parameter.requires_grad_(requires_grad)
