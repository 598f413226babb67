"""A client for Whispr servers: REST, live sockets, and end-to-end encryption, for applications and bots.

Begin with `WhisprClient`. The package needs nothing of the server's code.
"""

from whispr.client.client import WhisprClient
from whispr.client.events import ChatMessage, ConversationEvent, Notice
from whispr.client.failures import ApiError, ClientError, SessionEnded, Undecryptable, Unreachable
from whispr.client.linking import WrongCheckCode
from whispr.client.models import SecondFactor
from whispr.client.outbox import Expires
from whispr.client.rest import RestClient
from whispr.client.store import Store

__all__ = [
    "ApiError",
    "ChatMessage",
    "ClientError",
    "ConversationEvent",
    "Expires",
    "Notice",
    "RestClient",
    "SecondFactor",
    "SessionEnded",
    "Store",
    "Undecryptable",
    "Unreachable",
    "WhisprClient",
    "WrongCheckCode",
]
