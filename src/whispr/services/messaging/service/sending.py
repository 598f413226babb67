"""The rules of sending, the same for sockets and REST.

The fast way is synchronous: everything a draft is checked against is at hand, and it joins the flusher's next batch. What
is not at hand is loaded while the conversation's later drafts queue behind, so that a device's messages keep their order.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Final, TypeVar
from uuid import UUID

from whispr.kit.clock import Clock
from whispr.kit.db import Database
from whispr.kit.errors import Failure, Internal, RateLimited, SessionRevoked, Unavailable
from whispr.kit.telemetry import get_logger
from whispr.services.messaging.models import (
    BadSignature,
    ClientIdConflict,
    CommittedEvent,
    Conversation,
    ConversationClosed,
    ConversationNotFound,
    ConversationType,
    DevicesMismatch,
    Draft,
    MessageHead,
    NotAllowed,
    NotAMember,
    ReplyNotFound,
    SendResult,
)
from whispr.services.messaging.models.abuse import Restricted
from whispr.services.messaging.service.contact import Contact
from whispr.services.messaging.service.content import Parsed, parse
from whispr.services.messaging.service.devices import Devices
from whispr.services.messaging.service.directory import Directory
from whispr.services.messaging.service.flusher import Admitted, Flusher, OnDone
from whispr.services.messaging.service.pace import SendingPace
from whispr.services.messaging.service.readthrough import ReadThrough
from whispr.services.messaging.service.restrictions import Restrictions
from whispr.services.messaging.service.signatures import SignatureChecker
from whispr.services.messaging.service.volume import Volume
from whispr.services.messaging.store import sending as store

log = get_logger(__name__)

T = TypeVar("T")

# A draft is judged again after each load; what is still missing then was dropped meanwhile. It ends somewhere.
_MAX_LOADS: Final = 6

_NOWHERE: Final = (UUID(int=0), 0)


class Overloaded(Unavailable):
    """Too many messages are waiting. Send it again with the same client_id."""

    code = "overloaded"

    def __init__(self) -> None:
        super().__init__(retry_after=1)


class _Missing(Exception):
    """Something a draft is judged by is not at hand; `load` gets it."""

    def __init__(self, load: Callable[[], Awaitable[object]], *, asks_auth: bool = False) -> None:
        self.load = load
        self.asks_auth = asks_auth


class _Waiting:
    """A draft in its conversation's queue."""

    __slots__ = ("on_done", "parsed")

    def __init__(self, parsed: Parsed, on_done: OnDone) -> None:
        self.parsed = parsed
        self.on_done = on_done


class Sending:
    """Takes drafts, answers each exactly once, and publishes what was stored. `run()` is its supervised loop.

    `on_expiring` is called with every stored message that disappears.
    `db` is a pool of its own with the settings of `store.sending.PLANNER`. `max_backlog` drafts may be unanswered; more
    are refused with `overloaded`.
    """

    def __init__(
        self,
        db: Database,
        clock: Clock,
        directory: Directory,
        devices: Devices,
        contact: Contact,
        signatures: SignatureChecker,
        publish: Callable[[list[CommittedEvent]], None],
        on_doubt: Callable[[], None],
        *,
        on_expiring: Callable[[MessageHead], None] = lambda head: None,
        pace: SendingPace | None = None,
        restrictions: Restrictions | None = None,
        volume: Volume | None = None,
        max_backlog: int = 20_000,
        patience: float = 8.0,
    ) -> None:
        self._db = db
        self._directory = directory
        self._devices = devices
        self._contact = contact
        self._signatures = signatures
        self._pace = pace
        self._restrictions = restrictions
        self._volume = volume
        self._max_backlog = max_backlog
        self._flusher = Flusher(
            db, clock, signatures, publish, on_doubt, self._answer_duplicate, on_expiring, patience=patience
        )
        # Where a message stands never changes.
        self._places = ReadThrough(self._locate, clock, lifetime=3600.0, capacity=20_000)
        self._queues: dict[UUID, deque[_Waiting]] = {}
        self._queued = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self.run = self._flusher.run

    def submit(self, draft: Draft, on_done: OnDone) -> None:
        """Send `draft`; `on_done` is called once, from the event loop, perhaps before this returns.

        With a `SendResult` after the commit, or with what refused it: `InvalidMessageType`, `InvalidContent`,
        `ContentTooLarge`, `BadSignature`, `NotAMember`, `ConversationClosed`, `Blocked`, `ContactsOnly`, `UnknownUser`,
        `DevicesMismatch`, `ClientIdConflict`, `SessionRevoked` (the device is none of the sender's), `RateLimited`,
        `Restricted` (the sender has written too much), or
        `Unavailable` (nothing is known; the same draft may be sent again).
        """
        if self._flusher.backlog + self._queued >= self._max_backlog or self._flusher.is_behind:
            on_done(Overloaded())
            return
        try:
            self.count(draft.sender_device_id, draft.sender_id, draft.conversation_id)
            parsed = parse(draft)
        except Failure as failure:
            on_done(failure)
            return
        queue = self._queues.get(draft.conversation_id)
        if queue is not None:
            self._enqueue(queue, _Waiting(parsed, on_done))
            return
        try:
            signing_key = self._judge(parsed, False)
        except _Missing:
            queue = self._queues[draft.conversation_id] = deque()
            self._enqueue(queue, _Waiting(parsed, on_done))
            self._hold(self._work_off(draft.conversation_id, queue))
        except Failure as failure:
            self._refuse(parsed, on_done, failure)
        else:
            self._admit(parsed, signing_key, on_done)

    async def send(self, draft: Draft) -> SendResult:
        """`submit` and wait. Raises what `submit` answers with."""
        answer: asyncio.Future[SendResult] = asyncio.get_running_loop().create_future()

        def done(result: SendResult | Failure) -> None:
            if answer.cancelled():
                return
            if isinstance(result, Failure):
                answer.set_exception(result)
            else:
                answer.set_result(result)

        self.submit(draft, done)
        return await answer

    async def examine(self, draft: Draft) -> Parsed:
        """Judge `draft` by every rule of sending, its signature too, and store nothing.

        Raises what `submit` answers with.
        """
        self.count(draft.sender_device_id, draft.sender_id, draft.conversation_id)
        parsed = parse(draft)
        signing_key = await self._with_loads(partial(self._judge, parsed))
        (is_genuine,) = await self._signatures.check([(signing_key, parsed.signed, draft.signature)])
        if not is_genuine:
            raise BadSignature
        return parsed

    def count(self, device_id: UUID, user_id: UUID, conversation_id: UUID) -> None:
        """Count a message, or a change of one, against the pace of sending. Raises `RateLimited`."""
        if self._pace is not None:
            self._pace.count(device_id, user_id, conversation_id)

    async def ensure_open(self, conversation_id: UUID, user_id: UUID) -> None:
        """Check that a person may do anything at all in a conversation, whatever their role.

        Raises `NotAMember`, `ConversationClosed`, `Blocked`, `ContactsOnly`, `UnknownUser`, `Restricted` or
        `Unavailable`.
        """
        await self._with_loads(lambda _: self._judge_place(conversation_id, user_id))

    def waiting_seconds(self) -> float:
        """How long the oldest message that waits for its turn has waited."""
        return self._flusher.waiting_seconds()

    async def drain(self) -> None:
        """Wait until everything submitted is answered."""
        while self._tasks:
            await asyncio.wait(self._tasks)
        await self._flusher.drain()

    def _judge(self, parsed: Parsed, asked_auth: bool) -> bytes:
        """The key that must have signed the draft. Raises why it is refused, or `_Missing`.

        `asked_auth`: its envelopes were compared with a fresh device list.
        """
        draft = parsed.draft
        conversation = self._judge_place(draft.conversation_id, draft.sender_id)
        role = conversation.members[draft.sender_id].role
        if conversation.type is ConversationType.GROUP and role.rank < conversation.permissions.send.rank:
            raise NotAllowed
        if draft.reply_to_id is not None:
            self._judge_reply(draft.reply_to_id, conversation, draft.sender_id)
        own = self._devices.peek(draft.sender_id)
        if own is None:
            # The others' devices are wanted next where there are envelopes: one question asks for all.
            wanted = [draft.sender_id] if parsed.envelopes is None else [*conversation.members]
            raise _Missing(lambda: self._devices.load(wanted))
        signing_key = own.signing_keys.get(draft.sender_device_id)
        if signing_key is None:
            if asked_auth:
                raise SessionRevoked
            raise _Missing(lambda: self._devices.load([draft.sender_id], again=True), asks_auth=True)
        if parsed.envelopes is not None:
            self._judge_envelopes(parsed, conversation, asked_auth)
        return signing_key

    def _judge_place(self, conversation_id: UUID, user_id: UUID) -> Conversation:
        conversation = self._directory.peek(conversation_id)
        if conversation is None:
            raise _Missing(lambda: self._load_place(conversation_id, user_id))
        if user_id not in conversation.members:
            raise NotAMember
        if not conversation.is_active:
            raise ConversationClosed
        if conversation.type is ConversationType.DIRECT:
            self._judge_contact(conversation, user_id)
        if self._restrictions is not None and (refusal := self._restrictions.refusal(user_id)) is not None:
            self._judge_acquaintance(self._restrictions, conversation, user_id, refusal)
        return conversation

    def _judge_acquaintance(
        self, restrictions: Restrictions, conversation: Conversation, user_id: UUID, refusal: Restricted
    ) -> None:
        """A restricted person may write to who has them among their contacts, and answer who wrote to them."""
        if conversation.type is not ConversationType.DIRECT:
            raise refusal
        if any(self._contact.knows(other, user_id) for other in conversation.members):
            return
        try:
            is_answer = restrictions.may_answer(conversation.id, user_id)
        except KeyError:
            raise _Missing(partial(restrictions.load_answer, conversation.id, user_id)) from None
        if not is_answer:
            raise refusal

    def _judge_contact(self, conversation: Conversation, sender_id: UUID) -> None:
        for other in conversation.members:
            if other == sender_id:
                continue
            try:
                refusal = self._contact.refusal(sender_id, other)
            except KeyError:
                raise _Missing(partial(self._contact.load, sender_id, [other])) from None
            if refusal is not None:
                raise refusal

    def _judge_reply(self, message_id: UUID, conversation: Conversation, sender_id: UUID) -> None:
        place = self._places.peek(message_id)
        if place is None:
            raise _Missing(lambda: self._places.load([message_id]))
        conversation_id, seq = place
        if conversation_id != conversation.id or seq <= conversation.members[sender_id].floor_seq:
            raise ReplyNotFound

    async def _locate(self, message_ids: list[UUID]) -> dict[UUID, tuple[UUID, int]]:
        async with self._db.connection() as connection:
            found = await store.locate_messages(connection, message_ids)
        return {message_id: found.get(message_id, _NOWHERE) for message_id in message_ids}

    def _judge_envelopes(self, parsed: Parsed, conversation: Conversation, asked_auth: bool) -> None:
        assert parsed.envelopes is not None
        current: dict[str, int] = {}
        for user_id in conversation.members:
            known = self._devices.peek(user_id)
            if known is None:
                raise _Missing(lambda: self._devices.load(conversation.members))
            current.update(known.registrations)
        current.pop(str(parsed.draft.sender_device_id), None)
        given = parsed.envelopes
        stale = [
            device
            for device, envelope in given.items()
            if isinstance(envelope.registration_id, int)
            and current.get(device, envelope.registration_id) != envelope.registration_id
        ]
        if given.keys() == current.keys() and not stale:
            return
        if not asked_auth:
            # Ours may be the list that is behind. Auth is asked once before a sender is told to encrypt again.
            raise _Missing(lambda: self._devices.load(conversation.members, again=True), asks_auth=True)
        missing = sorted(current.keys() - given.keys())
        raise DevicesMismatch(
            missing=missing,
            # A sender that does not know a device needs its owner to ask for its keys.
            owners={device: str(self._owner(device, conversation)) for device in missing},
            extra=sorted(given.keys() - current.keys()),
            stale=sorted(stale),
        )

    def _owner(self, device: str, conversation: Conversation) -> UUID:
        return next(
            user_id
            for user_id in conversation.members
            if (known := self._devices.peek(user_id)) is not None and device in known.registrations
        )

    async def _load_place(self, conversation_id: UUID, user_id: UUID) -> None:
        """Load the conversation, and in one go what a message of `user_id` in it is judged by next."""
        try:
            conversation = await self._directory.get(conversation_id)
        except ConversationNotFound:
            raise NotAMember from None
        if conversation.type is ConversationType.DIRECT and user_id in conversation.members:
            others = [member for member in conversation.members if member != user_id]
            await asyncio.gather(
                self._contact.load(user_id, others), self._devices.load(conversation.members)
            )

    def _enqueue(self, queue: deque[_Waiting], waiting: _Waiting) -> None:
        self._queued += 1
        queue.append(waiting)

    async def _work_off(self, conversation_id: UUID, queue: deque[_Waiting]) -> None:
        """Judge a conversation's waiting drafts in order, loading what each one misses."""
        try:
            while queue:
                waiting = queue[0]
                try:
                    signing_key = await self._with_loads(partial(self._judge, waiting.parsed))
                except Failure as failure:
                    self._refuse(waiting.parsed, waiting.on_done, failure)
                except Exception:
                    log.exception("sending_check_failed")
                    waiting.on_done(Internal())
                else:
                    self._admit(waiting.parsed, signing_key, waiting.on_done)
                queue.popleft()
                self._queued -= 1
        finally:
            # Nothing may queue behind a worker that has gone.
            del self._queues[conversation_id]
            self._queued -= len(queue)
            for waiting in queue:
                waiting.on_done(Unavailable(retry_after=1))

    async def _with_loads(self, judge: Callable[[bool], T]) -> T:
        """What `judge` says, after loading what it misses; it is told whether auth was asked for it."""
        asked_auth = False
        for _ in range(_MAX_LOADS):
            try:
                return judge(asked_auth)
            except _Missing as missing:
                await missing.load()
                asked_auth |= missing.asks_auth
        raise Unavailable(retry_after=1)

    def _admit(self, parsed: Parsed, signing_key: bytes, on_done: OnDone) -> None:
        if self._volume is not None:
            self._volume.count_message(parsed.draft.sender_id)
        self._flusher.add(Admitted(parsed, signing_key, on_done, time.monotonic()))

    def _refuse(self, parsed: Parsed, on_done: OnDone, failure: Failure) -> None:
        """Refuse, unless the message was stored before the ground for it arose and only its answer was lost."""
        if isinstance(failure, NotAMember | RateLimited | Unavailable):
            on_done(failure)
        else:
            self._hold(self._answer_earlier(parsed, on_done, failure))

    def _answer_duplicate(self, parsed: Parsed, on_done: OnDone) -> None:
        self._hold(self._answer_earlier(parsed, on_done, Internal()))

    async def _answer_earlier(self, parsed: Parsed, on_done: OnDone, otherwise: Failure) -> None:
        """Answer with the message stored under the draft's client id, `otherwise` if there is none."""
        draft = parsed.draft
        result: SendResult | Failure = otherwise
        try:
            async with self._db.connection() as connection:
                earlier = await store.find_sent(
                    connection, draft.conversation_id, draft.sender_device_id, draft.client_id
                )
            if earlier is not None:
                message, first_sha256 = earlier
                is_same = first_sha256 == parsed.content_sha256
                result = SendResult(message, duplicate=True) if is_same else ClientIdConflict()
        except Failure as failure:
            result = failure
        except Exception:
            log.exception("duplicate_lookup_failed")
            result = Internal()
        on_done(result)

    def _hold(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
