"""`WhisprClient`: one device of one person."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Sequence
from datetime import datetime
from typing import Any, Final
from urllib.parse import urlsplit, urlunsplit
from uuid import UUID

import httpx
import msgspec

from whispr.client.account import Account, keep_session, load_session
from whispr.client.actions import Actions
from whispr.client.backoff import Backoff
from whispr.client.conversations import Conversations
from whispr.client.crypto.engine import Engine, Payload
from whispr.client.crypto.identity import fingerprint
from whispr.client.devices import Devices
from whispr.client.events import ChatMessage, ConversationEvent, Notice, OnEvent, OnNotice
from whispr.client.expiry import Expiry
from whispr.client.failures import ApiError, ClientError, SessionEnded, Unreachable
from whispr.client.history import History
from whispr.client.inbox import Inbox
from whispr.client.linking import Linking
from whispr.client.live import Live
from whispr.client.models import Claim, Profile, SecondFactor, Sent
from whispr.client.outbox import Expires, Outbox
from whispr.client.rest import RestClient
from whispr.client.scheduled import Schedule
from whispr.client.socket import SocketOptions
from whispr.client.store import Store

log = logging.getLogger(__name__)

TEND_EVERY: Final = 3600.0
# Messages often disappear together, and each rewriting of the store costs its whole size.
SHRED_AFTER: Final = 5.0


class WhisprClient:
    """Chats end-to-end encrypted; everything that has to last is in `store`.

    ```python
    client = WhisprClient("https://chat.example", Store.open(path, passphrase))
    await client.register("ada", password)      # once; `login` for one more device of the same person
    await client.start()
    conversation = await client.direct("bob")
    await client.send_text(conversation, "hello")
    async for message in client.messages():
        ...
    ```

    `url` is the public address of the server; `socket_url` only where sockets live elsewhere.
    `require_post_quantum` refuses sessions with devices that offer no ML-KEM key. `now` gives epoch seconds.
    """

    def __init__(
        self,
        url: str,
        store: Store,
        *,
        name: str = "Whispr client",
        platform: str = "desktop",
        socket_url: str | None = None,
        socket_options: SocketOptions | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
        require_post_quantum: bool = False,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.store = store
        self._name = name
        self._platform = platform
        self._socket_url = socket_url or _socket_url(url)
        self._socket_options = socket_options
        self._require_post_quantum = require_post_quantum
        self._now = now
        self._notice_callbacks: list[OnNotice] = []
        self._event_callbacks: list[OnEvent] = []
        self.rest = RestClient(
            url,
            session=load_session(store),
            on_session=lambda session: keep_session(store, session),
            transport=transport,
        )
        self.account = Account(store, self.rest, now)
        self.conversations = Conversations(store, self.rest)
        self.history = History(store)
        self.linking = Linking(self.rest, self.account)
        self.actions = Actions(self.rest, self.history)
        self._tasks: set[asyncio.Task[None]] = set()
        self._running = False
        self._backoff = Backoff(base=0.5, cap=30.0)

    # Who

    async def register(self, username: str, password: str) -> None:
        """Make an account, with this store as its first device. Raises ApiError, Unreachable."""
        await self.account.enter("register", username, password, self._name, self._platform)

    async def login(self, username: str, password: str, second_factor: SecondFactor | None = None) -> None:
        """Add this store as a new device of an account.

        Raises ApiError (`totp_required`: again, with a second factor), Unreachable.
        """
        await self.account.enter("login", username, password, self._name, self._platform, second_factor)

    async def claim_link(self, token: str) -> Claim:
        """Make this store a device of the account whose other device shows `token`; show the check code to compare.

        `finish_link` then waits for the other device. Raises ApiError, Unreachable, WrongCheckCode.
        """
        return await self.linking.claim(token, self._name, self._platform)

    async def finish_link(self, token: str) -> None:
        """Raises ApiError (`link_refused`, `link_expired`), Unreachable."""
        await self.linking.finish(token)

    @property
    def user_id(self) -> UUID:
        return self.rest.session.user_id

    @property
    def device_id(self) -> UUID:
        return self.rest.session.device_id

    @property
    def fingerprint(self) -> str:
        """This device's, for people to compare."""
        identity = self.account.identity
        return fingerprint(identity.identity_key, identity.signing_key)

    # Running

    async def start(self) -> None:
        """Connect, and go on from where the store says. Returns without waiting for the connection."""
        if self._running:
            return
        self._running = True
        self.engine = Engine(
            self.store,
            self.account.identity,
            self.user_id,
            self.device_id,
            self._now,
            require_post_quantum=self._require_post_quantum,
        )
        self._devices = Devices(self.store, self.engine, self.rest, self._notify)
        self.outbox = Outbox(
            self.store,
            self.engine,
            self._devices,
            self.conversations,
            self.history,
            push=self._push,
            notify=self._notify,
        )
        self.schedule = Schedule(self.store, self.outbox, self.history, self.rest, self._notify)
        self._expiry = Expiry(self.store, self.history, self.user_id, notify=self._notify, now=self._now)
        inbox = Inbox(
            self.store,
            self.engine,
            self._devices,
            self.conversations,
            self.history,
            self._expiry,
            hand_over=self._dispatch,
            acknowledge=self._acknowledge,
            on_own=self._own,
        )
        self.live = Live(
            self._socket_url,
            self.rest,
            self.user_id,
            self.conversations,
            inbox,
            options=self._socket_options,
            notify=self._notify,
            on_user_event=self._user_event,
            on_read=self._read_here,
        )
        for conversation_id in self.conversations.ids():
            self.live.open(conversation_id)
        self._spawn(inbox.run())
        self._spawn(self._expiry.run())
        # An earlier run may have ended before it came to it.
        self.history.erased.set()
        self._spawn(self._shred())
        self._spawn(self._tend())
        self.outbox.start()
        self.live.start()

    async def stop(self) -> None:
        """Disconnect and end everything; the store stays open."""
        if self._running:
            self._running = False
            self.live.close()
            await self.outbox.stop()
            await self.live.stop()
            for task in list(self._tasks):
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            self._compact()
        await self.rest.close()

    async def offline(self) -> None:
        """Disconnect for a while. Messages sent meanwhile wait for `online()`."""
        await self.live.stop()

    def online(self) -> None:
        self.live.start()

    # Hearing

    def on_event(self, callback: OnEvent) -> None:
        """Call `callback`, plain or async, with every event of every conversation: once, and in order within each.

        Events kept before a crash but not handed over are handed over after the next start. So an event may come
        a second time only if the crash fell between the callback's end and the note of it.
        """
        self._event_callbacks.append(callback)

    def on_notice(self, callback: OnNotice) -> None:
        self._notice_callbacks.append(callback)

    async def messages(self) -> AsyncGenerator[ChatMessage, None]:
        """Messages as they arrive from now on, this device's own included."""
        queue: asyncio.Queue[ChatMessage] = asyncio.Queue()

        def keep(event: ConversationEvent) -> None:
            if (
                event.event == "new_message"
                and event.message is not None
                and event.message.kind != "sender_key"
            ):
                queue.put_nowait(event.message)

        self._event_callbacks.append(keep)
        try:
            while True:
                yield await queue.get()
        finally:
            self._event_callbacks.remove(keep)

    # Conversations

    async def direct(self, user: UUID | str) -> UUID:
        """The conversation with a person, given by id or username; begun if there is none."""
        return await self._create("direct", [await self._user_id(user)])

    async def group(self, members: Sequence[UUID | str], metadata: dict[str, Any] | None = None) -> UUID:
        """A new group with these people."""
        return await self._create("group", [await self._user_id(member) for member in members], metadata)

    async def send_text(
        self,
        conversation_id: UUID,
        text: str,
        *,
        reply_to_id: UUID | None = None,
        client_id: UUID | None = None,
        expires: Expires | None = None,
    ) -> Sent:
        """Send, and wait until the server has committed it; offline, that is after coming back.

        The message is kept and sent on even when the waiting is cancelled or the process ends. Raises ApiError when the
        server refuses it, for example `blocked`.
        """
        return await asyncio.shield(
            self.outbox.send(
                conversation_id,
                Payload("text", text),
                reply_to_id=reply_to_id,
                client_id=client_id,
                expires=expires,
            )
        )

    async def edit_text(self, message_id: UUID, text: str) -> None:
        """Give a message of one's own another text; kept and sent like a message. Raises ApiError."""
        message = self.actions.known(message_id)
        await asyncio.shield(self.outbox.edit(message, Payload("text", text)))

    async def schedule_text(
        self,
        conversation_id: UUID,
        text: str,
        send_at: datetime,
        *,
        reply_to_id: UUID | None = None,
        expires: Expires | None = None,
    ) -> UUID:
        """Have the server send it later. Returns the id by which `schedule` changes or cancels it."""
        return await self.schedule.add(
            conversation_id, Payload("text", text), send_at, reply_to_id=reply_to_id, expires=expires
        )

    async def reschedule(
        self, scheduled_id: UUID, *, text: str | None = None, send_at: datetime | None = None
    ) -> None:
        """Raises ApiError, for example `already_sent`."""
        payload = None if text is None else Payload("text", text)
        await self.schedule.change(scheduled_id, payload=payload, send_at=send_at)

    def queue_text(self, conversation_id: UUID, text: str) -> asyncio.Future[Sent]:
        """Like `send_text`, without waiting."""
        return self.outbox.send(conversation_id, Payload("text", text))

    async def send(self, conversation_id: UUID, kind: str, data: dict[str, Any]) -> Sent:
        """Send an application's own payload."""
        return await asyncio.shield(self.outbox.send(conversation_id, Payload(kind, data=data)))

    async def mark_read(self, conversation_id: UUID, seq: int) -> None:
        """Everything up to `seq`. Delivery is acknowledged by the client itself."""
        self._read_here(conversation_id, seq)
        await self.live.push(conversation_id, "mark_as_read", {"seq": seq})

    def typing(self, conversation_id: UUID, *, stop: bool = False) -> None:
        self.live.open(conversation_id).cast("typing", {"state": "stop" if stop else "start"})

    # People

    async def profile(self, user: UUID | str) -> Profile:
        return await self.rest.profile(await self._user_id(user))

    def fingerprints(self, user_id: UUID) -> dict[UUID, str]:
        """Of the person's devices as far as they are known, by device id."""
        known = self.engine.directory.devices_of(user_id) or []
        return {device.device_id: device.fingerprint for device in known}

    # Inside

    async def _push(self, conversation_id: UUID, event: str, payload: dict[str, Any]) -> msgspec.Raw:
        return await self.live.push(conversation_id, event, payload)

    def _acknowledge(self, conversation_id: UUID, seq: int) -> None:
        self.live.acknowledge(conversation_id, seq)

    def _own(self, client_id: UUID) -> None:
        self.outbox.seen(client_id)
        self.schedule.sent(client_id)

    def _read_here(self, conversation_id: UUID, seq: int) -> None:
        with self.store.transaction():
            self._expiry.read(conversation_id, seq)

    async def _create(self, kind: str, members: list[UUID], metadata: dict[str, Any] | None = None) -> UUID:
        conversation = await self.rest.create_conversation(kind, members, metadata)
        self.conversations.keep(conversation)
        self.live.open(conversation.id)
        return conversation.id

    async def _user_id(self, user: UUID | str) -> UUID:
        if isinstance(user, UUID):
            return user
        profile = await self.rest.find_user(user)
        if profile is None:
            raise ApiError("user_not_found", 404, f"There is nobody called {user}.")
        return profile.user_id

    def _user_event(self, event: str, payload: dict[str, Any]) -> None:
        try:
            self._follow(event, payload)
        except (AttributeError, KeyError, TypeError, ValueError):
            # It must not stop the connection, which is where this is called from.
            log.warning("The server sent a %s that makes no sense.", event)
        if event != "undelivered":  # pages of what the conversations' own channels bring
            self._notify(Notice(event, payload))

    def _follow(self, event: str, payload: dict[str, Any]) -> None:
        if event == "joined":
            # Additions are pushed to whoever is there; whoever was away looks for them.
            self._spawn(self._persist(self._refresh_conversations))
            self._spawn(self._persist(self.schedule.resume))
        elif event == "conversation_added":
            conversation_id = UUID(payload["conversation"]["id"])
            self._spawn(self._persist(lambda: self._add(conversation_id)))
        elif event == "conversation_removed":
            conversation_id = UUID(payload["conversation_id"])
            self.live.leave(conversation_id)
            self.conversations.forget(conversation_id)
        elif event == "prekeys_low" and payload.get("device_id") in (None, str(self.device_id)):
            self._spawn(self._persist(lambda: self.account.tend_prekeys(self.engine.prekeys)))
        elif event == "needs_reencrypt":
            scheduled_id = UUID(payload["scheduled_id"])
            self._spawn(self._persist(lambda: self.schedule.encrypt_anew(scheduled_id, payload)))
        elif event == "read_synced":
            self._read_here(UUID(payload["conversation_id"]), int(payload["read_seq"]))

    async def _refresh_conversations(self) -> None:
        async for conversation in self.rest.conversations():
            if self.conversations.get(conversation.id) is None:
                await self._add(conversation.id)

    async def _add(self, conversation_id: UUID) -> None:
        await self.conversations.load(conversation_id, again=True)
        self.live.open(conversation_id)

    async def _persist(self, work: Callable[[], Awaitable[None]]) -> None:
        """Until it succeeds or the server refuses it for good."""
        attempt = 0
        while True:
            try:
                await work()
            except (Unreachable, ApiError) as error:
                if isinstance(error, ApiError) and not error.passing:
                    raise
                attempt += 1
                await asyncio.sleep(self._backoff.delay(attempt))
            else:
                return

    async def _tend(self) -> None:
        while True:
            try:
                await self.account.tend_prekeys(self.engine.prekeys)
            except SessionEnded:
                return
            except ClientError as error:
                log.warning("Prekeys could not be tended: %s", error)
            await asyncio.sleep(TEND_EVERY)

    async def _shred(self) -> None:
        while True:
            await self.history.erased.wait()
            await asyncio.sleep(SHRED_AFTER)
            self._compact()

    def _compact(self) -> None:
        if self.history.erased.is_set():
            self.history.erased.clear()
            try:
                self.store.compact()
            except OSError as error:
                log.warning("What was deleted is still in the store's file: %s", error)

    async def _dispatch(self, event: ConversationEvent) -> None:
        for callback in list(self._event_callbacks):
            try:
                result = callback(event)
                if isinstance(result, Awaitable):
                    await result
            except Exception:
                # A defect of the application must not stop its messages.
                log.exception("A callback failed on %s %d.", event.event, event.seq)

    def _notify(self, notice: Notice) -> None:
        for callback in list(self._notice_callbacks):
            try:
                callback(notice)
            except Exception:
                # A defect of the application must not stop its connection.
                log.exception("A callback failed on the notice %s.", notice.name)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            error = task.exception()
            level = logging.WARNING if isinstance(error, ClientError) else logging.ERROR
            log.log(level, "A background task failed: %r", error, exc_info=error)


def _socket_url(url: str) -> str:
    parts = urlsplit(url)
    scheme = "wss" if parts.scheme == "https" else "ws"
    return urlunsplit((scheme, parts.netloc, "/socket/websocket", "", ""))
