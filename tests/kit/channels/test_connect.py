"""What is decided before the upgrade."""

from __future__ import annotations

import base64
from typing import Any

import pytest
from tests.kit.channels.conftest import Connect, Serve
from tests.kit.channels.raw import RawClient, Refused, until
from tests.kit.channels.room import user_id

from whispr.kit.channels import Limits
from whispr.kit.channels.metrics import stats


async def refused(port: int, *args: Any, **options: Any) -> Refused:
    with pytest.raises(Refused) as caught:
        await RawClient.connect(port, *args, **options)
    return caught.value


def protocols(token: str) -> dict[str, str]:
    encoded = base64.b64encode(token.encode()).decode().rstrip("=")
    return {"Sec-WebSocket-Protocol": f"phoenix, base64url.bearer.phx.{encoded}"}


@pytest.mark.parametrize(
    ("query", "headers"),
    [
        ("vsn=2.0.0&token=alice", {}),
        ("vsn=2.0.0&access_token=alice", {}),
        ("vsn=2.0.0", protocols("alice")),
        ("vsn=2.0.0", {"Authorization": "Bearer alice"}),
        ("vsn=2.0.0&token=alice", {"Connection": "keep-alive, Upgrade"}),
    ],
)
async def test_where_a_token_may_stand(
    serve: Serve, connect: Connect, query: str, headers: dict[str, str]
) -> None:
    endpoint, port = await serve()
    client = await connect(port, query, headers)
    assert endpoint.hub.is_online(user_id("alice"))
    assert client.headers.get("sec-websocket-protocol") == (
        "phoenix" if "Sec-WebSocket-Protocol" in headers else None
    )


async def test_token_of_the_subprotocol_is_decoded_whatever_its_bytes(serve: Serve, connect: Connect) -> None:
    endpoint, port = await serve()
    name = "ÿþ~~>>??"
    assert set("+/") & set(base64.b64encode(name.encode()).decode())
    await connect(port, "vsn=2.0.0", protocols(name))
    assert endpoint.hub.is_online(user_id(name))


@pytest.mark.parametrize(
    "item", ["base64url.bearer.phx.%%%", "base64url.bearer.phx./////w", "base64url.bearer.phx."]
)
async def test_broken_token_in_the_subprotocol(serve: Serve, item: str) -> None:
    _, port = await serve()
    answer = await refused(port, "vsn=2.0.0", {"Sec-WebSocket-Protocol": f"phoenix, {item}"})
    assert (answer.status, answer.json()["code"]) == (401, "unauthenticated")


@pytest.mark.parametrize(
    ("token", "status", "code", "retry_after"),
    [
        ("", 401, "unauthenticated", None),
        ("forged", 401, "invalid_token", None),
        ("banned", 403, "forbidden", None),
        ("busy", 429, "rate_limited", "7"),
        ("lost", 503, "unavailable", "2"),
        ("bug", 500, "internal", None),
    ],
)
async def test_refusals(serve: Serve, token: str, status: int, code: str, retry_after: str | None) -> None:
    endpoint, port = await serve()
    before = stats.refusals[status]
    answer = await refused(port, f"vsn=2.0.0&token={token}")
    assert answer.status == status
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["code"] == code
    assert answer.headers.get("retry-after") == retry_after
    assert stats.refusals[status] == before + 1
    assert len(endpoint.hub) == 0


@pytest.mark.parametrize(
    "vsn", ["3.0.0", "2", "2.0", "2.1.0", "1.1.0", "x", "", "2.0.0-rc.1", "02.0.0", "2.0.0\u0661"]
)
async def test_unspoken_versions(serve: Serve, vsn: str) -> None:
    _, port = await serve()
    answer = await refused(port, f"token=alice&vsn={vsn.encode().hex() if not vsn.isascii() else vsn}")
    assert (answer.status, answer.json()["code"]) == (403, "unsupported_vsn")


@pytest.mark.parametrize(("query", "vsn"), [("", "1.0.0"), ("&vsn=1.0.7", "1.0.0"), ("&vsn=2.0.12", "2.0.0")])
async def test_spoken_versions(serve: Serve, connect: Connect, query: str, vsn: str) -> None:
    endpoint, port = await serve()
    await connect(port, f"token=alice{query}")
    (socket,) = endpoint.hub.sockets()
    assert socket.vsn == vsn


@pytest.mark.parametrize(
    ("origin", "allowed", "admitted"),
    [
        (None, [], True),
        ("http://127.0.0.1:3000", [], True),
        ("https://127.0.0.1", [], True),
        ("https://evil.example", [], False),
        ("null", [], False),
        ("", [], False),
        ("http://[broken", [], False),
        ("https://app.example", ["https://app.example"], True),
        ("https://APP.example", ["https://app.example/"], True),
        ("http://app.example", ["https://app.example"], False),
        ("https://a.example.org", ["//*.example.org"], True),
        ("https://example.org", ["//*.example.org"], False),
        ("https://evilexample.org", ["//*.example.org"], False),
        ("http://example.org:81", ["//example.org"], True),
        ("https://example.org.evil.example", ["//example.org"], False),
        ("null", ["*"], True),
    ],
)
async def test_origins(
    serve: Serve, connect: Connect, origin: str | None, allowed: list[str], admitted: bool
) -> None:
    _, port = await serve(allowed_origins=allowed)
    headers = {} if origin is None else {"Origin": origin}
    if admitted:
        await connect(port, headers=headers)
    else:
        answer = await refused(port, headers=headers)
        assert (answer.status, answer.json()["code"]) == (403, "origin_refused")


async def test_other_paths_and_methods(serve: Serve) -> None:
    _, port = await serve()
    assert (await refused(port, path="/elsewhere")).status == 404
    assert (await refused(port, path="/socket/websocket/")).status == 404
    assert (await refused(port, method="POST")).status == 400
    assert (await refused(port, headers={"Upgrade": "h2c"})).status == 400
    assert (await refused(port, headers={"Sec-WebSocket-Key": "short"})).status == 400


async def test_absurdly_many_parameters(serve: Serve) -> None:
    _, port = await serve()
    answer = await refused(port, "vsn=2.0.0&token=alice&" + "&".join(f"a{n}=1" for n in range(100)))
    assert answer.status == 403


async def test_sockets_per_person_and_in_all_are_bounded(serve: Serve, connect: Connect) -> None:
    endpoint, port = await serve(limits=Limits(max_sockets=3, max_sockets_per_user=2))
    await connect(port)
    second = await connect(port)
    answer = await refused(port)
    assert (answer.status, answer.json()["code"]) == (429, "too_many_sockets")
    await connect(port, "vsn=2.0.0&token=bob")
    answer = await refused(port, "vsn=2.0.0&token=carol")
    assert (answer.status, answer.json()["code"], answer.headers["retry-after"]) == (503, "unavailable", "5")
    second.abandon()
    await until(lambda: len(endpoint.hub) == 2)
    await connect(port)


async def test_a_socket_remembers_its_parameters_but_no_credentials(serve: Serve, connect: Connect) -> None:
    endpoint, port = await serve()
    await connect(port, "vsn=2.0.0&token=alice&access_token=x&locale=fr&a[b]=c&empty=")
    (socket,) = endpoint.hub.sockets()
    assert socket.params == {"locale": "fr", "a[b]": "c", "empty": ""}
    link: Any = socket.link
    request = link._transport.request
    assert b"alice" not in request.path
    assert not request.headers


async def test_hooks_that_fail_harm_nobody(serve: Serve, connect: Connect) -> None:
    def fail(_: object) -> None:
        raise ZeroDivisionError

    endpoint, port = await serve(on_connect=fail, on_disconnect=fail)
    client = await connect(port)
    await client.silence()
    client.abandon()
    await until(lambda: len(endpoint.hub) == 0)
