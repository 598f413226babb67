"""Puts the messaging service together."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any
from uuid import UUID

import whispr
from whispr.kit.db import Database
from whispr.kit.http import create_app
from whispr.kit.maintenance import Maintenance
from whispr.kit.outbox import Dispatcher
from whispr.kit.process import Context, Service
from whispr.kit.settings import load
from whispr.services.auth.client import AuthClient
from whispr.services.messaging import api, jobs, rpc
from whispr.services.messaging.models import CommittedEvent
from whispr.services.messaging.service.contact import Contact
from whispr.services.messaging.service.conversations import Conversations
from whispr.services.messaging.service.devices import Devices
from whispr.services.messaging.service.directory import Directory
from whispr.services.messaging.service.erasure import Erasure
from whispr.services.messaging.service.history import History
from whispr.services.messaging.service.housekeeping import Housekeeping
from whispr.services.messaging.service.members import Members
from whispr.services.messaging.service.privacy import ReadReceipts
from whispr.services.messaging.service.receipts import Receipts
from whispr.services.messaging.service.sending import Sending
from whispr.services.messaging.service.signatures import SignatureChecker
from whispr.services.messaging.service.status import Status
from whispr.services.messaging.service.structure import Structure
from whispr.services.messaging.settings import MessagingSettings
from whispr.services.messaging.store.sending import PLANNER
from whispr.services.user.client import UserClient


class _Bus:
    def publish(self, events: Sequence[CommittedEvent]) -> None:
        del events

    def notice(self, user_ids: Sequence[UUID], event: str, payload: dict[str, Any]) -> None:
        del user_ids, event, payload


async def build(context: Context) -> Service:
    """messaging; it cannot do without `auth` (devices, keys) and `user` (who may write to whom)."""
    settings = load(MessagingSettings)
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
    read_receipts = ReadReceipts(user, context.cache, clock)
    history = History(database)
    receipts = Receipts(database, clock)
    bus = _Bus()
    dispatcher = Dispatcher(database, clock, {}, batch=20, ttl=timedelta(hours=settings.outbox_hours))
    structure = Structure(database, clock, directory, user, bus, dispatcher.wake)
    members = Members(structure, read_receipts)
    conversations = Conversations(structure, members, read_receipts)
    housekeeping = Housekeeping(
        database,
        clock,
        receipt_detail=timedelta(days=settings.receipt_detail_days),
        cursor_life=timedelta(days=settings.cursor_days),
    )
    sending_database = Database(
        settings.database_url, pool_size=2, application_name="whispr-messaging-sending", settings=PLANNER
    )
    sending = Sending(
        sending_database,
        clock,
        directory,
        Devices(auth, clock),
        Contact(user, clock),
        SignatureChecker(2),
        bus.publish,
        lambda: None,
    )
    maintenance = Maintenance(database, log_retention=housekeeping.run_once)

    async def start() -> None:
        directory.start()
        read_receipts.start()

    return Service(
        name="messaging",
        http=create_app(
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
                )
            ],
            identity=identity,
        ),
        rpc=[rpc.register(Erasure(structure)), maintenance.register],
        loops={**jobs.loops(dispatcher, receipts, housekeeping), "sending": sending.run},
        on_start=[sending_database.open, start],
        on_stop=[sending_database.close, receipts.flush, sending.drain],
    )
