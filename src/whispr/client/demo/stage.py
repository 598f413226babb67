"""What the demonstration's scenes are made of: devices, what they have seen, checks, and telling about it."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final
from uuid import UUID

from rich.console import Console
from rich.panel import Panel
from rich.table import Table

from whispr.client.client import WhisprClient
from whispr.client.events import ChatMessage, ConversationEvent, Notice
from whispr.client.models import SecondFactor
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


class Stage:
    """Each scene tells what happens, waits for it, and notes whether it was as expected.

    `now` gives epoch seconds, as the server has them.
    """

    def __init__(self, url: str, console: Console, folder: Path, now: Callable[[], float]) -> None:
        self.url = url
        self.console = console
        self.folder = folder
        self.now = now
        self.suffix = secrets.token_hex(4)
        self.gadgets: dict[str, Gadget] = {}
        self.secrets: list[str] = []
        self.checks: list[tuple[str, bool]] = []

    async def close(self) -> None:
        for gadget in self.gadgets.values():
            await gadget.client.stop()
            gadget.client.store.close()

    async def add(
        self,
        owner: str,
        kind: str,
        *,
        new_person: bool = False,
        second_factor: SecondFactor | None = None,
    ) -> Gadget:
        """A device that registers its owner, or logs in."""
        gadget = await self.unpack(owner, kind)
        if new_person:
            await gadget.client.register(self.name(owner), PASSWORD)
        else:
            await gadget.client.login(self.name(owner), PASSWORD, second_factor)
        await self.switch_on(gadget)
        return gadget

    async def unpack(self, owner: str, kind: str) -> Gadget:
        """A device that is nobody's yet."""
        label = f"{owner}'s {kind}"
        path = self.folder / f"{label}.whispr"
        store = await asyncio.to_thread(Store.open, path, PASSWORD)
        platform = "desktop" if kind == "laptop" else "ios"
        client = WhisprClient(self.url, store, name=label, platform=platform)
        return Gadget(label, owner, client, path)

    async def switch_on(self, gadget: Gadget) -> None:
        self.gadgets[gadget.label] = gadget
        gadget.watch()
        await gadget.client.start()

    async def say(
        self, sender: str, conversation_id: UUID, text: str, readers: Iterable[str], *, show: bool = True
    ) -> None:
        """Send, and wait until every reader has decrypted it."""
        readers = list(readers)
        client = self.of(sender).client
        await asyncio.wait_for(client.send_text(conversation_id, self.secret(text)), PATIENCE)
        arrived = await self.until(
            lambda: all(text in self.of(label).texts(conversation_id) for label in readers)
        )
        if show:
            self.console.print(f"   [bold]{sender}[/bold] writes: {text}")
            for label in readers:
                found = [m for m in self.of(label).read if m.text == text]
                if label != sender:
                    self.show(label, found[-1:])
        self.check(f"“{text}” is read by {len(readers)} devices", arrived)

    def show(self, label: str, messages: list[ChatMessage]) -> None:
        """What this device decrypted."""
        for message in messages:
            self.console.print(f"      [green]✓[/green] {label:<16} {message.text}", style="dim")

    async def until(self, condition: Callable[[], bool]) -> bool:
        try:
            async with asyncio.timeout(PATIENCE):
                while not condition():  # noqa: ASYNC110 -- conditions are about many things
                    await asyncio.sleep(0.02)
        except TimeoutError:
            return False
        return True

    async def envelope_types(self, label: str, conversation_id: UUID) -> list[str]:
        page = await self.of(label).client.rest.messages(conversation_id, after_seq=0, limit=100)
        return [
            envelope.type for message in page.items for envelope in (message.content.envelopes or {}).values()
        ]

    def everyone_in_group(self) -> list[str]:
        return [label for label in self.gadgets if "Mallory" not in label]

    def of(self, label: str) -> Gadget:
        return self.gadgets[label]

    def name(self, owner: str) -> str:
        return f"{owner.lower()}_{self.suffix}"

    def owner(self, user_id: UUID) -> str:
        return next((g.owner for g in self.gadgets.values() if g.client.user_id == user_id), "?")

    def secret(self, text: str) -> str:
        # Three bytes turn up among a million of ciphertext by chance.
        assert len(text) > 5, "too short to be looked for"
        self.secrets.append(text)
        return text

    def all_different(self) -> bool:
        return len({g.client.fingerprint for g in self.gadgets.values()}) == len(self.gadgets)

    def step(self, title: str, text: str) -> None:
        self.console.print()
        self.console.print(Panel(text, title=f"[bold]{title}[/bold]", title_align="left", expand=False))

    def check(self, what: str, right: bool) -> None:
        self.checks.append((what, right))
        if not right:
            self.console.print(f"   [bold red]✗ {what}[/bold red]")

    def summary(self) -> int:
        for gadget in self.gadgets.values():
            for seqs in gadget.events.values():
                in_order = seqs == list(range(seqs[0], seqs[0] + len(seqs)))
                self.check(f"{gadget.label}: every event once, in order, without holes", in_order)
        table = Table("device", "events", "read", "not for it", title="Summary", title_justify="left")
        for gadget in self.gadgets.values():
            readable = sum(m.error is None for m in gadget.read)
            seen = sum(map(len, gadget.events.values()))
            table.add_row(gadget.label, str(seen), str(readable), str(len(gadget.read) - readable))
        self.console.print()
        self.console.print(table)
        wrong = [what for what, right in self.checks if not right]
        if wrong:
            self.console.print(f"[bold red]{len(wrong)} of {len(self.checks)} checks failed:[/bold red]")
            for what in wrong:
                self.console.print(f"  ✗ {what}")
            return 1
        self.console.print(f"[bold green]All {len(self.checks)} checks passed.[/bold green]")
        return 0
