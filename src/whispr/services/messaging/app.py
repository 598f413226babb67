"""Puts the messaging service together."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from uuid import UUID

import whispr
from whispr.kit.db import Database
from whispr.kit.http import create_app
from whispr.kit.maintenance import Maintenance
from whispr.kit.outbox import Dispatcher, Handler
from whispr.kit.process import Context, Service
from whispr.kit.settings import load, split_bind
from whispr.services.auth.client import AuthClient
from whispr.services.media.client import MediaClient
from whispr.services.media.client import MediaLink as LinkOfMedia
from whispr.services.messaging import api, channels, jobs, rpc
from whispr.services.messaging.models import Announcement
from whispr.services.messaging.service.acquaintances import Acquaintances
from whispr.services.messaging.service.announcing import Announcing, Online
from whispr.services.messaging.service.changes import Changes
from whispr.services.messaging.service.contact import Contact
from whispr.services.messaging.service.conversations import Conversations
from whispr.services.messaging.service.devices import Devices
from whispr.services.messaging.service.directory import Directory
from whispr.services.messaging.service.erasure import Erasure
from whispr.services.messaging.service.events import EventBus
from whispr.services.messaging.service.expiry import Expiry
from whispr.services.messaging.service.export import Export
from whispr.services.messaging.service.firing import Firing
from whispr.services.messaging.service.history import History
from whispr.services.messaging.service.housekeeping import Housekeeping
from whispr.services.messaging.service.last_seen import LastSeen
from whispr.services.messaging.service.media_links import (
    MEDIA_LINKED,
    MEDIA_UNLINKED,
    MediaAccess,
    MediaLink,
    MediaLinks,
)
from whispr.services.messaging.service.members import Members
from whispr.services.messaging.service.opening import Openings
from whispr.services.messaging.service.outdated import Outdated
from whispr.services.messaging.service.pace import Pace, Rate, SendingPace
from whispr.services.messaging.service.pins import Pins
from whispr.services.messaging.service.privacy import ReadReceipts
from whispr.services.messaging.service.reactions import Reactions
from whispr.services.messaging.service.receipts import Receipts
from whispr.services.messaging.service.reports import REPORT_SUBMITTED, Reports
from whispr.services.messaging.service.restrictions import INCIDENT, Restrictions
from whispr.services.messaging.service.retention import Retention
from whispr.services.messaging.service.scheduled import Scheduled
from whispr.services.messaging.service.sending import Sending
from whispr.services.messaging.service.signatures import SignatureChecker
from whispr.services.messaging.service.status import Status
from whispr.services.messaging.service.structure import Structure
from whispr.services.messaging.service.timers import Timers
from whispr.services.messaging.service.usage import Usage
from whispr.services.messaging.service.visibility import Visibility
from whispr.services.messaging.service.volume import Approaches, Volume
from whispr.services.messaging.settings import MessagingLive, MessagingSettings
from whispr.services.messaging.store.sending import PLANNER
from whispr.services.notification.client import Event, NotificationClient
from whispr.services.scheduling.client import SchedulingClient
from whispr.services.user.client import UserClient


async def build(context: Context) -> Service:
    """messaging; it cannot do without `auth` (devices, keys) and `user` (who may write to whom)."""
    settings = load(MessagingSettings)
    context.live.declare(MessagingLive)
    database = context.database(settings.database_url)
    clock = context.clock
    auth = AuthClient(context.neighbour("auth"))
    user = UserClient(context.neighbour("user"))
    identity = context.identity(auth)

    directory = Directory(
        database,
        context.cache,
        clock,
        max_conversations=settings.cached_conversations,
        max_members=settings.cached_members,
    )
    contact = Contact(user, clock)
    read_receipts = ReadReceipts(user, contact, context.cache, clock)
    history = History(database)
    receipts = Receipts(database, clock)
    bus = EventBus(context.cache, history)
    bus.on_structure(directory.invalidate)
    whereabouts = channels.Whereabouts(
        context.cache,
        clock,
        Visibility(user, clock),
        LastSeen(context.cache),
        context.live,
        context.pressure,
    )
    dispatcher = Dispatcher(
        database,
        clock,
        {
            **_announcing(context, database, whereabouts.presence),
            **_media_links(context),
            **_timers(context, database),
        },
        batch=20,
        ttl=timedelta(hours=settings.outbox_hours),
        lasting={REPORT_SUBMITTED, INCIDENT, MEDIA_LINKED, MEDIA_UNLINKED},
    )
    reports = Reports(
        database, clock, context.limiter, dispatcher.wake, life=timedelta(days=settings.report_days)
    )
    expiry = Expiry(database, clock, bus.publish, bus.suspect, dispatcher.wake)
    receipts.on_moved(expiry.readers_moved)
    bus.on_structure(expiry.reconsider)
    retention = Retention(
        database,
        clock,
        bus.publish,
        bus.suspect,
        dispatcher.wake,
        longest=lambda: _days(context.live.value("retention_days", settings.retention_days)),
    )
    is_limited = context.common.rate_limits == "on"
    restrictions = Restrictions(database, context.cache, clock, bus)
    volume = _volume(settings, context, restrictions)
    approaches = Approaches(restrictions, volume if is_limited else None)
    structure = Structure(database, clock, directory, user, bus, approaches, dispatcher.wake)
    members = Members(structure, read_receipts, context.limiter)
    conversations = Conversations(structure, members, read_receipts, context.limiter)
    housekeeping = Housekeeping(
        database,
        clock,
        receipt_detail=timedelta(days=settings.receipt_detail_days),
        cursor_life=timedelta(days=settings.cursor_days),
    )
    sending_database = Database(
        settings.database_url,
        pool_size=2,
        application_name="whispr-messaging-sending",
        settings=PLANNER,
    )
    devices = Devices(auth, clock)
    signatures = SignatureChecker(settings.signature_processes)
    pace = _pace(settings, context)
    sending = Sending(
        sending_database,
        clock,
        directory,
        devices,
        contact,
        signatures,
        bus.publish,
        bus.suspect,
        on_expiring=expiry.expects,
        pace=pace if is_limited else None,
        restrictions=restrictions,
        volume=volume if is_limited else None,
    )
    changes = Changes(structure, sending)
    reactions = Reactions(structure, sending, ensure_on=lambda: context.live.require("reactions"))
    pins = Pins(structure, sending)
    # Where scheduling does not run nobody calls for them, and nobody is waited for.
    grace = settings.scheduled_grace_seconds if context.common.scheduling_address else 0
    firing = Firing(database, clock, sending, directory, bus, grace=timedelta(seconds=grace))

    def scheduled_changed() -> None:
        firing.wake()
        dispatcher.wake()

    scheduled = Scheduled(
        database,
        clock,
        sending,
        context.limiter,
        scheduled_changed,
        ensure_on=lambda: context.live.require("scheduled_messages"),
    )
    rooms = channels.Rooms(bus)
    typists = channels.Typists(rooms, bus, directory, contact, clock, context.live, context.pressure)
    channels.ReceiptTeller(
        receipts, rooms, bus, directory, contact, read_receipts, context.live, context.pressure
    )
    reads = Pace(clock, rate=settings.read_rate, burst=settings.read_burst, name="reads")
    _follow_live(context, settings, pace, reads)
    context.pressure.watch(sending.waiting_seconds)
    desk = channels.Desk(
        clock,
        rooms,
        sending,
        changes,
        reactions,
        pins,
        history,
        Openings(database, directory, history, read_receipts),
        receipts,
        devices,
        typists,
        whereabouts,
        scheduled,
        reads=reads if is_limited else None,
    )
    endpoint = channels.build_endpoint(
        identity, desk, bus, clock, max_sockets=settings.max_sockets, max_channels=settings.max_channels
    )
    news = channels.DeviceNews(endpoint.hub, whereabouts, Acquaintances(database))
    outdated = Outdated(
        context.cache, devices, contact, whereabouts.changed, news.changed, whereabouts.suspect
    )
    ports: dict[str, int] = {}
    maintenance = Maintenance(database, log_retention=housekeeping.run_once)

    async def start() -> None:
        directory.start()
        read_receipts.start()
        bus.start()
        outdated.start()
        restrictions.start()
        host, port = split_bind(settings.socket_bind)
        ports["socket"] = await endpoint.listen(host, port, reuse_port=context.common.share_ports)

    async def drain() -> None:
        await endpoint.drain(min(5.0, context.common.shutdown_seconds / 2), 2.0)

    http = create_app(
        title="Whispr messaging service",
        description="Conversations, their members, messages and receipts.",
        version=whispr.__version__,
        routers=[
            api.build_router(
                conversations=conversations,
                members=members,
                directory=directory,
                history=history,
                receipts=receipts,
                status=Status(database, read_receipts),
                sending=sending,
                changes=changes,
                reactions=reactions,
                pins=pins,
                reports=reports,
                export=Export(database, clock, directory, history, conversations, context.limiter),
                restrictions=restrictions,
                volume=volume,
                scheduled=scheduled,
            )
        ],
        identity=identity,
    )
    http.router.routes.extend(endpoint.longpoll_routes())

    return Service(
        name="messaging",
        http=http,
        rpc=[
            rpc.register(
                Erasure(structure),
                expiry,
                retention,
                MediaAccess(database, clock),
                Usage(database, clock, threshold=settings.usage_threshold),
                firing,
            ),
            maintenance.register,
        ],
        loops={
            **jobs.loops(
                dispatcher,
                receipts,
                housekeeping,
                expiry,
                retention,
                reports,
                firing,
                scheduled,
                scheduled_life=timedelta(days=settings.scheduled_days),
            ),
            "sending": sending.run,
            "pace": pace.run,
            "restrictions": restrictions.run,
            "volume": volume.run,
            "events": bus.run,
            "typing": typists.run,
            "presence": whereabouts.presence.run,
            "visibility": whereabouts.run,
        },
        on_start=[sending_database.open, start],
        on_drain=[drain, firing.drain],
        on_stop=[
            sending_database.close,
            signatures.close,
            bus.close,
            whereabouts.presence.close,
            receipts.flush,
            sending.drain,
        ],
        ports=ports,
    )


def _follow_live(context: Context, settings: MessagingSettings, pace: SendingPace, reads: Pace) -> None:
    """Let limits follow the live settings."""
    live = context.live

    def take() -> None:
        for name, limit in (
            ("message", pace.device),
            ("user", pace.user),
            ("member", pace.member),
            ("conversation", pace.conversation),
            ("read", reads),
        ):
            rate, burst = f"{name}_rate", f"{name}_burst"
            limit.change(
                live.value(rate, getattr(settings, rate)), live.value(burst, getattr(settings, burst))
            )

    live.on_change(take)
    context.limiter.adjust("conversations", lambda usual: live.value("conversations_per_hour", usual))
    context.limiter.adjust("memberships", lambda usual: live.value("additions_per_hour", usual))


def _days(days: int) -> timedelta | None:
    return timedelta(days=days) if days else None


def _pace(settings: MessagingSettings, context: Context) -> SendingPace:
    return SendingPace(
        context.clock,
        context.cache,
        device=Rate(settings.message_rate, settings.message_burst),
        user=Rate(settings.user_rate, settings.user_burst),
        member=Rate(settings.member_rate, settings.member_burst),
        conversation=Rate(settings.conversation_rate, settings.conversation_burst),
    )


def _volume(settings: MessagingSettings, context: Context, restrictions: Restrictions) -> Volume:
    return Volume(
        context.cache,
        context.clock,
        restrictions,
        messages_per_minute=settings.abnormal_messages_per_minute,
        messages_per_hour=settings.abnormal_messages_per_hour,
        approaches_per_minute=settings.abnormal_approaches_per_minute,
        approaches_per_hour=settings.abnormal_approaches_per_hour,
        restriction=timedelta(minutes=settings.restriction_minutes),
    )


class Announcer:
    """Puts messaging's announcements into notification's words."""

    def __init__(self, notification: NotificationClient) -> None:
        self._notification = notification

    async def publish(self, announcements: Sequence[Announcement]) -> None:
        """Hand over announcements; the same one twice is told once."""
        await self._notification.publish_events(
            [
                Event(
                    event_id=item.event_id,
                    type="message" if item.message_id is not None else "group",
                    name=item.name,
                    conversation_id=item.conversation_id,
                    conversation_type=item.conversation_type.value,
                    message_id=item.message_id,
                    sender_id=item.sender_id,
                    recipient_ids=item.recipient_ids,
                    occurred_at=item.occurred_at,
                )
                for item in announcements
            ]
        )


def _announcing(context: Context, database: Database, online: Online) -> dict[str, Handler]:
    # Where notification does not run, nobody handles its topics: the rows wait out their time.
    channel = context.channel("notification")
    if channel is None:
        return {}
    return Announcing(database, Announcer(NotificationClient(channel)), online).handlers()


class LinkTeller:
    """Puts messaging's links into media's words."""

    def __init__(self, media: MediaClient) -> None:
        self._media = media

    async def link(self, operation_id: UUID, links: Sequence[MediaLink]) -> None:
        """These messages refer to media; the same again changes nothing."""
        await self._media.link_media(operation_id, links=[_link(link) for link in links])

    async def unlink(self, operation_id: UUID, links: Sequence[MediaLink]) -> None:
        """These messages do not any more, for good."""
        await self._media.link_media(operation_id, unlinks=[_link(link) for link in links])


def _link(link: MediaLink) -> LinkOfMedia:
    return LinkOfMedia(link.message_id, link.conversation_id, link.sender_id, link.media_ids)


def _timers(context: Context, database: Database) -> dict[str, Handler]:
    # Where scheduling does not run the rows wait out their time: what is late is sent without it.
    channel = context.channel("scheduling")
    if channel is None:
        return {}
    return Timers(database, SchedulingClient(channel)).handlers()


def _media_links(context: Context) -> dict[str, Handler]:
    # Where media does not run, nobody can have uploaded anything; the few rows wait for it.
    channel = context.channel("media")
    if channel is None:
        return {}
    return MediaLinks(LinkTeller(MediaClient(channel))).handlers()
