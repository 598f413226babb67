"""A device that was away comes to the state of one that was not, and of one that begins now.

The server's side is a model of the log as contracts describe it: it keeps no content, and renders each entry
from the messages as they are now.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import httpx
import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.client.parties import Party, Sent, World
from whispr.client.conversations import Conversations
from whispr.client.devices import Devices
from whispr.client.events import ChatMessage
from whispr.client.expiry import Expiry
from whispr.client.history import History
from whispr.client.inbox import Inbox
from whispr.client.models import Content, LogEvent, Message, Pin, Reaction
from whispr.client.rest import RestClient

BEGUN = datetime(2027, 1, 1, tzinfo=UTC)
EMOJI = ["👍", "❤️", "🌻"]


@dataclass
class Row:
    """A message as the server has it."""

    message_id: UUID
    seq: int
    text: str | None
    sent: Sent
    author: Party
    edited_by: Party | None = None
    edited_at: datetime | None = None
    kind: str = "text"
    is_deleted: bool = False
    reactions: list[tuple[str, UUID]] = field(default_factory=list)

    def render(self, reader: Party) -> Message:
        signer = self.edited_by or self.author
        gone: dict[str, Any] = {"content": Content(), "signature": "", "content_sha256": ""}
        chosen: dict[str, list[UUID]] = {}
        for reaction, user_id in self.reactions:
            chosen.setdefault(reaction, []).append(user_id)
        return self.sent.message_for(
            reader.device_id,
            id=self.message_id,
            seq=self.seq,
            sender_device_id=self.author.device_id,
            sent_at=BEGUN + timedelta(seconds=self.seq),
            edited_device_id=None if signer is self.author else signer.device_id,
            edited_at=self.edited_at,
            is_deleted=self.is_deleted,
            reactions=[Reaction(name, users) for name, users in chosen.items()],
            **(gone if self.is_deleted else {}),
        )


class Reader:
    """A device that only listens, with the whole of the library between the log and its store."""

    def __init__(self, server: Server, party: Party) -> None:
        self.server = server
        self.party = party
        rest = RestClient("http://nowhere", transport=httpx.MockTransport(lambda _: httpx.Response(404)))
        self.conversations = Conversations(party.store, rest)
        self.history = History(party.store)
        expiry = Expiry(
            party.store,
            self.history,
            party.user_id,
            notify=lambda _: None,
            now=lambda: server.world.time,
        )
        self.inbox = Inbox(
            party.store,
            party.engine,
            Devices(party.store, party.engine, rest, lambda _: None),
            self.conversations,
            self.history,
            expiry,
            hand_over=self._take,
            acknowledge=lambda conversation_id, seq: None,
            on_own=lambda client_id: None,
        )
        self.cursor = 0

    async def _take(self, event: object) -> None:
        pass

    async def catch_up(self) -> None:
        """As joining with a cursor does: what was purged is left out, the rest is as it is now."""
        conversation_id = self.server.world.conversation_id
        events = [
            e
            for seq in range(self.cursor + 1, self.server.head + 1)
            if (e := self.server.render(seq, self.party))
        ]
        self.inbox.put(conversation_id, "epoch", events)
        self.cursor = self.server.head
        last = events[-1].seq if events else 0
        while self.conversations.cursor(conversation_id).seq < last:
            await asyncio.sleep(0)

    def state(self) -> tuple[list[ChatMessage], list[Pin]]:
        conversation_id = self.server.world.conversation_id
        return self.history.messages(conversation_id), self.history.pins(conversation_id)


class Server:
    def __init__(self, *, group: bool) -> None:
        self.world = World()
        self.group = group
        self.rows: list[Row] = []
        self.log: list[tuple[str, Row | None, dict[str, Any]]] = []
        self.purged = 0
        self.pins: dict[UUID, UUID] = {}
        ada, ben = self.world.party(), self.world.party()
        self.authors = [ada, ben, self.world.party(user_id=ada.user_id)]
        listener = uuid4()
        self.readers = [Reader(self, self.world.party(user_id=listener)) for _ in range(3)]
        for reader in self.readers:
            reader.party.knows(*self.authors)
        self.count = 0

    @property
    def head(self) -> int:
        return len(self.log)

    def append(self, name: str, row: Row | None, **payload: Any) -> None:
        about = {} if row is None else {"message_id": str(row.message_id)}
        self.log.append((name, row, {"seq": self.head + 1, **about, **payload}))

    def render(self, seq: int, reader: Party) -> LogEvent | None:
        name, row, payload = self.log[seq - 1]
        if seq <= self.purged:
            return None
        shown: Any = payload
        if row is not None and name in ("new_message", "message_edited"):
            if row.seq <= self.purged:
                name, shown = "message_deleted", {**payload, "deleted_by": None}
            elif name == "new_message":
                shown = row.render(reader)
            else:
                shown = {"seq": seq, "message": row.render(reader)}
        return LogEvent(seq, name, msgspec.Raw(msgspec.json.encode(shown)))

    # What people do. `pick` chooses among what there is.

    def send(self, who: int, pick: int) -> None:
        author = self.authors[who]
        self.count += 1
        text = f"text {self.count}"
        sent = self._seal(author, text, uuid4())
        row = Row(uuid4(), self.head + 1, text, sent, author)
        self.rows.append(row)
        self.append("new_message", row)

    def edit(self, who: int, pick: int) -> None:
        row, editor = self._pick(pick), self.authors[who]
        if row is None or row.is_deleted or row.author.user_id != editor.user_id:
            return
        self.count += 1
        row.text = f"edited {self.count}"
        row.sent = self._seal(editor, row.text, row.sent.client_id)
        row.edited_by, row.edited_at = editor, BEGUN + timedelta(hours=self.count)
        self.append("message_edited", row)

    def delete(self, who: int, pick: int) -> None:
        row = self._pick(pick)
        if row is not None and not row.is_deleted:
            row.is_deleted, row.reactions = True, []
            self.pins.pop(row.message_id, None)
            self.append("message_deleted", row, deleted_by=str(self.authors[who].user_id))

    def react(self, who: int, pick: int) -> None:
        row, choice = self._pick(pick), (EMOJI[pick % 3], self.authors[who].user_id)
        if row is not None and not row.is_deleted and choice not in row.reactions:
            row.reactions.append(choice)
            self.append("reaction_added", row, user_id=str(choice[1]), reaction=choice[0])

    def unreact(self, who: int, pick: int) -> None:
        row, choice = self._pick(pick), (EMOJI[pick % 3], self.authors[who].user_id)
        if row is not None and choice in row.reactions:
            row.reactions.remove(choice)
            self.append("reaction_removed", row, user_id=str(choice[1]), reaction=choice[0])

    def pin(self, who: int, pick: int) -> None:
        row = self._pick(pick)
        if row is not None and not row.is_deleted and row.message_id not in self.pins:
            self.pins[row.message_id] = self.authors[who].user_id
            self.append("message_pinned", row, user_id=str(self.authors[who].user_id))

    def unpin(self, who: int, pick: int) -> None:
        row = self._pick(pick)
        if row is not None and row.message_id in self.pins:
            del self.pins[row.message_id]
            self.append("message_unpinned", row, user_id=str(self.authors[who].user_id))

    def purge(self, who: int, pick: int) -> None:
        if self.group:
            return  # whoever is away for longer than history is kept may miss the key of what follows
        until = min(self.purged + pick, self.head)
        if until > self.purged:
            self.purged = until
            for row in [row for row in self.rows if row.seq <= until]:
                self.rows.remove(row)
                self.pins.pop(row.message_id, None)
            self.append("history_purged", None, until_seq=until)

    def _pick(self, pick: int) -> Row | None:
        said = [row for row in self.rows if row.kind == "text"]
        return said[pick % len(said)] if said else None

    def _seal(self, author: Party, text: str, client_id: UUID) -> Sent:
        others = [reader.party for reader in self.readers]
        sent = author.text(text, *others, group=self.group, client_id=client_id)
        for key in sent.keys:
            row = Row(uuid4(), self.head + 1, None, key, author, kind="sender_key")
            self.rows.append(row)
            self.append("new_message", row)
        return sent


Act = Callable[[Server, int, int], None]
ACTS: list[Act | None] = [
    None,
    Server.send,
    Server.send,
    Server.edit,
    Server.delete,
    Server.react,
    Server.unreact,
    Server.pin,
    Server.unpin,
    Server.purge,
]


@settings(max_examples=60, deadline=None)
@given(
    st.booleans(),
    st.lists(st.tuples(st.sampled_from(ACTS), st.integers(0, 2), st.integers(0, 9)), max_size=30),
)
def test_every_device_comes_to_the_same_state(group: bool, steps: list[tuple[Act | None, int, int]]) -> None:
    asyncio.run(_every_device_comes_to_the_same_state(group, steps))


async def _every_device_comes_to_the_same_state(
    group: bool, steps: list[tuple[Act | None, int, int]]
) -> None:
    server = Server(group=group)
    live, away, fresh = server.readers
    tasks = [asyncio.create_task(reader.inbox.run()) for reader in server.readers]
    try:
        async with asyncio.timeout(20):
            for act, who, pick in steps:
                if act is None:
                    await away.catch_up()
                else:
                    act(server, who, pick)
                    await live.catch_up()
            for reader in (away, fresh):
                await reader.catch_up()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    assert live.state() == away.state() == fresh.state()
    messages, pins = live.state()
    assert [
        (m.id, m.text, m.edited_at, m.is_deleted, m.error, {r: set(u) for r, u in m.reactions.items()})
        for m in messages
    ] == [
        (
            row.message_id,
            None if row.is_deleted else row.text,
            None if row.is_deleted else row.edited_at,
            row.is_deleted,
            None,
            {name: {user for chosen, user in row.reactions if chosen == name} for name, _ in row.reactions},
        )
        for row in server.rows
    ]
    assert {pin.message_id: pin.pinned_by for pin in pins} == server.pins
