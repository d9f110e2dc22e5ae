"""The version of this package. Package metadata cannot be relied on: a clone on PYTHONPATH has none."""

__version__ = "0.1.0"
