"""Presence over two nodes and a real Valkey."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from tests.kit.channels.raw import RawClient, until
from tests.kit.channels.room import authenticate, user_id
from tests.node.driver import Unavailable, phoenix_client

from whispr.instance.valkey import EmbeddedValkey
from whispr.kit.cache import Cache
from whispr.kit.channels import Channel, Endpoint, Presence
from whispr.kit.clock import ManualClock
from whispr.kit.identity import Caller
from whispr.kit.pressure import Pressure

INTERVAL = 0.03
TTL = 0.6


class PresentRoom(Channel):
    """Tracks its person by name; the topic's last part keeps tests apart."""

    __slots__ = ("presence", "tracked")

    presence: Presence

    async def join(self, params: dict[str, Any]) -> Any:
        self.tracked = False
        if not params.get("hidden"):
            meta = {"device": str(self.socket.caller.device_id), **params.get("meta", {})}
            self.tracked = self.presence.track(self.topic, str(self.socket.caller.user_id), self, meta)
        return {"tracked": self.tracked}

    async def joined(self) -> None:
        await self.presence.follow(self, [self.topic])

    def receive(self, event: str, payload: Any, reply: Any) -> None:
        if event == "move":
            self.presence.update(self.topic, self, {"moved": True})
        if event == "follow":
            self.socket.core.spawn(
                self.presence.follow(self, [self.topic, *bytes(payload).decode().split('"')[3:4]])
            )

    def terminated(self) -> None:
        self.presence.untrack(self)
        self.presence.unfollow(self)


class Node:
    """One process' worth of presence."""

    def __init__(self, url: str, **options: Any) -> None:
        self.cache = Cache(url, timeout=0.5)
        self.clock = ManualClock()
        options = {"ttl": TTL, "interval": INTERVAL, **options}
        self.presence = Presence(self.cache, self.clock, **options)
        self.endpoint = Endpoint([("room:*", self._room)], authenticate, clock=self.clock)
        self.port = 0
        self._clients: list[RawClient] = []
        self._loops: list[asyncio.Task[None]] = []

    def _room(self, socket: Any, topic: str, topic_id: str) -> Channel:
        room = PresentRoom(socket, topic, topic_id)
        room.presence = self.presence
        return room

    async def start(self) -> None:
        self._loops = [asyncio.create_task(self.cache.run())]
        await until(lambda: "presence:changes" in self.cache.subscribed)
        self._loops.append(asyncio.create_task(self.presence.run()))
        await until(lambda: not self.presence._behind)
        self.port = await self.endpoint.listen("127.0.0.1", 0)

    async def join(self, topic: str, token: str, params: Any = None, vsn: str = "2.0.0") -> RawClient:
        client = await RawClient.connect(self.port, f"vsn={vsn}&token={token}")
        self._clients.append(client)
        await client.join(topic, params)
        return client

    async def die(self) -> None:
        """Vanish without a word, as a killed process does."""
        loops = set(self._loops)
        while loops:
            for loop in loops:
                loop.cancel()
            # On Python 3.11 a cancellation may be lost inside redis-py's use of wait_for.
            _, loops = await asyncio.wait(loops, timeout=0.5)
        if self.presence._timer is not None:
            self.presence._timer.cancel()
        self._loops = []

    async def stop(self) -> None:
        for client in self._clients:
            client.abandon()
        await self.endpoint.drain(0, 0.1)
        if self._loops:
            await self.presence.close()
        await self.die()
        await self.cache.close()


Start = Callable[..., Awaitable[Node]]


@pytest.fixture
async def start(valkey_url: str) -> AsyncIterator[Start]:
    nodes: list[Node] = []

    async def make(url: str = valkey_url, **options: Any) -> Node:
        node = Node(url, **options)
        nodes.append(node)
        await node.start()
        return node

    yield make
    for node in nodes:
        await node.stop()


@pytest.fixture
def topic() -> str:
    return f"room:{uuid4()}"


class Seen:
    """What a client that follows the protocol sees: keys with the devices they are present from."""

    def __init__(self, client: RawClient) -> None:
        self.client = client
        self.state: dict[str, dict[str, Any]] = {}
        self.diffs = 0

    def apply(self, event: str, payload: Any) -> None:
        if event == "presence_state":
            self.state = {
                key: {meta["phx_ref"]: meta for meta in value["metas"]} for key, value in payload.items()
            }
            return
        assert event == "presence_diff", event
        self.diffs += 1
        for key, value in payload["joins"].items():
            for meta in value["metas"]:
                assert meta["phx_ref"] not in self.state.get(key, {}), "joined twice"
                self.state.setdefault(key, {})[meta["phx_ref"]] = meta
        for key, value in payload["leaves"].items():
            for meta in value["metas"]:
                self.state.get(key, {}).pop(meta["phx_ref"], None)
            if not self.state.get(key):
                self.state.pop(key, None)

    async def until(self, *names: str, timeout: float = 5.0) -> None:
        wanted = {str(user_id(name)) for name in names}
        async with asyncio.timeout(timeout):
            while set(self.state) != wanted:
                frame = await self.client.next(timeout)
                self.apply(frame[3], frame[4])

    async def nothing(self, seconds: float = 5 * INTERVAL) -> None:
        await asyncio.sleep(seconds)
        await self.client.silence()


async def test_state_then_diffs(start: Start, topic: str) -> None:
    node = await start(interval=0.5)
    alice = Seen(await node.join(topic, "alice"))
    assert (await alice.client.next())[3] == "presence_state"
    diff = await alice.client.next()
    assert diff[:4] == ["1", None, topic, "presence_diff"]
    (meta,) = diff[4]["joins"][str(user_id("alice"))]["metas"]
    assert set(meta) == {"device", "phx_ref"}
    assert diff[4]["leaves"] == {}
    alice.apply(diff[3], diff[4])
    bob = Seen(await node.join(topic, "bob"))
    await alice.until("alice", "bob")
    await bob.until("alice", "bob")
    bob.client.send("1", "2", topic, "phx_leave", {})
    await alice.until("alice")
    assert node.presence.state(topic) == {str(user_id("alice")): {"metas": [meta]}}


async def test_over_two_nodes(start: Start, topic: str) -> None:
    here, there = await start(), await start()
    alice = Seen(await here.join(topic, "alice"))
    await alice.until("alice")
    bob = Seen(await there.join(topic, "bob"))
    await bob.until("alice", "bob")
    await alice.until("alice", "bob")
    carol = Seen(await here.join(topic, "carol"))
    for seen in (alice, bob, carol):
        await seen.until("alice", "bob", "carol")
    bob.client.abandon()
    await alice.until("alice", "carol")
    await carol.until("alice", "carol")


async def test_several_devices_of_one_person(start: Start, topic: str) -> None:
    here, there = await start(), await start()
    watcher = Seen(await here.join(topic, "watcher", {"hidden": True}))
    phone = await here.join(topic, "alice/phone")
    laptop = await there.join(topic, "alice/laptop")
    await until(lambda: len(here.presence.state(topic).get(str(user_id("alice")), {}).get("metas", [])) == 2)
    phone.abandon()
    await until(lambda: len(here.presence.state(topic)[str(user_id("alice"))]["metas"]) == 1)
    await watcher.until("alice")
    laptop.abandon()
    await watcher.until()


async def test_update_joins_anew_and_names_the_entry_before(start: Start, topic: str) -> None:
    here, there = await start(), await start()
    watcher = Seen(await there.join(topic, "watcher", {"hidden": True}))
    alice = await here.join(topic, "alice")
    await watcher.until("alice")
    (before,) = watcher.state[str(user_id("alice"))].values()
    alice.send("1", "2", topic, "move", {})
    diff = (await watcher.client.next())[4]
    (joined,) = diff["joins"][str(user_id("alice"))]["metas"]
    (left,) = diff["leaves"][str(user_id("alice"))]["metas"]
    assert (joined["moved"], joined["phx_ref_prev"], left["phx_ref"]) == (
        True,
        before["phx_ref"],
        before["phx_ref"],
    )


async def test_changes_within_an_interval_are_told_together(start: Start, topic: str) -> None:
    node = await start(interval=0.3)
    watcher = Seen(await node.join(topic, "watcher", {"hidden": True}))
    for n in range(5):
        await node.join(topic, f"user{n}")
    fleeting = await node.join(topic, "fleeting")
    fleeting.send("1", "2", topic, "phx_leave", {})
    await watcher.until(*(f"user{n}" for n in range(5)))
    assert watcher.diffs <= 2


async def test_someone_who_came_and_went_within_an_interval_was_never_there(start: Start, topic: str) -> None:
    node = await start(interval=0.2)
    watcher = Seen(await node.join(topic, "watcher", {"hidden": True}))
    assert (await watcher.client.next())[4] == {}
    fleeting = await node.join(topic, "fleeting")
    fleeting.send("1", "2", topic, "phx_leave", {})
    await watcher.nothing(0.4)


async def test_topics_are_capped(start: Start, topic: str) -> None:
    node = await start(cap=2)
    await node.join(topic, "alice")
    client = await node.join(topic, "bob")
    refused = await RawClient.connect(node.port, "vsn=2.0.0&token=carol")
    assert (await refused.join(topic))["response"] == {"tracked": False}
    second_device = await RawClient.connect(node.port, "vsn=2.0.0&token=alice/other")
    assert (await second_device.join(topic))["response"] == {"tracked": True}
    assert set(node.presence.state(topic)) == {str(user_id("alice")), str(user_id("bob"))}
    client.abandon()
    await until(lambda: len(node.presence.state(topic)) == 1)
    late = await RawClient.connect(node.port, "vsn=2.0.0&token=carol")
    assert (await late.join(topic))["response"] == {"tracked": True}
    for other in (refused, second_device, late):
        other.abandon()


async def test_who_may_not_see_whom(start: Start, topic: str) -> None:
    def visible(viewer: Caller, key: str) -> bool:
        return not (viewer.user_id == user_id("bob") and key == str(user_id("alice")))

    here, there = await start(visible=visible), await start(visible=visible)
    alice = Seen(await here.join(topic, "alice"))
    bob = Seen(await there.join(topic, "bob"))
    carol = Seen(await there.join(topic, "carol"))
    await alice.until("alice", "bob", "carol")
    await carol.until("alice", "bob", "carol")
    await bob.until("bob", "carol")
    alice.client.abandon()
    await carol.until("bob", "carol")
    await bob.nothing()


async def test_following_other_topics(start: Start, topic: str) -> None:
    here, there = await start(), await start()
    other = f"room:{uuid4()}"
    await there.join(other, "bob")
    await until(lambda: there.presence.state(other))
    alice = Seen(await here.join(topic, "alice"))
    await alice.until("alice")
    alice.client.send("1", "2", topic, "follow", {"topic": other})
    await alice.until("alice", "bob")
    carol = await there.join(other, "carol")
    await alice.until("alice", "bob", "carol")
    carol.abandon()
    await alice.until("alice", "bob")


async def test_a_node_that_dies_takes_its_people_along(start: Start, topic: str) -> None:
    here, there = await start(), await start()
    alice = Seen(await here.join(topic, "alice"))
    await there.join(topic, "bob")
    await alice.until("alice", "bob")
    await there.die()
    await alice.until("alice")
    # Neither does someone who asks later see them.
    carol = Seen(await here.join(topic, "carol"))
    await carol.until("alice", "carol")
    assert await here.presence.online([]) == set()


async def test_a_node_that_stops_takes_its_people_along_at_once(start: Start, topic: str) -> None:
    here, there = await start(ttl=60), await start(ttl=60)
    alice = Seen(await here.join(topic, "alice"))
    await there.join(topic, "bob")
    await alice.until("alice", "bob")
    await there.endpoint.drain(0, 0.1)
    await there.presence.close()
    await alice.until("alice", timeout=3)


async def test_a_node_that_was_only_slow_is_seen_again(start: Start, topic: str) -> None:
    here, there = await start(), await start()
    alice = Seen(await here.join(topic, "alice"))
    await there.join(topic, "bob")
    await alice.until("alice", "bob")
    await there.die()
    await alice.until("alice")
    there._loops = [asyncio.create_task(there.cache.run()), asyncio.create_task(there.presence.run())]
    await alice.until("alice", "bob")


async def test_online(start: Start) -> None:
    here, there = (
        await start(user_topic=lambda user: f"room:{user}"),
        await start(user_topic=lambda user: f"room:{user}"),
    )
    alice, bob, carol = user_id("alice"), user_id("bob"), user_id("carol")
    await here.join(f"room:{alice}", "alice")
    client = await there.join(f"room:{bob}", "bob")
    people = [alice, bob, carol]

    async def online_is(expected: set[Any]) -> None:
        async with asyncio.timeout(5):
            while await here.presence.online(people) != expected:
                await asyncio.sleep(0.02)

    await online_is({alice, bob})
    client.abandon()
    await online_is({alice})
    await there.join(f"room:{carol}", "carol")
    await online_is({alice, carol})
    await there.die()
    await online_is({alice})


async def test_going_offline_is_told_when_the_last_device_went(start: Start, topic: str) -> None:
    gone: list[tuple[str, str, float]] = []
    here, there = (
        await start(on_offline=lambda *offline: gone.append(offline)),
        await start(on_offline=lambda *offline: gone.append(offline)),
    )
    devices = [await node.join(topic, f"alice/{n}") for n, node in enumerate((here, here, there))]
    await until(lambda: len(there.presence.state(topic).get(str(user_id("alice")), {}).get("metas", [])) == 3)
    for device in devices[:2]:
        device.abandon()
    await until(lambda: len(there.presence.state(topic)[str(user_id("alice"))]["metas"]) == 1)
    await asyncio.sleep(3 * INTERVAL)
    assert gone == []
    there.clock.advance(1000)
    devices[2].abandon()
    await until(lambda: gone)
    assert gone == [(topic, str(user_id("alice")), there.clock.time())]


async def test_nothing_is_left_behind(start: Start, topic: str) -> None:
    here, there = await start(), await start()
    clients = [await node.join(topic, f"user{n}") for n, node in enumerate((here, there))]
    await until(lambda: len(here.presence.state(topic)) == 2)
    for client in clients:
        client.abandon()

    def idle(presence: Presence) -> bool:
        return not (presence._topics or presence._held or presence._following)

    await until(lambda: idle(here.presence) and idle(there.presence))
    await until(lambda: here.presence._writer is None and there.presence._writer is None)
    assert await here.cache.client.exists(f"presence:topic:{topic}") == 0


async def test_catching_up_leaves_no_ghosts(start: Start, topic: str) -> None:
    here, there = await start(), await start()
    watcher = Seen(await there.join(topic, "watcher", {"hidden": True}))
    for n in range(15):
        client = await here.join(topic, f"user{n}")
        if n % 2:
            here.presence.flush()
        catching_up = [asyncio.create_task(here.presence._beat(renew=True)) for _ in range(3)]
        client.abandon()
        await until(lambda: not here.presence._held)
        here.presence.flush()
        await asyncio.gather(*catching_up)
    await until(lambda: here.presence._writer is None)
    assert await here.cache.client.exists(f"presence:topic:{topic}") == 0
    await there.presence._beat(renew=True)
    await until(lambda: there.presence.state(topic) == {})
    await watcher.until()


async def test_who_goes_between_catching_up_and_the_next_diff_leaves_no_ghost(
    start: Start, topic: str
) -> None:
    node = await start(interval=60)
    client = await node.join(topic, "alice")
    await node.presence._beat(renew=True)
    assert await node.cache.client.exists(f"presence:topic:{topic}") == 1
    client.abandon()
    await until(lambda: not node.presence._held)
    node.presence.flush()
    await until(lambda: node.presence._writer is None)
    assert await node.cache.client.exists(f"presence:topic:{topic}") == 0


async def test_stored_topics_expire_by_themselves(start: Start, topic: str) -> None:
    node = await start()
    await node.join(topic, "alice")
    key = f"presence:topic:{topic}"
    async with asyncio.timeout(5):
        while not await node.cache.client.exists(key):
            await asyncio.sleep(0.01)
    assert 3000 < await node.cache.client.ttl(key) <= 3600
    await node.cache.client.expire(key, 10)
    await node.presence._beat(renew=True)
    assert await node.cache.client.ttl(key) > 3000


@pytest.fixture
def own_valkey(tmp_path: Path) -> Any:
    server = EmbeddedValkey(tmp_path).start()
    yield server
    server.stop()


async def test_without_valkey_presence_goes_on_within_the_node_and_catches_up(
    start: Start, own_valkey: EmbeddedValkey, topic: str
) -> None:
    here, there = await start(own_valkey.url), await start(own_valkey.url)
    alice = Seen(await here.join(topic, "alice"))
    bob = Seen(await there.join(topic, "bob"))
    await alice.until("alice", "bob")
    await bob.until("alice", "bob")
    own_valkey.stop(0)
    carol = Seen(await here.join(topic, "carol"))
    # The other node's people are taken away once nothing was heard of it for the ttl.
    await alice.until("alice", "carol", timeout=15)
    await carol.until("alice", "carol", timeout=15)
    assert await here.presence.online([user_id("alice")]) == set()
    own_valkey.start()
    for seen in (alice, bob, carol):
        await seen.until("alice", "bob", "carol", timeout=15)


async def test_phoenix_js_agrees(start: Start, topic: str) -> None:
    try:
        async with phoenix_client() as phoenix:
            here, there = await start(), await start()
            phoenix.do(
                "connect", url=f"ws://127.0.0.1:{here.port}/socket", options={"params": {"token": "alice"}}
            )
            phoenix.do("join", topic=topic)
            bob = await there.join(topic, "bob/phone")
            await there.join(topic, "bob/laptop")
            both = {str(user_id("alice")): 1, str(user_id("bob")): 2}
            assert (await phoenix.wait("presence", present=both))["present"] == both
            bob.abandon()
            await phoenix.wait("presence", present={**both, str(user_id("bob")): 1})
    except Unavailable as reason:
        pytest.skip(str(reason))


async def test_under_pressure_diffs_are_left_out_and_the_state_is_told_afterwards(
    start: Start, topic: str
) -> None:
    pressure = Pressure()
    node = await start(pressure=pressure)
    alice = Seen(await node.join(topic, "alice"))
    await alice.until("alice")
    pressure.observe(10.0)
    bob = await node.join(topic, "bob")
    carol = await node.join(topic, "carol")
    carol.abandon()
    await until(lambda: node.presence._outdated and len(node.presence.state(topic)) == 2)
    await alice.nothing()
    pressure._change(False, 0.0)
    event, payload = (await alice.client.next())[3:]
    assert (event, set(payload)) == ("presence_state", {str(user_id("alice")), str(user_id("bob"))})
    alice.apply(event, payload)
    bob.abandon()
    await alice.until("alice")
