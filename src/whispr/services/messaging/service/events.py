"""From a commit to the sockets of every node, each event once and in order, whatever is lost on the way.

Valkey carries hints. A node keeps, for each conversation it serves, the number of the last event it delivered: what it has
is dropped, what is ahead waits, and a hole is read from PostgreSQL. Heads are compared with PostgreSQL every few seconds
and whenever hints may have been missed, so that a loss is a delay and never a hole.

A node that is alone publishes nothing: its own echo would cost it more than the rest of the delivery.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any, Final, Protocol
from uuid import UUID

import msgspec

from whispr.kit.cache import LOST_CACHE, Cache
from whispr.kit.errors import Failure
from whispr.kit.ids import id_of
from whispr.kit.telemetry import get_logger
from whispr.services.messaging.models import CommittedEvent
from whispr.services.messaging.service.packing import (
    Notice,
    PackedBatch,
    PackedHint,
    decode_batch,
    decode_notice,
    encode_batch,
    pack,
    unpack,
)

log = get_logger(__name__)

SHARDS: Final = 64
NOTICES: Final = "user:notices"
NODES: Final = "messaging:nodes"
"""Every node listens here and says hello when it begins to."""

COMPARE_SECONDS: Final = 10.0
SURVEY_SECONDS: Final = 1.0

# Events of two nodes cross on the way. Only a hole that stays is worth a query.
HOLE_SECONDS: Final = 0.03

_RETRY_SECONDS: Final = 0.5
_COMPARE_CHUNK: Final = 1_000
_FILL_PAGE: Final = 200
_MAX_FILLS: Final = 3
_MAX_HELD: Final = 1_000
_NODE_BYTES: Final = 8

# Not edits and reactions: a busy group would have its members read anew with every one of them.
_STRUCTURAL: Final = frozenset(
    {"member_added", "member_removed", "member_updated", "conversation_updated", "history_purged"}
)

Sink = Callable[[UUID, list[CommittedEvent]], None]
HintSink = Callable[[UUID, str, bytes], None]
NoticeSink = Callable[[UUID, UUID | None, str, msgspec.Raw], None]


class Log(Protocol):
    """The truth: the conversations' logs in PostgreSQL."""

    async def log(
        self, conversation_id: UUID, after_seq: int, until_seq: int, limit: int
    ) -> list[CommittedEvent]:
        """Events with `after_seq < seq <= until_seq`, the first `limit` of them."""

    async def heads(self, conversation_ids: list[UUID]) -> dict[UUID, int]:
        """The newest `seq` of each conversation."""


class _Feed:
    """A served conversation. `head`: the last event delivered, None until the first join has read it. `known`: the newest
    one heard of."""

    __slots__ = ("filling", "head", "held", "known", "timer")

    def __init__(self) -> None:
        self.head: int | None = None
        self.known = 0
        self.held: dict[int, CommittedEvent] = {}
        self.timer: asyncio.TimerHandle | None = None
        self.filling = False


class EventBus:
    """`run()` is the supervised loop. The sinks are called on the event loop and must not block."""

    def __init__(self, cache: Cache, log_reader: Log) -> None:
        self._cache = cache
        self._log = log_reader
        self._node = secrets.token_bytes(_NODE_BYTES)
        self._feeds: dict[UUID, _Feed] = {}
        self._shards: dict[int, int] = {}
        self._unproven: set[int] = set()
        self._outgoing: dict[int, PackedBatch] = {}
        self._notices: list[bytes] = []
        self._is_sending = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._fills = asyncio.Semaphore(_MAX_FILLS)
        self._alone = False
        self._hellos = 0
        self._compare_now = asyncio.Event()
        self._all_suspect = False
        self._sinks: list[Sink] = []
        self._structure_sinks: list[Callable[[UUID], None]] = []
        self._hint_sinks: list[HintSink] = []
        self._notice_sinks: list[NoticeSink] = []

    def start(self) -> None:
        """Listen for notices, for other nodes, and for losses of Valkey."""
        self._cache.subscribe(NOTICES, self._hear_notice)
        self._cache.subscribe(NODES, self._hear_node)
        self._cache.on_reconnect(self.suspect)
        self._cache.on_reconnect(self._arrive)
        self._arrive()

    def on_events(self, sink: Sink) -> None:
        """Call `sink` with the next events of a served conversation: dense, in order, each once."""
        self._sinks.append(sink)

    def on_structure(self, sink: Callable[[UUID], None]) -> None:
        """Call `sink` before an event is delivered that tells of other members, another state or another floor."""
        self._structure_sinks.append(sink)

    def on_hint(self, sink: HintSink) -> None:
        """Call `sink` with (conversation, kind, body) of other nodes' hints about served conversations."""
        self._hint_sinks.append(sink)

    def on_notice(self, sink: NoticeSink) -> None:
        """Call `sink` with (user, device or None for all, event, payload) of notices from here and everywhere."""
        self._notice_sinks.append(sink)

    # Serving conversations.

    def serve(self, conversation_id: UUID) -> None:
        """Deliver the conversation here from now on. Events are held until `settle` says where it begins."""
        if conversation_id in self._feeds:
            return
        self._feeds[conversation_id] = _Feed()
        shard = conversation_id.int % SHARDS
        count = self._shards.get(shard)
        self._shards[shard] = (count or 0) + 1
        if count is None:
            # Hints of the moment before the subscription stands are missed.
            self._unproven.add(shard)
            self._cache.subscribe(_channel(shard), self._hear)
            self._compare_now.set()

    def settle(self, conversation_id: UUID, head: int) -> None:
        """Events up to `head` have been read by the first join; deliver what comes after. Later calls do nothing."""
        feed = self._feeds.get(conversation_id)
        if feed is None or feed.head is not None:
            return
        feed.head = head
        held = [feed.held.pop(seq) for seq in sorted(feed.held)]
        self._advance(conversation_id, feed, held)

    def release(self, conversation_id: UUID) -> None:
        """Nobody here listens to the conversation any more."""
        feed = self._feeds.pop(conversation_id, None)
        if feed is None:
            return
        if feed.timer is not None:
            feed.timer.cancel()
        # The subscription is left later, by `run`: a client that reconnects would only make it anew.
        self._shards[conversation_id.int % SHARDS] -= 1

    # Telling.

    def publish(self, events: Sequence[CommittedEvent]) -> None:
        """Deliver committed events here and tell the other nodes. Sync, never fails."""
        by_conversation: dict[UUID, list[CommittedEvent]] = {}
        for event in events:
            by_conversation.setdefault(event.conversation_id, []).append(event)
        for conversation_id, group in by_conversation.items():
            self._take(conversation_id, group)
            if not self._alone:
                batch = self._batch(conversation_id)
                batch.events += map(pack, group)
        if self._outgoing:
            self._send()

    def hint(self, conversation_id: UUID, kind: str, body: bytes) -> None:
        """Tell the other nodes something about a conversation that may be lost."""
        if not self._alone:
            self._batch(conversation_id).hints.append(PackedHint(conversation_id.bytes, kind, body))
            self._send()

    def notice(
        self, user_ids: Sequence[UUID], event: str, payload: Any, *, device_id: UUID | None = None
    ) -> None:
        """Push `event` on people's own channels, on every node. Sync, never fails; not durable."""
        raw = payload if isinstance(payload, msgspec.Raw) else msgspec.Raw(msgspec.json.encode(payload))
        for user_id in user_ids:
            self._deliver_notice(user_id, device_id, event, raw)
        if user_ids and not self._alone:
            notice = Notice(
                event=event, payload=raw, user_ids=list(user_ids), device_id=device_id, node=self._node.hex()
            )
            self._notices.append(msgspec.json.encode(notice))
            self._send()

    def suspect(self) -> None:
        """Hints may have been missed: compare every served conversation with PostgreSQL soon."""
        self._all_suspect = True
        self._compare_now.set()

    async def run(self) -> None:
        """Compare heads and look for other nodes, for ever."""
        async with asyncio.TaskGroup() as loops:
            loops.create_task(self._run_compares())
            loops.create_task(self._run_surveys())

    async def _run_compares(self) -> None:
        """All heads every `COMPARE_SECONDS`, some sooner when there is a reason."""
        loop = asyncio.get_running_loop()
        due = loop.time() + COMPARE_SECONDS
        while True:
            try:
                async with asyncio.timeout_at(due):
                    await self._compare_now.wait()
            except TimeoutError:
                self._all_suspect = True
            self._compare_now.clear()
            if self._all_suspect:
                self._leave_idle_shards()
                due = loop.time() + COMPARE_SECONDS
            try:
                await self._compare()
            except Failure as failure:
                log.warning("compare_failed", code=failure.code)
                loop.call_later(_RETRY_SECONDS, self._compare_now.set)

    async def close(self) -> None:
        """Send what waits to be sent."""
        self._send_waiting()
        for task in tuple(self._tasks):
            task.cancel()

    # Other nodes.

    def _arrive(self) -> None:
        """Be heard of by the other nodes, and look again at what they did before they knew."""
        self._alone = False
        self._hold(self._say_hello())

    async def _say_hello(self) -> None:
        while NODES not in self._cache.subscribed:  # noqa: ASYNC110 (the cache tells nobody)
            await asyncio.sleep(_RETRY_SECONDS / 10)
        try:
            await self._cache.publish(NODES, self._node)
        except Failure as failure:
            log.warning("hello_lost", code=failure.code)
        # Those who missed the hello find us in their next survey.
        await asyncio.sleep(SURVEY_SECONDS * 1.5)
        self.suspect()

    def _hear_node(self, node: bytes) -> None:
        if node != self._node:
            self._hellos += 1
            self._alone = False

    async def _run_surveys(self) -> None:
        while True:
            await asyncio.sleep(SURVEY_SECONDS)
            hellos = self._hellos
            try:
                ((_, listeners),) = await self._cache.client.pubsub_numsub(NODES)
            except LOST_CACHE:
                self._alone = False
                continue
            # A hello during the question may be newer than its answer.
            self._alone = listeners == 1 and NODES in self._cache.subscribed and hellos == self._hellos

    # Taking events in.

    def _take(self, conversation_id: UUID, events: Sequence[CommittedEvent]) -> None:
        for event in events:
            if event.event in _STRUCTURAL:
                for sink in self._structure_sinks:
                    sink(conversation_id)
                break
        feed = self._feeds.get(conversation_id)
        if feed is not None:
            self._advance(conversation_id, feed, events)

    def _advance(self, conversation_id: UUID, feed: _Feed, events: Iterable[CommittedEvent]) -> None:
        """Deliver what comes next, hold what is ahead, drop what is past."""
        held = feed.held
        ready: list[CommittedEvent] = []
        head = feed.head
        for event in events:
            seq = event.seq
            if head is not None and seq == head + 1:
                ready.append(event)
                head = seq
            elif head is None or seq > head:
                feed.known = max(feed.known, seq)
                if len(held) < _MAX_HELD:
                    held[seq] = event
        if head is None:
            return
        while held and (following := held.pop(head + 1, None)) is not None:
            ready.append(following)
            head += 1
        feed.head = head
        feed.known = max(feed.known, head)
        if feed.known > head:
            self._watch_hole(conversation_id, feed)
        for sink in self._sinks if ready else ():
            try:
                sink(conversation_id, ready)
            except Exception:
                log.exception("event_sink_failed")

    def _watch_hole(self, conversation_id: UUID, feed: _Feed) -> None:
        head = feed.head or 0
        for seq in [seq for seq in feed.held if seq <= head]:
            del feed.held[seq]
        if feed.timer is None and not feed.filling:
            loop = asyncio.get_running_loop()
            feed.timer = loop.call_later(HOLE_SECONDS, self._start_fill, conversation_id, feed)

    def _start_fill(self, conversation_id: UUID, feed: _Feed) -> None:
        feed.timer = None
        if feed.head is not None and feed.known > feed.head and not feed.filling:
            feed.filling = True
            self._hold(self._fill(conversation_id, feed))

    async def _fill(self, conversation_id: UUID, feed: _Feed) -> None:
        """Read the hole, and whatever else came meanwhile, from PostgreSQL."""
        try:
            async with self._fills:
                while (
                    self._feeds.get(conversation_id) is feed
                    and feed.head is not None
                    and feed.known > feed.head
                ):
                    until = feed.known
                    events = await self._log.log(conversation_id, feed.head, until, _FILL_PAGE)
                    if not events:
                        log.error("log_has_a_hole", after=feed.head, until=until)
                        feed.known = feed.head
                        return
                    # What was purged before this node heard of it is nobody's to see any more.
                    feed.head = max(feed.head, events[0].seq - 1)
                    self._advance(conversation_id, feed, events)
        except Failure as failure:
            log.warning("fill_failed", code=failure.code)
            asyncio.get_running_loop().call_later(_RETRY_SECONDS, self.suspect)
        finally:
            feed.filling = False

    # Comparing with PostgreSQL.

    async def _compare(self) -> None:
        everything, self._all_suspect = self._all_suspect, False
        standing = {shard for shard in self._unproven if _channel(shard) in self._cache.subscribed}
        if not everything and not standing:
            if self._unproven:
                asyncio.get_running_loop().call_later(0.05, self._compare_now.set)
            return
        self._unproven -= standing
        suspects = [
            conversation_id
            for conversation_id, feed in self._feeds.items()
            if feed.head is not None and (everything or conversation_id.int % SHARDS in standing)
        ]
        try:
            for start in range(0, len(suspects), _COMPARE_CHUNK):
                heads = await self._log.heads(suspects[start : start + _COMPARE_CHUNK])
                for conversation_id, head in heads.items():
                    feed = self._feeds.get(conversation_id)
                    if feed is not None and feed.head is not None and head > feed.head:
                        feed.known = max(feed.known, head)
                        self._start_fill(conversation_id, feed)
        except Failure:
            self._all_suspect = True
            raise
        if self._unproven:
            asyncio.get_running_loop().call_later(0.05, self._compare_now.set)

    def _leave_idle_shards(self) -> None:
        for shard in [shard for shard, count in self._shards.items() if count == 0]:
            del self._shards[shard]
            self._unproven.discard(shard)
            self._cache.unsubscribe(_channel(shard), self._hear)

    # Between nodes.

    def _batch(self, conversation_id: UUID) -> PackedBatch:
        shard = conversation_id.int % SHARDS
        batch = self._outgoing.get(shard)
        if batch is None:
            batch = self._outgoing[shard] = PackedBatch([], [])
        return batch

    def _send(self) -> None:
        if not self._is_sending:
            # What else comes in this turn of the loop goes along.
            self._is_sending = True
            asyncio.get_running_loop().call_soon(self._send_waiting)

    def _send_waiting(self) -> None:
        self._is_sending = False
        outgoing, self._outgoing = self._outgoing, {}
        notices, self._notices = self._notices, []
        messages = [(_channel(shard), self._node + encode_batch(batch)) for shard, batch in outgoing.items()]
        messages += [(NOTICES, notice) for notice in notices]
        if messages:
            # If they are lost, the other nodes find out by comparing.
            self._cache.tell(messages)

    def _hear(self, data: bytes) -> None:
        if data.startswith(self._node):
            return
        try:
            batch = decode_batch(memoryview(data)[_NODE_BYTES:])
        except msgspec.MsgspecError:
            log.warning("shard_message_unreadable", size=len(data))
            self.suspect()
            return
        groups: dict[UUID, list[CommittedEvent]] = {}
        for packed in batch.events:
            conversation_id = id_of(packed.conversation)
            # Most of what is heard is of conversations that only other nodes serve.
            if conversation_id in self._feeds or packed.event in _STRUCTURAL:
                groups.setdefault(conversation_id, []).append(unpack(packed))
        for conversation_id, events in groups.items():
            self._take(conversation_id, events)
        for hint in batch.hints:
            conversation_id = id_of(hint.conversation)
            if conversation_id in self._feeds:
                for sink in self._hint_sinks:
                    sink(conversation_id, hint.kind, hint.body)

    def _hear_notice(self, data: bytes) -> None:
        try:
            notice = decode_notice(data)
        except msgspec.MsgspecError:
            log.warning("notice_unreadable", size=len(data))
            return
        if notice.node == self._node.hex():
            return
        people = notice.user_ids if notice.user_id is None else [notice.user_id, *notice.user_ids]
        for user_id in people:
            self._deliver_notice(user_id, notice.device_id, notice.event, notice.payload)

    def _deliver_notice(
        self, user_id: UUID, device_id: UUID | None, event: str, payload: msgspec.Raw
    ) -> None:
        for sink in self._notice_sinks:
            sink(user_id, device_id, event, payload)

    def _hold(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _channel(shard: int) -> str:
    return f"messaging:shard:{shard}"
