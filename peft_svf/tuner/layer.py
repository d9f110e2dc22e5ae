"""The adapted layer: an unchanged base layer, one shared singular basis, and one δ per adapter."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate.utils import align_module_device, has_offloaded_params
from peft.tuners.tuners_utils import (
    BaseTunerLayer,
    _get_in_out_features,
    check_adapters_to_merge,
    delete_adapter,
    onload_layer,
)
from peft.utils import ModulesToSaveWrapper
from peft.utils.integrations import gather_params_ctx
from torch import nn
from torch.nn.functional import linear, pad
from transformers.pytorch_utils import Conv1D

from ..spectral.arithmetic import delta_weight, effective_weight, gate_correction
from ..spectral.basis import gate_side, singular_basis
from ..spectral.cache import BasisCache
from ..spectral.fingerprint import fingerprint
from ..spectral.function import folded_linear
from ..spectral.pack import BasisPack
from ..spectral.rounding import surviving_fraction
from .base_check import check_base
from .bases import build_bases
from .config import SVFConfig
from .fold import Fold
from .frozen import watch_training
from .merge import Merge
from .parameters import BASIS_NAME, Delta
from .protocol import DeltasOfRows
from .quantized import Original, dequantized, kept_fraction
from .rows import row_deltas
from .sharing import WholeModel, check_only_owner

if TYPE_CHECKING:
    from peft.utils.quantization_utils import QuantizationBackend


class SVFLayer(BaseTunerLayer):
    """
    Singular value fine-tuning of one weight (Transformer², https://huggingface.co/papers/2501.06252, eq. 1).

    With `W = U diag(σ) Vᵀ` and z = 1 + δ the layer computes `W(z) x = U diag(σ ⊙ z) Vᵀ x`. On the smaller side of W the
    singular vectors form an orthogonal matrix Q, and the whole effect is a gate there,

        g(h) = h + Q (δ ⊙ Qᵀ h)        y = g(W x) + b  if out <= in, else  y = W g(x) + b

    around an unchanged base layer. All adapters of the layer share Q, so they are vectors in one space: active ones
    add, their weighted sums are adapters, and δ = 0 is the base model bit for bit.

    Q belongs to the base model and is never saved with an adapter. `build_basis` makes it wide enough for the widest
    adapter; narrower ones use its leading columns. On a quantized base layer, Q is that of the full-precision weight
    and comes from a basis pack.
    """

    adapter_layer_names: tuple[str, ...] = ("svf_delta",)
    other_param_names: tuple[str, ...] = ("svf_config",)

    def __init__(
        self, base_layer: nn.Module, *, name: str, quantization_backend: QuantizationBackend | None = None
    ) -> None:
        self.base_layer = base_layer
        self.quantization_backend = quantization_backend
        self.module_name = name  # for messages
        self.svf_delta = nn.ModuleDict({})
        self.svf_config: dict[str, SVFConfig] = {}
        self.register_parameter(BASIS_NAME, None)
        self.basis_rank = 0  # stored, because ZeRO-3 leaves partitioned parameters without a shape
        self.base_spectrum: torch.Tensor | None = None  # σ of the decomposed weight, [k], on the CPU
        self._fingerprints: dict[int, list[float]] = {}  # by r
        self.merge_state = Merge([self])
        self.whole_model = WholeModel()
        self.fold = Fold()
        self.open_calls = 0  # mixed batches that run in any thread

        self._disable_adapters = False
        self.trainable_when_enabled: list[str] = []  # adapters that were trainable before all were disabled
        self.merged_adapters = self.merge_state.names
        self.cast_input_dtype_enabled = True

        self.fan_in_fan_out = isinstance(self.get_base_layer(), Conv1D)
        self.in_features, self.out_features = _get_in_out_features(self.get_base_layer())
        self.side = gate_side(self.out_features, self.in_features)

    # ------------------------------------------------------------------------------------------------ adapters

    def update_layer(self, adapter_name: str, config: SVFConfig, inference_mode: bool = False) -> None:
        """Add an adapter with δ = 0 `[min(r, k)]`, or random δ if `config.init_weights` is False."""
        self.svf_config[adapter_name] = config
        self.svf_delta[adapter_name] = Delta(self.rank(adapter_name))
        if not config.init_weights:
            nn.init.normal_(self._delta(adapter_name).weight, std=0.5)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_requires_grad(adapter_name, adapter_name in self.active_adapters and not inference_mode)

    def _delta(self, adapter_name: str) -> Delta:
        delta = self.svf_delta[adapter_name]
        assert isinstance(delta, Delta)
        return delta

    @property
    def rows(self) -> DeltasOfRows | None:
        """The δ of the batch rows, during a mixed batch of this thread."""
        return row_deltas(self) if self.open_calls else None

    def delta_weights(self, adapter_names: Iterable[str]) -> list[torch.Tensor]:
        """Return the parameters δ of these adapters, to inspect. To compute with δ, use `summed_delta`."""
        return [cast(torch.Tensor, self.svf_delta[name].weight) for name in adapter_names]

    def rank(self, adapter_name: str) -> int:
        """Return how many singular values an adapter rescales: `r`, at most k."""
        k, r = min(self.in_features, self.out_features), self.svf_config[adapter_name].r
        return k if r is None else min(r, k)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT's version also casts to the base layer's dtype: a bf16 δ would lose the small updates of RL.
        delta, base_layer = self._delta(adapter_name), self.get_base_layer()
        device = device or self._get_base_layer_device_and_dtype(base_layer)[0]
        if has_offloaded_params(base_layer):  # its weight is on the meta device until it is called
            device = torch.device(cast(Any, base_layer._hf_hook).execution_device)
        if device is not None and device.type != "meta" and not delta.weight.is_meta:
            delta.to(device)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Activate adapters as PEFT does."""
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self.trainable_when_enabled = []  # enabling must not undo this choice

    def activate(self, adapter_names: list[str]) -> None:
        """Activate adapters without changing which are trainable."""
        self._active_adapter = adapter_names

    def enable_adapters(self, enabled: bool) -> None:
        """Enable or disable all adapters. Frozen adapters stay frozen, while PEFT's version makes them trainable."""
        if enabled:
            self._disable_adapters = False
            self.set_requires_grad(self.trainable_when_enabled)
            self.trainable_when_enabled = []
        elif not self._disable_adapters:
            # layers that share δ have it frozen by the first of them
            self.trainable_when_enabled = [name for name, delta in self._named_deltas() if delta.requires_grad]
            super().enable_adapters(False)

    def _named_deltas(self) -> list[tuple[str, torch.Tensor]]:
        return list(zip(self.svf_delta, self.delta_weights(self.svf_delta), strict=True))

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter, and the basis with the last one.

        Raises:
            ValueError: The adapter is merged.
        """
        if adapter_name in self.merged_adapters:
            raise ValueError(f"Adapter {adapter_name!r} is merged. Unmerge it before you delete it.")
        before = [(parameter, parameter.requires_grad) for _, parameter in self._named_deltas()]
        when_enabled = self.trainable_when_enabled
        super().delete_adapter(adapter_name)
        for parameter, trainable in before:
            parameter.requires_grad_(trainable)  # PEFT makes the adapter trainable that becomes active
        self.trainable_when_enabled = when_enabled
        self.fold = Fold()  # the old one refers to the deleted δ
        if not self.svf_delta:
            self._set_basis(None)

    def summed_delta(self, adapter_names: Iterable[str]) -> torch.Tensor:
        """Return the sum of the δ of these adapters, `[widest r]` in fp32. The layer must have at least one of them."""
        deltas = [self.svf_delta[name]() for name in adapter_names if name in self.svf_delta]
        total, *others = sorted(deltas, key=len, reverse=True)
        for delta in others:
            total = total + (delta if len(delta) == len(total) else pad(delta, (0, len(total) - len(delta))))
        return total

    @torch.no_grad()
    def mix(self, adapter_name: str, parts: Iterable[tuple[str, float]]) -> None:
        """Overwrite the δ of an adapter by Σ_k α_k δ_k, given pairs of a name and its α_k.

        An adapter that the layer does not have counts as δ = 0.
        """
        total = torch.zeros_like(self._delta(adapter_name)())
        for name, weight in parts:
            if name in self.svf_delta:
                delta = self._delta(name)()
                total[: len(delta)] += weight * delta.to(total.device)
        self._delta(adapter_name).weight.copy_(total)

    # ------------------------------------------------------------------------------------------------ basis

    @property
    def basis(self) -> torch.Tensor | None:
        """Q, `[k, r]` with the r of the widest adapter; `None` until it is built.

        Its dtype is that of the base weight, or that of the pack if the base weight is quantized.
        """
        return getattr(self, BASIS_NAME)

    @property
    def shape(self) -> tuple[int, int]:
        """`(out, in)` of the base weight."""
        return self.out_features, self.in_features

    def needs_basis(self) -> bool:
        """Whether `build_basis` must run: there is no basis, it is too narrow, or it was made on the meta device."""
        if not self.svf_delta:
            return False
        if self.basis is None or self.basis_rank < self._widest():
            return True
        return self.basis.is_meta and not self.is_on_meta

    @property
    def base_device(self) -> torch.device:
        """The device of the base weight."""
        device = self._get_base_layer_device_and_dtype(self.get_base_layer())[0]
        return torch.device("cpu") if device is None else device

    @property
    def base_dtype(self) -> torch.dtype | None:
        """The dtype of the base weight; of its computation if it is quantized and known; otherwise `None`."""
        dtype: torch.dtype | None = self._get_base_layer_device_and_dtype(self.get_base_layer())[1]
        return dtype

    @property
    def is_on_meta(self) -> bool:
        """Whether the base weight has not been loaded yet."""
        return self.base_device.type == "meta"

    @torch.no_grad()
    def build_basis(self, source: BasisCache | BasisPack | None = None) -> None:
        """Compute Q from the base weight, or read it from a cache or a pack.

        On the meta device, Q only gets its shape. It is built when the weights have been loaded.

        Args:
            source ([`BasisCache`] or [`BasisPack`], *optional*): Where to read Q; a cache also stores it.

        Raises:
            ValueError: The weight holds NaN or Inf, is not a floating point matrix, or differs from that of the pack.
                Or the pack has fewer columns than the widest adapter, or a quantized weight has no pack.
        """
        r, base_layer = self._widest(), self.get_base_layer()
        for other in self.merge_state.layers:
            if other is not self and other.basis_rank >= r and (other.is_on_meta or not other.needs_basis()):
                self._adopt_basis(other)
                return
        quantized = self.quantization_backend is not None
        with ExitStack() as stack:
            if not quantized:
                stack.enter_context(gather_params_ctx(base_layer.weight, modifier_rank=None))  # ZeRO-3 partitions it
            stack.enter_context(align_module_device(base_layer))  # accelerate's CPU offload keeps it elsewhere
            if self.is_on_meta:
                self._set_basis(torch.empty(min(self.shape), r, dtype=self.base_dtype, device="meta"))
                return
            if quantized and not isinstance(source, BasisPack):
                self._check_may_decompose()
            weight = self.weight_out_in()
            if source is None:
                found = singular_basis(weight, name=self.module_name)
            elif isinstance(source, BasisPack):
                policy = next(reversed(self.svf_config.values())).runtime_config.base_check
                found = source.basis_for(weight, name=self.module_name, quantized=quantized, base_check=policy)
            else:
                found = source.load_or_compute(weight, name=self.module_name)
            if found.vectors.shape[1] < r:
                raise ValueError(
                    f"{source} has {found.vectors.shape[1]} singular vectors for {self.module_name}, but the adapter "
                    f"changes {r}. Make a wider pack (`peft-svf decompose --r`), or pass a smaller `r`."
                )
        self.base_spectrum, self._fingerprints = found.spectrum, {}
        self._set_basis(found.leading(r).vectors)

    def _adopt_basis(self, other: SVFLayer) -> None:
        """Use the basis of a layer that has the same base weight."""
        self.base_spectrum, self._fingerprints = other.base_spectrum, {}
        self._parameters[BASIS_NAME], self.basis_rank = other._parameters[BASIS_NAME], other.basis_rank

    @torch.no_grad()
    def fingerprint(self, adapter_name: str) -> list[float] | None:
        """Return the numbers that identify the base weight for an adapter; `None` if it is not decomposed yet.

        Without samples of Q if Q is sharded or offloaded.
        """
        if self.base_spectrum is None:
            return None
        r, Q = self.rank(adapter_name), self.basis
        if r not in self._fingerprints:
            sharded = type(Q) not in (torch.Tensor, nn.Parameter)
            if Q is None or Q.is_meta or sharded or Q.shape != (min(self.shape), self.basis_rank):
                return fingerprint(self.base_spectrum)
            self._fingerprints[r] = fingerprint(self.base_spectrum, Q[:, :r])
        return self._fingerprints[r]

    def _check_may_decompose(self) -> None:
        if any(config.runtime_config.decompose_quantized for config in self.svf_config.values()):
            return
        assert self.quantization_backend is not None
        raise ValueError(
            f"{self.module_name} is quantized ({self.quantization_backend.backend_name}), and SVF needs the singular "
            "vectors of the full-precision weights. Make a basis pack, `peft-svf decompose MODEL --output_dir PACK`, "
            'and pass `runtime_config=SVFRuntimeConfig(basis="PACK")`. To train experts for this quantized model only, '
            "pass `SVFRuntimeConfig(decompose_quantized=True)`."
        )

    def _set_basis(self, vectors: torch.Tensor | None) -> None:
        parameter = None if vectors is None else nn.Parameter(vectors, requires_grad=False)
        # not by assignment, which PEFT's low_cpu_mem_usage patches to put every new parameter on the meta device
        self._parameters[BASIS_NAME] = parameter
        self.basis_rank = 0 if vectors is None else vectors.shape[1]

    def forget_basis(self) -> None:
        """Drop the basis before the base weight changes. It is built and checked again when it is needed."""
        self._set_basis(None)
        self.base_spectrum, self._fingerprints = None, {}
        self.fold = Fold()

    def _widest(self) -> int:
        return max(self.rank(adapter_name) for adapter_name in self.svf_delta)

    def basis_columns(self, r: int) -> torch.Tensor:
        """Return the first r columns of Q, `[k, r]`, and build Q first if necessary.

        Raises:
            ValueError: As `build_basis`, or the base model is not the one that an adapter was made for.
            RuntimeError: The base weight is on the meta device.
        """
        if self.needs_basis():
            build_bases([self])  # the weights were loaded after the adapter
            try:
                for adapter_name in self.svf_delta:
                    check_base(adapter_name, [self], whole_model=False)
            except ValueError:
                self._set_basis(None)  # or the next forward would succeed
                raise
        if self.basis is None or self.basis.is_meta:
            raise RuntimeError(
                f"{self.module_name} is on the meta device: its base weight was never loaded, so SVF has no singular "
                "basis. Load the base model's weights first."
            )
        return self.basis[:, :r]

    # ------------------------------------------------------------------------------------------------ weight

    def as_out_in(self, weight: torch.Tensor) -> torch.Tensor:
        """Convert a weight between the layout of the base layer (Conv1D: `[in, out]`) and `[out, in]`, either way."""
        return weight.mT if self.fan_in_fan_out else weight

    def weight_out_in(self) -> torch.Tensor:
        """Return the unmerged base weight as `[out, in]`, dequantized if necessary.

        Raises:
            RuntimeError: ZeRO-3 partitions the weight.
        """
        return self.as_out_in(self._unmerged_weight())

    @torch.no_grad()
    def get_delta_weight(self, adapter_name: str) -> torch.Tensor:
        """Return ΔW = W(z) - W of one adapter, fp32, in the layout of the base layer's weight."""
        delta = self._delta(adapter_name)()
        return self.as_out_in(delta_weight(self.weight_out_in(), self.basis_columns(len(delta)), delta))

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True

    @torch.no_grad()
    def effective_weight(self, delta: torch.Tensor) -> torch.Tensor:
        """Return `W(z)` as `[out, in]`, in the dtype of the base weight. δ is `[r]`."""
        return effective_weight(self.weight_out_in(), self.basis_columns(len(delta)), delta)

    @torch.no_grad()
    def surviving_fraction(self, delta: torch.Tensor, dtype: torch.dtype) -> float:
        """Return the fraction of ΔW that survives rounding W + ΔW to this dtype; at most 1. δ is `[r]`."""
        return surviving_fraction(self.weight_out_in(), self.basis_columns(len(delta)), delta, dtype)

    def _stored_weight(self) -> torch.Tensor:
        if self.quantization_backend is not None:
            return dequantized(self.quantization_backend, self.get_base_layer(), self.in_features)
        weight: torch.Tensor = self.get_base_layer().weight.detach()
        return weight

    def _unmerged_weight(self) -> torch.Tensor:
        if self.merge_state.before is not None:
            return self.merge_state.before.to(self.get_base_layer().weight.device)
        if self.merge_state.quantized is not None:
            return self.merge_state.quantized.weight()
        weight = self._stored_weight()
        if weight.numel() == 0:
            raise RuntimeError(
                f"The weight of {self.module_name} is partitioned by ZeRO-3. Merge inside `deepspeed.zero."
                "GatheredParameters(list(model.parameters()))`."
            )
        return weight

    # ------------------------------------------------------------------------------------------------ merging

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """
        Merge adapters into the base weight, and store the original weight.

        `unmerge` restores it bit for bit, so any number of cycles leaves the base model unchanged (TRL merges once per
        weight sync). Weights of 16 bits or less round small changes away. `merged_fraction` is the fraction of ΔW in
        the merged weight, and the model warns if it is below 98 %.

        Layers with the same base weight are merged together, by the first call for one of them.

        Args:
            safe_merge (`bool`):
                Check that the merged weight is finite before the base weight is overwritten.
            adapter_names (`list[str]`, *optional*):
                The adapters to merge; the active ones if `None`.

        Raises:
            TypeError: The base layer is quantized by a backend that cannot quantize a merged weight.
            ValueError: `safe_merge` found NaN or Inf. Another module uses the same weight, or another PEFT method is
                active on it or merged into it. Or the merged weight was changed since an earlier merge.
        """
        state = self.merge_state
        wanted = self.active_adapters if adapter_names is None else adapter_names
        if self.merged and self is not state.layers[0] and set(wanted) <= {*self.merged_adapters}:
            return  # merged together with the first layer of this weight
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.svf_delta]
        if not names:
            return
        self.check_mergeable()
        if not state.checked:
            self.fold.release()  # LoRA on top calls this, and has written the weight through `.data`
            if (model := self.whole_model()) is not None:
                check_only_owner(model, [self], names)
        self._check_intact()
        backend = self.quantization_backend
        with align_module_device(self):  # PEFT's onload_layer leaves out the layer's own parameters
            together = (*self.merged_adapters, *names)
            delta = self.summed_delta(together)
            folded = self.fold.peek(self, together)
            merged = self.effective_weight(delta) if folded is None else folded
            fraction = self._merged_fraction(delta)
            for layer in state.layers:
                layer.fold.release()  # to make room for the copy of the original weight
        if safe_merge and not torch.isfinite(merged).all():
            raise ValueError(
                f"NaNs detected in the merged weights. The adapter {', '.join(names)} seems to be broken: "
                f"{self.module_name} would hold values that are not finite."
            )
        state.fraction = fraction
        if backend is None:
            if not self.merged:
                state.before = self.get_base_layer().weight.detach().clone()
            self._write(self.as_out_in(merged))
            state.wrote(self.get_base_layer().weight)
        else:
            self._merge_quantized(backend, merged)
        self.merged_adapters.extend(names)

    def _merge_quantized(self, backend: QuantizationBackend, merged: torch.Tensor) -> None:
        original = self.merge_state.quantized or Original(backend, self.get_base_layer())
        try:
            original.replace(self, merged)
            self.merge_state.fraction = kept_fraction(original.weight(), merged, self._stored_weight())
        except BaseException:
            original.put_back(self)
            self.merge_state.clear()
            raise
        self.merge_state.quantized = original

    def _write(self, weight: torch.Tensor | None) -> None:
        """Overwrite the base weight. Casting can have separated the tensors of layers that share it."""
        parameters = (layer.get_base_layer().weight for layer in self.merge_state.layers)
        for parameter in {id(parameter): parameter for parameter in parameters}.values():
            # in place: under FSDP2, assigning `weight.data` silently does nothing
            parameter.data.copy_(weight)

    @property
    def merged_fraction(self) -> float:
        """The fraction of ΔW in the merged weight; 1 if nothing is merged."""
        return self.merge_state.fraction

    def _check_intact(self) -> None:
        weights = [layer.get_base_layer().weight for layer in self.merge_state.layers]
        if self.merge_state.before is not None and not all(
            self.merge_state.is_intact(weight) for weight in {id(weight): weight for weight in weights}.values()
        ):
            raise ValueError(
                f"The base weight of {self.module_name} was changed while {', '.join(self.merged_adapters)} was merged "
                "into it, so the original weight is out of date. Load the base model again, and unmerge before "
                "anything else writes its weights."
            )

    def check_mergeable(self) -> None:
        """Check that the base layer can hold a merged weight.

        Raises:
            TypeError: It is quantized by a backend that cannot quantize a merged weight.
        """
        backend = self.quantization_backend
        if backend is not None and not backend.supports_merge:
            raise TypeError(
                f"{self.module_name} is quantized ({backend.backend_name}), and PEFT cannot quantize a merged weight "
                "for it. Leave the adapter unmerged, or merge it into the full-precision model."
            )

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restore the base weight from before the first `merge`.

        Raises:
            ValueError: The merged weight was changed since, by another adapter, an optimizer or `load_state_dict`.
        """
        if not self.merged:
            self.fold.release()  # LoRA on top calls this, and has written the weight through `.data`
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self._check_intact()
        if self.merge_state.quantized is not None:
            self.merge_state.quantized.put_back(self)
        else:
            self._write(self.merge_state.before)
        self.merge_state.clear()

    def _merged_fraction(self, delta: torch.Tensor) -> float:
        if self.quantization_backend is not None:
            return 1.0  # computed after quantization
        weight = self._unmerged_weight()
        if weight.dtype.itemsize > 2 or type(weight) not in (torch.Tensor, nn.Parameter):  # sharded: has not all rows
            return 1.0
        return self.surviving_fraction(delta, weight.dtype)


class Linear(nn.Module, SVFLayer):
    """SVF around an `nn.Linear`, a transformers `Conv1D`, or a quantized linear layer."""

    if TYPE_CHECKING:  # declared for mypy, which sees `nn.Module.__getattr__` in place of PEFT's untyped mixin
        active_adapters: list[str]
        get_base_layer: Callable[[], Any]
        _cast_input_dtype: Callable[[torch.Tensor, torch.dtype], torch.Tensor]

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: SVFConfig,
        *,
        name: str,
        quantization_backend: QuantizationBackend | None = None,
    ) -> None:
        super().__init__()
        SVFLayer.__init__(self, base_layer, name=name, quantization_backend=quantization_backend)
        self._active_adapter = [adapter_name]
        self.update_layer(adapter_name, config=config)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Map `[..., in]` to `[..., out]`, in the output dtype of the base layer.

        Raises:
            ValueError: In a mixed batch, the number of rows differs from that of the adapters.
        """
        if self.disable_adapters:
            if self.merged:
                with onload_layer(self):  # an offloaded weight can only be changed while it is here
                    self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        rows = row_deltas(self) if self.open_calls else None
        if rows is None and not args and not kwargs and (folded := self.fold.ready(self)) is not None:
            return linear(x, folded, self._base_bias())
        if rows is not None:
            if self.merged:
                raise ValueError(f"{self.module_name} was merged during a mixed batch. Call `unmerge_adapter` first.")
            names = rows.same
            if names and not args and not kwargs:
                if (folded := self.fold.ready(self, names)) is not None:
                    rows.check(x)
                    return linear(x, folded, self._base_bias())
                if (folded := self.fold.find(self, names, x)) is not None:
                    rows.check(x)
                    return self._folded(x, folded, names)
            delta = rows(x)
            return self.base_layer(x, *args, **kwargs) if delta is None else self._gated(x, delta, *args, **kwargs)
        names = tuple(name for name in self.active_adapters if name in self.svf_delta)
        if self.merged:
            if set(names) <= {*self.merged_adapters}:
                return self.base_layer(x, *args, **kwargs)
            names = tuple(dict.fromkeys([*self.merged_adapters, *names]))  # some are active and not merged
            return self._gated(x, self.summed_delta(names), *args, **kwargs)
        if not names:
            self.fold.release()
            return self.base_layer(x, *args, **kwargs)
        if not args and not kwargs:
            folded = self.fold.find(self, names, x)
            if folded is not None:
                return self._folded(x, folded, names)
        result = self._gated(x, self.summed_delta(names), *args, **kwargs)
        if self.side == "output":
            self.fold.watch(result)
        return result

    def _gated(self, x: torch.Tensor, delta: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.side == "input":
            return self._base(x + self._correction(x, delta), *args, **kwargs)
        result = self._base(x, *args, **kwargs)
        bias = self.bias
        if bias is not None and bias.is_meta and has_offloaded_params(base_layer := self.get_base_layer()):
            bias = base_layer._hf_hook.weights_map["bias"].to(result.device)
        h = result if bias is None else result - bias.to(result.dtype)  # they differ under autocast
        return result + self._correction(h, delta)

    def _base(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Apply the unmerged base layer."""
        if not self.merged:
            return self.base_layer(x, *args, **kwargs)
        bias = self._base_bias()
        return linear(x, self.weight_out_in().to(x.dtype), None if bias is None else bias.to(x.dtype))

    def _correction(self, h: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
        basis = self.basis_columns(delta.shape[-1])
        return gate_correction(self._cast_input_dtype(h, basis.dtype), basis, delta).to(h.dtype)

    def _folded(self, x: torch.Tensor, folded: torch.Tensor, names: tuple[str, ...]) -> torch.Tensor:
        bias = self._base_bias()
        if not (torch.is_grad_enabled() and any(delta.requires_grad for delta in self.delta_weights(names))):
            return linear(x, folded, bias)
        delta = self.summed_delta(names)
        if torch.is_autocast_enabled(x.device.type):
            x, bias = x.to(folded.dtype), None if bias is None else bias.to(folded.dtype)
        return folded_linear(x, delta, bias, folded, self.basis_columns(len(delta)))

    def _base_bias(self) -> torch.Tensor | None:
        base_layer = self._modules["base_layer"]  # PEFT's property takes as long as a small layer
        assert base_layer is not None
        return base_layer._parameters["bias"]

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        self.fold.release()  # it would stay on the old device
        if self.merge_state.before is None:
            return super()._apply(fn, recurse)
        intact = self.merge_state.is_intact(self.get_base_layer().weight)
        module = super()._apply(fn, recurse)
        self.merge_state.converted(fn, self.get_base_layer().weight, intact)
        return module

    def train(self, mode: bool = True) -> Linear:
        """Set the training mode. An optimizer that could not train the layer is refused from then on."""
        if mode:
            watch_training(self)
        super().train(mode)
        return self

    def __repr__(self) -> str:
        return "svf." + super().__repr__()


def take_out(model: nn.Module, adapter_name: str) -> None:
    """Delete an adapter from a model, and put the base modules back where it was the last one.

    PEFT's `delete_adapter` leaves empty layers.
    """
    delete_adapter(model, adapter_name=adapter_name, prefix="svf_", layer_cls=SVFLayer)
    for name, module in list(model.named_modules()):
        if isinstance(module, SVFLayer) and not module.svf_delta:
            model.set_submodule(name, module.base_layer)
        elif isinstance(module, ModulesToSaveWrapper) and not module.modules_to_save:
            model.set_submodule(name, module.original_module)


def svf_layers(model: nn.Module, adapter_name: str | None = None) -> list[SVFLayer]:
    """Return the SVF layers of a model in its order; with a name, those that have this adapter."""
    layers = [module for module in model.modules() if isinstance(module, SVFLayer)]
    return layers if adapter_name is None else [layer for layer in layers if adapter_name in layer.svf_delta]
