"""Requests no schema suggests: every one gets an answer in order, and none a 500."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import pytest
from tests.journeys.scene import (
    SERVICES,
    UNKNOWN_ID,
    Scene,
    document,
    exchange,
    refused_in_order,
    routes,
    send,
)
from tests.services.messaging.door import Door
from tests.stack import PASSWORD, DeviceKeys, Stack

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
    UNKNOWN_ID.upper() + "0",
    UNKNOWN_ID[:-1],
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


@pytest.mark.parametrize("service", SERVICES)
async def test_bodies_no_schema_suggests(stack: Stack, service: str) -> None:
    for method, path in routes(stack, service):
        if method == "GET":
            continue
        scene = await Scene.set(stack)
        for name, (content, content_type) in BODIES.items():
            headers = {"Content-Type": content_type} if content_type else {}
            answer = await send(
                stack, service, scene.person, method, scene.fill(path), content=content, headers=headers
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
            scene = await Scene.set(stack)
            body = json.dumps(nul_body(content["schema"], components)).encode()
            headers = {"Content-Type": "application/json"}
            answer = await send(
                stack, service, scene.person, method.upper(), scene.fill(path), content=body, headers=headers
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
        scene = await Scene.set(stack)
        for value in IDS:
            what = (method, path, value[:50])
            status = refused_in_order(
                await send(stack, service, scene.person, method, scene.fill(path, value)), what
            )
            assert status >= 300 or "reaction" in path, (what, status)


@pytest.mark.parametrize("service", SERVICES)
async def test_queries_that_make_no_sense(stack: Stack, service: str) -> None:
    scene = await Scene.set(stack)
    for method, path in routes(stack, service):
        if method != "GET":
            continue
        for query in QUERIES:
            answer = await send(stack, service, scene.person, method, f"{scene.fill(path)}?{query}")
            refused_in_order(answer, (method, path, query[:80]))


@pytest.mark.parametrize("service", SERVICES)
async def test_headers_that_make_no_sense(stack: Stack, service: str) -> None:
    for method, path in routes(stack, service):
        scene = await Scene.set(stack)
        for headers in HEADERS:
            answer = await send(stack, service, scene.person, method, scene.fill(path), headers=headers)
            if answer is not None:
                refused_in_order(answer, (method, path, headers))


@pytest.mark.parametrize("service", SERVICES)
async def test_methods_nobody_offers(stack: Stack, service: str) -> None:
    offered: dict[str, set[str]] = {}
    for method, path in routes(stack, service):
        offered.setdefault(path, set()).add(method)
    for path, methods in offered.items():
        scene = await Scene.set(stack)
        for method in {"GET", "POST", "PUT", "PATCH", "DELETE", "TRACE", "PROPFIND", "BREW"} - methods:
            status = refused_in_order(
                await send(stack, service, scene.person, method, scene.fill(path)), (method, path)
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
    answer = await send(stack, service, (await Scene.set(stack)).person, "GET", path)
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


# --- long polling, which no document describes ------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE", "OPTIONS"])
@pytest.mark.parametrize(
    "query",
    [
        "",
        "vsn=2.0.0",
        "vsn=9.9.9&token=x",
        "token=%00",
        "token=%ff&access_token=%00",
        "vsn=2.0.0&token=" + "a" * 9000,
    ],
)
async def test_long_polling_answers_nonsense_in_order(stack: Stack, method: str, query: str) -> None:
    scene = await Scene.set(stack)
    for content, content_type in BODIES.values():
        headers = {"Content-Type": content_type} if content_type else {}
        path = f"/socket/longpoll?{query}"
        answer = await send(stack, "messaging", scene.person, method, path, content=content, headers=headers)
        assert answer is not None
        assert answer.status < 500, (method, query[:50], content[:50], answer)


# --- good requests, spoiled in one place ------------------------------------------------------------------------------

SPOILS: list[Any] = [
    None,
    True,
    0,
    -1,
    2**31,
    2**63,
    2**64,
    1.5,
    1e308,
    "",
    "\0",
    "a\0b",
    "x" * 3000,
    "\u202e\ufeff",
    "-1",
    "NaN",
    "0001-01-01T00:00:00Z",
    "9999-12-31T23:59:59.999999+14:00",
    UNKNOWN_ID,
    [],
    {},
    [[]],
    [None],
    {"a": {"b": 1}},
    {"\0": 1},
    ["x"] * 2000,
]


async def good_requests(stack: Stack, scene: Scene) -> list[tuple[str, str, str, dict[str, Any]]]:
    """(service, method, path, body) of requests that succeed as they stand."""
    keys, door = DeviceKeys(), Door(stack, scene.person)
    draft = door.draft(scene.conversation_id)
    envelopes = {"envelopes": {str(scene.other.device_id): {"type": "message", "body": "AAAA"}}}
    register = {"username": f"u{uuid4().hex[:20]}", "password": PASSWORD, "device": keys.registration(1)}
    push = {"channel": "fcm", "token": "t" * 100, "app_id": "app", "environment": "production"}
    profile = {
        "display_name": "Ada",
        "avatar_media_id": UNKNOWN_ID,
        "locale": "en",
        "time_zone": "UTC",
        "privacy": {"online": "nobody", "read_receipts": True},
    }
    group = {"type": "group", "member_ids": [str(scene.other.user_id)], "metadata": {"title": "t", "n": [1]}}
    conversation = f"/api/v1/conversations/{scene.conversation_id}"
    return [
        ("auth", "POST", "/api/v1/auth/register", register),
        ("auth", "POST", "/api/v1/auth/login", {**register, "username": scene.person.username}),
        ("auth", "POST", "/api/v1/auth/refresh", {"refresh_token": scene.person.session["refresh_token"]}),
        ("auth", "PUT", f"/api/v1/devices/{scene.person.device_id}/push-token", push),
        (
            "auth",
            "PUT",
            "/api/v1/keys",
            {"signed_prekey": scene.person.keys.signed_prekey(7), "one_time_prekeys": [keys.prekey(9)]},
        ),
        ("user", "PATCH", "/api/v1/users/me", profile),
        ("messaging", "POST", "/api/v1/conversations", group),
        (
            "messaging",
            "POST",
            "/api/v1/messages",
            {**draft, "reply_to_id": scene.message_id, "expires_in": 60},
        ),
        (
            "messaging",
            "POST",
            "/api/v1/messages",
            door.draft(scene.conversation_id, content=envelopes, media_ids=[]),
        ),
        ("messaging", "POST", f"{conversation}/read", {"seq": 1}),
        ("messaging", "POST", f"{conversation}/members", {"member_ids": [str(scene.other.user_id)]}),
        ("messaging", "PATCH", f"{conversation}/members/{scene.other.user_id}", {"role": "admin"}),
        ("messaging", "PATCH", conversation, {"metadata": {"title": "t"}}),
    ]


def spoiled(value: Any, spoil: Any) -> Iterator[Any]:
    """`value` with `spoil` in the place of each of its parts in turn, itself included."""
    yield spoil
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in list(parts):
        for changed in spoiled(part, spoil):
            copy = value.copy()
            copy[key] = changed
            yield copy


@pytest.mark.parametrize("number", range(13))
async def test_good_requests_spoiled_in_one_place(stack: Stack, number: int) -> None:
    scene = await Scene.set(stack)
    service, method, path, good = (await good_requests(stack, scene))[number]
    headers = {"Content-Type": "application/json"}
    answer = await send(
        stack, service, scene.person, method, path, content=json.dumps(good).encode(), headers=headers
    )
    assert answer is not None
    assert answer.status in (200, 201, 204), (method, path, answer.body)
    for spoil in SPOILS:
        for body in spoiled(good, spoil):
            content = json.dumps(body).encode()
            answer = await send(stack, service, scene.person, method, path, content=content, headers=headers)
            refused_in_order(answer, (method, path, content[:2000]))
