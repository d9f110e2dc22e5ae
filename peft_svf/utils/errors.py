"""The errors that a user can cause."""

from __future__ import annotations

from safetensors import SafetensorError

# Such as a damaged file or a value of the wrong type in a recipe. All others are bugs, which need their traceback.
EXPECTED = (ValueError, TypeError, ImportError, OSError, SafetensorError)
