"""The services of Whispr started in the test's own event loop: real gRPC over mutual TLS, real HTTP, real sockets."""

from __future__ import annotations

import base64
import importlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from nacl.signing import SigningKey

from whispr.instance.ports import free_port
from whispr.kit.clock import ManualClock
from whispr.kit.mtls import LocalCA
from whispr.kit.process import Context, Running
from whispr.kit.settings import CommonSettings

PASSWORD = "correct horse battery staple"


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


@dataclass
class DeviceKeys:
    """The private half of what a device registers."""

    signing_key: SigningKey = field(default_factory=SigningKey.generate)
    identity_key: X25519PrivateKey = field(default_factory=X25519PrivateKey.generate)
    registration_id: int = 4711

    def prekey(self, key_id: int) -> dict[str, Any]:
        return {
            "key_id": key_id,
            "public_key": b64(X25519PrivateKey.generate().public_key().public_bytes_raw()),
        }

    def signed_prekey(self, key_id: int = 1) -> dict[str, Any]:
        public = X25519PrivateKey.generate().public_key().public_bytes_raw()
        return {
            "key_id": key_id,
            "public_key": b64(public),
            "signature": b64(self.signing_key.sign(public).signature),
        }

    def registration(self, one_time_prekeys: int = 0, **changes: Any) -> dict[str, Any]:
        """`DEVICE` as the contract has it."""
        return {
            "name": "Test device",
            "platform": "desktop",
            "registration_id": self.registration_id,
            "identity_key": b64(self.identity_key.public_key().public_bytes_raw()),
            "signing_key": b64(bytes(self.signing_key.verify_key)),
            "signed_prekey": self.signed_prekey(),
            "one_time_prekeys": [self.prekey(key_id) for key_id in range(1, one_time_prekeys + 1)],
            **changes,
        }


@dataclass
class Person:
    """A registered person on one device."""

    username: str
    password: str
    keys: DeviceKeys
    session: dict[str, Any]

    @property
    def user_id(self) -> UUID:
        return UUID(self.session["user_id"])

    @property
    def device_id(self) -> UUID:
        return UUID(self.session["device_id"])

    @property
    def session_id(self) -> UUID:
        return UUID(self.session["session_id"])

    @property
    def token(self) -> str:
        return str(self.session["access_token"])

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token}"}


class Node:
    """One running service: `url` of its REST door, `grpc` address, `running` for its insides."""

    def __init__(self, name: str, running: Running) -> None:
        self.name = name
        self.running = running

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.running.http_port}"

    @property
    def internal_url(self) -> str:
        return f"http://127.0.0.1:{self.running.internal_port}"

    @property
    def grpc(self) -> str:
        return f"127.0.0.1:{self.running.grpc_port}"

    @property
    def socket_url(self) -> str:
        return f"ws://127.0.0.1:{self.running.ports['socket']}/socket/websocket"


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    # Only while a service starts: processes that other tests start would inherit a longer-lived change.
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            # What a test has set itself wins.
            patch.setenv(name, os.environ.get(name, value))
        yield


class Stack:
    """auth, user and messaging, and more messaging nodes on demand, sharing one CA, Valkey and clock."""

    SERVICES: tuple[str, ...] = ("auth", "user", "messaging")

    def __init__(self, valkey_url: str, databases: Mapping[str, str], directory: Path) -> None:
        self.valkey_url = valkey_url
        self._variables = {
            "WHISPR_AUTH_ARGON2_MEMORY_KIB": "64",
            "WHISPR_AUTH_ARGON2_TIME_COST": "1",
            "WHISPR_AUTH_KEYRING_FILE": str(directory / "auth-keyring.json"),
            **{f"WHISPR_{name.upper()}_DATABASE_URL": url for name, url in databases.items()},
        }
        self.clock = ManualClock()
        self.ca = LocalCA(directory / "ca")
        self._directory = directory
        self._grpc_ports = {name: free_port() for name in self.SERVICES}
        self._extra: list[Node] = []
        self.nodes: dict[str, Node] = {}
        self.http = httpx.AsyncClient(timeout=30)

    async def start(self) -> None:
        for name in self.SERVICES:
            self.nodes[name] = await self._start_node(name, f"127.0.0.1:{self._grpc_ports[name]}")

    async def stop(self) -> None:
        await self.http.aclose()
        for node in [*self._extra, *reversed(self.nodes.values())]:
            await node.running.stop()

    @property
    def auth(self) -> Node:
        return self.nodes["auth"]

    @property
    def user(self) -> Node:
        return self.nodes["user"]

    @property
    def messaging(self) -> Node:
        return self.nodes["messaging"]

    @property
    def socket_url(self) -> str:
        return self.messaging.socket_url

    def settings(self, service: str, **changes: Any) -> CommonSettings:
        """What `service` reads, with its own freshly issued certificate."""
        identity = self._directory / "identity" / service
        self.ca.issue(service, identity)
        values: dict[str, Any] = {
            "environment": "test",
            "rate_limits": "off",
            "log_level": "error",
            "valkey_url": self.valkey_url,
            "identity_dir": identity,
            "shutdown_seconds": 3,
            "database_pool_size": 5,
            **{f"{name}_address": f"127.0.0.1:{port}" for name, port in self._grpc_ports.items()},
            **changes,
        }
        return CommonSettings(**values)

    async def another_node(self, service: str = "messaging", **changes: Any) -> Node:
        """A second process's worth of `service`, sharing its database and Valkey. Stop it with `running.stop()`."""
        node = await self._start_node(service, "127.0.0.1:0", **changes)
        self._extra.append(node)
        return node

    async def restart(self, service: str) -> None:
        """Stop `service` and start it again at the same addresses."""
        old = self.nodes[service].running
        ports = dict(old.ports)
        await old.stop()
        socket_bind = (
            {f"WHISPR_{service.upper()}_SOCKET_BIND": f"127.0.0.1:{ports['socket']}"}
            if "socket" in ports
            else {}
        )
        with _environment(socket_bind):
            self.nodes[service] = await self._start_node(
                service, f"127.0.0.1:{ports['grpc']}", http_bind=f"127.0.0.1:{ports['http']}"
            )

    async def _start_node(self, service: str, grpc_bind: str, **changes: Any) -> Node:
        module = importlib.import_module(f"whispr.services.{service}.app")
        context = Context(service, self.settings(service, grpc_bind=grpc_bind, **changes), self.clock)
        with _environment(self._variables):
            return Node(service, await Running.start(module.build, context))

    async def register(self, username: str | None = None, *, one_time_prekeys: int = 0) -> Person:
        """A new person with one device."""
        keys = DeviceKeys()
        name = username or f"u{uuid4().hex[:20]}"
        answer = await self.http.post(
            f"{self.auth.url}/api/v1/auth/register",
            json={"username": name, "password": PASSWORD, "device": keys.registration(one_time_prekeys)},
        )
        assert answer.status_code == 201, answer.text
        return Person(name, PASSWORD, keys, answer.json())

    async def add_device(self, person: Person, **changes: Any) -> Person:
        """The same person on one more device, by logging in."""
        keys = DeviceKeys()
        answer = await self.http.post(
            f"{self.auth.url}/api/v1/auth/login",
            json={
                "username": person.username,
                "password": person.password,
                "device": keys.registration(**changes),
            },
        )
        assert answer.status_code == 200, answer.text
        return Person(person.username, person.password, keys, answer.json())
