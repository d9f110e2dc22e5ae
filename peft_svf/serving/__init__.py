"""Serve experts: many in one engine, another expert or mixture for each request."""

from .mixtures import mixture_name, parse_mixture

__all__ = ["mixture_name", "parse_mixture"]
