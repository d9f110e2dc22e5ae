"""Between SVF adapters and the formats of others."""

from .fit import Explained, from_weights
from .hub import push_expert
from .inspect import AdapterSummary, inspect_adapter
from .lora import LoraExport, to_lora
from .merged import Merged, merge_to_folder
from .packs import decompose
from .released import import_expert

__all__ = [
    "AdapterSummary",
    "Explained",
    "LoraExport",
    "Merged",
    "decompose",
    "from_weights",
    "import_expert",
    "inspect_adapter",
    "merge_to_folder",
    "push_expert",
    "to_lora",
]
