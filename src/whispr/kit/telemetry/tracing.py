"""Traces: W3C trace context over every hop, spans to an OTLP collector where one is configured.

Without a collector no span is recorded, but each request still carries a trace id from door to door, so that the log
lines of several services can be joined.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import (
    NonRecordingSpan,
    Span,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    Tracer,
)
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from whispr.kit.settings import CommonSettings
from whispr.kit.telemetry import masking

Attribute = str | int | float | bool

_FIELDS = frozenset({"traceparent", "tracestate"})
_propagator = TraceContextTextMapPropagator()
_OFF: AbstractContextManager[None] = nullcontext()
_provider: TracerProvider | None = None
_tracer: Tracer | None = None


def configure_tracing(service: str, settings: CommonSettings, exporter: SpanExporter | None = None) -> None:
    """Record spans if there is somewhere to send them.

    `exporter` replaces the OTLP exporter and is written to at once (for tests and local inspection).
    """
    global _provider, _tracer
    if exporter is None and not settings.otlp_endpoint:
        return
    shutdown_tracing()
    ratio = TraceIdRatioBased(settings.trace_sample_ratio)
    # A parent that arrived unsampled is asked again by ratio: the answer is a function of the trace id, so services
    # agree, and the public door may drop the client's wish to be sampled without losing the trace (`server_span`).
    sampler = ParentBased(root=ratio, remote_parent_not_sampled=ratio)
    provider = TracerProvider(
        sampler=sampler,
        resource=Resource.create(
            {"service.name": f"{service}-service", "service.namespace": settings.namespace}
        ),
        shutdown_on_exit=False,
    )
    if exporter is not None:
        provider.add_span_processor(SimpleSpanProcessor(exporter))
    else:
        # Imported here: the exporter takes a quarter of a second that a process without a collector need not spend.
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

        endpoint = settings.otlp_endpoint or ""
        provider.add_span_processor(
            BatchSpanProcessor(
                OTLPSpanExporter(endpoint=endpoint, insecure=not endpoint.startswith("https"), timeout=5)
            )
        )
    _provider = provider
    _tracer = provider.get_tracer("whispr")


def shutdown_tracing() -> None:
    """Send what is buffered and stop recording. Blocks up to the exporter's timeout."""
    global _provider, _tracer
    provider, _provider, _tracer = _provider, None, None
    if provider is not None:
        provider.shutdown()


def inject(carrier: MutableMapping[str, str]) -> MutableMapping[str, str]:
    """Write the present trace into `carrier` (headers, gRPC metadata, an outbox payload) and return it."""
    _propagator.inject(carrier)
    return carrier


def extract(carrier: Mapping[str, str]) -> Context:
    """The trace context in `carrier` (lower-case keys), empty where there is none or it is malformed."""
    return _propagator.extract(carrier, context=Context())


def asgi_carrier(headers: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    """The trace headers among an ASGI scope's headers."""
    return {
        name.decode("latin-1"): value.decode("latin-1")
        for name, value in headers
        if name in (b"traceparent", b"tracestate")
    }


def grpc_carrier(metadata: Iterable[tuple[str, str | bytes]] | None) -> dict[str, str]:
    """The trace entries among gRPC invocation metadata."""
    return {key: value for key, value in metadata or () if key in _FIELDS and isinstance(value, str)}


def grpc_metadata() -> tuple[tuple[str, str], ...]:
    """The present trace as gRPC invocation metadata, for an outgoing call."""
    return tuple(inject({}).items())


def trace_id() -> str | None:
    """The present trace id in hex, for error bodies and logs."""
    context = trace.get_current_span().get_span_context()
    return f"{context.trace_id:032x}" if context.is_valid else None


def span(name: str, **attributes: Attribute) -> AbstractContextManager[Span | None]:
    """A span of work inside this process. Costs next to nothing when no collector is configured."""
    if _tracer is None:
        return _OFF
    return _recorded(_tracer, name, SpanKind.INTERNAL, None, attributes)


def client_span(name: str, **attributes: Attribute) -> AbstractContextManager[Span | None]:
    """A span around a call to another process; `inject` inside it."""
    if _tracer is None:
        return _OFF
    return _recorded(_tracer, name, SpanKind.CLIENT, None, attributes)


def server_span(
    name: str, carrier: Mapping[str, str], *, public: bool = False, **attributes: Attribute
) -> AbstractContextManager[Span | None]:
    """A span around serving a request whose trace came in `carrier`; begins a trace where none came.

    With `public` the caller is anyone: its trace id is kept, its sampling flag is not, or a stranger could have every
    request recorded.
    """
    parent = extract(carrier)
    context = trace.get_current_span(parent).get_span_context()
    if public and context.is_valid:
        parent = trace.set_span_in_context(
            NonRecordingSpan(
                SpanContext(context.trace_id, context.span_id, True, TraceFlags(0), context.trace_state)
            ),
            Context(),
        )
    if _tracer is None:
        return _followed(context)
    return _recorded(_tracer, name, SpanKind.SERVER, parent, attributes)


def consumer_span(
    name: str, carrier: Mapping[str, str], **attributes: Attribute
) -> AbstractContextManager[Span | None]:
    """A span around work taken from a queue: a trace of its own, linked to the one that queued it.

    A child span would keep the first trace open for as long as the queue is long.
    """
    cause = trace.get_current_span(extract(carrier)).get_span_context()
    if _tracer is None:
        return _followed(cause)
    links = [trace.Link(cause)] if cause.is_valid else []
    return _recorded(_tracer, name, SpanKind.CONSUMER, Context(), attributes, links)


@contextmanager
def _recorded(
    tracer: Tracer,
    name: str,
    kind: SpanKind,
    parent: Context | None,
    attributes: Mapping[str, Attribute],
    links: list[trace.Link] | None = None,
) -> Iterator[Span]:
    masked = {key: masking.by_key(key, value) for key, value in attributes.items()}
    # The SDK's own recording of exceptions copies their text, and that may quote what a person wrote.
    with tracer.start_as_current_span(
        name, parent, kind, masked, links, record_exception=False, set_status_on_exception=False
    ) as recorded:
        try:
            yield recorded
        except BaseException as error:
            recorded.set_attribute("error.type", type(error).__name__)
            recorded.set_status(Status(StatusCode.ERROR))
            raise


@contextmanager
def _followed(parent: SpanContext) -> Iterator[Span]:
    follower = NonRecordingSpan(
        SpanContext(
            parent.trace_id if parent.is_valid else random.getrandbits(128) or 1,
            random.getrandbits(64) or 1,
            is_remote=False,
            trace_flags=TraceFlags(0),
        )
    )
    token = otel_context.attach(trace.set_span_in_context(follower))
    try:
        yield follower
    finally:
        otel_context.detach(token)
