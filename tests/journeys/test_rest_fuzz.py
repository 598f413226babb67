"""No request, however malformed, gives a 500, and every answer is one the OpenAPI document names.

Two ways: schemathesis makes requests from each service's document, valid and invalid; below it stand the kinds of
nonsense that no schema suggests.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.core.result import Ok
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from tests.stack import Person, Stack

SERVICES = ("auth", "user", "messaging")

EXAMPLES = 12

CHECKS = [status_code_conformance, content_type_conformance, response_schema_conformance]

# Asked for a service that does not run: the one 5xx that is the right answer.
MISSING_NEIGHBOURS = {"scheduling_unavailable"}

# Of methods nobody offers the document cannot speak.
AT_THE_DOOR = {405}


def document(stack: Stack, service: str) -> dict[str, Any]:
    described: dict[str, Any] = stack.nodes[service].running.service.http.openapi()
    return described


def routes(stack: Stack, service: str) -> Iterator[tuple[str, str]]:
    for path, methods in document(stack, service)["paths"].items():
        for method in methods:
            yield method.upper(), path


# --- from the document ------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Do not use the `random` module inside strategies")
@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["valid", "invalid"])
@pytest.mark.parametrize("service", SERVICES)
async def test_requests_made_from_the_document(stack: Stack, service: str, mode: GenerationMode) -> None:
    schema = schemathesis.openapi.from_dict(document(stack, service))
    count = 0
    for result in schema.get_all_operations():
        assert isinstance(result, Ok), result
        operation = result.ok()
        # One person for each operation: some of them end the session they are called with.
        person = await stack.register()
        try:
            # The services answer in this loop, so the generator must run beside it.
            await asyncio.to_thread(fuzz, operation, mode, stack.nodes[service].url, person)
        except Unsatisfiable:
            assert mode is GenerationMode.NEGATIVE, operation.label
            assert operation.body is None or not list(operation.body), operation.label
            assert not list(operation.query), operation.label
            continue
        count += 1
    assert count >= 5


def fuzz(operation: Any, mode: GenerationMode, url: str, person: Person) -> None:
    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def check(case: Any) -> None:
        response = case.call(base_url=url, headers=person.headers, timeout=10)
        if response.status_code >= 500:
            assert response.json()["code"] in MISSING_NEIGHBOURS, (case, response.text)
        if response.status_code not in AT_THE_DOOR:
            case.validate_response(response, checks=CHECKS)

    check()


# --- nonsense by hand -------------------------------------------------------------------------------------------------

UUID_TEXT = "018f4e6a-7b1c-7def-8a90-123456789abc"

BODIES: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "application/json"),
    "oversized": (b'{"a": "' + b"x" * 1_000_000 + b'"}', "application/json"),
    "deep": (b"[" * 50_000 + b"]" * 50_000, "application/json"),
    "deep objects": (b'{"a":' * 20_000 + b"1" + b"}" * 20_000, "application/json"),
    "truncated": (b'{"username": "a', "application/json"),
    "invalid UTF-8": (b'{"username": "\xff\xfe"}', "application/json"),
    "UTF-16": ('{"username": "a"}'.encode("utf-16"), "application/json"),
    "lone surrogate": (
        b'{"username": "\\ud800", "password": "\\udfff", "display_name": "\\ud800"}',
        "application/json",
    ),
    "NaN": (b'{"limit": NaN, "seq": Infinity}', "application/json"),
    "huge number": (b'{"seq": 1' + b"0" * 5000 + b', "expires_in": 1e999}', "application/json"),
    "a number": (b"17", "application/json"),
    "a list": (b'[{"username": "a"}]', "application/json"),
    "null": (b"null", "application/json"),
    "text": (b"username=a&password=b", "text/plain"),
    "a form": (b"username=a&password=b", "application/x-www-form-urlencoded"),
    "broken multipart": (b"--x\r\nno headers", "multipart/form-data; boundary=x"),
    "no boundary": (b"--x", "multipart/form-data"),
    "XML": (
        b"<?xml version='1.0'?><!DOCTYPE a [<!ENTITY b SYSTEM 'file:///etc/passwd'>]><a>&b;</a>",
        "application/xml",
    ),
    "no type": (b'{"username": "a"}', ""),
    "a strange type": (b'{"username": "a"}', "application/json; charset=klingon"),
    "compressed": (b"\x1f\x8b\x08\x00garbage", "application/json"),
}

IDS = [
    "..%2F..%2Fetc%2Fpasswd",
    "%2e%2e/%2e%2e",
    "....//",
    "%00",
    "a%00b",
    "%ff%fe",
    "%",
    "%zz",
    "' OR 1=1 --".replace(" ", "%20"),
    "{0.__class__}",
    "-1",
    "0",
    "9" * 400,
    "NaN",
    "null",
    "\u202e".encode().hex(),
    "é",
    UUID_TEXT.upper() + "0",
    UUID_TEXT[:-1],
    "x" * 5000,
]

QUERIES = [
    "limit=0",
    "limit=-1",
    "limit=1e3",
    f"limit={10**40}",
    f"after_seq={2**63}&before_seq={2**63}",
    f"after_seq={10**40}",
    "after_seq=-9223372036854775809",
    "before_seq=0&limit=100",
    "cursor=%00",
    "cursor=%ff",
    "cursor=eyJhIjoxfQ&cursor=AAAA",
    "cursor=" + "W1tbW1tb" * 60,
    "cursor=WzksOV0",
    "cursor=bnVsbA",
    "username=%00&username=a",
    "username=%F0%9F%92%A9",
    "username=" + "a" * 9000,
    "a[b][c]=1&&&=&=",
    "%",
]

HEADERS: list[dict[str, str | bytes]] = [
    {"Authorization": ""},
    {"Authorization": "Bearer"},
    {"Authorization": "Bearer "},
    {"Authorization": "Basic YTpi"},
    {"Authorization": b"Bearer \xff\xfe"},
    {"Authorization": "Bearer " + "a" * 9000},
    {"Authorization": "Bearer a.b.c"},
    {"Authorization": "Bearer eyJhbGciOiJub25lIn0.eyJzdWIiOiIxIn0."},
    {"Authorization": "Bearer W10.W10.W10"},
    {"X-Forwarded-For": "not, an, address"},
    {"X-Forwarded-For": b"\xff\xfe"},
    {"X-Request-Id": "x" * 5000},
    {"X-Request-Id": b"\xff"},
    {"traceparent": "00-zz-zz-zz"},
    {"Idempotency-Key": ""},
    {"Idempotency-Key": "k" * 5000},
    {"Idempotency-Key": b"\xff\x80"},
    {"Accept": "nothing/at-all"},
    {"Accept-Encoding": "lz99"},
    {"Content-Length": "-1"},
    {"Content-Encoding": "gzip"},
    {"Range": "bytes=-1"},
    {"Host": "evil.example"},
    {"Cookie": "a=\x7f"},
]


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes


async def send(
    stack: Stack,
    service: str,
    person: Person | None,
    method: str,
    path: str,
    *,
    content: bytes | None = None,
    headers: Mapping[str, str | bytes] = MappingProxyType({}),
) -> Answer | None:
    """Ask byte for byte as written: HTTP clients would tidy up, or refuse to send, what is meant here.

    None where the server hung up without an answer, as its HTTP parser may on what is not HTTP.
    """
    sent: dict[str, str | bytes] = {"Host": "127.0.0.1", "Connection": "close"}
    if person is not None:
        sent["Authorization"] = f"Bearer {person.token}"
    if content is not None:
        sent["Content-Length"] = str(len(content))
    sent.update(headers)
    lines = [f"{method} {path} HTTP/1.1".encode()]
    for name, value in sent.items():
        lines.append(name.encode() + b": " + (value if isinstance(value, bytes) else value.encode()))
    reply = await exchange(stack, service, b"\r\n".join(lines) + b"\r\n\r\n" + (content or b""))
    if not reply:
        return None
    head, _, body = reply.partition(b"\r\n\r\n")
    status, *fields = head.decode("latin-1").split("\r\n")
    pairs = (field.partition(": ") for field in fields)
    return Answer(int(status.split(" ")[1]), {name.lower(): value for name, _, value in pairs}, body)


async def exchange(stack: Stack, service: str, request: bytes, *, hang_up: bool = False) -> bytes:
    """What the service's REST port says to `request` before it closes the connection.

    `hang_up` ends the sending side: for what leaves a server waiting for more.
    """
    url = httpx.URL(stack.nodes[service].url)
    reader, writer = await asyncio.open_connection(url.host, url.port)
    reply = b""
    # A refusal may come, and the connection end, before a large request is written.
    with contextlib.suppress(ConnectionError):
        writer.write(request)
        if hang_up:
            writer.write_eof()
        async with asyncio.timeout(10):
            while chunk := await reader.read(65_536):
                reply += chunk
    writer.close()
    return reply


def refused_in_order(answer: Answer | None, what: object) -> int:
    """The status. A refusal is a problem document with a code; success is fine where the nonsense was harmless."""
    assert answer is not None, what
    assert answer.status < 500, (what, answer.status, answer.body[:500])
    if answer.status >= 400 and not is_the_parsers(answer):
        assert answer.headers.get("content-type") == "application/problem+json", (what, answer)
        assert json.loads(answer.body)["code"], what
    return answer.status


def is_the_parsers(answer: Answer) -> bool:
    """What is not HTTP is answered below the application, where there are no problem documents."""
    return answer.status == 400 and answer.body == b"Invalid HTTP request received."


def filled(path: str, value: str = UUID_TEXT) -> str:
    """The template with each of its parameters replaced by `value`."""
    while "{" in path:
        start, _, rest = path.partition("{")
        path = start + "\0" + rest.partition("}")[2]
    return path.replace("\0", value)


@pytest.mark.parametrize("service", SERVICES)
async def test_bodies_no_schema_suggests(stack: Stack, service: str) -> None:
    for method, path in routes(stack, service):
        if method == "GET":
            continue
        person = await stack.register()
        for name, (content, content_type) in BODIES.items():
            headers = {"Content-Type": content_type} if content_type else {}
            answer = await send(
                stack, service, person, method, filled(path), content=content, headers=headers
            )
            status = refused_in_order(answer, (method, path, name))
            if name == "oversized":
                assert status in (401, 413), (method, path, status)


@pytest.mark.parametrize("service", SERVICES)
async def test_text_with_nul_in_every_place(stack: Stack, service: str) -> None:
    components = document(stack, service).get("components", {}).get("schemas", {})
    for path, methods in document(stack, service)["paths"].items():
        for method, operation in methods.items():
            content = operation.get("requestBody", {}).get("content", {}).get("application/json")
            if content is None:
                continue
            person = await stack.register()
            body = json.dumps(nul_body(content["schema"], components)).encode()
            headers = {"Content-Type": "application/json"}
            answer = await send(
                stack, service, person, method.upper(), filled(path), content=body, headers=headers
            )
            status = refused_in_order(answer, (method, path))
            assert status in (401, 422), (method, path, status)


def nul_body(schema: dict[str, Any], components: dict[str, Any], depth: int = 0) -> Any:
    """Something of the schema's shape whose every text holds a NUL."""
    if "$ref" in schema:
        schema = components[schema["$ref"].rpartition("/")[2]]
    for key in ("anyOf", "oneOf", "allOf"):
        if key in schema:
            return nul_body(schema[key][0], components, depth)
    match schema.get("type"):
        case "object" if depth < 6:
            members = schema.get("properties", {}).items()
            return {
                "extra\0": "\0",
                **{name: nul_body(part, components, depth + 1) for name, part in members},
            }
        case "array" if depth < 6:
            return [nul_body(schema.get("items", {}), components, depth + 1)]
        case "integer" | "number":
            return 10**15
        case "boolean":
            return True
        case _:
            return "a\0b"


@pytest.mark.parametrize("service", SERVICES)
async def test_ids_that_are_none(stack: Stack, service: str) -> None:
    for method, path in routes(stack, service):
        if "{" not in path:
            continue
        person = await stack.register()
        for value in IDS:
            what = (method, path, value[:50])
            status = refused_in_order(await send(stack, service, person, method, filled(path, value)), what)
            assert status >= 300 or "reaction" in path, (what, status)


@pytest.mark.parametrize("service", SERVICES)
async def test_queries_that_make_no_sense(stack: Stack, service: str) -> None:
    person = await stack.register()
    for method, path in routes(stack, service):
        if method != "GET":
            continue
        for query in QUERIES:
            answer = await send(stack, service, person, method, f"{filled(path)}?{query}")
            refused_in_order(answer, (method, path, query[:80]))


@pytest.mark.parametrize("service", SERVICES)
async def test_headers_that_make_no_sense(stack: Stack, service: str) -> None:
    for method, path in routes(stack, service):
        person = await stack.register()
        for headers in HEADERS:
            answer = await send(stack, service, person, method, filled(path), headers=headers)
            if answer is not None:
                refused_in_order(answer, (method, path, headers))


@pytest.mark.parametrize("service", SERVICES)
async def test_methods_nobody_offers(stack: Stack, service: str) -> None:
    offered: dict[str, set[str]] = {}
    for method, path in routes(stack, service):
        offered.setdefault(path, set()).add(method)
    for path, methods in offered.items():
        person = await stack.register()
        for method in {"GET", "POST", "PUT", "PATCH", "DELETE", "TRACE", "PROPFIND", "BREW"} - methods:
            status = refused_in_order(
                await send(stack, service, person, method, filled(path)), (method, path)
            )
            # Another template may match the same address, as `/users/{id}` does `/users/me`.
            assert status in (200, 204, 400, 403, 404, 405, 422), (method, path, status)


@pytest.mark.parametrize("service", SERVICES)
@pytest.mark.parametrize(
    "path",
    [
        "/",
        "//",
        "/api",
        "/api/v1/../../../etc/passwd",
        "/..%2f..%2fetc%2fpasswd",
        "/api/v1/nothing/",
        "/openapi.json",
        "/docs",
        "/metrics",
        "/readyz",
        "/api/v1/%00",
        "/api/v1/%ff",
        "/api/v1/" + "a" * 20_000,
        "/api/v1/é",
        "http://[::1/",
        "*",
        "no-slash",
    ],
    ids=lambda path: path[:24],
)
async def test_paths_that_lead_nowhere(stack: Stack, service: str, path: str) -> None:
    answer = await send(stack, service, await stack.register(), "GET", path)
    assert refused_in_order(answer, path) in (400, 404, 405, 414, 422)


@pytest.mark.parametrize("service", SERVICES)
@pytest.mark.parametrize(
    "text",
    [
        b"GARBAGE\r\n\r\n",
        b"GET /api/v1/users/me HTTP/9.9\r\n\r\n",
        b"POST /api/v1/auth/login HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"POST /api/v1/auth/login HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999999999999999\r\n\r\n{}",
        b"GET / HTTP/1.1\r\nConnection: close\r\nX: " + b"y" * 200_000 + b"\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"\x00" * 1000,
    ],
    ids=lambda text: repr(text[:24]),
)
async def test_what_is_not_http_gets_no_500_and_harms_nobody(stack: Stack, service: str, text: bytes) -> None:
    reply = await exchange(stack, service, text, hang_up=True)
    assert not reply.startswith(b"HTTP/1.1 5"), reply[:200]
    assert (await stack.http.get(f"{stack.nodes[service].internal_url}/livez")).status_code == 200
