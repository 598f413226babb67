"""The WebSocket door: `user:{id}` and `conversation:{id}`."""

from __future__ import annotations

import asyncio
from functools import partial

from whispr.kit.channels import ConnectRequest, Endpoint, Limits
from whispr.kit.clock import Clock
from whispr.kit.identity import Caller, Identity, Revocation
from whispr.services.messaging.channels.conversation import ConversationChannel
from whispr.services.messaging.channels.desk import Desk
from whispr.services.messaging.channels.device_news import DeviceNews
from whispr.services.messaging.channels.presence import Whereabouts
from whispr.services.messaging.channels.receipts import ReceiptTeller
from whispr.services.messaging.channels.rooms import Rooms
from whispr.services.messaging.channels.typists import Typists
from whispr.services.messaging.channels.user import UserChannel, push_notice
from whispr.services.messaging.service.events import EventBus

__all__ = ["Desk", "DeviceNews", "ReceiptTeller", "Rooms", "Typists", "Whereabouts", "build_endpoint"]


def build_endpoint(
    identity: Identity, desk: Desk, bus: EventBus, clock: Clock, *, max_sockets: int, max_channels: int
) -> Endpoint:
    """The endpoint of this node. A revoked session's sockets close with 1001 as soon as the revocation is known."""

    def authenticate(request: ConnectRequest) -> Caller:
        return identity.verify(request.token or "")

    endpoint = Endpoint(
        [
            ("conversation:*", partial(ConversationChannel, desk=desk)),
            ("user:*", partial(UserChannel, desk=desk)),
        ],
        authenticate,
        clock=clock,
        limits=Limits(max_sockets=max_sockets, max_channels=max_channels),
    )

    identity.on_revocation(_Expulsion(endpoint, identity).request)
    bus.on_notice(partial(push_notice, endpoint.hub))
    return endpoint


class _Expulsion:
    """Closes the sockets of revoked callers, looking at each socket once however many revocations arrive together."""

    def __init__(self, endpoint: Endpoint, identity: Identity) -> None:
        self._endpoint = endpoint
        self._identity = identity
        self._is_due = False

    def request(self, revocation: Revocation) -> None:
        del revocation
        if not self._is_due:
            self._is_due = True
            asyncio.get_running_loop().call_soon(self._expel)

    def _expel(self) -> None:
        self._is_due = False
        self._endpoint.disconnect(self._identity.revoked)
