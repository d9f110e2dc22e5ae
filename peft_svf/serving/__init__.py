"""Experts in vLLM: many in one engine, another expert or mixture for each request."""

from .engine import adapter_bytes, add_experts, fold_expert, update_expert
from .mixtures import mixture_name, parse_mixture
from .options import ServingOptions, engine_options, serve_arguments

__all__ = [
    "ServingOptions",
    "adapter_bytes",
    "add_experts",
    "engine_options",
    "fold_expert",
    "mixture_name",
    "parse_mixture",
    "serve_arguments",
    "update_expert",
]
