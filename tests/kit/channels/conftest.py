from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from tests.kit.channels.raw import RawClient
from tests.kit.channels.room import Room, make_endpoint

from whispr.kit.channels import Endpoint

Serve = Callable[..., Awaitable[tuple[Endpoint, int]]]
Connect = Callable[..., Awaitable[RawClient]]


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    """Start an endpoint with these options; itself and its port."""
    endpoints: list[Endpoint] = []
    Room.rooms.clear()

    async def start(**options: Any) -> tuple[Endpoint, int]:
        endpoint = make_endpoint(**options)
        endpoints.append(endpoint)
        return endpoint, await endpoint.listen("127.0.0.1", 0)

    yield start
    for endpoint in endpoints:
        await endpoint.drain(0, 0.2)


@pytest.fixture
async def connect() -> AsyncIterator[Connect]:
    """Connect a client that is gone after the test."""
    clients: list[RawClient] = []

    async def open_client(port: int, *args: Any, **options: Any) -> RawClient:
        client = await RawClient.connect(port, *args, **options)
        clients.append(client)
        return client

    yield open_client
    for client in clients:
        client.abandon()
