"""Transformer² (https://huggingface.co/papers/2501.06252) for PEFT. Importing this package registers SVF with PEFT."""

from .adaptation import AdaptiveMixture, MixtureResult, NearestDispatcher, PromptDispatcher, SelfAdaptiveModel
from .tuner import SVFConfig, SVFLayer, SVFModel, SVFRuntimeConfig

__version__ = "0.1.0"

__all__ = [
    "AdaptiveMixture",
    "MixtureResult",
    "NearestDispatcher",
    "PromptDispatcher",
    "SVFConfig",
    "SVFLayer",
    "SVFModel",
    "SVFRuntimeConfig",
    "SelfAdaptiveModel",
]
