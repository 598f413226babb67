"""`WhisprClient` over the real services: what people do, and what must survive crashes, absences and lost phones."""

from __future__ import annotations

import asyncio
import contextlib
import io
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import msgspec
import pytest
from rich.console import Console

from tests.stack import PASSWORD, Stack
from whispr.client import ApiError, Unreachable, WhisprClient, demo
from whispr.client.backoff import Backoff
from whispr.client.crypto.prekeys import LOW, PQ_STOCK, ROTATE_AFTER, STOCK
from whispr.client.demo import stage
from whispr.client.events import ChatMessage, ConversationEvent, Notice
from whispr.client.socket import SocketOptions
from whispr.client.store import KdfCost, Store

QUICK = SocketOptions(reconnect=Backoff(0.01, 0.1), rejoin=Backoff(0.01, 0.1), reply_timeout=5.0)
CHEAP = KdfCost(passes=1, memory=64, lanes=1)


class Gateway(httpx.AsyncBaseTransport):
    """Sends each path to the service that has it, as the public port does."""

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self._inner = httpx.AsyncHTTPTransport()
        self.calls: list[tuple[str, str]] = []

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        path = request.url.path
        self.calls.append((request.method, path))
        node = self._stack.messaging
        if path.startswith(("/api/v1/auth", "/api/v1/devices", "/api/v1/keys")):
            node = self._stack.auth
        elif path.startswith("/api/v1/users"):
            node = self._stack.user
        target = httpx.URL(node.url)
        request.url = request.url.copy_with(host=target.host, port=target.port)
        request.headers["Host"] = f"{target.host}:{target.port}"
        return await self._inner.handle_async_request(request)

    async def aclose(self) -> None:
        await self._inner.aclose()


class Device:
    """A client and what its application was told."""

    def __init__(self, stack: Stack, store: Store | None = None) -> None:
        self.gateway = Gateway(stack)
        self.client = WhisprClient(
            "http://gateway",
            store or Store(),
            socket_url=stack.socket_url,
            socket_options=QUICK,
            transport=self.gateway,
            now=stack.clock.time,
        )
        self.events: list[ConversationEvent] = []
        self.notices: list[Notice] = []
        self.client.on_event(self.events.append)
        self.client.on_notice(self.notices.append)

    @property
    def messages(self) -> list[ChatMessage]:
        return [e.message for e in self.events if e.event == "new_message" and e.message is not None]

    def texts(self) -> list[str | None]:
        return [m.text for m in self.messages if m.kind != "sender_key"]

    def seqs(self) -> list[int]:
        return [e.seq for e in self.events]

    async def hears(self, *texts: str) -> None:
        await until(
            lambda: [t for t in self.texts() if t in texts] == list(texts), lambda: str(self.messages)
        )


async def until(
    condition: Callable[[], object], shown: Callable[[], str] = str, within: float = 10.0
) -> None:
    try:
        async with asyncio.timeout(within):
            while not condition():
                await asyncio.sleep(0.01)
    except TimeoutError:
        pytest.fail(f"it did not happen: {shown()}")


class People:
    """Makes devices and stops them in the end."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self.devices: list[Device] = []

    async def new(self, username: str | None = None, store: Store | None = None) -> Device:
        device = Device(self.stack, store)
        self.devices.append(device)
        await device.client.register(username or name(), PASSWORD)
        await device.client.start()
        return device

    async def another(self, username: str, store: Store | None = None) -> Device:
        device = Device(self.stack, store)
        self.devices.append(device)
        await device.client.login(username, PASSWORD)
        await device.client.start()
        return device

    async def again(self, store: Store) -> Device:
        """The same device after its process was started again."""
        device = Device(self.stack, store)
        self.devices.append(device)
        await device.client.start()
        return device


def name() -> str:
    return f"c{uuid4().hex[:16]}"


@pytest.fixture
async def people(stack: Stack) -> AsyncIterator[People]:
    made = People(stack)
    yield made
    for device in made.devices:
        await device.client.stop()


async def test_two_people_on_three_devices_exchange_messages(people: People) -> None:
    ada, ben = name(), name()
    phone, laptop, bens = await people.new(ada), await people.another(ada), await people.new(ben)
    conversation = await phone.client.direct(ben)
    sent = await phone.client.send_text(conversation, "hello Ben")
    assert (sent.seq, sent.duplicate) == (1, False)
    await bens.hears("hello Ben")
    await laptop.hears("hello Ben")
    await phone.hears("hello Ben")
    assert await bens.client.direct(phone.client.user_id) == conversation
    await bens.client.send_text(conversation, "hello Ada")
    for device in (phone, laptop, bens):
        await device.hears("hello Ben", "hello Ada")
        assert device.seqs() == [1, 2]
        assert all(message.verified for message in device.messages)
    stored = await bens.client.rest.messages(conversation, after_seq=0)
    assert "hello" not in repr(stored)
    assert set(stored.items[0].content.envelopes or {}) == {str(bens.client.device_id)}
    assert bens.client.fingerprints(phone.client.user_id)[phone.client.device_id] == phone.client.fingerprint


async def test_a_group_shares_sender_keys_and_follows_its_members(people: People) -> None:
    owner, ben, cleo, dan = [await people.new() for _ in range(4)]
    group = await owner.client.group([ben.client.user_id, cleo.client.user_id])
    for number in range(3):
        await owner.client.send_text(group, f"text {number}")
    await ben.client.send_text(group, "from Ben")
    for device in (owner, ben, cleo):
        await device.hears("text 0", "text 1", "text 2", "from Ben")
    page = await cleo.client.rest.messages(group, after_seq=0)
    kinds = [next(iter((m.content.envelopes or {}).values())).type for m in page.items]
    # Each sender's key goes ahead in a message of its own.
    assert kinds == ["prekey", "sender_key", "sender_key", "sender_key", "prekey", "sender_key"]

    await owner.client.rest.add_members(group, [dan.client.user_id])
    await until(lambda: dan.client.user_id in owner.client.conversations.get(group).members)  # type: ignore[union-attr]
    await owner.client.send_text(group, "welcome Dan")
    await dan.hears("welcome Dan")
    assert [e.event for e in dan.events] == ["member_added", "new_message", "new_message"]
    assert [m.kind for m in dan.messages] == ["sender_key", "text"]

    chain = owner.client.engine.sender_keys.holders(group)
    assert cleo.client.device_id in chain
    await owner.client.rest.remove_member(group, cleo.client.user_id)
    await until(lambda: any(n.name == "conversation_closed" for n in cleo.notices))
    await owner.client.send_text(group, "without Cleo")
    await dan.hears("welcome Dan", "without Cleo")
    await ben.hears("welcome Dan", "without Cleo")
    assert cleo.client.device_id not in owner.client.engine.sender_keys.holders(group)
    assert "without Cleo" not in cleo.texts()


async def test_long_texts_take_the_shared_form(people: People) -> None:
    owner = await people.new()
    others = [await people.new() for _ in range(4)]
    group = await owner.client.group([device.client.user_id for device in others])
    long = "a long text " * 2500
    await owner.client.send_text(group, long)
    for device in others:
        await device.hears(long)
        assert device.seqs() == [1, 2]  # the sender key came in a message of its own


async def test_what_is_sent_and_missed_while_offline_comes_once_and_in_order(people: People) -> None:
    ada, ben = await people.new(), await people.new()
    conversation = await ada.client.direct(ben.client.user_id)
    await ada.client.send_text(conversation, "first")
    await ben.hears("first")
    await ben.client.offline()
    queued = [ben.client.queue_text(conversation, f"from the tunnel {n}") for n in range(3)]
    for number in range(25):
        await ada.client.send_text(conversation, f"{number}")
    assert not any(future.done() for future in queued)
    ben.client.online()
    receipts = await asyncio.gather(*queued)
    assert [receipt.seq for receipt in receipts] == sorted(receipt.seq for receipt in receipts)
    await until(lambda: len(ben.events) == 29 and len(ada.events) == 29)
    for device in (ada, ben):
        assert device.seqs() == list(range(1, 30))
        assert [t for t in device.texts() if t and t.startswith("from")] == [
            f"from the tunnel {n}" for n in range(3)
        ]


async def test_cut_connections_lose_and_repeat_nothing(people: People) -> None:
    ada, ben = await people.new(), await people.new()
    conversation = await ada.client.direct(ben.client.user_id)
    futures = []
    for number in range(40):
        futures.append(ada.client.queue_text(conversation, f"{number}"))
        if number % 7 == 3:
            ada.client.live.drop()
        if number % 9 == 4:
            ben.client.live.drop()
        await asyncio.sleep(0.01)
    await asyncio.gather(*futures)
    expected = [f"{number}" for number in range(40)]
    await until(lambda: len(ben.texts()) >= 40 and len(ada.texts()) >= 40)
    assert ben.texts() == expected
    assert ada.texts() == expected
    assert ben.seqs() == ada.seqs() == list(range(1, 41))


async def test_a_device_that_is_started_again_goes_on_where_it_was(people: People, tmp_path: Path) -> None:
    path = tmp_path / "ben.whispr"
    store = Store.open(path, "secret", CHEAP)
    ada, ben = await people.new(), await people.new(store=store)
    conversation = await ada.client.direct(ben.client.user_id)
    await ada.client.send_text(conversation, "before")
    await ben.hears("before")
    await ben.client.offline()
    ben.client.queue_text(conversation, "kept over the crash")
    await ben.client.stop()
    store.close()
    await ada.client.send_text(conversation, "meanwhile")

    store = Store.open(path, "secret")
    ben = await people.again(store)
    await ben.hears("meanwhile", "kept over the crash")
    await ada.hears("before", "meanwhile", "kept over the crash")
    assert "before" not in ben.texts()  # the application had it before the restart
    assert [m.text for m in ben.client.history.messages(conversation)] == [
        "before",
        "meanwhile",
        "kept over the crash",
    ]
    assert b"kept over" not in path.read_bytes()
    await ben.client.stop()
    store.close()


async def test_a_lost_reply_leads_to_one_message(people: People) -> None:
    ada, ben = await people.new(), await people.new()
    conversation = await ada.client.direct(ben.client.user_id)
    push, lost = ada.client.live.push, 0

    async def losing(conversation_id: Any, event: str, payload: Any) -> Any:
        nonlocal lost
        reply = await push(conversation_id, event, payload)
        if event == "new_message" and lost < 2:
            lost += 1
            raise Unreachable("the reply was lost")
        return reply

    ada.client.live.push = losing  # type: ignore[method-assign]
    sent = await ada.client.send_text(conversation, "once")
    assert sent.duplicate
    assert lost == 2
    await ada.client.send_text(conversation, "twice")
    await ben.hears("once", "twice")
    assert ben.seqs() == [1, 2]


async def test_a_reply_lost_while_devices_change_leads_to_one_message(people: People) -> None:
    """The first encryption is stored, its reply lost, then a device joins: what is made anew meets a conflict."""
    ada, bens_name = await people.new(), name()
    ben = await people.new(bens_name)
    conversation = await ada.client.direct(ben.client.user_id)
    push, lost = ada.client.live.push, False

    async def losing(conversation_id: Any, event: str, payload: Any) -> Any:
        nonlocal lost
        reply = await push(conversation_id, event, payload)
        if event == "new_message" and not lost:
            lost = True
            await people.another(bens_name)
            raise Unreachable("the reply was lost")
        return reply

    ada.client.live.push = losing  # type: ignore[method-assign]
    sent = await ada.client.send_text(conversation, "once")
    assert sent.seq == 1
    await ada.client.send_text(conversation, "for three devices")
    await ben.hears("once", "for three devices")
    assert ben.seqs() == [1, 2]
    await people.devices[-1].hears("for three devices")


async def test_a_new_phone_is_served_and_the_lost_one_is_shut_out(people: People) -> None:
    ada, bens_name = await people.new(), name()
    lost, laptop = await people.new(bens_name), await people.another(bens_name)
    conversation = await ada.client.direct(bens_name)
    await ada.client.send_text(conversation, "old phone")
    await lost.hears("old phone")
    lost_id = lost.client.device_id
    await laptop.client.rest.remove_device(lost_id)
    await until(lambda: any(notice.name == "session_ended" for notice in lost.notices))
    new = await people.another(bens_name)
    await until(lambda: conversation in new.client.conversations.ids())
    await ada.client.send_text(conversation, "new phone")
    await new.hears("new phone")
    await laptop.hears("old phone", "new phone")
    assert "new phone" not in lost.texts()
    assert [m.error for m in new.messages] == ["no_envelope", None]
    added = [n.payload["device_id"] for n in ada.notices if n.name == "device_added"]
    assert added == [str(new.client.device_id)]
    known = ada.client.engine.directory.devices_of(new.client.user_id) or []
    assert {d.device_id for d in known} == {new.client.device_id, laptop.client.device_id}
    await new.client.send_text(conversation, "here I am")
    await ada.hears("old phone", "new phone", "here I am")


async def test_stale_keys_of_a_device_are_replaced_and_told(people: People) -> None:
    """The server says `stale` when an envelope names another installation of the device than the present one."""
    ada, ben = await people.new(), await people.new()
    conversation = await ada.client.direct(ben.client.user_id)
    await ada.client.send_text(conversation, "before")
    await ben.hears("before")
    known = ada.client.engine.directory.device(ben.client.device_id)
    assert known is not None
    outdated = msgspec.structs.replace(
        known.current, registration_id=1 + known.current.registration_id % 16380
    )
    with ada.client.store.transaction():
        ada.client.store.save(
            "devices", str(known.device_id), msgspec.structs.replace(known, keys=[outdated])
        )
    await ada.client.send_text(conversation, "after")
    await ben.hears("before", "after")
    assert [n.payload["device_id"] for n in ada.notices if n.name == "identity_changed"] == [
        str(known.device_id)
    ]
    page = await ben.client.rest.messages(conversation, after_seq=1)
    assert next(iter((page.items[0].content.envelopes or {}).values())).type == "prekey"


async def test_a_message_of_a_device_that_is_gone_is_read_and_marked(people: People) -> None:
    ada, bens_name = await people.new(), name()
    phone, laptop = await people.new(bens_name), await people.another(bens_name)
    await ada.client.offline()
    conversation = await phone.client.direct(ada.client.user_id)
    await phone.client.send_text(conversation, "my last words on this phone")
    await laptop.client.rest.remove_device(phone.client.device_id)
    ada.client.online()
    await ada.hears("my last words on this phone")
    assert [message.verified for message in ada.messages] == [False]


async def test_a_blocked_sender_is_refused_and_not_retried(people: People) -> None:
    ada, mallory = await people.new(), await people.new()
    conversation = await mallory.client.direct(ada.client.user_id)
    await mallory.client.send_text(conversation, "hello")
    await ada.hears("hello")
    await ada.client.rest.block(mallory.client.user_id)
    with pytest.raises(ApiError) as refused:
        await asyncio.wait_for(mallory.client.send_text(conversation, "hello?"), 10)
    assert refused.value.code == "blocked"
    assert any(notice.name == "send_failed" for notice in mallory.notices)
    assert mallory.client.store.keys("outbox") == []
    await ada.client.rest.unblock(mallory.client.user_id)
    await mallory.client.send_text(conversation, "friends again")
    await ada.hears("hello", "friends again")


async def test_two_people_who_write_at_once_understand_each_other(people: People) -> None:
    ada, ben = await people.new(), await people.new()
    conversation = await ada.client.direct(ben.client.user_id)
    await until(lambda: conversation in ben.client.conversations.ids())
    await asyncio.gather(
        *(
            device.client.queue_text(conversation, f"{who} {n}")
            for n in range(5)
            for who, device in (("ada", ada), ("ben", ben))
        )
    )
    await until(lambda: len(ada.texts()) == len(ben.texts()) == 10)
    assert ada.texts() == ben.texts()
    assert all(message.error is None for message in ada.messages + ben.messages)


async def test_receipts_and_typing_reach_the_other_side(people: People) -> None:
    ada, ben = await people.new(), await people.new()
    conversation = await ada.client.direct(ben.client.user_id)
    await ada.client.send_text(conversation, "read me")
    await ben.hears("read me")

    def receipts(field: str) -> list[Any]:
        return [n.payload.get(field) for n in ada.notices if n.name == "receipt"]

    await until(lambda: 1 in receipts("delivered_seq"), lambda: str(ada.notices))
    await ben.client.mark_read(conversation, 1)
    await until(lambda: 1 in receipts("read_seq"), lambda: str(ada.notices))
    ben.client.typing(conversation)
    await until(lambda: any(n.name == "typing" for n in ada.notices))


async def test_an_applications_own_payload_and_a_reply(people: People) -> None:
    ada, ben = await people.new(), await people.new()
    conversation = await ada.client.direct(ben.client.user_id)
    await ada.client.send(conversation, "location", {"lat": 52.5, "lon": 13.4})
    await until(lambda: ben.messages)
    assert (ben.messages[0].kind, ben.messages[0].data) == ("location", {"lat": 52.5, "lon": 13.4})
    answer = await ben.client.send_text(conversation, "nice", reply_to_id=ben.messages[0].id)
    await until(lambda: len(ada.messages) == 2)
    assert (ada.messages[1].id, ada.messages[1].reply_to_id) == (answer.id, ben.messages[0].id)


async def test_messages_can_be_iterated_and_a_failing_callback_harms_nothing(people: People) -> None:
    ada, ben = await people.new(), await people.new()

    def broken(event: ConversationEvent) -> None:
        raise ValueError("the application's defect")

    ben.client.on_event(broken)
    conversation = await ada.client.direct(ben.client.user_id)
    heard = []

    async def listen() -> None:
        async with contextlib.aclosing(ben.client.messages()) as messages:
            async for message in messages:
                heard.append(message.text)
                if len(heard) == 2:
                    return

    listening = asyncio.create_task(listen())
    await asyncio.sleep(0)
    await ada.client.send_text(conversation, "one")
    await ada.client.send_text(conversation, "two")
    await asyncio.wait_for(listening, 10)
    assert heard == ["one", "two"]


async def test_a_callback_cut_off_by_a_crash_is_called_again(people: People) -> None:
    store = Store()
    ada, ben = await people.new(), await people.new(store=store)
    conversation = await ada.client.direct(ben.client.user_id)
    reached = asyncio.Event()

    async def crashing(event: ConversationEvent) -> None:
        reached.set()
        await asyncio.Event().wait()

    ben.client.on_event(crashing)
    await ada.client.send_text(conversation, "do not lose me")
    await asyncio.wait_for(reached.wait(), 10)
    await ben.client.stop()
    again = await people.again(store)
    await again.hears("do not lose me")


async def test_prekeys_are_refilled_and_the_signed_one_rotated(people: People) -> None:
    ada = await people.new()
    counts = await ada.client.rest.key_counts()
    assert counts["one_time_prekeys"] == STOCK
    prekeys = ada.client.engine.prekeys
    await ada.client.account.tend_prekeys(prekeys)
    counts = await ada.client.rest.key_counts()
    assert counts["pq_one_time_prekeys"] == PQ_STOCK
    assert counts["pq_last_resort_prekey_id"] == prekeys.last_resort().key_id
    first_signed, first_last_resort = prekeys.current().key_id, prekeys.last_resort().key_id
    ben = await people.new()
    for _ in range(STOCK - LOW + 1):
        await ben.client.rest.device_keys(ada.client.user_id, ada.client.device_id)
    people.stack.clock.advance(ROTATE_AFTER + 1)
    await ada.client.account.tend_prekeys(prekeys)
    counts = await ada.client.rest.key_counts()
    assert counts["one_time_prekeys"] == STOCK + LOW - 1
    assert counts["pq_one_time_prekeys"] >= PQ_STOCK  # the notice may have led to an upload before
    assert prekeys.current().key_id > first_signed
    assert counts["pq_last_resort_prekey_id"] == prekeys.last_resort().key_id > first_last_resort
    conversation = await ben.client.direct(ada.client.user_id)
    await ben.client.send_text(conversation, "with the new key")
    await ada.hears("with the new key")
    assert ben.client.engine.sessions.post_quantum(ada.client.device_id)
    assert ada.client.engine.sessions.post_quantum(ben.client.device_id)


async def test_a_registration_whose_answer_is_lost_is_finished_by_trying_again(stack: Stack) -> None:
    store, username = Store(), name()
    first = Device(stack, store)
    adopt = first.client.rest.adopt
    first.client.rest.adopt = lambda session: (_ for _ in ()).throw(KeyboardInterrupt())  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        await first.client.register(username, PASSWORD)
    first.client.rest.adopt = adopt  # type: ignore[method-assign]
    await first.client.stop()
    second = Device(stack, store)
    await second.client.register(username, PASSWORD)
    devices = await second.client.rest.devices()
    assert [device.device_id for device in devices] == [second.client.device_id]
    await second.client.stop()


async def test_profiles(people: People) -> None:
    username = name()
    ada, ben = await people.new(username), await people.new()
    await ada.client.rest.update_profile(display_name="Ada")
    profile = await ben.client.profile(username)
    assert (profile.user_id, profile.display_name) == (ada.client.user_id, "Ada")
    with pytest.raises(ApiError) as unknown:
        await ben.client.direct("nobody_of_this_name")
    assert unknown.value.code == "user_not_found"


async def test_the_demonstration_is_right(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    def client(url: str, store: Store, **options: Any) -> WhisprClient:
        return WhisprClient(
            url, store, socket_url=stack.socket_url, transport=Gateway(stack), now=stack.clock.time, **options
        )

    async def tick() -> None:
        while True:
            await asyncio.sleep(0.1)
            stack.clock.advance(0.1)

    monkeypatch.setattr(stage, "WhisprClient", client)
    out = io.StringIO()
    ticking = asyncio.create_task(tick())
    code = await demo.run("http://gateway", Console(file=out, width=120), stack.clock.time)
    ticking.cancel()
    assert code == 0, out.getvalue()
    assert "checks passed" in out.getvalue()


async def test_more_conversations_than_one_socket_takes(
    people: People, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("whispr.client.live.TOPICS_PER_SOCKET", 3)
    ada, ben = await people.new(), await people.new()
    groups = [await ada.client.group([ben.client.user_id]) for _ in range(5)]
    for number, group in enumerate(groups):
        await ada.client.send_text(group, f"group {number}")
    await until(lambda: sorted(filter(None, ben.texts())) == [f"group {n}" for n in range(5)])
    assert len(ada.client.live._sockets) == 2


async def test_who_was_removed_while_away_is_told_and_forgets_the_group(people: People) -> None:
    ada, ben = await people.new(), await people.new()
    group = await ada.client.group([ben.client.user_id])
    await until(lambda: group in ben.client.conversations.ids())
    await ben.client.offline()
    await ada.client.rest.remove_member(group, ben.client.user_id)
    ben.client.online()
    await until(lambda: any(n.name == "conversation_closed" for n in ben.notices))
    assert group not in ben.client.conversations.ids()
    with pytest.raises(ApiError):
        await asyncio.wait_for(ben.client.send_text(group, "still there?"), 10)


async def test_entries_of_the_log_that_make_no_sense_stop_nothing(people: People) -> None:
    ada, ben = await people.new(), await people.new()
    conversation = await ada.client.direct(ben.client.user_id)
    await until(lambda: ben.client.live.open(conversation).joined)
    names = [
        "new_message",
        "message_edited",
        "message_deleted",
        "reaction_added",
        "reaction_removed",
        "message_pinned",
        "message_unpinned",
        "history_purged",
        "member_added",
        "member_removed",
        "of_the_future",
    ]
    bodies = [
        b'"user_id":"?"',
        b'"message_id":"?","message":{}',
        b'"message_id":null,"until_seq":[],"message":7',
    ]
    entries = [(name, body) for name in names for body in bodies]
    for seq, (event, body) in enumerate(entries, 1):
        raw = msgspec.Raw(b'{"seq":%d,%b}' % (seq, body))
        ben.client.live.open(conversation)._on_event(event, raw)
    for notice in ("read_synced", "needs_reencrypt", "conversation_added"):
        ben.client._user_event(notice, {"conversation_id": 7, "scheduled_id": None})
    await until(lambda: len(ben.events) == len(entries))
    assert ben.messages == []


def test_the_library_stands_alone() -> None:
    code = (
        "import sys, whispr.client, whispr.client.demo;"
        "print([m for m in sys.modules if m.startswith(('whispr.kit', 'whispr.services', 'whispr.contracts'))])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
