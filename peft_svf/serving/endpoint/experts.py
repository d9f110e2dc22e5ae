"""The names that a request may have as its `model`."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from ...mixture.experts import expert_config
from ...mixture.loading import CLASSIFIER
from ...scoring.names import BASE
from ...tuner.layer import svf_layers
from ...tuner.names import check_adapter_name
from ..mixtures import parse_mixture
from .engine import LARGEST_DELTA, Engine
from .errors import RequestError

AUTO = "auto"  # the name of the two passes
LARGEST_WEIGHT = 10.0  # of an expert in a mixture


@dataclass(frozen=True)
class Choice:
    """
    What answers a request.

    Attributes:
        name: For the client.
        weights: α of each adapter; empty for the base model.
        label: For metrics. Mixtures have one for all, as clients can name any number of them.
    """

    name: str
    weights: Mapping[str, float]
    label: str


@dataclass
class Expert:
    """
    An expert that is served.

    Attributes:
        adapter: Its name in the model. It differs if an expert of the same name was unloaded before.
        description: What it is for.
        loaded_by_client: Whether a client loaded it, so clients may unload it.
    """

    adapter: str
    description: str = ""
    loaded_by_client: bool = False


class Experts:
    """
    The base model, the experts and mixtures of them, by the names of requests.

    Args:
        engine ([`Engine`]): The engine.
        experts (`dict[str, str]`): Description of each expert that is loaded.
        base_name (`str`): Name of the base model.
        max_mixture (`int`): Most experts of a mixture.
        root (`Path`, *optional*): The only folder that clients may load experts from. Without one they cannot.
        base_check (`str`): For experts that clients load, as of [`SVFRuntimeConfig`].

    Raises:
        ValueError: An expert has a name that is taken, cannot be served, or its parameters are not finite.
    """

    def __init__(
        self,
        engine: Engine,
        experts: Mapping[str, str],
        *,
        base_name: str,
        max_mixture: int = 8,
        root: Path | None = None,
        base_check: Any = "error",
    ) -> None:
        self.engine, self.base_name, self.max_mixture = engine, base_name, max_mixture
        self.root, self._base_check = None if root is None else root.resolve(), base_check
        self._retired: list[str] = []
        self._changing = threading.Lock()
        self._loads = 0
        self._experts: dict[str, Expert] = {}
        for name, description in experts.items():
            self._check_name(name)
            self._check_servable(name)
            self._experts[name] = Expert(name, description)

    def __iter__(self) -> Any:
        return iter(dict(self._experts).items())

    # ------------------------------------------------------------------------------------------------ names

    def find(self, name: str) -> Choice:
        """
        Return what a name stands for.

        Raises:
            RequestError: There is no such expert (404), or it is no proper mixture (400).
        """
        if name in (self.base_name, BASE):
            return self.base
        if name in self._experts:
            return Choice(name, {self._experts[name].adapter: 1.0}, name)
        if "=" not in name:
            raise self.unknown(name)
        try:
            weights = parse_mixture(name)
        except ValueError as error:
            raise RequestError(400, str(error), param="model") from error
        if len(weights) > self.max_mixture:
            raise RequestError(
                400, f"A mixture may have {self.max_mixture} experts, got {len(weights)}.", param="model"
            )
        return self.mixture(weights)

    @property
    def base(self) -> Choice:
        """The base model."""
        return Choice(self.base_name, {}, BASE)

    def mixture(self, weights: Mapping[str, float]) -> Choice:
        """Return a mixture of experts.

        Raises:
            RequestError: There is no such expert (404), or a weight is too large (400).
        """
        for name, weight in weights.items():
            if name not in self._experts:
                raise self.unknown(name)
            if not abs(weight) <= LARGEST_WEIGHT:
                raise RequestError(
                    400, f"The weight of {name!r} is {weight:g}. It may be at most {LARGEST_WEIGHT:g}.", param="model"
                )
        text = ",".join(f"{name}={weight:g}" for name, weight in weights.items())
        return Choice(text, {self._experts[name].adapter: weight for name, weight in weights.items()}, "mixture")

    def unknown(self, name: str) -> RequestError:
        """Return the error of a name that is not served."""
        served = ", ".join([self.base_name, AUTO, *self._experts])
        return RequestError(
            404,
            f"There is no model {name[:100]!r}. Served are {served}, and mixtures such as 'math=0.7,logic=0.3'.",
            param="model",
            code="model_not_found",
        )

    # ------------------------------------------------------------------------------------------------ changes

    def load(self, name: str, path: str) -> None:
        """
        Load an expert from the root. Requests wait as long as the adapter is attached.

        Args:
            name (`str`): Its name in requests.
            path (`str`): Its folder, in the root.

        Raises:
            RequestError: The path is outside of the root, the name is taken, or the expert is damaged, made for another
                base model, or cannot be served.
        """
        folder = self._folder(path)
        with self._changing:
            adapter = self._unused_adapter(name)
            try:
                self._check_name(name)
                config = expert_config(name, folder, self._base_check)
                self._attach(adapter, folder, config)
            except (ValueError, TypeError, OSError, SafetensorError) as error:
                message = str(error).replace(str(self.root), "").replace(adapter, name)
                raise RequestError(400, message) from error
            self._experts[name] = Expert(adapter, loaded_by_client=True)

    def _unused_adapter(self, name: str) -> str:
        adapter = name
        while adapter == name or adapter in self.engine.model.peft_config:  # PEFT would overwrite the other one
            self._loads += 1
            adapter = f"{name}-{self._loads}"
        return adapter

    def _attach(self, adapter: str, folder: Path, config: Any) -> None:
        model = self.engine.model
        with self.engine.changing():
            try:
                model.load_adapter(folder, adapter_name=adapter, config=config, torch_device=str(model.device))
                self._check_servable(adapter)
            except BaseException:
                if adapter in model.peft_config:
                    model.delete_adapter(adapter)
                raise

    def unload(self, name: str) -> None:
        """
        Remove an expert that a client loaded. Requests that use it go on to their end.

        Raises:
            RequestError: There is no such expert, or the server was started with it.
        """
        with self._changing:
            expert = self._experts.get(name)
            if expert is None:
                raise self.unknown(name)
            if not expert.loaded_by_client:
                raise RequestError(400, f"The server was started with the expert {name!r}, so it stays.")
            del self._experts[name]
            self._retired.append(expert.adapter)
        self.delete_unused()

    def delete_unused(self) -> None:
        """Free the adapters of removed experts that no request uses any more."""
        with self._changing:
            if self.has_unused:
                with self.engine.changing():
                    for adapter in [each for each in self._retired if not self.engine.uses(each)]:
                        self.engine.model.delete_adapter(adapter)
                        self._retired.remove(adapter)

    @property
    def has_unused(self) -> bool:
        """Whether `delete_unused` has work."""
        return any(not self.engine.uses(adapter) for adapter in list(self._retired))

    def _folder(self, path: str) -> Path:
        if self.root is None:
            raise RequestError(404, "This server loads no experts. Start it with --expert_root.")
        try:
            folder = (self.root / path).resolve()  # also follows links out of the root
            allowed = folder.is_relative_to(self.root) and folder.is_dir()
        except (OSError, ValueError, RuntimeError):  # too long, a null byte, a circle of links
            allowed = False
        if not allowed:
            raise RequestError(400, f"There is no folder {path!r} in the folder of experts.", param="lora_path")
        return folder

    def _check_name(self, name: Any) -> None:
        check_adapter_name(name)
        if name in (self.base_name, BASE, AUTO, CLASSIFIER) or any(mark in name for mark in ",= "):
            raise ValueError(f"An expert cannot be served as {name!r}. Choose another name, such as 'math'.")
        if name in self._experts:
            raise ValueError(f"There is an expert {name!r} already. Unload it first, or choose another name.")

    def _check_servable(self, adapter: str) -> None:
        self.engine.rows.check([adapter])
        for layer in svf_layers(self.engine.model, adapter):
            largest = float(torch.as_tensor(layer.delta_weights([adapter])[0]).abs().max())
            if not largest <= LARGEST_DELTA:
                raise ValueError(f"The expert {adapter!r} has |δ| = {largest:g} in {layer.module_name}: it is damaged.")
