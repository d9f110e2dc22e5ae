"""SVF as a PEFT method, laid out as PEFT lays out its own."""

from .config import SVFConfig, SVFRuntimeConfig
from .deltas import adapter_deltas
from .layer import Linear, SVFLayer, svf_layers
from .model import SVFModel
from .registration import register
from .transformers_loading import check_what_transformers_loads

register(SVFConfig, SVFModel)
check_what_transformers_loads()

__all__ = ["Linear", "SVFConfig", "SVFLayer", "SVFModel", "SVFRuntimeConfig", "adapter_deltas", "svf_layers"]
