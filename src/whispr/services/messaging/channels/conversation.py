"""`conversation:{id}`: messages, receipts, typing and presence of one conversation, for its members."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine
from datetime import datetime
from typing import TYPE_CHECKING, Any, ClassVar
from uuid import UUID

import msgspec

from whispr.kit.channels import Reply, UnknownEvent
from whispr.kit.errors import Failure
from whispr.services.messaging.channels import payloads
from whispr.services.messaging.channels.desk import Desk
from whispr.services.messaging.channels.rooms import RoomChannel, Tails, render_events
from whispr.services.messaging.models import (
    Actor,
    CommittedEvent,
    Draft,
    NotAMember,
    ReceiptKind,
    SendResult,
)
from whispr.services.messaging.service.opening import RECOVERED_EVENTS, SMALL_GROUP

if TYPE_CHECKING:
    from whispr.kit.channels import Socket

Work = Coroutine[Any, Any, None] | None


class _Person(msgspec.Struct):
    user_id: UUID


_decode_person = msgspec.json.Decoder(_Person).decode


class ConversationChannel(RoomChannel):
    """One device in one conversation."""

    __slots__ = ("_desk", "_is_typing", "_members")

    def __init__(self, socket: Socket, topic: str, topic_id: str, desk: Desk) -> None:
        super().__init__(socket, topic, topic_id, _conversation_id(topic_id))
        self._desk = desk
        self._is_typing = False
        self._members: frozenset[UUID] = frozenset()

    async def join(self, params: dict[str, Any]) -> dict[str, Any]:
        """Params `{cursor?: {epoch, seq}}`; refused with `forbidden` for strangers and what does not exist alike."""
        desk = self._desk
        cursor = payloads.cursor_of(params)
        desk.count_read(self.socket.caller.device_id)
        desk.rooms.enter(self)
        opening = await desk.openings.open(self.conversation_id, self.user_id, cursor)
        self.membership = opening.membership
        self._members = opening.member_ids
        page = opening.page
        desk.rooms.settle(self, page.head_seq)
        events, fits = render_events(page.items, self.socket.caller.device_id)
        return {
            "epoch": page.epoch,
            "head_seq": page.head_seq,
            "recovered": opening.recovered,
            "events": events,
            "more": page.more or not fits,
            "members": opening.members,
            "member_count": len(opening.member_ids),
        }

    async def joined(self) -> None:
        """Let live events through, then presence."""
        self.release_backlog()
        if self.closed or len(self._members) > SMALL_GROUP:
            return
        whereabouts = self._desk.whereabouts
        whereabouts.enter(self, self.topic, {"online_at": self._desk.clock.now()})
        await whereabouts.watch_members(self, self.topic, self._members)

    def receive(self, event: str, payload: msgspec.Raw, reply: Reply) -> Work:
        """The frame callback: no task for anything that is at hand."""
        handle = self._handlers.get(event)
        if handle is None:
            raise UnknownEvent
        return handle(self, payload, reply)

    def take(self, event: CommittedEvent, tails: Tails) -> None:
        """As every room channel; newcomers are looked out for."""
        super().take(event, tails)
        if event.event == "member_added" and self.backlog is None:
            self._desk.whereabouts.joined(self, _decode_person(event.payload).user_id)

    def terminated(self) -> None:
        """Leave everything this channel was in."""
        if self._is_typing:
            self._desk.typists.stop(self.conversation_id, self.user_id)
        self._desk.rooms.leave(self)
        self._desk.whereabouts.leave(self)

    def _new_message(self, payload: msgspec.Raw, reply: Reply) -> Work:
        body = payloads.decode_new_message(payload)
        caller = self.socket.caller
        draft = Draft(
            self.conversation_id,
            caller.user_id,
            caller.device_id,
            body.client_id,
            body.message_type,
            bytes(body.content),
            body.signature,
            body.reply_to_id,
            body.media_ids or (),
            body.expires_in,
            body.expires_from == "read",
        )
        if body.send_at is not None:
            return self._answer_schedule(draft, body.send_at, reply)
        self._desk.sending.submit(draft, _Answer(reply))
        if self._is_typing:
            self._stop_typing()
        return None

    def _edit_message(self, payload: msgspec.Raw, reply: Reply) -> Work:
        return self._answer_edit(payloads.decode_edit(payload), reply)

    async def _answer_edit(self, body: payloads.Edit, reply: Reply) -> None:
        message, seq = await self._desk.changes.edit(
            self._actor, self.conversation_id, body.message_id, bytes(body.content), body.signature
        )
        reply.ok({"seq": seq, "edited_at": message.head.edited_at})

    def _delete_message(self, payload: msgspec.Raw, reply: Reply) -> Work:
        message_id = payloads.decode_of_message(payload).message_id
        return _answer(self._desk.changes.delete(self._actor, self.conversation_id, message_id), reply)

    def _add_reaction(self, payload: msgspec.Raw, reply: Reply) -> Work:
        body = payloads.decode_of_reaction(payload)
        reactions = self._desk.reactions
        return _answer(
            reactions.add(self._actor, self.conversation_id, body.message_id, body.reaction), reply
        )

    def _remove_reaction(self, payload: msgspec.Raw, reply: Reply) -> Work:
        body = payloads.decode_of_reaction(payload)
        reactions = self._desk.reactions
        return _answer(
            reactions.remove(self._actor, self.conversation_id, body.message_id, body.reaction), reply
        )

    def _pin_message(self, payload: msgspec.Raw, reply: Reply) -> Work:
        message_id = payloads.decode_of_message(payload).message_id
        return _answer(self._desk.pins.pin(self._actor, self.conversation_id, message_id), reply)

    def _unpin_message(self, payload: msgspec.Raw, reply: Reply) -> Work:
        message_id = payloads.decode_of_message(payload).message_id
        return _answer(self._desk.pins.unpin(self._actor, self.conversation_id, message_id), reply)

    @property
    def _actor(self) -> Actor:
        caller = self.socket.caller
        return Actor(caller.user_id, caller.device_id)

    async def _answer_schedule(self, draft: Draft, send_at: datetime, reply: Reply) -> None:
        plan = await self._desk.scheduled.schedule(draft, send_at)
        reply.ok({"scheduled_id": plan.id, "send_at": plan.send_at, "status": plan.status})

    def _mark_as_delivered(self, payload: msgspec.Raw, reply: Reply) -> Work:
        return self._mark(ReceiptKind.DELIVERED, payload, reply)

    def _mark_as_read(self, payload: msgspec.Raw, reply: Reply) -> Work:
        return self._mark(ReceiptKind.READ, payload, reply)

    def _mark(self, kind: ReceiptKind, payload: msgspec.Raw, reply: Reply) -> Work:
        assert self.membership is not None
        seq = payloads.decode_mark(payload).seq

        def done(failure: Failure | None) -> None:
            if failure is None:
                reply.ok()
            else:
                reply.error(failure)

        self._desk.receipts.mark(self.membership, self.socket.caller.device_id, kind, seq, done)
        return None

    def _typing(self, payload: msgspec.Raw, reply: Reply) -> Work:
        self._desk.typists.ensure_on()
        state = payloads.decode_typing(payload).state
        reply.ok()
        if state == "stop":
            if self._is_typing:
                self._stop_typing()
            return None
        self._is_typing = True
        return self._desk.typists.start(self.conversation_id, self.user_id)

    def _stop_typing(self) -> None:
        self._is_typing = False
        self._desk.typists.stop(self.conversation_id, self.user_id)

    def _sync(self, payload: msgspec.Raw, reply: Reply) -> Work:
        return self._answer_sync(payloads.decode_sync(payload), reply)

    async def _answer_sync(self, asked: payloads.Sync, reply: Reply) -> None:
        desk = self._desk
        desk.count_read(self.socket.caller.device_id)
        membership = await desk.openings.membership(self.conversation_id, self.user_id)
        page = await desk.history.events(
            membership, after_seq=asked.after_seq, until_seq=asked.until_seq, limit=RECOVERED_EVENTS
        )
        events, fits = render_events(page.items, self.socket.caller.device_id)
        reply.ok({"events": events, "more": page.more or not fits, "head_seq": page.head_seq})

    _handlers: ClassVar[dict[str, Callable[[ConversationChannel, msgspec.Raw, Reply], Work]]] = {
        "new_message": _new_message,
        "edit_message": _edit_message,
        "delete_message": _delete_message,
        "add_reaction": _add_reaction,
        "remove_reaction": _remove_reaction,
        "pin_message": _pin_message,
        "unpin_message": _unpin_message,
        "mark_as_delivered": _mark_as_delivered,
        "mark_as_read": _mark_as_read,
        "typing": _typing,
        "sync": _sync,
    }


async def _answer(change: Awaitable[int | None], reply: Reply) -> None:
    """The reply to a change: the `seq` of its event, null if there had to be none."""
    reply.ok({"seq": await change})


class _Answer:
    """Turns what became of a draft into the reply of its push."""

    __slots__ = ("_reply",)

    def __init__(self, reply: Reply) -> None:
        self._reply = reply

    def __call__(self, result: SendResult | Failure) -> None:
        if isinstance(result, Failure):
            self._reply.error(result)
        else:
            head = result.message.head
            self._reply.ok_raw(
                payloads.encode(payloads.Ack(head.id, head.seq, head.sent_at, result.duplicate))
            )


def _conversation_id(topic_id: str) -> UUID:
    try:
        conversation_id = UUID(topic_id)
    except ValueError:
        raise NotAMember from None
    # One spelling, one topic: events are pushed under the name the client joined.
    if str(conversation_id) != topic_id:
        raise NotAMember
    return conversation_id
