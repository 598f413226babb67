"""What every part of an instance stands on."""

from dataclasses import dataclass, field
from typing import Protocol

from whispr.instance.catalog import Entry
from whispr.instance.layout import Layout
from whispr.instance.settings import InstanceSettings
from whispr.instance.supervision import Family


class Progress(Protocol):
    """Tells the person at the terminal what happens."""

    def step(self, text: str) -> None:
        """Something that takes a moment begins."""

    def done(self, name: str, text: str) -> None:
        """A part is ready: one line."""

    def trouble(self, text: str) -> None:
        """Something went wrong that is being mended."""


@dataclass(frozen=True, slots=True)
class Site:
    """Settings, folders, processes and ports of one instance. `ports` is filled once, before anything starts."""

    settings: InstanceSettings
    entries: tuple[Entry, ...]
    layout: Layout
    progress: Progress
    family: Family
    ports: dict[str, int] = field(default_factory=dict)

    @property
    def url(self) -> str:
        """The public address."""
        host = "127.0.0.1" if self.settings.host in {"0.0.0.0", "::"} else self.settings.host  # noqa: S104
        return f"http://{host}:{self.settings.port}"
