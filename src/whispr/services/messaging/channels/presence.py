"""Who is shown as present to whom: the kit's presence, seen through people's privacy."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from typing import Any, Final
from uuid import UUID

from whispr.kit.cache import Cache
from whispr.kit.channels import Channel, Presence
from whispr.kit.clock import Clock
from whispr.kit.identity import Caller
from whispr.kit.live import Live
from whispr.kit.pressure import Pressure
from whispr.services.messaging.channels.watches import Watch, Watches
from whispr.services.messaging.service.last_seen import LastSeen
from whispr.services.messaging.service.opening import SMALL_GROUP
from whispr.services.messaging.service.visibility import View, Visibility

# How often is looked for views that are old, how many are asked for at once, and how long others have their turn between.
_REFRESH_SECONDS: Final = 10.0
_REVIEWED_AT_ONCE: Final = 50
_PAUSE_SECONDS: Final = 0.05


class Whereabouts:
    """Presence of people (topic `user:ID`) and of open conversations (topic `conversation:ID`).

    A viewer's `presence_state` is pushed anew when relations or privacy change. `run()` is the supervised loop that makes
    good what a lost hint would have changed. Switched off, nobody is told of anyone: who is there is
    still kept, because it decides whom to notify.
    """

    def __init__(
        self,
        cache: Cache,
        clock: Clock,
        visibility: Visibility,
        last_seen: LastSeen,
        live: Live,
        pressure: Pressure,
    ) -> None:
        self.presence = Presence(
            cache,
            clock,
            cap=SMALL_GROUP,
            visible=self._may_see,
            on_offline=self._went_offline,
            pressure=pressure,
        )
        self._live = live
        self._is_shown = live.flag("presence")
        self._visibility = visibility
        self._last_seen = last_seen
        self._watches = Watches()
        self._tasks: set[asyncio.Task[None]] = set()
        live.on_change(self._switch)

    def enter(self, channel: Channel, topic: str, meta: dict[str, Any]) -> None:
        """The channel's person is present on `topic` while the channel lives."""
        self.presence.track(topic, str(channel.socket.caller.user_id), channel, meta)

    async def watch_contacts(self, channel: Channel) -> None:
        """Tell the channel of its person's contacts."""
        await self._watch(channel, None, None)

    async def watch_members(self, channel: Channel, topic: str, members: Iterable[UUID]) -> None:
        """Tell the channel who else has the conversation open."""
        await self._watch(channel, frozenset(members), (topic,))

    def leave(self, channel: Channel) -> None:
        """The channel is gone."""
        self.presence.untrack(channel)
        self.presence.unfollow(channel)
        self._watches.remove(channel)

    def changed(self, user_id: UUID) -> None:
        """Relations or privacy of `user_id` are not what they were."""
        for watch in self._watches.concerned(user_id):
            self._hold(self._review(watch))

    def having_contact(self, user_id: UUID) -> set[UUID]:
        """Who is connected here and has `user_id` among their contacts."""
        return self._watches.having_contact(user_id)

    def suspect(self) -> None:
        """Hints may have been missed: every view is asked for again soon."""
        for watch in self._watches:
            self._visibility.suspect(watch.view)

    def joined(self, channel: Channel, user_id: UUID) -> None:
        """`user_id` has become a member of the conversation that `channel` watches."""
        watch = self._watches.at(channel)
        if watch is not None and watch.view.subjects is not None and user_id not in watch.view.subjects:
            watch.view.subjects |= {user_id}
            self._watches.index(watch)
            self._hold(self._review(watch))

    async def run(self) -> None:
        """Review what has not been reviewed for long, for ever."""
        while True:
            await asyncio.sleep(_REFRESH_SECONDS)
            due = [watch for watch in self._watches if self._visibility.is_due(watch.view)]
            for start in range(0, len(due), _REVIEWED_AT_ONCE):
                some = due[start : start + _REVIEWED_AT_ONCE]
                await asyncio.gather(*(self._review(watch) for watch in some if watch in self._watches))
                await asyncio.sleep(_PAUSE_SECONDS)

    async def _watch(
        self, channel: Channel, subjects: frozenset[UUID] | None, topics: tuple[str, ...] | None
    ) -> None:
        if channel.closed:
            return
        watch = Watch(channel, View(channel.socket.caller.user_id, subjects), topics)
        # Known before it is filled, so that a change meanwhile is not missed.
        self._watches.add(watch)
        await self._review(watch, is_new=True)

    async def _review(self, watch: Watch, *, is_new: bool = False) -> None:
        """Ask what the viewer may see now, and tell them if that is new.

        One question at a time: a slow answer must not replace a newer one.
        """
        watch.is_outdated = True
        if watch.is_reviewed:
            return
        watch.is_reviewed = True
        try:
            while watch.is_outdated:
                watch.is_outdated = False
                has_changed = await self._ask(watch)
                if (has_changed or is_new) and watch in self._watches:
                    is_new = False
                    await self._show(watch)
        finally:
            watch.is_reviewed = False

    async def _ask(self, watch: Watch) -> bool:
        self._watches.begin(watch)
        try:
            return await self._visibility.refresh(watch.view)
        finally:
            self._watches.end(watch)

    def _switch(self) -> None:
        """Follow the feature being switched on or off."""
        if self._live.flag("presence") == self._is_shown:
            return
        self._is_shown = not self._is_shown
        if self._is_shown:
            self._hold(self._show_all())
            return
        for watch in self._watches:
            self.presence.unfollow(watch.channel)
            watch.channel.push("presence_state", {})

    async def _show_all(self) -> None:
        for watch in self._watches:
            if watch in self._watches:
                await self._show(watch)

    async def _show(self, watch: Watch) -> None:
        if not self._is_shown:
            return
        view = watch.view
        topics = watch.topics or [f"user:{user_id}" for user_id in sorted(view.online)]
        await self.presence.follow(watch.channel, topics)
        absent = await self._absent(view)
        if absent and not watch.channel.closed:
            watch.channel.push("last_seen", {"users": absent})

    async def _absent(self, view: View) -> dict[str, Any]:
        curious = sorted(view.last_seen)[:SMALL_GROUP]
        online = await self.presence.online(user_id for user_id in curious if user_id in view.online)
        times = await self._last_seen.of([user_id for user_id in curious if user_id not in online])
        return {str(user_id): at for user_id, at in times.items()}

    def _may_see(self, viewer: Caller, key: str) -> bool:
        subject = UUID(key)
        return subject == viewer.user_id or any(
            subject in watch.view.online for watch in self._watches.of(viewer.user_id)
        )

    def _went_offline(self, topic: str, key: str, at: float) -> None:
        if topic == f"user:{key}":
            self._hold(self._last_seen.note(UUID(key), at))

    def _hold(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
