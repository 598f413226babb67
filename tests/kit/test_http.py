from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Annotated, Any
from uuid import UUID

import httpx
import pytest
from fastapi import Path
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from whispr.kit import http, telemetry
from whispr.kit.db import DatabaseUnavailable
from whispr.kit.errors import Conflict, Forbidden, Internal, NotFound, RateLimited
from whispr.kit.http import (
    Body,
    InvalidCursor,
    LimitParam,
    Page,
    create_app,
    decode_cursor,
    encode_cursor,
    new_router,
)
from whispr.kit.process import _HttpDoor
from whispr.kit.settings import CommonSettings

SLOW_SECONDS = 0.05


class Note(Body):
    text: str
    extra: dict[str, Any] = Field(default_factory=dict)


def router() -> Any:
    made = new_router()

    @made.post("/notes", status_code=201)
    async def create(note: Note) -> Note:
        return note

    @made.get("/notes/{note_id}")
    async def read(note_id: Annotated[UUID, Path()]) -> Note:
        raise NotFound(note_id=str(note_id))

    @made.get("/slow")
    async def slow() -> None:
        await asyncio.sleep(SLOW_SECONDS)

    @made.get("/notes")
    async def page(limit: LimitParam = 50) -> Page[Note]:
        return Page(items=[], next_cursor=None)

    failures = {
        "crash": RuntimeError("secret"),
        "internal": Internal("secret"),
        "conflict": Conflict(field="x"),
        "limited": RateLimited(retry_after=2.4),
        "away": DatabaseUnavailable(),
        "forbidden": Forbidden(),
    }

    @made.get("/fail/{how}")
    async def fail(how: str) -> None:
        raise failures[how]

    return made


@pytest.fixture(scope="module")
async def client() -> AsyncIterator[httpx.AsyncClient]:
    app = create_app(
        title="Notes", description="", version="1", routers=[router()], identity=None, max_body=10_000
    )
    door = _HttpDoor(app, "127.0.0.1:0", 1)
    await door.start()
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{door.port}") as made:
        yield made
    await door.stop()


def problem(answer: httpx.Response, status: int, code: str) -> dict[str, Any]:
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = answer.json()
    assert (body["status"], body["code"]) == (status, code)
    assert body["request_id"] == answer.headers["x-request-id"]
    return body


async def test_what_is_asked_for_is_given(client: httpx.AsyncClient) -> None:
    answer = await client.post(
        "/notes", json={"text": "é", "newer": "member"}, headers={"X-Request-Id": "abc"}
    )
    assert answer.status_code == 201
    assert answer.json() == {"text": "é", "extra": {}}
    assert answer.headers["x-request-id"] == "abc"


@pytest.mark.parametrize(
    ("how", "status", "code"),
    [
        ("crash", 500, "internal"),
        ("internal", 500, "internal"),
        ("conflict", 409, "conflict"),
        ("limited", 429, "rate_limited"),
        ("away", 503, "database_unavailable"),
        ("forbidden", 403, "forbidden"),
    ],
)
async def test_failures_are_problems(client: httpx.AsyncClient, how: str, status: int, code: str) -> None:
    answer = await client.get(f"/fail/{how}")
    body = problem(answer, status, code)
    assert "secret" not in answer.text
    if how == "conflict":
        assert body["field"] == "x"
    if how == "limited":
        assert answer.headers["retry-after"] == "2"


@pytest.mark.parametrize(
    ("content", "status", "code"),
    [
        (b"{", 400, "malformed_json"),
        (b'{"text": "\xff"}', 400, "malformed_json"),
        (b'{"text": "\\ud800"}', 400, "malformed_json"),
        (b'{"text": NaN}', 400, "malformed_json"),
        (b"[" * 9_000, 400, "malformed_json"),
        (b'{"text": "a\\u0000b"}', 422, "invalid_request"),
        (b'{"text": "a", "extra": {"k": ["\\u0000"]}}', 422, "invalid_request"),
        (b'{"text": 1}', 422, "invalid_request"),
        (b"null", 422, "invalid_request"),
        (b'{"text": "%s"}' % (b"a" * 11_000), 413, "too_large"),
    ],
)
async def test_bad_bodies_are_told_apart(
    client: httpx.AsyncClient, content: bytes, status: int, code: str
) -> None:
    answer = await client.post("/notes", content=content, headers={"Content-Type": "application/json"})
    problem(answer, status, code)


async def test_a_body_without_declared_length_is_bounded_too(client: httpx.AsyncClient) -> None:
    async def endless() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield b" " * 1_000
            await asyncio.sleep(0)

    answer = await client.post("/notes", content=endless(), headers={"Content-Type": "application/json"})
    problem(answer, 413, "too_large")


async def test_another_content_type_is_refused(client: httpx.AsyncClient) -> None:
    problem(await client.post("/notes", content=b"text=a"), 422, "invalid_request")


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nothing", 404, "not_found"),
        ("DELETE", "/notes", 405, "method_not_allowed"),
        ("GET", "/notes/not-a-uuid", 422, "invalid_request"),
        ("GET", "/notes/%00", 422, "invalid_request"),
        ("GET", "/notes?limit=0", 422, "invalid_request"),
        ("GET", "/notes?limit=10%00", 422, "invalid_request"),
        ("GET", "/notes/01a1fb8e-963b-71f9-ae9b-c029c90a02cf", 404, "not_found"),
    ],
)
async def test_bad_addresses(
    client: httpx.AsyncClient, method: str, path: str, status: int, code: str
) -> None:
    problem(await client.request(method, path), status, code)


async def test_a_strange_request_id_is_replaced(client: httpx.AsyncClient) -> None:
    answer = await client.get("/notes", headers={"X-Request-Id": "a b\tc" * 50})
    assert UUID(answer.headers["x-request-id"]).version == 7


# --- the log ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def written(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[], str]]:
    """What was logged since the last call, as in production."""
    telemetry.configure("notes", CommonSettings(environment="production", mesh=True))
    # A logger keeps what was configured when it first wrote, and earlier tests have used this one.
    monkeypatch.setattr(http, "log", telemetry.get_logger(http.__name__))
    capsys.readouterr()
    yield lambda: capsys.readouterr().out
    telemetry.configure("test", CommonSettings(environment="test", log_level="error", mesh=True))


def request_lines(text: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in text.splitlines()]
    return [line for line in lines if line["event"] == "http_request"]


NOTE_ID = "01a1fb8e-963b-71f9-ae9b-c029c90a02cf"


@pytest.mark.parametrize(
    ("method", "path", "status", "route"),
    [
        ("GET", "/notes", 200, "/notes"),
        ("GET", f"/notes/{NOTE_ID}", 404, "/notes/{note_id}"),
        ("GET", "/notes?limit=0", 422, "/notes"),
        ("GET", "/fail/forbidden", 403, "/fail/{how}"),
        ("GET", "/fail/away", 503, "/fail/{how}"),
        ("GET", "/fail/crash", 500, "/fail/{how}"),
        ("GET", "/nothing", 404, "unmatched"),
        ("DELETE", "/notes", 405, "unmatched"),
        ("PROPFIND", "/notes", 405, "unmatched"),
    ],
)
async def test_each_request_is_one_line(
    client: httpx.AsyncClient, written: Callable[[], str], method: str, path: str, status: int, route: str
) -> None:
    answer = await client.request(method, path, headers={"X-Request-Id": "abc"})
    [line] = request_lines(written())
    assert answer.status_code == status
    assert (line["route"], line["status"], line["request_id"]) == (route, status, "abc")
    assert line["method"] == ("other" if method == "PROPFIND" else method)
    assert line["ms"] > 0
    assert line["level"] == "info"


async def test_the_milliseconds_are_those_the_request_took(
    client: httpx.AsyncClient, written: Callable[[], str]
) -> None:
    began = time.perf_counter()
    await client.get("/slow")
    took = (time.perf_counter() - began) * 1000
    [line] = request_lines(written())
    # The loop's clock may wake a sleeper a little early.
    assert SLOW_SECONDS * 1000 - 5 <= line["ms"] <= took


async def test_requests_at_once_keep_their_own_lines(
    client: httpx.AsyncClient, written: Callable[[], str]
) -> None:
    names = [f"r{number}" for number in range(20)]
    await asyncio.gather(*(client.get("/notes", headers={"X-Request-Id": name}) for name in names))
    assert sorted(line["request_id"] for line in request_lines(written())) == sorted(names)


SECRET = "s3cr3t-Value-7f"


async def test_no_line_holds_what_people_sent(client: httpx.AsyncClient, written: Callable[[], str]) -> None:
    """Neither bodies, ids in paths, queries, tokens nor addresses; also not when it goes wrong."""
    headers = {"Authorization": f"Bearer {SECRET}", "Cookie": SECRET, "X-Forwarded-For": "203.0.113.77"}
    for method, path, content in (
        ("POST", f"/notes?token={SECRET}", json.dumps({"text": SECRET})),
        ("POST", "/notes", json.dumps({"text": {SECRET: SECRET}})),
        ("POST", "/notes", f'{{"{SECRET}'),
        ("GET", f"/notes/{NOTE_ID}?q={SECRET}", ""),
        ("GET", f"/nothing/{SECRET}", ""),
        ("GET", f"/fail/away?q={SECRET}", ""),
    ):
        await client.request(
            method, path, content=content, headers={**headers, "Content-Type": "application/json"}
        )
    text = written()
    assert len(request_lines(text)) == 6
    for personal in (SECRET, NOTE_ID, "203.0.113.77"):
        assert personal not in text


@given(st.tuples(st.integers(0, 2**62), st.text()))
def test_cursors_come_back_as_they_were(value: tuple[int, str]) -> None:
    assert decode_cursor(encode_cursor(value), tuple[int, str]) == value


@given(st.text(max_size=60))
def test_no_foreign_cursor_is_believed_or_crashes(cursor: str) -> None:
    try:
        decode_cursor(cursor, tuple[int, str])
    except InvalidCursor:
        return
    raise AssertionError("a random text was taken for a cursor")


def test_the_document_names_problems_by_their_own_type() -> None:
    app = create_app(title="Notes", description="", version="1", routers=[router()], identity=None)
    create = app.openapi()["paths"]["/notes"]["post"]
    problem_type = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
    assert {
        status: answer["content"] for status, answer in create["responses"].items() if status >= "400"
    } == dict.fromkeys(("400", "413", "422", "429", "503"), problem_type)
    assert set(create["responses"]["201"]["content"]) == {"application/json"}
    assert "413" not in app.openapi()["paths"]["/notes/{note_id}"]["get"]["responses"], (
        "nothing to be too large"
    )
    assert app.openapi() == app.openapi()
