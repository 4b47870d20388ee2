"""What the server counts, in a registry of its own: `GET /metrics`."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

NAME = "paligemma_vla"
SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 5.0, 10.0)


class Metrics:
    """latency: from an observation's arrival to its answer, by protocol. dropped: by reason: queue, gone."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        name, registry = NAME, self.registry
        self.latency = Histogram(
            f"{name}_latency_seconds", "from observation to answer", ["protocol"], buckets=SECONDS, registry=registry
        )
        self.batch = Histogram(
            f"{name}_batch_size", "observations answered at once", buckets=(1, 2, 4, 8, 16, 32), registry=registry
        )
        self.queue = Gauge(f"{name}_queue", "observations that wait", registry=registry)
        self.clients = Gauge(f"{name}_clients", "connections", ["protocol"], registry=registry)
        self.errors = Counter(f"{name}_errors", "observations refused or failed", ["protocol"], registry=registry)
        self.dropped = Counter(f"{name}_dropped", "observations not computed", ["reason"], registry=registry)
        self.limited = Counter(f"{name}_limited", "numbers of actions that a limit changed", ["name"], registry=registry)
        self.recording = Gauge(f"{name}_recording", "1 while clients are recorded", registry=registry)
        self.not_recorded = Counter(f"{name}_not_recorded", "views that --record left out", registry=registry)

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)

    def total(self, name: str) -> float:
        """A sample's value over all labels, as `errors_total`."""
        samples = (sample for family in self.registry.collect() for sample in family.samples)
        return sum(sample.value for sample in samples if sample.name == f"{NAME}_{name}")
