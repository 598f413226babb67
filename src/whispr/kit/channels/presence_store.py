"""Where the nodes tell each other who is present: Valkey, and only there.

One hash per topic, a field per entry. A field outlives its node when that dies at once, so entries count only while their
node's own key, renewed all the time, has not expired. Changes are written first and then announced on one pub/sub channel;
whoever reads the hash after hearing of nothing has missed nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import zip_longest
from typing import Any, Final, TypeVar

import msgspec

from whispr.kit.cache import Cache

CHANNEL: Final = "presence:changes"

_HASH_TTL: Final = 3600
"""Seconds a topic's hash lives without being renewed: what a whole cluster left behind goes by itself."""

_CHUNK: Final = 500

T = TypeVar("T")


class Entry(msgspec.Struct, array_like=True, gc=False, frozen=True):
    """One presence. `ref` is "node.number" and unique; `meta` is JSON text of an object with `phx_ref` in it."""

    topic: str
    key: str
    ref: str
    meta: msgspec.Raw

    @property
    def node(self) -> str:
        """The node whose client this is."""
        return self.ref.partition(".")[0]


class Changes(msgspec.Struct, array_like=True):
    """What changed on one node."""

    node: str
    joins: list[Entry]
    leaves: list[Entry]


class _Stored(msgspec.Struct, array_like=True):
    key: str
    meta: msgspec.Raw


_changes: Final = msgspec.json.Decoder(Changes)
_stored: Final = msgspec.json.Decoder(_Stored)


def _hash(topic: str) -> str:
    return f"presence:topic:{topic}"


def _node(node: str) -> str:
    return f"presence:node:{node}"


def _chunks(items: Sequence[T]) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), _CHUNK):
        yield items[start : start + _CHUNK]


class PresenceStore:
    """This node's door to the others. Every coroutine raises members of `kit.cache.LOST_CACHE` when Valkey is away."""

    def __init__(self, cache: Cache, node: str, ttl: float) -> None:
        self._cache = cache
        self._node = node
        self._ttl = ttl

    def listen(self, handler: Callable[[Changes], None]) -> Callable[[], None]:
        """Call `handler` with the changes of other nodes. Returns what ends it."""

        def receive(message: bytes) -> None:
            changes = _changes.decode(message)
            if changes.node != self._node:
                handler(changes)

        self._cache.subscribe(CHANNEL, receive)
        return lambda: self._cache.unsubscribe(CHANNEL, receive)

    @property
    def listening(self) -> bool:
        """Whether changes of other nodes reach us now."""
        return CHANNEL in self._cache.subscribed

    async def beat(self) -> bool:
        """Say that this node lives. False when the others may have thought otherwise since the last time."""
        previous = await self._cache.client.set(_node(self._node), b"1", px=int(self._ttl * 1000), get=True)
        return previous is not None

    async def dead(self, nodes: Iterable[str]) -> set[str]:
        """Those of `nodes` that have not said for `ttl` seconds that they live."""
        asked = list(nodes)
        found: list[object] = []
        for chunk in _chunks(asked):
            found += await self._cache.client.mget([_node(node) for node in chunk])
        return {node for node, value in zip(asked, found, strict=True) if value is None}

    async def write(self, joins: Sequence[Entry], leaves: Sequence[Entry]) -> None:
        """Store changes of this node and announce them. Doing it twice does no harm."""
        for joined, left in zip_longest(_chunks(joins), _chunks(leaves), fillvalue=()):
            await self._apply(joined, left)

    async def _apply(self, joins: Sequence[Entry], leaves: Sequence[Entry]) -> None:
        pipeline = self._cache.client.pipeline(transaction=False)
        for entry in joins:
            pipeline.hset(_hash(entry.topic), entry.ref, msgspec.json.encode(_Stored(entry.key, entry.meta)))
        for topic in {entry.topic for entry in joins}:
            pipeline.expire(_hash(topic), _HASH_TTL)
        for entry in leaves:
            pipeline.hdel(_hash(entry.topic), entry.ref)
        pipeline.publish(CHANNEL, msgspec.json.encode(Changes(self._node, list(joins), list(leaves))))
        await pipeline.execute()

    async def renew(self, topics: Sequence[str]) -> None:
        """Keep the hashes of `topics` from expiring."""
        for chunk in _chunks(topics):
            pipeline = self._cache.client.pipeline(transaction=False)
            for topic in chunk:
                pipeline.expire(_hash(topic), _HASH_TTL)
            await pipeline.execute()

    async def load(self, topics: Sequence[str]) -> dict[str, list[Entry]]:
        """The entries of living nodes, this one's left out, for each of `topics`."""
        loaded: dict[str, list[Entry]] = {}
        for chunk in _chunks(topics):
            hashes = await self._read(chunk, "HGETALL")
            for topic, fields in zip(chunk, hashes, strict=True):
                loaded[topic] = [
                    Entry(topic, stored.key, ref.decode(), stored.meta)
                    for ref, stored in ((ref, _stored.decode(value)) for ref, value in fields.items())
                ]
        dead = await self.dead(
            {entry.node for entries in loaded.values() for entry in entries} - {self._node}
        )
        gone = dead | {self._node}
        return {
            topic: [entry for entry in entries if entry.node not in gone] for topic, entries in loaded.items()
        }

    async def occupied(self, topics: Sequence[str]) -> set[str]:
        """Those of `topics` that have an entry of a living node."""
        nodes: dict[str, set[str]] = {}
        for chunk in _chunks(topics):
            hashes = await self._read(chunk, "HKEYS")
            for topic, refs in zip(chunk, hashes, strict=True):
                nodes[topic] = {ref.decode().partition(".")[0] for ref in refs}
        dead = await self.dead(set().union(*nodes.values()))
        return {topic for topic, living in nodes.items() if living - dead}

    async def _read(self, topics: Sequence[str], command: str) -> list[Any]:
        pipeline = self._cache.client.pipeline(transaction=False)
        for topic in topics:
            pipeline.execute_command(command, _hash(topic))
        answers: list[Any] = await pipeline.execute()
        return answers

    async def leave(self, entries: Sequence[Entry]) -> None:
        """Remove this node and its entries."""
        await self.write((), entries)
        await self._cache.client.delete(_node(self._node))
