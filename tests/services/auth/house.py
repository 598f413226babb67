"""Helpers for tests of auth: requests with their answers, and the rules without doors."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import httpx
import msgspec
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
from nacl.signing import SigningKey
from tests.stack import PASSWORD, DeviceKeys, Person, Stack, b64

from whispr.kit.cache import Cache, RateLimiter
from whispr.kit.clock import ManualClock
from whispr.kit.db import Database
from whispr.kit.grpc import Channel
from whispr.kit.identity import Caller
from whispr.kit.mtls import WorkloadIdentity
from whispr.services.auth.adapters import new_ring
from whispr.services.auth.client import AuthClient
from whispr.services.auth.models import NewDevice, OneTimeKey, Origin, RootKeys, SignedKey, Tokens
from whispr.services.auth.service import Auth, build_auth
from whispr.services.auth.settings import AuthSettings

ORIGIN = Origin("192.0.2.1")


class AuthHouse(Stack):
    """auth by itself."""

    SERVICES = ("auth",)

    def __init__(self, valkey_url: str, directory: Path, database_url: str) -> None:
        super().__init__(valkey_url, {"auth": database_url}, directory)
        self.database_url = database_url

    async def call(
        self, method: str, path: str, person: Person | None = None, json: Any = None, **options: Any
    ) -> httpx.Response:
        headers = {**(person.headers if person else {}), **options.pop("headers", {})}
        return await self.http.request(
            method, f"{self.auth.url}/api/v1{path}", json=json, headers=headers, **options
        )

    async def refresh(self, token: str, **more: Any) -> httpx.Response:
        return await self.call("POST", "/auth/refresh", json={"refresh_token": token, **more})

    async def log_in(self, person: Person, **body: Any) -> httpx.Response:
        return await self.call(
            "POST", "/auth/login", json={"username": person.username, "password": person.password, **body}
        )

    @asynccontextmanager
    async def as_service(self, service: str) -> AsyncIterator[AuthClient]:
        """auth's client as `service` holds it."""
        directory = self._directory / "callers" / service
        self.ca.issue(service, directory)
        channel = Channel(self.auth.grpc, "auth", WorkloadIdentity(directory))
        try:
            yield AuthClient(channel)
        finally:
            await channel.close()

    @asynccontextmanager
    async def hints(self, channel: str) -> AsyncIterator[list[Any]]:
        """What is published on `channel` meanwhile, decoded."""
        cache, heard = Cache(self.valkey_url), []
        cache.subscribe(channel, lambda message: heard.append(msgspec.json.decode(message)))
        task = asyncio.create_task(cache.run())
        await until(lambda: channel in cache.subscribed)
        try:
            yield heard
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await cache.close()


async def until(true: Callable[[], object], seconds: float = 5) -> None:
    """Wait for what another task brings about."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "waited too long"
        await asyncio.sleep(0.01)


def code(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["code"]


def pq_prekey(keys: DeviceKeys, key_id: int) -> dict[str, Any]:
    public = MLKEM768PrivateKey.generate().public_key().public_bytes_raw()
    return {
        "key_id": key_id,
        "public_key": b64(public),
        "signature": b64(keys.signing_key.sign(public).signature),
    }


# --- the rules without doors ---


@asynccontextmanager
async def rules(
    database_url: str, valkey_url: str, clock: ManualClock, root: RootKeys | None = None, **options: Any
) -> AsyncIterator[Auth]:
    """The rules of auth over real servers, in the running loop, with light hashing."""
    light = {"argon2_time_cost": 1, "argon2_memory_kib": 8, "argon2_parallelism": 1}
    settings = AuthSettings(database_url=database_url, **{**light, **options})
    db, cache = Database(database_url, pool_size=8), Cache(valkey_url)
    await db.open()
    auth = build_auth(
        db=db,
        clock=clock,
        publisher=cache,
        limiter=RateLimiter(cache, enabled=False),
        root=root or ROOT,
        settings=settings,
        issuer="whispr",
        audience="whispr",
        wake_outbox=lambda: None,
        require=lambda feature: None,
    )
    try:
        yield auth
    finally:
        auth.close()
        await cache.close()
        await db.close()


def root_keys() -> RootKeys:
    """A fresh ring."""
    ring = msgspec.json.decode(new_ring())
    return RootKeys(
        ring["primary"],
        {name: msgspec.json.decode(f'"{key}"', type=bytes) for name, key in ring["keys"].items()},
    )


ROOT = root_keys()


def new_device(one_time: int = 0, first_id: int = 1, signing: SigningKey | None = None) -> NewDevice:
    signing = signing or SigningKey.generate()
    public = uuid4().bytes * 2
    return NewDevice(
        name="Test device",
        platform="desktop",
        registration_id=7,
        identity_key=uuid4().bytes * 2,
        signing_key=bytes(signing.verify_key),
        signed_prekey=SignedKey(1, public, signing.sign(public).signature),
        one_time_prekeys=tuple(one_time_key(first_id + n) for n in range(one_time)),
    )


def one_time_key(key_id: int) -> OneTimeKey:
    return OneTimeKey(key_id, uuid4().bytes * 2)


async def register(auth: Auth, device: NewDevice | None = None) -> tuple[str, Tokens]:
    username = f"u{uuid4().hex[:20]}"
    return username, await auth.entry.register(username, PASSWORD, device or new_device(), ORIGIN)


def caller_of(tokens: Tokens) -> Caller:
    return Caller(tokens.user_id, tokens.device_id, tokens.session_id, frozenset(), 0.0, 0.0)


def a_caller(user_id: UUID | None = None) -> Caller:
    return Caller(user_id or uuid4(), uuid4(), uuid4(), frozenset(), 0.0, 0.0)
