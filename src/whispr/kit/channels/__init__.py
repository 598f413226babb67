"""Phoenix Channels: topics that clients join over a WebSocket or long polling, with pushes both ways and presence.

A service subclasses `Channel`, gives an `Endpoint` its routes, and broadcasts through the endpoint's `Hub`. The protocol
is that of phoenix.js, versions 1 and 2 of its wire, text and binary.
"""

from whispr.kit.channels.channel import Channel, InvalidPayload, Reply, UnknownEvent, decode_payload
from whispr.kit.channels.connect import ConnectRequest
from whispr.kit.channels.core import Limits
from whispr.kit.channels.endpoint import Endpoint
from whispr.kit.channels.hub import Hub
from whispr.kit.channels.presence import Presence
from whispr.kit.channels.socket import Socket

__all__ = [
    "Channel",
    "ConnectRequest",
    "Endpoint",
    "Hub",
    "InvalidPayload",
    "Limits",
    "Presence",
    "Reply",
    "Socket",
    "UnknownEvent",
    "decode_payload",
]
