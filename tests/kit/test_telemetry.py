"""Lines carry request and trace but no secret; traces survive hops; metrics cannot be made to grow without bound."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from prometheus_client.parser import text_string_to_metric_families

import whispr
from whispr.kit import telemetry
from whispr.kit.settings import CommonSettings
from whispr.kit.telemetry import masking, metrics

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
TRACE = "0af7651916cd43dd8448eb211c80319c"
Lines = Callable[[], list[dict[str, Any]]]


def _settings(**changes: Any) -> CommonSettings:
    return CommonSettings(**{"environment": "test", "mesh": True, "log_level": "debug", **changes})


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    yield
    telemetry.shutdown()
    telemetry.clear_request()
    telemetry.configure("test", _settings(log_level="error"))


@pytest.fixture
def lines(capsys: pytest.CaptureFixture[str]) -> Lines:
    """What was logged since the last call, parsed."""
    telemetry.configure("auth", _settings())
    return lambda: [json.loads(line) for line in capsys.readouterr().out.split("\n") if line]


@pytest.fixture
def exported() -> Callable[[], list[ReadableSpan]]:
    """Spans finished so far, every one sampled."""
    exporter = InMemorySpanExporter()
    telemetry.configure("auth", _settings(trace_sample_ratio=1.0), exporter)
    return lambda: list(exporter.get_finished_spans())


def _fail(error: Exception) -> None:
    raise error


# --- logs ------------------------------------------------------------------------------------------------------------


def test_a_line_is_one_json_object_with_where_and_when(lines: Lines) -> None:
    telemetry.get_logger("whispr.somewhere").info("it happened", seq=7, ok=True, ratio=0.5, nothing=None)
    [line] = lines()
    assert line.pop("ts").endswith("Z")
    assert line == {
        "level": "info",
        "service": "auth",
        "logger": "whispr.somewhere",
        "event": "it happened",
        "seq": 7,
        "ok": True,
        "ratio": 0.5,
        "nothing": None,
    }


async def test_lines_carry_their_own_request_and_trace(lines: Lines) -> None:
    log = telemetry.get_logger("t")
    user = str(uuid4())

    async def serve(request_id: str) -> None:
        with telemetry.server_span("GET /", {}):
            telemetry.bind_request(request_id=request_id)
            telemetry.bind_request(user_id=user)
            await asyncio.sleep(0)
            assert telemetry.request_id() == request_id
            log.info("served", trace=telemetry.trace_id())

    await asyncio.gather(serve("r1"), serve("r2"))
    log.info("outside")
    first, second, outside = lines()
    assert {first["request_id"], second["request_id"]} == {"r1", "r2"}
    assert first["trace_id"] == first["trace"]
    assert first["trace_id"] != second["trace_id"]
    assert len(first["span_id"]) == 16
    assert first["user_id"] == second["user_id"] == masking.person(user)
    assert not {"request_id", "trace_id", "user_id"} & set(outside)


SECRET = "s3cr3t-Value-7f"
PERSON = "0198c5f0-aaaa-7bbb-8ccc-0123456789ab"
JWT = "eyJhbGciOiJFZERTQSJ9.eyJzdWIiOiJ4In0.c2lnbmF0dXJl"


@pytest.mark.parametrize(
    "key",
    [
        "token",
        "access_token",
        "refresh_token",
        "push_token",
        "device_tokens",
        "password",
        "new_password",
        "password_hash",
        "secret",
        "client_secret",
        "authorization",
        "Authorization",
        "cookie",
        "signature",
        "ciphertext",
        "content",
        "envelopes",
        "payload",
        "private_key",
        "signed_prekey",
        "one_time_prekeys",
        "username",
        "display_name",
        "email",
        "phone",
    ],
)
@pytest.mark.parametrize("wrap", [lambda v: v, lambda v: [v], lambda v: {"a": v}, lambda v: v.encode()])
def test_secret_keys_never_appear(lines: Lines, key: str, wrap: Callable[[str], Any]) -> None:
    log = telemetry.get_logger("t")
    log.info("direct", **{key: wrap(SECRET)})
    log.info("inside", details={"list": [{key: wrap(SECRET)}]})
    telemetry.bind_request(**{key: wrap(SECRET)})
    log.info("bound")
    written = json.dumps(lines())
    assert SECRET not in written
    assert key in written, "the key stays, so that one sees that something was there"


@pytest.mark.parametrize(
    "key", ["user_id", "sender_id", "recipient_id", "member_id", "user_ids", "recipient_ids", "sub"]
)
def test_people_get_a_pseudonym_that_joins_lines(lines: Lines, key: str) -> None:
    value: Any = [PERSON] if key.endswith("s") else PERSON
    telemetry.get_logger("t").info("a", **{key: value})
    telemetry.get_logger("t").info("b", **{key: value})
    first, second = lines()
    assert first[key] == second[key]
    assert PERSON not in json.dumps([first, second])
    assert PERSON[-12:] not in json.dumps([first, second])
    other = masking.by_key(key, [str(uuid4())] if key.endswith("s") else str(uuid4()))
    assert other != first[key]


@pytest.mark.parametrize("key", ["ip", "client_ip", "remote_ip", "peer"])
@pytest.mark.parametrize("value", ["203.0.113.7", "2001:db8::7", "ipv4:203.0.113.7:4711"])
def test_addresses_are_never_in_clear(lines: Lines, key: str, value: str) -> None:
    telemetry.get_logger("t").info("a", **{key: value})
    [line] = lines()
    assert "203.0.113" not in json.dumps(line)
    assert "db8" not in json.dumps(line)
    assert line[key].startswith("ip#")


@pytest.mark.parametrize(
    "text",
    [
        JWT,
        f"Authorization: Bearer {SECRET}",
        f"authorization=Basic {SECRET}",
        f"GET /socket/websocket?vsn=2.0.0&token={SECRET}&x=1",
        f"access_token={SECRET}",
        f'{{"password": "{SECRET}"}}',
        f"{{'refresh_token': '{SECRET}'}}",
        f"postgresql://whispr:{SECRET}@db:5432/whispr_auth",
        f"redis://:{SECRET}@127.0.0.1:6379/0",
        f"DETAIL:  Key (username)=({SECRET}) already exists.",
        f"invalid input for query argument $2: '{SECRET}' (expected bytes)",
    ],
)
def test_credentials_in_free_text_are_cut_out(lines: Lines, text: str) -> None:
    log = telemetry.get_logger("t")
    log.info(text)
    log.info("value", detail=text, nested=[{"deep": text}])
    logging.getLogger("a.library").warning("it said %s", text)
    try:
        _fail(RuntimeError(text))
    except RuntimeError:
        log.exception("failed")
        logging.getLogger("a.library").exception("failed too")
    written = lines()
    assert len(written) == 5
    for forbidden in (SECRET, JWT.split(".")[1]):
        assert forbidden not in json.dumps(written)


def test_ordinary_text_is_left_alone(lines: Lines) -> None:
    text = "token bucket for passwords: 3 secrets of 10 basic shapes at http://127.0.0.1:8080/a@b"
    telemetry.get_logger("t").info("x", detail="listening on 127.0.0.1:8080", conversation_id=PERSON, count=3)
    telemetry.get_logger("t").info("the answer is yes")
    first, second = lines()
    assert (first["detail"], first["conversation_id"], first["count"]) == (
        "listening on 127.0.0.1:8080",
        PERSON,
        3,
    )
    assert second["event"] == "the answer is yes"
    assert masking.text(text).endswith("at http://127.0.0.1:8080/a@b")


def test_libraries_lines_lose_addresses(lines: Lines) -> None:
    logging.getLogger("a.library").error("connection from ('203.0.113.9', 1234) to 127.0.0.1")
    [line] = lines()
    assert "203.0.113.9" not in line["event"]
    assert "127.0.0.1" in line["event"]
    assert (line["logger"], line["level"], line["service"]) == ("a.library", "error", "auth")


def test_access_logs_of_the_server_are_silent(lines: Lines) -> None:
    logging.getLogger("uvicorn.access").info('203.0.113.9 - "GET /?token=x HTTP/1.1" 200')
    logging.getLogger("httpx").info("HTTP Request: GET https://example.org")
    assert lines() == []


def test_an_exception_is_told_with_its_traceback_and_trace(lines: Lines) -> None:
    with telemetry.server_span("x", {"traceparent": PARENT}):
        try:
            _fail(KeyError("missing"))
        except KeyError:
            telemetry.get_logger("t").exception("crashed")
    [line] = lines()
    assert line["level"] == "error"
    assert line["trace_id"] == TRACE
    assert "test_telemetry.py" in line["exception"]
    assert "KeyError" in line["exception"]
    assert "exc_info" not in line


@given(
    key=st.text(max_size=20).filter(lambda key: key not in {"event", "self"}),
    value=st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats()
        | st.text(st.characters())
        | st.binary()
        | st.uuids()
        | st.datetimes(),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.text(st.characters()), inner, max_size=3)
            | st.tuples(inner)
        ),
        max_leaves=6,
    ),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_value_makes_logging_fail(lines: Lines, key: str, value: object) -> None:
    telemetry.get_logger("t").info("odd", **{f"k{key}": value})
    assert len(lines()) == 1


def test_lone_surrogates_and_cycles_are_survived(lines: Lines) -> None:
    cycle: list[Any] = []
    cycle.append(cycle)
    telemetry.get_logger("t").info("odd", text="\ud800", cycle=cycle)
    [line] = lines()
    assert line["event"] == "odd"


def test_levels(capsys: pytest.CaptureFixture[str]) -> None:
    telemetry.configure("auth", _settings(log_level="warning"))
    log = telemetry.get_logger("t")
    log.info("no")
    log.warning("yes")
    logging.getLogger("lib").info("no")
    logging.getLogger("lib").warning("yes")
    assert [json.loads(line)["event"] for line in capsys.readouterr().out.split("\n") if line] == [
        "yes",
        "yes",
    ]


def test_production_has_no_debug_lines_whatever_was_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    telemetry.configure("auth", _settings(environment="production", log_level="debug"))
    telemetry.get_logger("t").debug("a person's doings")
    logging.getLogger("lib").debug("a person's doings")
    telemetry.get_logger("t").info("yes")
    assert [json.loads(line)["event"] for line in capsys.readouterr().out.split("\n") if line] == ["yes"]


def test_console_format_is_for_people_and_masked_too(capsys: pytest.CaptureFixture[str]) -> None:
    telemetry.configure("auth", _settings(log_format="console"))
    telemetry.get_logger("t").info("hello", token=SECRET, seq=3)
    written = capsys.readouterr().out
    assert "hello" in written
    assert "seq" in written
    assert SECRET not in written


def test_configuring_again_does_not_double_lines(lines: Lines) -> None:
    telemetry.configure("auth", _settings())
    telemetry.configure("auth", _settings())
    logging.getLogger("lib").warning("once")
    assert len(lines()) == 1


# --- traces ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recording", [True, False])
def test_a_trace_goes_from_door_to_door(recording: bool) -> None:
    exporter = InMemorySpanExporter()
    telemetry.configure("auth", _settings(trace_sample_ratio=1.0), exporter if recording else None)
    with telemetry.server_span(
        "GET /a", telemetry.asgi_carrier([(b"host", b"x"), (b"traceparent", PARENT.encode())])
    ):
        assert telemetry.trace_id() == TRACE
        with telemetry.client_span("/user.UserService/GetProfiles"):
            sent = telemetry.grpc_metadata()
    assert telemetry.trace_id() is None
    assert [key for key, _ in sent] == ["traceparent"]
    received = telemetry.grpc_carrier([*sent, ("other", "x"), ("traceparent-bin", b"\x00")])
    with telemetry.server_span("/user.UserService/GetProfiles", received):
        assert telemetry.trace_id() == TRACE
        payload = telemetry.inject({"event": "x"})
    assert payload["traceparent"].split("-")[1] == TRACE
    if recording:
        server, client, first = (
            {span.name + span.kind.name: span for span in exporter.get_finished_spans()}[name]
            for name in (
                "/user.UserService/GetProfilesSERVER",
                "/user.UserService/GetProfilesCLIENT",
                "GET /aSERVER",
            )
        )
        assert client.parent is not None
        assert server.parent is not None
        assert client.parent.span_id == first.context.span_id
        assert server.parent.span_id == client.context.span_id
        assert server.parent.is_remote
        assert first.resource.attributes["service.name"] == "auth-service"


def test_without_a_collector_requests_still_have_ids_and_spans_cost_nothing() -> None:
    telemetry.configure("auth", _settings())
    with telemetry.server_span("a", {}):
        first = telemetry.trace_id()
        assert first is not None
        assert telemetry.span("inner") is telemetry.span("another", a=1)
        with telemetry.span("inner") as inner:
            assert inner is None
            assert telemetry.trace_id() == first
        assert telemetry.inject({})["traceparent"].endswith("-00"), (
            "nobody downstream should record it either"
        )
    with telemetry.server_span("b", {}):
        assert telemetry.trace_id() != first


@pytest.mark.parametrize(
    "header", ["", "garbage", "00-0-0-0", f"00-{'0' * 32}-b7ad6b7169203331-01", "ff" + PARENT[2:], "\x00"]
)
@pytest.mark.parametrize("public", [True, False])
def test_a_malformed_trace_begins_a_new_one(header: str, public: bool) -> None:
    telemetry.configure("auth", _settings())
    with telemetry.server_span("a", {"traceparent": header}, public=public):
        assert telemetry.trace_id() not in (None, TRACE, "0" * 32)


def test_a_stranger_may_name_a_trace_but_not_have_it_recorded() -> None:
    exporter = InMemorySpanExporter()
    telemetry.configure("auth", _settings(trace_sample_ratio=0.0), exporter)
    with telemetry.server_span("public", {"traceparent": PARENT}, public=True):
        assert telemetry.trace_id() == TRACE
        assert telemetry.inject({})["traceparent"].endswith("-00")
    assert exporter.get_finished_spans() == ()
    with telemetry.server_span("internal", {"traceparent": PARENT}):
        assert telemetry.inject({})["traceparent"].endswith("-01")
    assert [span.name for span in exporter.get_finished_spans()] == ["internal"]


def test_a_public_trace_is_recorded_by_our_own_ratio(exported: Callable[[], list[ReadableSpan]]) -> None:
    unsampled = PARENT[:-1] + "0"
    with telemetry.server_span("public", {"traceparent": unsampled}, public=True):
        pass
    [span] = exported()
    assert span.parent is not None
    assert f"{span.context.trace_id:032x}" == TRACE


def test_queued_work_links_to_its_cause(exported: Callable[[], list[ReadableSpan]]) -> None:
    with telemetry.server_span("POST /x", {}):
        row = telemetry.inject({})
    with telemetry.consumer_span("outbox", row, topic="t"):
        pass
    cause, work = exported()
    assert work.kind is SpanKind.CONSUMER
    assert work.parent is None
    assert work.context.trace_id != cause.context.trace_id
    assert [link.context.span_id for link in work.links] == [cause.context.span_id]


def test_without_a_collector_queued_work_keeps_the_trace() -> None:
    telemetry.configure("auth", _settings())
    with telemetry.consumer_span("outbox", {"traceparent": PARENT}):
        assert telemetry.trace_id() == TRACE


def test_a_failed_span_names_the_error_and_quotes_nothing(exported: Callable[[], list[ReadableSpan]]) -> None:
    with (
        pytest.raises(ValueError, match=SECRET),
        telemetry.span("work", user_id=PERSON, password=SECRET, seq=3),
    ):
        raise ValueError(SECRET)
    [span] = exported()
    assert span.status.status_code is StatusCode.ERROR
    assert span.attributes is not None
    assert span.attributes["error.type"] == "ValueError"
    assert span.attributes["seq"] == 3
    assert SECRET not in span.to_json()
    assert PERSON not in span.to_json()


def test_spans_reach_a_collector_over_otlp() -> None:
    # In a process of its own: the exporter keeps gRPC threads that other tests should not inherit.
    program = """
import grpc, threading
from concurrent.futures import ThreadPoolExecutor
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from whispr.kit import telemetry
from whispr.kit.settings import CommonSettings
names = []
class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    def Export(self, request, context):
        for resource in request.resource_spans:
            for scope in resource.scope_spans:
                names.extend(span.name for span in scope.spans)
        return trace_service_pb2.ExportTraceServiceResponse()
server = grpc.server(ThreadPoolExecutor(1))
trace_service_pb2_grpc.add_TraceServiceServicer_to_server(Collector(), server)
port = server.add_insecure_port("127.0.0.1:0")
server.start()
telemetry.configure("auth", CommonSettings(mesh=True, trace_sample_ratio=1, otlp_endpoint=f"http://127.0.0.1:{port}"))
with telemetry.server_span("GET /", {}), telemetry.span("inner"):
    pass
telemetry.shutdown()
server.stop(None)
assert sorted(names) == ["GET /", "inner"], names
print("collected")
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(whispr.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert "collected" in done.stdout


# --- metrics ---------------------------------------------------------------------------------------------------------


def _sample(name: str, **labels: str) -> float:
    return metrics.REGISTRY.get_sample_value(name, labels) or 0.0


def test_the_exposition_is_what_prometheus_reads() -> None:
    metrics.http_requests.labels("GET", "/api/v1/keys", "200").inc()
    telemetry.configure("auth", _settings())
    families = {
        family.name: family for family in text_string_to_metric_families(metrics.exposition().decode())
    }
    assert {"whispr_http_requests", "whispr_info", "process_resident_memory_bytes"} <= set(families)
    [info] = families["whispr_info"].samples
    assert info.labels["service"] == "auth"
    assert info.value == 1


def test_a_metric_is_declared_once() -> None:
    metrics.counter("test_declared_once", "x")
    with pytest.raises(ValueError, match="Duplicated"):
        metrics.counter("test_declared_once", "x")


def test_values_from_outside_are_bounded() -> None:
    assert metrics.bounded("GET", metrics.HTTP_METHODS) == "GET"
    assert metrics.bounded("X" * 1000, metrics.HTTP_METHODS) == "other"


def test_every_metric_is_named_and_documented_alike() -> None:
    allowed = {
        "method", "route", "status", "caller", "target", "topic", "outcome", "state", "name", "loop", "way", "check",
    }  # fmt: skip
    own = [
        metric
        for metric in vars(metrics).values()
        if hasattr(metric, "_labelnames") and getattr(metric, "_name", "").startswith("whispr")
    ]
    assert len(own) > 20
    for metric in own:
        assert metric._documentation.endswith("."), metric._name
        assert set(metric._labelnames) <= allowed, f"{metric._name}: is that label's set of values closed?"


def test_metrics_count() -> None:
    before = _sample("whispr_loop_restarts_total", loop="test")
    metrics.loop_restarts.labels("test").inc()
    assert _sample("whispr_loop_restarts_total", loop="test") == before + 1
