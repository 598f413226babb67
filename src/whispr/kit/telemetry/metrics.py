"""Prometheus metrics, declared once. Labels take values from closed sets only, or one client could fill the memory.

Naming: `whispr_<area>_<what>_<unit>`; times in seconds.
"""

from __future__ import annotations

import platform
from collections.abc import Container, Sequence

from prometheus_client import (
    GC_COLLECTOR,
    PLATFORM_COLLECTOR,
    PROCESS_COLLECTOR,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    generate_latest,
)

from whispr import __version__

REGISTRY = CollectorRegistry(auto_describe=False)
for _collector in (PROCESS_COLLECTOR, PLATFORM_COLLECTOR, GC_COLLECTOR):
    REGISTRY.register(_collector)

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

FAST = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Buckets in seconds for work a person waits for."""

SLOW = (0.1, 0.5, 1.0, 5.0, 15.0, 30.0, 60.0, 300.0, 900.0, 3600.0)
"""Buckets in seconds for work in the background."""

HTTP_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


def counter(name: str, documentation: str, labels: Sequence[str] = ()) -> Counter:
    """Declare a counter `whispr_<name>_total` at module level. Raises ValueError if the name is taken."""
    return Counter(f"whispr_{name}", documentation, labels, registry=REGISTRY)


def gauge(name: str, documentation: str, labels: Sequence[str] = ()) -> Gauge:
    """Declare a gauge `whispr_<name>` at module level. Raises ValueError if the name is taken."""
    return Gauge(f"whispr_{name}", documentation, labels, registry=REGISTRY)


def histogram(
    name: str, documentation: str, labels: Sequence[str] = (), buckets: Sequence[float] = FAST
) -> Histogram:
    """Declare a histogram `whispr_<name>` at module level. Raises ValueError if the name is taken."""
    return Histogram(f"whispr_{name}", documentation, labels, buckets=tuple(buckets), registry=REGISTRY)


def bounded(value: str, allowed: Container[str]) -> str:
    """`value` if it is one of `allowed`, else "other": for label values that come from outside."""
    return value if value in allowed else "other"


def exposition() -> bytes:
    """All metrics in Prometheus' text format."""
    return generate_latest(REGISTRY)


info = Info("whispr", "What runs here.", registry=REGISTRY)


def describe(service: str) -> None:
    """Set `whispr_info` to this process' service and versions."""
    info.info({"service": service, "version": __version__, "python": platform.python_version()})


http_requests = counter("http_requests", "Requests served.", ("method", "route", "status"))
http_request_seconds = histogram("http_request_seconds", "Time to serve a request.", ("method", "route"))
http_requests_in_flight = gauge("http_requests_in_flight", "Requests being served.")

grpc_server_calls = counter("grpc_server_calls", "Calls served.", ("method", "caller", "status"))
grpc_server_call_seconds = histogram("grpc_server_call_seconds", "Time to serve a call.", ("method",))
grpc_client_calls = counter("grpc_client_calls", "Calls made, retries included.", ("method", "status"))
grpc_client_call_seconds = histogram(
    "grpc_client_call_seconds", "Time of a call with its retries.", ("method",)
)
grpc_client_retries = counter("grpc_client_retries", "Calls tried again.", ("method",))
grpc_client_circuit_open = gauge(
    "grpc_client_circuit_open", "1 while calls to a neighbour are not even tried.", ("target",)
)

outbox_rows = counter(
    "outbox_rows", "Rows handled, by outcome (sent, failed, refused, expired).", ("topic", "outcome")
)
outbox_pending = gauge("outbox_pending", "Rows waiting.", ("topic",))
outbox_oldest_seconds = gauge("outbox_oldest_seconds", "Age of the oldest waiting row.", ("topic",))
outbox_dispatch_seconds = histogram(
    "outbox_dispatch_seconds", "Time from commit to handled.", ("topic",), SLOW
)

db_connections = gauge("db_connections", "Connections of the pool (idle, used, max).", ("state",))
db_acquire_seconds = histogram("db_acquire_seconds", "Time to wait for a connection.")
db_failures = counter("db_failures", "Statements that failed because the database was not there.")

cache_failures = counter("cache_failures", "Commands that failed because Valkey was not there.")
cache_reconnects = counter("cache_reconnects", "Times the subscription was lost and made again.")
rate_limited = counter("rate_limited", "Requests refused by a limit.", ("name",))

loop_restarts = counter("loop_restarts", "Supervised loops restarted after a crash.", ("loop",))

tokens_verified = counter(
    "tokens_verified", "Access tokens checked, by outcome (ok or the failure's code).", ("outcome",)
)
revocations_learned = counter(
    "revocations_learned", "Revocations learned, by way (push, poll, local).", ("way",)
)
jwks_refreshes = counter("jwks_refreshes", "Key set fetches, by outcome (ok, failed).", ("outcome",))

certificate_expiry = gauge("certificate_expiry_timestamp_seconds", "End of this workload's certificate.")
certificate_rotations = counter("certificate_rotations", "Certificates taken up while running.")

readiness = gauge("ready", "1 while a check of readiness passes.", ("check",))
readiness_seconds = histogram("ready_check_seconds", "Time of a check of readiness.", ("check",))
