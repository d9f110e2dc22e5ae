"""Prometheus metrics of an endpoint."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric

from .engine import Engine

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """
    Counts by expert. All mixtures have one label, as clients can name any number of them.

    Args:
        engine ([`Engine`]): The engine, whose running requests are reported.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine, self._registry = engine, CollectorRegistry()
        common: Any = {"namespace": "peft_svf", "registry": self._registry}
        self.requests = Counter("requests", "Requests.", ["expert", "status"], **common)
        self.tokens = Counter("tokens", "Tokens of prompts and answers.", ["expert", "kind"], **common)
        self.first_pass = Histogram(
            "first_pass_seconds", "From a request to its choice.", ["expert"], buckets=_SECONDS, **common
        )
        self.first_pass_failures = Counter("first_pass_failures", "Answered by the base model instead.", **common)
        self._registry.register(self)  # for `collect`

    def collect(self) -> list[Metric]:
        """Return the metrics that are read when they are asked for."""
        running = GaugeMetricFamily("peft_svf_running_requests", "Requests that are not finished.")
        running.add_metric([], self._engine.running)
        return [running]

    def text(self) -> bytes:
        """Return all metrics in Prometheus's text format."""
        return generate_latest(self._registry)
