"""The version of this package, for itself: an installed package's metadata may be absent, as in a clone on the path."""

__version__ = "0.1.0"
