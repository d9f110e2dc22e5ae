"""Model cards and plots, from files and plain data."""

from .plots import plot_curves, plot_deltas, plot_evaluation, plot_result

__all__ = ["plot_curves", "plot_deltas", "plot_evaluation", "plot_result"]
