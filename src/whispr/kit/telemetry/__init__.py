"""Logs, traces and metrics of a process: `configure` once at the start, `shutdown` at the end."""

from __future__ import annotations

from opentelemetry.sdk.trace.export import SpanExporter

from whispr.kit.settings import CommonSettings
from whispr.kit.telemetry import metrics
from whispr.kit.telemetry.logs import (
    bind_request,
    clear_request,
    configure_logs,
    get_logger,
    request_id,
    set_level,
)
from whispr.kit.telemetry.tracing import (
    asgi_carrier,
    client_span,
    configure_tracing,
    consumer_span,
    extract,
    grpc_carrier,
    grpc_metadata,
    inject,
    server_span,
    shutdown_tracing,
    span,
    trace_id,
)

__all__ = [
    "asgi_carrier",
    "bind_request",
    "clear_request",
    "client_span",
    "configure",
    "consumer_span",
    "extract",
    "get_logger",
    "grpc_carrier",
    "grpc_metadata",
    "inject",
    "metrics",
    "request_id",
    "server_span",
    "set_level",
    "shutdown",
    "span",
    "trace_id",
]


def configure(service: str, settings: CommonSettings, exporter: SpanExporter | None = None) -> None:
    """Set up this process' logs, traces and `whispr_info`. `exporter` takes the spans instead of OTLP (tests)."""
    configure_logs(service, settings)
    configure_tracing(service, settings, exporter)
    metrics.describe(service)


def shutdown() -> None:
    """Send buffered spans. Blocks up to the exporter's timeout; call it last, off the event loop."""
    shutdown_tracing()
