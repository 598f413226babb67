"""What the channel layer counts.

Plain integers that a collector reads when Prometheus asks: a counter of the client library takes a lock at every
increment, which is too much for something that happens with each frame.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from whispr.kit.telemetry import metrics


class Stats:
    """Totals of this process. Only the event loop's thread writes them."""

    __slots__ = (
        "channels",
        "closes",
        "crashes",
        "frames_in",
        "frames_out",
        "joins",
        "malformed",
        "refusals",
        "slow_closes",
        "sockets",
    )

    def __init__(self) -> None:
        self.sockets = 0
        self.channels = 0
        self.frames_in = 0
        self.frames_out = 0
        self.malformed = 0
        self.slow_closes = 0
        self.crashes = 0
        self.joins: Counter[str] = Counter()
        """By outcome: ok, refused, crashed, abandoned."""
        self.refusals: Counter[int] = Counter()
        """Connections refused before they were made, by HTTP status."""
        self.closes: Counter[int] = Counter()
        """Sockets closed by us, by code."""


stats = Stats()


class _Reader(Collector):
    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        for name, text in (("sockets", "Open sockets."), ("channels", "Joined channels.")):
            yield GaugeMetricFamily(f"whispr_channels_{name}", text, value=getattr(stats, name))
        for name, text in (
            ("frames_in", "Frames received."),
            ("frames_out", "Frames sent."),
            ("malformed", "Frames that could not be read."),
            ("slow_closes", "Sockets closed because they did not read."),
            ("crashes", "Channels that ended in an unexpected error."),
        ):
            yield CounterMetricFamily(f"whispr_channels_{name}", text, value=getattr(stats, name))
        for name, text, label in (
            ("joins", "Joins, by outcome.", "outcome"),
            ("refusals", "Connections refused, by HTTP status.", "status"),
            ("closes", "Sockets closed by us, by code.", "code"),
        ):
            family = CounterMetricFamily(f"whispr_channels_{name}", text, labels=[label])
            for value, count in getattr(stats, name).items():
                family.add_metric([str(value)], count)
            yield family


metrics.REGISTRY.register(_Reader())
