"""Who is present on a topic, in Phoenix's terms: `presence_state` once, then `presence_diff`s.

Present are *entries*: a key (whom clients see) with a meta (from where), held by a channel of some node. Channels *follow*
topics, their own or others, and are told what changes there, at most once per `interval` and at most about `cap` keys: presence
grows with the square of a group's size, and alone can outweigh every message.

The entries of this node live in memory and are shared through Valkey. Without Valkey presence goes on within the node; when it
is back the nodes catch up.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any
from uuid import UUID

import msgspec

from whispr.kit.batching import Batcher
from whispr.kit.cache import LOST_CACHE, Cache
from whispr.kit.channels.channel import Channel
from whispr.kit.channels.presence_store import Changes, Entry, PresenceStore
from whispr.kit.clock import Clock
from whispr.kit.pressure import Pressure
from whispr.kit.telemetry import get_logger

if TYPE_CHECKING:
    from whispr.kit.identity import Caller

log = get_logger(__name__)

_RENEW_BEATS = 60
"""Heartbeats between two renewals of the stored topics."""

_STATES_AT_ONCE = 50
_STATES_PAUSE = 0.05

Groups = dict[str, list[msgspec.Raw]]
"""Metas by key."""


_Changes = list[tuple[bool, Entry]]
"""Entries that joined (true) or left (false), in order."""


class _Topic:
    """What is known of a topic. Entries of other nodes are known only while someone here follows it."""

    __slots__ = ("entries", "followers", "known", "readings")

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}
        self.followers: set[Channel] = set()
        self.known = False
        # For each reading of the topic under way, the changes that have come since it began: what is read may be older.
        self.readings: list[_Changes] = []

    def keys(self) -> set[str]:
        return {entry.key for entry in self.entries.values()}


class _Diff:
    __slots__ = ("joins", "leaves")

    def __init__(self) -> None:
        self.joins: dict[str, Entry] = {}
        self.leaves: dict[str, Entry] = {}

    def join(self, entry: Entry) -> None:
        self.joins[entry.ref] = entry

    def leave(self, entry: Entry) -> None:
        # Someone who came and went within one interval was never there.
        if self.joins.pop(entry.ref, None) is None:
            self.leaves[entry.ref] = entry


def _group(entries: Iterable[Entry]) -> Groups:
    groups: Groups = {}
    for entry in entries:
        groups.setdefault(entry.key, []).append(entry.meta)
    return groups


def _render(groups: Groups) -> dict[str, dict[str, list[msgspec.Raw]]]:
    return {key: {"metas": metas} for key, metas in groups.items()}


def _user_topic(user_id: UUID) -> str:
    return f"user:{user_id}"


class Presence:
    """Presence of one process.

    `ttl`: seconds after which a node that died no longer counts. `interval`: seconds between two diffs. `cap`: keys per topic, and
    topics per follower. `visible(viewer, key)`: whether a person may see a key; it is asked often and must answer from memory.
    `on_offline(topic, key, at)`: no entry of `key` is left on `topic` on any node, `at` in epoch seconds.
    With `pressure` high, followers hear of nothing; they get the present state when it is over.
    """

    def __init__(
        self,
        cache: Cache,
        clock: Clock,
        *,
        node_id: str | None = None,
        ttl: float = 45.0,
        interval: float = 0.5,
        cap: int = 100,
        visible: Callable[[Caller, str], bool] | None = None,
        on_offline: Callable[[str, str, float], None] | None = None,
        user_topic: Callable[[UUID], str] = _user_topic,
        pressure: Pressure | None = None,
    ) -> None:
        self._pressure = pressure
        # Followers that were told nothing of some change.
        self._outdated: set[Channel] = set()
        self._catching_up: asyncio.Task[None] | None = None
        if pressure is not None:
            pressure.on_calm(self._catch_up)
        # A restarted process must not be taken for the one before it, whose entries it does not hold.
        self.node = f"{(node_id or 'node').replace('.', '-')}-{secrets.token_hex(4)}"
        self._store = PresenceStore(cache, self.node, ttl)
        self._stop_listening = self._store.listen(self._hear)
        self._loads = Batcher(self._load_together, largest=500)
        self._occupied = Batcher(self._occupied_together, largest=500)
        self._clock = clock
        self._ttl = ttl
        self._interval = interval
        self._cap = cap
        self._visible = visible
        self._on_offline = on_offline
        self._user_topic = user_topic
        self._numbers = 0
        self._topics: dict[str, _Topic] = {}
        self._held: dict[Channel, list[Entry]] = {}
        self._following: dict[Channel, tuple[str, ...]] = {}
        self._starting: set[Channel] = set()
        self._dirty: dict[str, _Diff] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._unwritten: list[_Diff] = []
        self._writer: asyncio.Task[None] | None = None
        self._nodes: set[str] = set()
        # Until the subscription stands, changes of other nodes go unheard.
        self._behind = True
        self._wake = asyncio.Event()
        cache.on_reconnect(self._fell_behind)

    # Being present.

    def track(self, topic: str, key: str, channel: Channel, meta: dict[str, Any]) -> bool:
        """Make `key` present on `topic` for as long as `channel` lives or until `untrack`.

        False, and nothing happens, when `cap` other keys are there already.
        """
        record = self._topics.get(topic)
        if channel.closed:
            return False
        if record is not None and len(record.entries) >= self._cap:
            keys = record.keys()
            if key not in keys and len(keys) >= self._cap:
                return False
        self._enter(self._entry(topic, key, meta), channel)
        return True

    def update(self, topic: str, channel: Channel, meta: dict[str, Any]) -> None:
        """Replace the meta of what `channel` tracks on `topic`."""
        for old in [entry for entry in self._held.get(channel, ()) if entry.topic == topic]:
            self._held[channel].remove(old)
            self._remove(old)
            self._enter(self._entry(topic, old.key, {**meta, "phx_ref_prev": old.ref}), channel)

    def untrack(self, channel: Channel) -> None:
        """End everything `channel` tracks."""
        for entry in self._held.pop(channel, ()):
            self._remove(entry)

    def _entry(self, topic: str, key: str, meta: dict[str, Any]) -> Entry:
        self._numbers += 1
        ref = f"{self.node}.{self._numbers}"
        return Entry(topic, key, ref, msgspec.Raw(msgspec.json.encode({**meta, "phx_ref": ref})))

    def _enter(self, entry: Entry, channel: Channel) -> None:
        self._held.setdefault(channel, []).append(entry)
        self._topics.setdefault(entry.topic, _Topic()).entries[entry.ref] = entry
        self._dirty.setdefault(entry.topic, _Diff()).join(entry)
        self._schedule()

    def _remove(self, entry: Entry) -> None:
        record = self._topics[entry.topic]
        del record.entries[entry.ref]
        self._dirty.setdefault(entry.topic, _Diff()).leave(entry)
        self._schedule()
        self._tidy(entry.topic)

    # Seeing who is present.

    async def follow(self, channel: Channel, topics: Iterable[str]) -> None:
        """Push `presence_state` of all `topics` together on `channel`, then diffs until `unfollow`.

        Following again replaces what was followed. Only the first `cap` topics are taken.
        """
        self.unfollow(channel)
        names = tuple(dict.fromkeys(topics))[: self._cap]
        if channel.closed:
            return
        self._following[channel] = names
        self._starting.add(channel)
        for name in names:
            self._topics.setdefault(name, _Topic()).followers.add(channel)
        await self._learn([name for name in names if not self._topics[name].known])
        if self._following.get(channel) is not names:
            return
        self._starting.discard(channel)
        self._push_state(channel)

    def _push_state(self, channel: Channel) -> None:
        self._outdated.discard(channel)
        names = self._following[channel]
        entries = [entry for name in names for entry in self._seen(self._topics[name])]
        channel.push("presence_state", _render(self._allowed(channel, _group(entries))))

    def unfollow(self, channel: Channel) -> None:
        """Stop telling `channel` of presence."""
        self._starting.discard(channel)
        self._outdated.discard(channel)
        for name in self._following.pop(channel, ()):
            record = self._topics[name]
            record.followers.discard(channel)
            if not record.followers:
                record.known = False
                record.entries = {
                    ref: entry for ref, entry in record.entries.items() if entry.node == self.node
                }
            self._tidy(name)

    def state(self, topic: str) -> dict[str, dict[str, list[dict[str, Any]]]]:
        """Who is on `topic`, as clients get it: on all nodes if someone here follows it, else on this one."""
        record = self._topics.get(topic)
        groups = _group(record.entries.values()) if record is not None else {}
        return {
            key: {"metas": [msgspec.json.decode(meta) for meta in metas]} for key, metas in groups.items()
        }

    async def online(self, user_ids: Iterable[UUID]) -> set[UUID]:
        """Those of `user_ids` who are present on their own topic on any node; on this one only while Valkey is away."""
        topics = {self._user_topic(user_id): user_id for user_id in user_ids}
        here = {topic for topic in topics if (record := self._topics.get(topic)) and record.entries}
        unknown = [topic for topic in topics if topic not in here]
        elsewhere: set[str] = set()
        try:
            if unknown:
                elsewhere = await self._occupied.ask(unknown)
        except LOST_CACHE:
            log.warning("presence_store_lost", during="online")
        return {topics[topic] for topic in here | elsewhere}

    def _seen(self, record: _Topic) -> Iterable[Entry]:
        """The entries followers know of: what waits for the next diff is left to that."""
        for entry in record.entries.values():
            diff = self._dirty.get(entry.topic)
            if diff is None or entry.ref not in diff.joins:
                yield entry

    def _allowed(self, channel: Channel, groups: Groups) -> Groups:
        if self._visible is None:
            return groups
        viewer = channel.socket.caller
        return {key: metas for key, metas in groups.items() if self._visible(viewer, key)}

    # Telling followers.

    def _schedule(self) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._interval, self.flush)

    def flush(self) -> None:
        """Tell followers and other nodes what changed. Called by a timer."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        dirty, self._dirty = self._dirty, {}
        if not dirty:
            return
        self._tell(dirty)
        for topic in dirty:
            self._tidy(topic)
        self._start_writing(dirty.values())

    def _tell(self, diffs: dict[str, _Diff]) -> None:
        news: dict[Channel, list[_Diff]] = {}
        for topic, diff in diffs.items():
            record = self._topics.get(topic)
            if record is not None and (diff.joins or diff.leaves):
                for channel in record.followers - self._starting - self._outdated:
                    news.setdefault(channel, []).append(diff)
        if news and self._pressure is not None and self._pressure.shed("presence", len(news)):
            self._outdated |= news.keys()
            return
        for channel, parts in news.items():
            joins = self._allowed(channel, _group(entry for part in parts for entry in part.joins.values()))
            leaves = self._allowed(channel, _group(entry for part in parts for entry in part.leaves.values()))
            if joins or leaves:
                channel.push("presence_diff", {"joins": _render(joins), "leaves": _render(leaves)})

    def _catch_up(self) -> None:
        if self._outdated and self._catching_up is None:
            self._catching_up = asyncio.get_running_loop().create_task(self._push_states())

    async def _push_states(self) -> None:
        """Give outdated followers the present state, some at a time: all at once would be the next pressure."""
        try:
            while self._outdated and self._pressure is not None and not self._pressure.high:
                for channel in list(self._outdated)[:_STATES_AT_ONCE]:
                    self._push_state(channel)
                await asyncio.sleep(_STATES_PAUSE)
        finally:
            self._catching_up = None

    def _tidy(self, topic: str) -> None:
        record = self._topics.get(topic)
        if record is not None and not record.entries and not record.followers and topic not in self._dirty:
            del self._topics[topic]

    # Other nodes.

    async def run(self) -> None:
        """The supervised loop: says that this node lives, notices nodes that died, catches up after a loss of Valkey."""
        beats = 0
        last_success = asyncio.get_running_loop().time()
        while True:
            try:
                await self._beat(renew=beats % _RENEW_BEATS == _RENEW_BEATS - 1)
                beats += 1
                last_success = asyncio.get_running_loop().time()
            except LOST_CACHE as error:
                self._behind = True
                log.warning("presence_store_lost", during="heartbeat", error=type(error).__name__)
                if asyncio.get_running_loop().time() - last_success > self._ttl:
                    self._lose(self._nodes)
            self._wake.clear()
            try:
                async with asyncio.timeout(self._ttl / 3):
                    await self._wake.wait()
            except TimeoutError:
                pass

    async def _beat(self, *, renew: bool) -> None:
        alive = await self._store.beat()
        if renew:
            await self._store.renew(list({entry.topic for held in self._held.values() for entry in held}))
        if renew or self._behind or not alive:
            self._behind = not self._store.listening
            await self._write_all()
            await self._learn([topic for topic, record in self._topics.items() if record.followers])
        self._lose(await self._store.dead(self._nodes))

    def _fell_behind(self) -> None:
        self._behind = True
        self._wake.set()

    def _lose(self, nodes: set[str]) -> None:
        """Take away the entries of nodes that died."""
        if not nodes:
            return
        diffs: dict[str, _Diff] = {}
        for topic, record in self._topics.items():
            for entry in [entry for entry in record.entries.values() if entry.node in nodes]:
                del record.entries[entry.ref]
                diffs.setdefault(topic, _Diff()).leave(entry)
        self._nodes = self._nodes - nodes
        self._tell(diffs)

    async def _learn(self, topics: list[str]) -> None:
        """Read what other nodes have on `topics`. Without Valkey they stay unknown until it is back."""
        readings: dict[str, tuple[_Topic, _Changes]] = {}
        for topic in topics:
            record, since = self._topics[topic], _Changes()
            record.readings.append(since)
            readings[topic] = record, since
        loaded: dict[str, list[Entry]] = {}
        try:
            loaded = await self._loads.ask(topics) if topics else {}
        except LOST_CACHE as error:
            self._behind = True
            log.warning("presence_store_lost", during="load", error=type(error).__name__)
        finally:
            for record, since in readings.values():
                record.readings = [other for other in record.readings if other is not since]
        diffs: dict[str, _Diff] = {}
        for topic, entries in loaded.items():
            record, since = readings[topic]
            if record.followers:
                record.known = True
                self._settle(record, entries, since, diffs.setdefault(topic, _Diff()))
        self._tell(diffs)

    async def _load_together(self, asked: list[list[str]]) -> list[dict[str, list[Entry]]]:
        loaded = await self._store.load(list({topic for topics in asked for topic in topics}))
        return [{topic: loaded[topic] for topic in topics} for topics in asked]

    async def _occupied_together(self, asked: list[list[str]]) -> list[set[str]]:
        occupied = await self._store.occupied(list({topic for topics in asked for topic in topics}))
        return [occupied.intersection(topics) for topics in asked]

    def _settle(self, record: _Topic, entries: list[Entry], since: _Changes, diff: _Diff) -> None:
        """Make `record` what was read, and what has changed since."""
        others = {entry.ref: entry for entry in entries}
        for joined, entry in since:
            if joined:
                others[entry.ref] = entry
            else:
                others.pop(entry.ref, None)
        for known in list(record.entries.values()):
            if known.node != self.node and known.ref not in others:
                self._change(record, False, known, diff)
        for entry in others.values():
            self._change(record, True, entry, diff)

    def _change(self, record: _Topic, joined: bool, entry: Entry, diff: _Diff) -> None:
        if joined and entry.ref not in record.entries:
            record.entries[entry.ref] = entry
            self._nodes.add(entry.node)
            diff.join(entry)
        elif not joined and record.entries.pop(entry.ref, None) is not None:
            diff.leave(entry)

    def _hear(self, changes: Changes) -> None:
        diffs: dict[str, _Diff] = {}
        for joined, entries in ((False, changes.leaves), (True, changes.joins)):
            for entry in entries:
                record = self._topics.get(entry.topic)
                if record is None or not record.followers:
                    continue
                for since in record.readings:
                    since.append((joined, entry))
                self._change(record, joined, entry, diffs.setdefault(entry.topic, _Diff()))
        self._tell(diffs)

    def _start_writing(self, diffs: Iterable[_Diff]) -> asyncio.Task[None]:
        # Everything goes through one writer: an entry that is written while another task removes it would stay for good.
        self._unwritten += diffs
        if self._writer is None:
            self._writer = asyncio.get_running_loop().create_task(self._write())
        return self._writer

    async def _write_all(self) -> None:
        """Store and announce everything this node holds, known to the others or not."""
        # Else who is written here and goes before the next flush would count as never written.
        self.flush()
        everything = _Diff()
        for held in self._held.values():
            for entry in held:
                everything.join(entry)
        await asyncio.wait([self._start_writing([everything])])

    async def _write(self) -> None:
        """Store what changed, one batch after the other. What cannot be stored is caught up with later."""
        try:
            while self._unwritten:
                diffs, self._unwritten = self._unwritten, []
                leaves = {ref: entry for diff in diffs for ref, entry in diff.leaves.items()}
                joins = {
                    ref: entry for diff in diffs for ref, entry in diff.joins.items() if ref not in leaves
                }
                try:
                    await self._store.write(list(joins.values()), list(leaves.values()))
                except LOST_CACHE as error:
                    self._behind = True
                    log.warning("presence_store_lost", during="write", error=type(error).__name__)
                await self._tell_offline(list(leaves.values()))
        finally:
            self._writer = None

    async def _tell_offline(self, leaves: list[Entry]) -> None:
        if self._on_offline is None:
            return
        gone = {(entry.topic, entry.key) for entry in leaves}
        gone -= {(topic, key) for topic, key in gone if self._is_here(topic, key)}
        if not gone:
            return
        elsewhere: dict[str, list[Entry]] = {}
        try:
            elsewhere = await self._store.load(list({topic for topic, _ in gone}))
        except LOST_CACHE:
            log.warning("presence_store_lost", during="offline")
        for topic, key in gone:
            if all(entry.key != key for entry in elsewhere.get(topic, ())):
                self._on_offline(topic, key, self._clock.time())

    def _is_here(self, topic: str, key: str) -> bool:
        record = self._topics.get(topic)
        return record is not None and any(
            entry.key == key and entry.node == self.node for entry in record.entries.values()
        )

    async def close(self) -> None:
        """Take this node's entries away at once instead of after `ttl`. Call it when the sockets are gone."""
        self._stop_listening()
        if self._catching_up is not None:
            self._catching_up.cancel()
        self.flush()
        if self._writer is not None:
            await asyncio.gather(self._writer, return_exceptions=True)
        entries = [entry for held in self._held.values() for entry in held]
        self._held.clear()
        try:
            await self._store.leave(entries)
        except LOST_CACHE:
            log.warning("presence_store_lost", during="close")
