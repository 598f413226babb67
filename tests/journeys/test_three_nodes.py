"""Three processes of messaging that share nothing but PostgreSQL and Valkey: one is killed, one loses Valkey, one loses
PostgreSQL, while devices on all three send into the same conversations."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from tests.journeys.cable import Cable
from tests.journeys.fleet import Device, Log, assert_kept, eventually, history, open_group
from tests.stack import Stack

from whispr.instance.children import spawn
from whispr.instance.valkey import EmbeddedValkey
from whispr.kit import migrate

NODES = 3
SECONDS_TO_RECOVER = 12.0


class Surroundings(Stack):
    """auth and user, which the nodes ask."""

    SERVICES = ("auth", "user")


def through(url: str, cable: Cable) -> str:
    """`url` with its server reached over `cable`."""
    parts = urlsplit(url)
    credentials = parts.netloc.rpartition("@")[0]
    return parts._replace(netloc=f"{credentials}@127.0.0.1:{cable.port}").geturl()


async def heard_by(logs: list[Log], seq: int) -> None:
    """Wait until each of these devices was given the events up to `seq`."""
    await eventually(
        lambda: all(len(log.given) >= seq for log in logs), SECONDS_TO_RECOVER, f"{seq} is given to everyone"
    )


class NodeProcess:
    """`whispr serve messaging`, over its own two cables. Its ports stay when it is started again."""

    def __init__(self, folder: Path, environment: dict[str, str], postgres: Cable, valkey: Cable) -> None:
        self.postgres = postgres
        self.valkey = valkey
        self.log = folder / "node.log"
        self.ports: dict[str, int] = {}
        self._ports_file = folder / "ports.json"
        self._environment = environment
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.ports['http']}"

    @property
    def socket_url(self) -> str:
        return f"ws://127.0.0.1:{self.ports['socket']}/socket/websocket"

    async def start(self) -> None:
        self._ports_file.unlink(missing_ok=True)
        binds = {
            variable: f"127.0.0.1:{self.ports.get(door, 0)}"
            for variable, door in (
                ("WHISPR_HTTP_BIND", "http"),
                ("WHISPR_GRPC_BIND", "grpc"),
                ("WHISPR_MESSAGING_SOCKET_BIND", "socket"),
            )
        }
        self._process = spawn(
            [sys.executable, "-m", "whispr", "serve", "messaging"],
            env={**os.environ, **self._environment, **binds, "WHISPR_PORTS_FILE": str(self._ports_file)},
            log=self.log,
        )
        await eventually(self._ports_file.exists, 40, f"the node starts: {self.log}")
        self.ports = json.loads(self._ports_file.read_text())

    async def end(self, number: int) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.send_signal(number)
            await asyncio.to_thread(process.wait, 30)


class Town:
    """The nodes, what they stand on, and people on all of them."""

    def __init__(self, stack: Stack, nodes: list[NodeProcess]) -> None:
        self.stack = stack
        self.nodes = nodes
        self.devices: list[list[Device]] = []
        self.conversations: list[str] = []
        self.quiet = ""
        """A conversation where nobody speaks unless told to: nothing later shows that something was missed."""
        self._stop = asyncio.Event()
        self._senders: list[asyncio.Task[None]] = []

    @property
    def everybody(self) -> list[Device]:
        return [device for devices in self.devices for device in devices]

    async def settle(self, per_node: int) -> None:
        """`per_node` people on each node; one group of all, and groups with one person of each node."""
        for node in self.nodes:
            people = [await self.stack.register() for _ in range(per_node)]
            self.devices.append([Device(person, node.socket_url) for person in people])
        across = [list(room) for room in zip(*self.devices, strict=True)]
        rooms = [self.everybody, *across, across[0]]
        for number, room in enumerate(rooms):
            node = self.nodes[number % NODES]
            conversation = await open_group(self.stack.http, node.url, [device.person for device in room])
            self.conversations.append(conversation)
            for device in room:
                device.follow(conversation)
        self.quiet = self.conversations[-1]
        for device in self.everybody:
            device.socket.start()
        await eventually(
            lambda: all(log.open_channel.joined for d in self.everybody for log in d.logs.values()),
            30,
            "joined",
        )

    def begin(self) -> None:
        self._senders = [
            asyncio.create_task(device.send_until(self._stop, 0.1, but=[self.quiet]))
            for device in self.everybody
        ]

    async def finish(self) -> None:
        self._stop.set()
        await asyncio.wait_for(asyncio.gather(*self._senders), 30)

    async def recovered(self, number: int) -> float:
        """Seconds until what a device of node `number` sends is with everyone, and what others send is with it."""
        began = time.monotonic()
        everyone = self.conversations[0]
        there, elsewhere = self.devices[number][0], self.devices[number - 1][0]
        for sender in (there, elsewhere):
            answer = await sender.send(everyone, patience=SECONDS_TO_RECOVER)
            assert answer is not None, "it can send"
            await heard_by([device.logs[everyone] for device in self.everybody], answer.seq)
        return time.monotonic() - began

    def acknowledged(self, number: int) -> int:
        """Messages of the devices on node `number` that were acknowledged so far."""
        return sum(len(log.acknowledged) for device in self.devices[number] for log in device.logs.values())

    async def check(self) -> int:
        """Every promise, for every conversation."""
        total = 0
        for conversation in self.conversations:
            room = [device for device in self.everybody if conversation in device.logs]
            events = await history(self.stack.http, self.nodes[0].url, room[0].person, conversation)
            await heard_by([device.logs[conversation] for device in room], len(events))
            total += assert_kept(room, conversation, events)
        return total


@asynccontextmanager
async def nodes_over(
    stack: Stack, folder: Path, database_url: str, valkey: EmbeddedValkey
) -> AsyncIterator[list[NodeProcess]]:
    async with AsyncExitStack() as cables:
        nodes = []
        identity = stack.settings("messaging").identity_dir
        postgres_port = urlsplit(database_url).port
        assert postgres_port is not None
        for number in range(NODES):
            to_postgres = await cables.enter_async_context(Cable(postgres_port))
            to_valkey = await cables.enter_async_context(Cable(valkey.port))
            (folder / str(number)).mkdir()
            environment = {
                "WHISPR_ENVIRONMENT": "test",
                "WHISPR_RATE_LIMITS": "off",
                "WHISPR_IDENTITY_DIR": str(identity),
                "WHISPR_AUTH_ADDRESS": stack.auth.grpc,
                "WHISPR_USER_ADDRESS": stack.user.grpc,
                "WHISPR_MESSAGING_DATABASE_URL": through(database_url, to_postgres),
                "WHISPR_VALKEY_URL": through(valkey.url, to_valkey),
                "WHISPR_MESSAGING_SIGNATURE_PROCESSES": "0",
                "WHISPR_DATABASE_POOL_SIZE": "5",
                "WHISPR_SHUTDOWN_SECONDS": "3",
            }
            nodes.append(NodeProcess(folder / str(number), environment, to_postgres, to_valkey))
        try:
            await asyncio.gather(*(node.start() for node in nodes))
            yield nodes
        finally:
            await asyncio.gather(*(node.end(signal.SIGKILL) for node in nodes))


@pytest.fixture
async def town(new_database: Callable[[str], str], tmp_path: Path) -> AsyncIterator[Town]:
    databases = {}
    for service in ("auth", "user", "messaging"):
        databases[service] = new_database(f"three_{service}")
        await asyncio.to_thread(migrate.upgrade, service, databases[service])
    valkey = await asyncio.to_thread(EmbeddedValkey(tmp_path / "valkey").start)
    stack = Surroundings(valkey.url, databases, tmp_path / "stack")
    await stack.start()
    try:
        async with nodes_over(stack, tmp_path, databases["messaging"], valkey) as nodes:
            town = Town(stack, nodes)
            try:
                yield town
            finally:
                for device in town.everybody:
                    await device.stop()
    finally:
        await stack.stop()
        valkey.stop()


@pytest.mark.slow
async def test_kill_one_cut_one_off_valkey_and_one_off_postgresql(town: Town) -> None:
    await town.settle(per_node=2)
    town.begin()
    await asyncio.sleep(1)
    recovery: dict[str, float] = {}

    await town.nodes[0].end(signal.SIGKILL)
    before = town.acknowledged(1), town.acknowledged(2)
    await asyncio.sleep(1.5)
    assert town.acknowledged(1) > before[0], "the others serve on"
    assert town.acknowledged(2) > before[1], "the others serve on"
    await town.nodes[0].start()
    recovery["killed"] = await town.recovered(0)

    town.nodes[1].valkey.cut()
    before_cut = town.acknowledged(1)
    told = await town.devices[1][0].send(town.quiet)
    await asyncio.sleep(6)
    assert town.acknowledged(1) > before_cut, "nothing that matters is in Valkey"
    town.nodes[1].valkey.heal()
    recovery["without Valkey"] = await town.recovered(1)
    assert told is not None
    listeners = [device.logs[town.quiet] for device in town.everybody if town.quiet in device.logs]
    await heard_by(listeners, told.seq)

    town.nodes[2].postgres.cut()
    await asyncio.sleep(0.5)
    silent = town.acknowledged(2)
    others = town.acknowledged(0), town.acknowledged(1)
    await asyncio.sleep(3.5)
    assert town.acknowledged(2) == silent, "nothing is acknowledged that could not be stored"
    assert town.acknowledged(0) > others[0], "the others serve on"
    assert town.acknowledged(1) > others[1], "the others serve on"
    town.nodes[2].postgres.heal()
    recovery["without PostgreSQL"] = await town.recovered(2)

    await town.finish()
    assert await town.check() > 100
    assert max(recovery.values()) < SECONDS_TO_RECOVER, recovery
    print("recovered after", {name: round(seconds, 2) for name, seconds in recovery.items()})
