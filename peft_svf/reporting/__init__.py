"""Model cards and plots. Knows files and numbers, no models."""

from .plots import plot_curves, plot_deltas, plot_evaluation, plot_result

__all__ = ["plot_curves", "plot_deltas", "plot_evaluation", "plot_result"]
