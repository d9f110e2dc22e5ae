"""Between SVF adapters and the formats of others."""

from .lora import LoraExport, to_lora

__all__ = ["LoraExport", "to_lora"]
