"""Singular bases and the arithmetic of SVF. Depends on torch, not on PEFT."""

from .arithmetic import (
    delta_weight,
    effective_weight,
    fold_cost,
    gate,
    gate_correction,
    gate_cost,
    products_cost,
    projected_products,
)
from .basis import SingularBasis, gate_side, singular_basis
from .cache import BasisCache, CacheEntry, checksum, clear_cache, default_cache_dir, list_cache, weight_key
from .fingerprint import fingerprint, fingerprint_difference
from .function import folded_linear, invertible
from .pack import FORMAT as PACK_FORMAT
from .pack import INDEX as PACK_INDEX
from .pack import BasisPack
from .rounding import surviving_fraction

__all__ = [
    "PACK_FORMAT",
    "PACK_INDEX",
    "BasisCache",
    "BasisPack",
    "CacheEntry",
    "SingularBasis",
    "checksum",
    "clear_cache",
    "default_cache_dir",
    "delta_weight",
    "effective_weight",
    "fingerprint",
    "fingerprint_difference",
    "fold_cost",
    "folded_linear",
    "gate",
    "gate_correction",
    "gate_cost",
    "gate_side",
    "invertible",
    "list_cache",
    "products_cost",
    "projected_products",
    "singular_basis",
    "surviving_fraction",
    "weight_key",
]
