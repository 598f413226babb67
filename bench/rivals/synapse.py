"""Synapse from PyPI in a virtual environment of its own, with its database in PostgreSQL and its limits lifted."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import os
import re
import secrets
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx

from bench.load import CONTENT_BYTES, gather_bounded
from bench.plain_http import Connections
from bench.rivals.server import Database, run, running
from whispr.instance.ports import free_port

HOST = "bench.local"
_NUMBER = re.compile(rb'"number":\s?(\d+)')
_NO_LIMIT = {"per_second": 1_000_000, "burst_count": 1_000_000}


def install(folder: Path) -> Path:
    """Make the environment; its Python. Raises CannotInstallError."""
    python = folder / "environment/bin/python"
    if (folder / "installed").exists():
        return python
    folder.mkdir(parents=True, exist_ok=True)
    run([sys.executable, "-m", "venv", "environment"], folder, "making a virtual environment")
    command = [str(python), "-m", "pip", "install", "--quiet", "matrix-synapse", "psycopg2-binary"]
    run(command, folder, "pip install matrix-synapse")
    (folder / "installed").touch()
    return python


def _config(home: Path, port: int, database: Database, secret: str) -> str:
    limits: dict[str, Any] = dict.fromkeys(
        ("rc_message", "rc_registration", "rc_room_creation", "rc_joins_per_room"), _NO_LIMIT
    )
    # JSON is YAML too.
    return json.dumps(
        {
            "server_name": HOST,
            "report_stats": False,
            "listeners": [
                {
                    "port": port,
                    "type": "http",
                    "bind_addresses": ["127.0.0.1"],
                    "resources": [{"names": ["client"]}],
                }
            ],
            "database": {
                "name": "psycopg2",
                "args": {
                    "user": database.user,
                    "password": database.password,
                    "dbname": database.name,
                    "host": database.host,
                    "port": database.port,
                    "cp_min": 5,
                    "cp_max": 10,
                },
            },
            "registration_shared_secret": secret,
            "macaroon_secret_key": secret,
            "signing_key_path": str(home / "signing.key"),
            "media_store_path": str(home / "media"),
            "pid_file": str(home / "synapse.pid"),
            "trusted_key_servers": [],
            "presence": {"enabled": False},
            "bcrypt_rounds": 4,
            **limits,
            "rc_login": {"address": _NO_LIMIT, "account": _NO_LIMIT, "failed_attempts": _NO_LIMIT},
            "rc_joins": {"local": _NO_LIMIT, "remote": _NO_LIMIT},
            "rc_invites": {"per_room": _NO_LIMIT, "per_user": _NO_LIMIT, "per_issuer": _NO_LIMIT},
        }
    )


@dataclass(slots=True)
class _Person:
    name: str
    token: str


async def _register(http: httpx.AsyncClient, secret: str, number: int) -> _Person:
    name, password = f"u{number}", "a password of the bench"
    nonce = (await http.get("/_synapse/admin/v1/register")).json()["nonce"]
    signed = "\0".join((nonce, name, password, "notadmin")).encode()
    answer = await http.post(
        "/_synapse/admin/v1/register",
        json={
            "nonce": nonce,
            "username": name,
            "password": password,
            "admin": False,
            "mac": hmac.new(secret.encode(), signed, hashlib.sha1).hexdigest(),
        },
    )
    answer.raise_for_status()
    document = answer.json()
    return _Person(document["user_id"], document["access_token"])


async def _room(http: httpx.AsyncClient, one: _Person, other: _Person) -> str:
    answer = await http.post(
        "/_matrix/client/v3/createRoom",
        json={"preset": "trusted_private_chat", "is_direct": True, "invite": [other.name]},
        headers={"Authorization": f"Bearer {one.token}"},
    )
    answer.raise_for_status()
    room: str = answer.json()["room_id"]
    joined = await http.post(
        f"/_matrix/client/v3/rooms/{room}/join", json={}, headers={"Authorization": f"Bearer {other.token}"}
    )
    joined.raise_for_status()
    return room


class SynapseTalk:
    """The pairs: the first sends into their room, the second has a long poll under way all the time."""

    def __init__(self, url: str, pairs: list[tuple[_Person, _Person, str]]) -> None:
        self.pairs = len(pairs)
        self.delivered: Callable[[int], None] = lambda number: None
        self._pairs = pairs
        self._connections = Connections(url)
        self._body = base64.b64encode(os.urandom(CONTENT_BYTES)).decode()
        self._tasks: set[asyncio.Task[None]] = set()

    async def listen(self) -> None:
        """Begin to poll; returns when everybody's first answer is in."""
        ready = [asyncio.Event() for _ in self._pairs]
        for (_, person, _), event in zip(self._pairs, ready, strict=True):
            self._hold(self._poll(person, event))
        await asyncio.gather(*(event.wait() for event in ready))

    def send(self, number: int) -> None:
        self._hold(self._send(number))

    async def close(self) -> None:
        """Stop polling."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._connections.close()

    async def _send(self, number: int) -> None:
        sender, _, room = self._pairs[number % self.pairs]
        body = json.dumps({"msgtype": "m.text", "body": self._body, "number": number}).encode()
        path = f"/_matrix/client/v3/rooms/{room}/send/m.room.message/{number}"
        await self._connections.request("PUT", path, sender.token, body)

    async def _poll(self, person: _Person, ready: asyncio.Event) -> None:
        since = ""
        while True:
            path = f"/_matrix/client/v3/sync?timeout={30_000 if since else 0}{since}"
            answer = await self._connections.get(path, person.token)
            for found in _NUMBER.finditer(answer):
                self.delivered(int(found[1]))
            since = f"&since={json.loads(answer)['next_batch']}"
            ready.set()

    def _hold(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


@asynccontextmanager
async def talking(folder: Path, admin_url: str, pairs: int) -> AsyncIterator[SynapseTalk]:
    """Synapse, with a room for each pair. Raises CannotInstallError."""
    python = await asyncio.to_thread(install, folder)
    database, port, secret = Database(admin_url, "synapse"), free_port(), secrets.token_urlsafe(24)
    await database.create()
    home = folder / "run"
    home.mkdir(exist_ok=True)
    (home / "homeserver.yaml").write_text(_config(home, port, database, secret))
    command = [str(python), "-m", "synapse.app.homeserver", "-c", "homeserver.yaml"]
    await asyncio.to_thread(run, [*command, "--generate-keys"], home, "making Synapse's keys")
    url = f"http://127.0.0.1:{port}"
    async with running(command, home, port, os.environ), httpx.AsyncClient(base_url=url, timeout=120) as http:
        people = await gather_bounded(
            [partial(_register, http, secret, number) for number in range(2 * pairs)], 4
        )
        couples = list(zip(people[::2], people[1::2], strict=True))
        rooms = await gather_bounded([partial(_room, http, one, two) for one, two in couples], 2)
        talk = SynapseTalk(url, [(*couple, room) for couple, room in zip(couples, rooms, strict=True)])
        await talk.listen()
        try:
            yield talk
        finally:
            await talk.close()
