"""Structured logs: one JSON object a line on stdout, masked, with the request and the trace they belong to."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, MutableMapping
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, cast

import msgspec
import structlog
from opentelemetry import trace

from whispr.kit.settings import CommonSettings
from whispr.kit.telemetry import masking

_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}

# One immutable mapping in one context variable: structlog's own contextvars walk every variable of the context for
# every line.
_request: ContextVar[Mapping[str, Any]] = ContextVar("whispr_request", default={})  # noqa: B039

# One object a name, so that `set_level` reaches those in use.
_loggers: dict[str, Any] = {}

_in_production = False

# They print the client's address and the query string with its token for each request; our own doors log better.
_SILENCED = ("uvicorn.access",)

# These say at INFO, for each call or connection, what our own lines say once.
_QUIET = ("httpx", "httpcore", "alembic", "asyncio", "uvicorn.error", "opentelemetry", "grpc._cython.cygrpc")


def bind_request(**values: Any) -> None:
    """Add `values` (request_id, user_id, device_id, …) to every line of the present task and those it starts."""
    _request.set({**_request.get(), **values})


def clear_request() -> None:
    """Forget what `bind_request` bound, for code that serves one request after another in one task."""
    _request.set({})


def request_id() -> str | None:
    """The id of the request being served, if there is one."""
    value = _request.get().get("request_id")
    return value if isinstance(value, str) else None


def get_logger(name: str) -> structlog.typing.FilteringBoundLogger:
    """A logger called `name` (pass `__name__`). Events are short and constant; what varies goes into keyword arguments."""
    logger = _loggers.get(name)
    if logger is None:
        logger = _loggers[name] = structlog.get_logger(name)
    return cast(structlog.typing.FilteringBoundLogger, logger)


class _Stdout:
    """Writes lines to whatever stdout is now (a test may have replaced it), whole and at once."""

    def __init__(self, name: str = "whispr") -> None:
        self.name = name

    def msg(self, line: bytes | str) -> None:
        stream = sys.stdout
        if isinstance(line, bytes):
            buffer = getattr(stream, "buffer", None)
            if buffer is not None:
                buffer.write(line + b"\n")
                buffer.flush()
                return
            line = line.decode()
        stream.write(line + "\n")
        stream.flush()

    debug = info = warning = error = critical = exception = log = msg


_encode = msgspec.json.Encoder(enc_hook=str).encode


def _render_json(logger: Any, method: str, event: MutableMapping[str, Any]) -> bytes:
    try:
        return _encode(event)
    except (ValueError, TypeError, OverflowError):
        # A lone surrogate in a client's string, say. A line that cannot be rendered must not fail the request.
        return _encode(
            {key: str(value).encode("utf-8", "backslashreplace").decode() for key, value in event.items()}
        )


class _Enrich:
    """Adds time, level, service, request and trace, and masks everything else."""

    def __init__(self, service: str) -> None:
        self._service = service

    def __call__(self, logger: Any, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        line: dict[str, Any] = {
            "ts": datetime.now(UTC),
            "level": "error" if method == "exception" else method,
            "service": self._service,
            "logger": logger.name,
            "event": masking.text(str(event.pop("event", ""))),
        }
        context = trace.get_current_span().get_span_context()
        if context.is_valid:
            line["trace_id"] = f"{context.trace_id:032x}"
            line["span_id"] = f"{context.span_id:016x}"
        for values in (_request.get(), event):
            for key, value in values.items():
                line[key] = masking.by_key(key, value)
        return line


def _format_exception(logger: Any, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    rendered = structlog.processors.format_exc_info(logger, method, event)
    if "exception" in rendered:
        # Tracebacks quote the messages of libraries, and those quote values.
        rendered["exception"] = masking.foreign_text(str(rendered["exception"]))
    return rendered


class _Bridge(logging.Handler):
    """Sends the standard library's records, which our dependencies write, through the same processors."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            message = masking.foreign_text(record.getMessage())
            level = logging.getLevelName(record.levelno).lower()
            method = level if level in _LEVELS else ("critical" if record.levelno > logging.ERROR else "info")
            values = {"exc_info": record.exc_info} if record.exc_info else {}
            getattr(get_logger(record.name), method)(message, **values)
        except Exception:  # noqa: BLE001 (the contract of logging handlers: report, never raise into the caller)
            self.handleError(record)


def configure_logs(service: str, settings: CommonSettings) -> None:
    """Set up structlog and the standard library's logging for this process."""
    global _in_production
    _in_production = settings.environment == "production"
    renderer: Any = _render_json
    if settings.log_format == "console":
        renderer = structlog.dev.ConsoleRenderer(
            colors=sys.stdout.isatty(), timestamp_key="ts", exception_formatter=structlog.dev.plain_traceback
        )
    structlog.configure(
        processors=[_format_exception, _Enrich(service), renderer],
        logger_factory=_Stdout,
        cache_logger_on_first_use=True,
    )
    root = logging.getLogger()
    root.handlers[:] = [
        *(handler for handler in root.handlers if not isinstance(handler, _Bridge | logging.StreamHandler)),
        _Bridge(),
    ]
    for name in _SILENCED:
        logging.getLogger(name).disabled = True
    set_level(settings.log_level)


def set_level(name: str) -> None:
    """Write lines of this level (debug, info, warning, error) and above from now on."""
    level = _LEVELS[name]
    if _in_production:
        # A debug line may describe a single person's doings; production does not keep those, whatever was asked for.
        level = max(level, logging.INFO)
    structlog.configure(
        **{**structlog.get_config(), "wrapper_class": structlog.make_filtering_bound_logger(level)}
    )
    for logger in _loggers.values():
        # A logger remembers the class it was first used with.
        vars(logger).pop("bind", None)
    logging.getLogger().setLevel(level)
    for name in _QUIET:
        logging.getLogger(name).setLevel(max(level, logging.WARNING))
