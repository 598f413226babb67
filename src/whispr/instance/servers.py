"""PostgreSQL and Valkey, embedded or external, and the services' databases in the one."""

import asyncio
import json
import os
import signal
import sys
from typing import Any
from urllib.parse import quote, urlsplit, urlunsplit

from whispr.instance.errors import StartFailed
from whispr.instance.postgres import EmbeddedPostgres
from whispr.instance.site import Site
from whispr.instance.supervision import wait_until
from whispr.instance.valkey import EmbeddedValkey


class Servers:
    """Where the services keep what they know. The URLs are empty until `start` has begun."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._postgres: EmbeddedPostgres | None = None
        self._valkey: EmbeddedValkey | None = None
        self._databases: dict[str, str] = {}

    @property
    def admin_url(self) -> str:
        """An administrator's URL of PostgreSQL."""
        if self._postgres is not None:
            return self._postgres.url
        return self._site.settings.postgres_url or ""

    @property
    def valkey_url(self) -> str:
        if self._valkey is not None:
            return self._valkey.url
        return self._site.settings.valkey_url or ""

    def database_url(self, service: str) -> str:
        """The URL that `service` enters its database with."""
        return self._databases[service]

    async def start(self) -> None:
        """Starts both, unless they are external, and prepares the databases. Raises InstanceError."""
        await asyncio.gather(self._start_postgres(), self._start_valkey())
        await self._prepare_databases()

    async def stop(self) -> None:
        """Stops what was started, the database last."""
        await self._site.family.stop("valkey")
        await self._site.family.stop("postgres")
        if self._postgres is not None:
            self._postgres.stop()

    def destroy(self) -> None:
        """Removes the data of a stopped PostgreSQL."""
        if self._postgres is not None:
            self._postgres.destroy()

    async def _start_postgres(self) -> None:
        site = self._site
        if site.settings.postgres_url is not None:
            site.progress.done("postgres", "external, from WHISPR_POSTGRES_URL")
            return
        server = EmbeddedPostgres(
            site.layout.postgres, port=site.ports["postgres"], password=site.layout.secret("postgres")
        )
        server.log = site.layout.log("postgres")
        self._postgres = server
        site.progress.step("preparing PostgreSQL")
        made = await asyncio.to_thread(server.prepare)
        child = site.family.supervise("postgres", server.spawn, stop_signal=signal.SIGINT, grace=30.0)
        await wait_until(child, server.accepting, site.settings.start_seconds, f"See {server.log}.")
        site.progress.done(
            "postgres", f"ready on 127.0.0.1:{server.port}" + (", new database" if made else "")
        )

    async def _start_valkey(self) -> None:
        site = self._site
        if site.settings.valkey_url is not None:
            site.progress.done("valkey", "external, from WHISPR_VALKEY_URL")
            return
        server = EmbeddedValkey(
            site.layout.valkey, port=site.ports["valkey"], password=site.layout.secret("valkey")
        )
        server.log = site.layout.log("valkey")
        self._valkey = server
        child = site.family.supervise("valkey", server.spawn)
        # Once ready it is never asked again: the services see for themselves.
        await wait_until(child, server.accepting, site.settings.start_seconds, f"See {server.log}.")
        site.progress.done("valkey", f"ready on 127.0.0.1:{server.port}")

    async def _prepare_databases(self) -> None:
        """Makes and migrates the services' databases, in a process of its own."""
        self._site.progress.step("preparing databases")
        order = {
            "admin_url": self.admin_url,
            "exclusive": self._postgres is not None,
            "databases": [self._database(entry.name) for entry in self._site.entries],
        }
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "whispr.instance.databases",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            if process.stdin is None or process.stdout is None or process.stderr is None:
                raise StartFailed("The databases' process has no pipes.")
            process.stdin.write(json.dumps(order).encode())
            process.stdin.close()
            complaints = asyncio.create_task(process.stderr.read())
            async for line in process.stdout:
                self._tell_database_step(json.loads(line))
            status = await process.wait()
            if status != 0:
                text = (await complaints).decode(errors="replace").strip()
                raise StartFailed(f"The databases could not be prepared:\n{text}")
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()

    def _tell_database_step(self, told: dict[str, Any]) -> None:
        if told["step"] == "migrating":
            self._site.progress.step(f"migrating the database of {told['service']}")

    def _database(self, service: str) -> dict[str, Any]:
        name = f"whispr_{service}"
        given = os.environ.get(f"WHISPR_{service.upper()}_DATABASE_URL")
        if given is not None:
            self._databases[service] = given
            return {"service": service, "name": name, "role": name, "password": None, "url": given}
        password = self._site.layout.secret(f"database-{service}")
        self._databases[service] = url_of(self.admin_url, name, name, password)
        return {
            "service": service,
            "name": name,
            "role": name,
            "password": password,
            "url": self._databases[service],
        }


def url_of(admin_url: str, database: str, user: str, password: str) -> str:
    """The URL of `database` on the server of `admin_url`, as `user`. Options after `?` stay."""
    parts = urlsplit(admin_url)
    where = parts.netloc.rpartition("@")[2]
    netloc = f"{quote(user, safe='')}:{quote(password, safe='')}@{where}"
    return urlunsplit((parts.scheme, netloc, f"/{database}", parts.query, ""))
