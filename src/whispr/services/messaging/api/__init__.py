"""The REST door: conversations, members, messages and receipts."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from whispr.kit.http import Problem, new_router
from whispr.services.messaging.api import changes as change_routes
from whispr.services.messaging.api import conversations as conversation_routes
from whispr.services.messaging.api import export as export_routes
from whispr.services.messaging.api import messages as message_routes
from whispr.services.messaging.api import reports as report_routes
from whispr.services.messaging.api import restrictions as restriction_routes
from whispr.services.messaging.api import scheduled as scheduled_routes
from whispr.services.messaging.service.changes import Changes
from whispr.services.messaging.service.conversations import Conversations
from whispr.services.messaging.service.directory import Directory
from whispr.services.messaging.service.export import Export
from whispr.services.messaging.service.history import History
from whispr.services.messaging.service.members import Members
from whispr.services.messaging.service.pins import Pins
from whispr.services.messaging.service.reactions import Reactions
from whispr.services.messaging.service.receipts import Receipts
from whispr.services.messaging.service.reports import Reports
from whispr.services.messaging.service.restrictions import Restrictions
from whispr.services.messaging.service.scheduled import Scheduled
from whispr.services.messaging.service.sending import Sending
from whispr.services.messaging.service.status import Status
from whispr.services.messaging.service.volume import Volume


def build_router(
    *,
    conversations: Conversations,
    members: Members,
    directory: Directory,
    history: History,
    receipts: Receipts,
    status: Status,
    sending: Sending,
    changes: Changes,
    reactions: Reactions,
    pins: Pins,
    reports: Reports,
    export: Export,
    restrictions: Restrictions,
    volume: Volume,
    scheduled: Scheduled,
) -> APIRouter:
    """`/api/v1/conversations`, `/api/v1/messages` and `/api/v1/scheduled-messages`."""
    unauthenticated: dict[int | str, dict[str, Any]] = {401: {"model": Problem}}
    router = new_router(prefix="/api/v1", responses=unauthenticated)
    conversation_routes.add_routes(router, conversations, members)
    message_routes.add_routes(router, directory, history, receipts, status, sending, scheduled)
    change_routes.add_routes(router, directory, changes, reactions, pins)
    report_routes.add_routes(router, reports)
    export_routes.add_routes(router, export)
    restriction_routes.add_routes(router, restrictions, volume)
    scheduled_routes.add_routes(router, scheduled)
    return router
