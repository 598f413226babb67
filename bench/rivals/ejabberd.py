"""ejabberd from Debian's packages, unpacked into a folder: mod_mam archives every message in PostgreSQL."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import cast

import asyncpg

from bench.load import CONTENT_BYTES, gather_bounded
from bench.rivals.server import Database, run, running
from bench.rivals.talk import CannotInstallError
from whispr.instance.ports import free_port

HOST = "bench.local"
PASSWORD = "a password of the bench"
_MESSAGE = re.compile(rb"<message [^>]*?\bid='(\d+)'")


def install(folder: Path) -> Path:
    """Unpack ejabberd and what it needs; the root of it. Raises CannotInstallError."""
    root = folder / "root"
    if (root / "usr/share/ejabberd/sql/pg.sql").exists():
        return root
    packages = folder / "packages"
    packages.mkdir(parents=True, exist_ok=True)
    # Only what the machine does not have: the rest is found where it is.
    script = "apt-get download $(apt-get install --dry-run --no-install-recommends ejabberd erlang-p1-pgsql | awk '/^Inst/ {print $2}')"
    run(
        ["sh", "-c", script],
        packages,
        "apt-get download ejabberd (is this Debian, with its lists of packages?)",
    )
    found = sorted(packages.glob("*.deb"))
    if not any(package.name.startswith("ejabberd_") for package in found):
        raise CannotInstallError("apt-get finds no package ejabberd that is not installed already")
    for package in found:
        run(["dpkg-deb", "-x", str(package), str(root)], packages, f"unpacking {package.name}")
    return root


def _config(port: int, database: Database) -> str:
    # JSON is YAML too.
    return json.dumps(
        {
            "hosts": [HOST],
            "loglevel": 3,
            "listen": [
                {"port": port, "ip": "127.0.0.1", "module": "ejabberd_c2s", "max_stanza_size": 262144}
            ],
            "auth_method": ["sql"],
            "auth_password_format": "plain",
            "default_db": "sql",
            "sql_type": "pgsql",
            "sql_server": database.host,
            "sql_port": database.port,
            "sql_database": database.name,
            "sql_username": database.user,
            "sql_password": database.password,
            "acl": {"local": {"user_regexp": ""}},
            "access_rules": {"local": {"allow": "local"}, "c2s": {"allow": "all"}},
            "modules": {"mod_mam": {"default": "always", "db_type": "sql"}},
        }
    )


class _Client(asyncio.Protocol):
    """One XMPP stream."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.on_message: Callable[[int], None] | None = None
        self._data = bytearray()
        self._news = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's is none by inheritance.
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._data += data
        if self.on_message is None:
            self._news.set()
            return
        end = self._data.rfind(b"</message>")
        if end >= 0:
            for found in _MESSAGE.finditer(self._data, 0, end):
                self.on_message(int(found[1]))
            del self._data[: end + 10]

    def write(self, text: str) -> None:
        assert self.transport is not None
        self.transport.write(text.encode())

    async def ask(self, text: str, until: bytes) -> None:
        """Write, and wait for `until` in the answer."""
        self._data.clear()
        self.write(text)
        async with asyncio.timeout(30):
            while until not in self._data:
                if b"<failure" in self._data or b"stream:error" in self._data:
                    raise RuntimeError(f"ejabberd refuses: {bytes(self._data)!r}")
                self._news.clear()
                await self._news.wait()
        self._data.clear()


async def _log_in(port: int, user: str) -> _Client:
    _, client = await asyncio.get_running_loop().create_connection(_Client, "127.0.0.1", port)
    opening = (
        f"<?xml version='1.0'?><stream:stream to='{HOST}' xmlns='jabber:client' "
        "xmlns:stream='http://etherx.jabber.org/streams' version='1.0'>"
    )
    await client.ask(opening, b"</stream:features>")
    secret = base64.b64encode(f"\0{user}\0{PASSWORD}".encode()).decode()
    await client.ask(
        f"<auth xmlns='urn:ietf:params:xml:ns:xmpp-sasl' mechanism='PLAIN'>{secret}</auth>", b"<success"
    )
    await client.ask(opening, b"</stream:features>")
    await client.ask(
        "<iq type='set' id='b'><bind xmlns='urn:ietf:params:xml:ns:xmpp-bind'><resource>r</resource></bind></iq>",
        b"</iq>",
    )
    client.write("<presence/>")
    return client


class EjabberdTalk:
    """The pairs: person 2n writes to person 2n+1."""

    def __init__(self, clients: list[_Client]) -> None:
        self.pairs = len(clients) // 2
        self.delivered: Callable[[int], None] = lambda number: None
        self._clients = clients
        self._body = base64.b64encode(os.urandom(CONTENT_BYTES)).decode()
        for client in clients:
            client.on_message = self._arrived

    def _arrived(self, number: int) -> None:
        self.delivered(number)

    def send(self, number: int) -> None:
        pair = number % self.pairs
        self._clients[2 * pair].write(
            f"<message to='u{2 * pair + 1}@{HOST}/r' type='chat' id='{number}'><body>{self._body}</body></message>"
        )


@asynccontextmanager
async def talking(folder: Path, admin_url: str, pairs: int) -> AsyncIterator[EjabberdTalk]:
    """ejabberd, with everybody logged in. Raises CannotInstallError."""
    root = await asyncio.to_thread(install, folder)
    database, port = Database(admin_url, "ejabberd"), free_port()
    await database.create()
    await _fill(database, root, 2 * pairs)
    home = folder / "run"
    home.mkdir(exist_ok=True)
    (home / "ejabberd.yml").write_text(_config(port, database))
    libraries, erlang = root / "usr/lib/x86_64-linux-gnu", root / "usr/lib/erlang"
    # What the script `erl` does, which knows only the place it was packaged for.
    binaries = next(erlang.glob("erts-*")) / "bin"
    environment = {
        **os.environ,
        "HOME": str(home),
        "ROOTDIR": str(erlang),
        "BINDIR": str(binaries),
        "EMU": "beam",
        "PROGNAME": "erl",
        "ERL_LIBS": f"{libraries}:{root}/usr/share",
        "LD_LIBRARY_PATH": str(libraries),
        "EJABBERD_CONFIG_PATH": str(home / "ejabberd.yml"),
        "EJABBERD_LOG_PATH": str(home / "ejabberd.log"),
    }
    command = [
        str(binaries / "erlexec"),
        "-noinput",
        "-mnesia",
        "dir",
        f'"{home}/mnesia"',
        "-s",
        "ejabberd",
    ]
    async with running(command, home, port, environment):
        clients = await gather_bounded(
            [partial(_log_in, port, f"u{number}") for number in range(2 * pairs)], 8
        )
        yield EjabberdTalk(clients)


async def _fill(database: Database, root: Path, people: int) -> None:
    connection = await asyncpg.connect(database.url)
    try:
        await connection.execute((root / "usr/share/ejabberd/sql/pg.sql").read_text())
        await connection.executemany(
            "INSERT INTO users (username, password) VALUES ($1, $2)",
            [(f"u{number}", PASSWORD) for number in range(people)],
        )
    finally:
        await connection.close()
