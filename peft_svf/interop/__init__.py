"""Between SVF adapters and the formats of others."""

from .fit import Explained, from_weights
from .lora import LoraExport, to_lora
from .released import import_expert

__all__ = ["Explained", "LoraExport", "from_weights", "import_expert", "to_lora"]
