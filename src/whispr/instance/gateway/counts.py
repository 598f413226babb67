"""What the builtin gateway counts. Envoy has its own numbers."""

import contextlib
from collections.abc import Iterator

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)

# Long polling holds a request for up to 90 seconds.
BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 90.0)


class Counts:
    """Requests by service. A service is one of the routes', or "none": labels from outside could fill the memory."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        ProcessCollector(registry=self._registry)
        self._requests = Counter(
            "whispr_gateway_requests",
            "Requests answered, by class of status; a WebSocket is 1xx, and counted when it opens.",
            ("service", "status"),
            registry=self._registry,
        )
        self._seconds = Histogram(
            "whispr_gateway_request_seconds",
            "Time to answer a request, WebSockets left out.",
            ("service",),
            buckets=BUCKETS,
            registry=self._registry,
        )
        self._sockets = Gauge("whispr_gateway_sockets", "Open WebSockets.", registry=self._registry)

    def answered(self, service: str, status: int, seconds: float) -> None:
        """A request was answered with `status` after `seconds`."""
        self._requests.labels(service, _class(status)).inc()
        self._seconds.labels(service).observe(seconds)

    @contextlib.contextmanager
    def open_socket(self, service: str) -> Iterator[None]:
        """A WebSocket is open meanwhile."""
        self._requests.labels(service, _class(101)).inc()
        with self._sockets.track_inprogress():
            yield

    def exposition(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self._registry)


def _class(status: int) -> str:
    return f"{status // 100}xx"
