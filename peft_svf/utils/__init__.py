"""Helpers for all other packages: atomic files, processes, progress bars, figures, the version."""
