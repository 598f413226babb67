"""A demonstration that checks itself: people with several devices, a group, absences, a lost phone, a blocked sender."""

from __future__ import annotations

import asyncio
import secrets
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final
from uuid import UUID

from rich.console import Console
from rich.panel import Panel
from rich.table import Table

from whispr.client.client import WhisprClient
from whispr.client.encoding import decode_base64
from whispr.client.events import ChatMessage, ConversationEvent, Notice
from whispr.client.failures import ApiError
from whispr.client.models import Message
from whispr.client.store import Store

PASSWORD: Final = "correct horse battery staple"  # noqa: S105 -- of accounts that live for a minute
PATIENCE: Final = 20.0


@dataclass
class Gadget:
    """One device and what it has seen. `label` is "Ada's phone"."""

    label: str
    owner: str
    client: WhisprClient
    path: Path
    events: dict[UUID, list[int]] = field(default_factory=dict)
    read: list[ChatMessage] = field(default_factory=list)
    notices: list[Notice] = field(default_factory=list)

    def watch(self) -> None:
        self.client.on_event(self._event)
        self.client.on_notice(self.notices.append)

    def _event(self, event: ConversationEvent) -> None:
        self.events.setdefault(event.conversation_id, []).append(event.seq)
        if event.event == "new_message" and event.message is not None and event.message.kind != "sender_key":
            self.read.append(event.message)

    def texts(self, conversation_id: UUID) -> list[str | None]:
        return [m.text for m in self.read if m.conversation_id == conversation_id and m.error is None]


class Demonstration:
    """Each step tells what happens, waits for it, and notes whether it was as expected."""

    def __init__(self, url: str, console: Console, folder: Path) -> None:
        self._url = url
        self._console = console
        self._folder = folder
        self._suffix = secrets.token_hex(4)
        self._gadgets: dict[str, Gadget] = {}
        self._secrets: list[str] = []
        self._checks: list[tuple[str, bool]] = []

    async def run(self) -> int:
        try:
            await self._people()
            direct = await self._direct()
            group = await self._group()
            await self._absence(group)
            await self._lost_phone(direct, group)
            await self._blocked()
            await self._server_view([direct, group])
            self._at_rest()
            return self._summary()
        finally:
            for gadget in self._gadgets.values():
                await gadget.client.stop()
                gadget.client.store.close()

    # The steps

    async def _people(self) -> None:
        self._step("Five people and a stranger", "Ada and Ben have a phone and a laptop each.")
        for owner in ("Ada", "Ben", "Cleo", "Dan", "Eve", "Mallory"):
            await self._add(owner, "phone", new_person=True)
        for owner in ("Ada", "Ben"):
            await self._add(owner, "laptop")
        table = Table("device", "fingerprint of its keys", box=None, header_style="dim")
        for gadget in self._gadgets.values():
            table.add_row(gadget.label, gadget.client.fingerprint[:29] + " …")
        self._console.print(table)
        self._check("every device has keys of its own", self._all_different())

    async def _direct(self) -> UUID:
        self._step(
            "Ada writes to Ben",
            "X3DH opens a session with each device, the Double Ratchet carries the messages.",
        )
        conversation = await self._of("Ada's phone").client.direct(self._name("Ben"))
        everyone = ["Ada's phone", "Ada's laptop", "Ben's phone", "Ben's laptop"]
        await self._say("Ada's phone", conversation, "Ben, are you free on Friday? 🌻", everyone)
        await self._say("Ben's laptop", conversation, "Yes! The usual place?", everyone)
        await self._say("Ada's laptop", conversation, "The usual place, at eight.", everyone)
        return conversation

    async def _group(self) -> UUID:
        self._step(
            "A group of five",
            "Each device has a sender key; after the first message one ciphertext serves all.",
        )
        others = [self._name(owner) for owner in ("Ben", "Cleo", "Dan", "Eve")]
        group = await self._of("Ada's phone").client.group(others, {"title": "Friday"})
        everyone = [label for label in self._gadgets if "Mallory" not in label]
        await self._say("Ada's phone", group, "Dinner on Friday at eight, who is in?", everyone)
        await self._say("Cleo's phone", group, "Me!", everyone)
        await self._say("Ada's phone", group, "Bring an umbrella.", everyone)
        kinds = await self._envelope_types("Ben's phone", group)
        self._console.print(
            f"   Ben's phone was sent envelopes of the types: {', '.join(kinds)}.", style="dim"
        )
        self._check("the group's second message of a device uses its sender key", kinds[-1] == "sender_key")
        return group

    async def _absence(self, group: UUID) -> None:
        self._step("Cleo is in a tunnel", "What is sent meanwhile waits on both sides.")
        cleo = self._of("Cleo's phone")
        await cleo.client.offline()
        texts = [f"Course {number} is decided." for number in (1, 2, 3)]
        for text in texts:
            await self._say(
                "Dan's phone", group, text, ["Ada's phone", "Dan's phone", "Eve's phone"], show=False
            )
        waiting = cleo.client.queue_text(group, self._secret("I am in a tunnel."))
        before = len(cleo.texts(group))
        self._console.print(f"   3 messages are sent; Cleo's phone has seen {before}, and has one to send.")
        cleo.client.online()
        sent = await asyncio.wait_for(waiting, PATIENCE)
        await self._until(lambda: "I am in a tunnel." in cleo.texts(group))
        self._show("Cleo's phone", [m for m in cleo.read if m.conversation_id == group][-4:])
        self._check("after the tunnel Cleo has everything, in order", cleo.texts(group)[-4:-1] == texts)
        self._check("what Cleo wrote in the tunnel was sent once", sent.seq == cleo.events[group][-1])

    async def _lost_phone(self, direct: UUID, group: UUID) -> None:
        self._step("Ben loses his phone", "He removes it, and installs Whispr on a new one, with new keys.")
        lost = self._gadgets.pop("Ben's phone")
        lost_id = lost.client.device_id
        await lost.client.stop()
        lost.client.store.close()
        await self._of("Ben's laptop").client.rest.remove_device(lost_id)
        new = await self._add("Ben", "new phone")
        await self._until(lambda: {direct, group} <= set(new.client.conversations.ids()))
        await self._say(
            "Ada's phone", direct, "New phone, Ben?", ["Ada's laptop", "Ben's laptop", "Ben's new phone"]
        )
        await self._say("Ada's phone", group, "Ben has a new phone.", self._everyone_in_group())
        unreadable = [m for m in new.read if m.error is not None]
        self._console.print(
            f"   The new phone reads none of the {len(unreadable)} messages from before: they were not made for it.",
            style="dim",
        )
        self._check(
            "a new device reads nothing from before it existed",
            bool(unreadable) and {m.error for m in unreadable} == {"no_envelope"},
        )
        await self._say("Ben's new phone", group, "Back again.", self._everyone_in_group())
        self._check(
            "the lost phone holds no key of the group any more",
            lost_id not in self._of("Ada's phone").client.engine.sender_keys.holders(group),
        )

    async def _blocked(self) -> None:
        self._step("Mallory is blocked", "Dan blocks Mallory, who tries to write to him all the same.")
        dan, mallory = self._of("Dan's phone"), self._of("Mallory's phone")
        conversation = await mallory.client.direct(self._name("Dan"))
        await self._say("Mallory's phone", conversation, "Hello, Dan.", ["Dan's phone"])
        await dan.client.rest.block(mallory.client.user_id)
        seen = len(dan.read)
        try:
            await asyncio.wait_for(mallory.client.send_text(conversation, "Why no answer?"), PATIENCE)
        except ApiError as error:
            refusal = error.code
        else:
            refusal = "accepted"
        self._console.print(f"   The server's answer to Mallory: [bold]{refusal}[/bold].")
        self._check("a blocked sender is refused", refusal == "blocked")
        await self._say("Dan's phone", await dan.client.direct(self._name("Ada")), "Peace.", ["Ada's phone"])
        mallory_id = mallory.client.user_id
        self._check(
            "nothing of the blocked sender arrives", all(m.sender_id != mallory_id for m in dan.read[seen:])
        )

    async def _server_view(self, conversations: list[UUID]) -> None:
        self._step(
            "What the server saw",
            "The same messages as the server has them: each device asks for what is stored for it.",
        )
        for conversation_id in conversations:
            stored = await self._stored(conversation_id)
            table = Table("seq", "from", "envelopes", "bytes", "begins", box=None, header_style="dim")
            for seq, (message, bodies) in list(stored.items())[:5]:
                kinds = Counter(kind for kind, _ in bodies)
                shown = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
                first = bodies[0][1] if bodies else b""
                size = sum(len(body) for _, body in bodies)
                table.add_row(
                    str(seq), self._owner(message.sender_id), shown, str(size), f"{first[:14].hex()}…"
                )
            self._console.print(table)
            everything = b"\0".join(body for _, bodies in stored.values() for _, body in bodies)
            self._check(
                "the server has something of every message", all(bodies for _, bodies in stored.values())
            )
            self._check(
                "no text of anybody is in what the server has",
                bool(everything) and not any(secret.encode() in everything for secret in self._secrets),
            )

    async def _stored(self, conversation_id: UUID) -> dict[int, tuple[Message, list[tuple[str, bytes]]]]:
        """By seq, each message with the type and bytes of all its envelopes, as far as today's devices are given them."""
        stored: dict[int, tuple[Message, list[tuple[str, bytes]]]] = {}
        for gadget in self._gadgets.values():
            if conversation_id not in gadget.client.conversations.ids():
                continue
            page = await gadget.client.rest.messages(conversation_id, after_seq=0, limit=100)
            for message in page.items:
                _, bodies = stored.setdefault(message.seq, (message, []))
                bodies += _bodies(message)
        return dict(sorted(stored.items()))

    def _at_rest(self) -> None:
        stored = b"".join(gadget.path.read_bytes() for gadget in self._gadgets.values())
        self._check(
            "no text of anybody is in the devices' files",
            not any(secret.encode() in stored for secret in self._secrets),
        )

    # What the steps are made of

    async def _add(self, owner: str, kind: str, *, new_person: bool = False) -> Gadget:
        label = f"{owner}'s {kind}"
        path = self._folder / f"{label}.whispr"
        store = await asyncio.to_thread(Store.open, path, PASSWORD)
        client = WhisprClient(self._url, store, name=label, platform="desktop" if kind == "laptop" else "ios")
        gadget = self._gadgets[label] = Gadget(label, owner, client, path)
        enter = client.register if new_person else client.login
        await enter(self._name(owner), PASSWORD)
        gadget.watch()
        await client.start()
        return gadget

    async def _say(
        self, sender: str, conversation_id: UUID, text: str, readers: Iterable[str], *, show: bool = True
    ) -> None:
        """Send, and wait until every reader has decrypted it."""
        readers = list(readers)
        client = self._of(sender).client
        await asyncio.wait_for(client.send_text(conversation_id, self._secret(text)), PATIENCE)
        arrived = await self._until(
            lambda: all(text in self._of(label).texts(conversation_id) for label in readers)
        )
        if show:
            self._console.print(f"   [bold]{sender}[/bold] writes: {text}")
            for label in readers:
                found = [m for m in self._of(label).read if m.text == text]
                if label != sender:
                    self._show(label, found[-1:])
        self._check(f"“{text}” is read by {len(readers)} devices", arrived)

    def _show(self, label: str, messages: list[ChatMessage]) -> None:
        """What this device decrypted."""
        for message in messages:
            self._console.print(f"      [green]✓[/green] {label:<16} {message.text}", style="dim")

    async def _until(self, condition: Callable[[], bool]) -> bool:
        try:
            async with asyncio.timeout(PATIENCE):
                while not condition():  # noqa: ASYNC110 -- conditions are about many things
                    await asyncio.sleep(0.02)
        except TimeoutError:
            return False
        return True

    async def _envelope_types(self, label: str, conversation_id: UUID) -> list[str]:
        page = await self._of(label).client.rest.messages(conversation_id, after_seq=0, limit=100)
        return [
            envelope.type for message in page.items for envelope in (message.content.envelopes or {}).values()
        ]

    def _everyone_in_group(self) -> list[str]:
        return [label for label in self._gadgets if "Mallory" not in label]

    def _of(self, label: str) -> Gadget:
        return self._gadgets[label]

    def _name(self, owner: str) -> str:
        return f"{owner.lower()}_{self._suffix}"

    def _owner(self, user_id: UUID) -> str:
        return next((g.owner for g in self._gadgets.values() if g.client.user_id == user_id), "?")

    def _secret(self, text: str) -> str:
        self._secrets.append(text)
        return text

    def _all_different(self) -> bool:
        return len({g.client.fingerprint for g in self._gadgets.values()}) == len(self._gadgets)

    def _step(self, title: str, text: str) -> None:
        self._console.print()
        self._console.print(Panel(text, title=f"[bold]{title}[/bold]", title_align="left", expand=False))

    def _check(self, what: str, right: bool) -> None:
        self._checks.append((what, right))
        if not right:
            self._console.print(f"   [bold red]✗ {what}[/bold red]")

    def _summary(self) -> int:
        for gadget in self._gadgets.values():
            for seqs in gadget.events.values():
                in_order = seqs == list(range(seqs[0], seqs[0] + len(seqs)))
                self._check(f"{gadget.label}: every event once, in order, without holes", in_order)
        table = Table("device", "events", "read", "not for it", title="Summary", title_justify="left")
        for gadget in self._gadgets.values():
            readable = sum(m.error is None for m in gadget.read)
            seen = sum(map(len, gadget.events.values()))
            table.add_row(gadget.label, str(seen), str(readable), str(len(gadget.read) - readable))
        self._console.print()
        self._console.print(table)
        wrong = [what for what, right in self._checks if not right]
        if wrong:
            self._console.print(f"[bold red]{len(wrong)} of {len(self._checks)} checks failed:[/bold red]")
            for what in wrong:
                self._console.print(f"  ✗ {what}")
            return 1
        self._console.print(f"[bold green]All {len(self._checks)} checks passed.[/bold green]")
        return 0


async def run(url: str, console: Console) -> int:
    """Demonstrate on the server at `url`. 0 when everything was as expected, else 1 and what was not."""
    with tempfile.TemporaryDirectory(prefix="whispr-demo-") as folder:
        return await Demonstration(url, console, Path(folder)).run()


def _bodies(message: Message) -> list[tuple[str, bytes]]:
    """What of a message the server gives to the asking device: types and ciphertexts."""
    bodies = [(e.type, decode_base64(e.body)) for e in (message.content.envelopes or {}).values()]
    if message.content.ciphertext is not None:
        bodies.append(("shared", decode_base64(message.content.ciphertext)))
    return bodies
