"""`whispr up --messaging-workers 3`: processes that share the ports of messaging."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest
from tests.cli.instances import Up, data_folder
from tests.journeys.fleet import Device, assert_kept, eventually, history, open_group, register
from tests.node.driver import Unavailable, phoenix_client

CHEAP = {"WHISPR_AUTH_ARGON2_MEMORY_KIB": "64", "WHISPR_AUTH_ARGON2_TIME_COST": "1"}
WORKERS = 3


@pytest.fixture(scope="module")
def up() -> Iterator[Up]:
    with data_folder() as folder:
        instance = Up(folder, None, WHISPR_MESSAGING_WORKERS=str(WORKERS), **CHEAP).wait_ready()
        try:
            yield instance
        finally:
            instance.stop()


@pytest.fixture
async def http() -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(timeout=30) as client:
        yield client


def workers(up: Up) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = up.record["services"]["messaging"]["workers"]
    return found


def metric(worker: dict[str, Any], pattern: str) -> float:
    """The sum of the worker's samples whose line matches `pattern`."""
    with urllib.request.urlopen(f"{worker['internal']}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if re.match(pattern, line))


async def gang(up: Up, http: httpx.AsyncClient, count: int) -> tuple[list[Device], str]:
    """`count` people in one group, connected and joined, at messaging's own shared port."""
    url = up.record["services"]["messaging"]["socket"].replace("http", "ws") + "/socket/websocket"
    people = [await register(http, up.url) for _ in range(count)]
    conversation = await open_group(http, up.url, people)
    devices = [Device(person, url) for person in people]
    for device in devices:
        device.follow(conversation)
        device.socket.start()
    await eventually(lambda: all(d.logs[conversation].open_channel.joined for d in devices), 20, "all join")
    return devices, conversation


async def test_each_worker_is_named_shown_and_ready(up: Up) -> None:
    described = up.record["services"]["messaging"]
    assert len({worker["pid"] for worker in workers(up)}) == WORKERS
    assert len({worker["internal"] for worker in workers(up)}) == WORKERS
    assert (described["pid"], described["internal"]) == (workers(up)[0]["pid"], workers(up)[0]["internal"])
    assert len(up.record["services"]["user"]["workers"]) == 1
    command = [sys.executable, "-m", "whispr", "status", "--json", "--data", str(up.folder)]
    outcome = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, check=True)
    states = {part["name"]: part["state"] for part in json.loads(outcome.stdout)["parts"]}
    assert [states[name] for name in ("messaging", "messaging-2", "messaging-3")] == ["ready"] * WORKERS
    assert up.ask("/readyz")[1]["services"]["messaging"] == "ready"
    own = {"internal": up.record["internal"]}
    names = ("messaging", "messaging-2", "messaging-3")
    assert [metric(own, rf'whispr_part_up\{{part="{name}"\}} ') for name in names] == [1] * WORKERS


async def test_sockets_and_requests_are_spread_over_the_workers(up: Up, http: httpx.AsyncClient) -> None:
    devices, _ = await gang(up, http, 24)
    try:
        counts = [metric(worker, "whispr_channels_sockets ") for worker in workers(up)]
        assert sum(counts) >= 24
        assert all(counts), counts
        rest = up.record["services"]["messaging"]["http"]
        for _ in range(40):
            # Each on a connection of its own: the kernel spreads connections, not requests.
            answer = await asyncio.to_thread(_list_conversations, rest, devices[0].person.token)
            assert answer == 200
        served = [
            metric(worker, r'whispr_http_requests_total\{.*route="/api/v1/conversations"')
            for worker in workers(up)
        ]
        assert all(served), served
    finally:
        for device in devices:
            await device.stop()


def _list_conversations(url: str, token: str) -> int:
    request = urllib.request.Request(f"{url}/api/v1/conversations")
    request.add_header("authorization", f"Bearer {token}")
    with urllib.request.urlopen(request, timeout=10) as answer:
        return int(answer.status)


async def test_one_of_three_is_killed_and_nothing_is_lost(up: Up, http: httpx.AsyncClient) -> None:
    devices, conversation = await gang(up, http, 9)
    stop = asyncio.Event()
    senders = [asyncio.create_task(device.send_until(stop, 0.02)) for device in devices]
    try:
        await asyncio.sleep(0.5)
        before = workers(up)
        doomed = before[1]
        others = [worker["pid"] for worker in (before[0], before[2])]
        os.kill(doomed["pid"], signal.SIGKILL)
        # The public door stays open all the while: the kernel gives new connections to the others.
        for _ in range(10):
            status, body = await asyncio.to_thread(up.ask, "/readyz")
            assert status == 200, body
        await eventually(
            lambda: workers(up)[1]["pid"] != doomed["pid"] and workers(up)[1]["restarts"] == 1, 10, "replaced"
        )
        assert [workers(up)[0]["pid"], workers(up)[2]["pid"]] == others, "the others were left alone"
        ready = asyncio.create_task(_until_ready(up))
        await asyncio.wait_for(ready, 20)
        await asyncio.sleep(0.5)
    finally:
        stop.set()
        await asyncio.wait_for(asyncio.gather(*senders), 60)
    events = await history(http, up.url, devices[0].person, conversation)
    await eventually(
        lambda: all(len(device.logs[conversation].given) >= len(events) for device in devices),
        15,
        "all arrive",
    )
    assert assert_kept(devices, conversation, events) > 50
    assert sum(device.socket.connections for device in devices) > len(devices), "somebody was cut off"
    for device in devices:
        await device.stop()


async def _until_ready(up: Up) -> None:
    while (await asyncio.to_thread(up.ask, "/readyz"))[1]["status"] != "ready":
        await asyncio.sleep(0.1)


async def test_a_rolling_restart_is_hardly_noticed(up: Up, http: httpx.AsyncClient) -> None:
    devices, conversation = await gang(up, http, 9)
    stop = asyncio.Event()
    senders = [asyncio.create_task(device.send_until(stop, 0.1)) for device in devices]
    try:
        await asyncio.sleep(0.5)
        for number in (0, 1):
            old = workers(up)[number]["pid"]
            os.kill(old, signal.SIGTERM)
            await eventually(lambda number=number, old=old: workers(up)[number]["pid"] != old, 20, "replaced")  # type: ignore[misc]
            await asyncio.wait_for(_until_ready(up), 20)
    finally:
        stop.set()
        await asyncio.wait_for(asyncio.gather(*senders), 60)
    events = await history(http, up.url, devices[0].person, conversation)
    await eventually(
        lambda: all(len(device.logs[conversation].given) >= len(events) for device in devices),
        15,
        "all arrive",
    )
    sent = assert_kept(devices, conversation, events)
    moved = sum(device.socket.connections - 1 for device in devices)
    unanswered = sum(device.unanswered for device in devices)
    # A push may cross the closing on its way, but what had arrived was answered first.
    assert sent > 100
    assert unanswered <= moved // 3
    assert max(device.slowest for device in devices) < 5, "nobody waited for a process to come back"
    for device in devices:
        await device.stop()


async def test_long_polling_stays_with_one_process(up: Up, http: httpx.AsyncClient) -> None:
    person = await register(http, up.url)
    other = await register(http, up.url)
    topic = f"conversation:{await open_group(http, up.url, [person, other])}"
    try:
        async with phoenix_client() as phoenix:
            options = {"params": {"access_token": person.token}}
            phoenix.do(
                "connect", socket="poll", url=f"{up.url}/socket", transport="longpoll", options=options
            )
            phoenix.do("join", socket="poll", topic=topic)
            await phoenix.wait("joined", socket="poll", topic=topic)
            # Every push is a request of its own, and none may meet a worker that does not know the session.
            for tag in range(20):
                phoenix.do(
                    "push", socket="poll", topic=topic, event="mark_as_read", payload={"seq": 0}, tag=tag
                )
                assert (await phoenix.wait("reply", tag=tag))["status"] == "ok"
    except Unavailable as reason:
        pytest.skip(str(reason))
