"""Singular bases and the arithmetic of SVF. Knows torch, not PEFT."""

from .arithmetic import delta_weight, effective_weight, gate, gate_correction
from .basis import SingularBasis, gate_side, singular_basis
from .cache import BasisCache, CacheEntry, clear_cache, default_cache_dir, list_cache, weight_key
from .fingerprint import fingerprint, fingerprint_difference

__all__ = [
    "BasisCache",
    "CacheEntry",
    "SingularBasis",
    "clear_cache",
    "default_cache_dir",
    "delta_weight",
    "effective_weight",
    "fingerprint",
    "fingerprint_difference",
    "gate",
    "gate_correction",
    "gate_side",
    "list_cache",
    "singular_basis",
    "weight_key",
]
