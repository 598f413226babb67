"""Starting and stopping a program that is not ours, and a database for it in the instance's PostgreSQL."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

import asyncpg

from bench.rivals.talk import CannotInstallError


class Database:
    """An empty database of the server at `admin_url`; its parts, for programs that want them apart."""

    def __init__(self, admin_url: str, name: str) -> None:
        parts = urlsplit(admin_url)
        self.host = parts.hostname or "127.0.0.1"
        self.port = parts.port or 5432
        self.user = unquote(parts.username or "")
        self.password = unquote(parts.password or "")
        self.name = name
        self.url = admin_url.rpartition("/")[0] + f"/{name}"
        self._admin_url = admin_url

    async def create(self) -> None:
        """As Synapse demands it: sorted by bytes."""
        connection = await asyncpg.connect(self._admin_url)
        try:
            await connection.execute(
                f'CREATE DATABASE "{self.name}" TEMPLATE template0 ENCODING UTF8 LC_COLLATE "C" LC_CTYPE "C"'
            )
        finally:
            await connection.close()


def run(command: Sequence[str], cwd: Path, what: str, timeout: float = 900) -> None:
    """Run a step of an installation. Raises CannotInstall with the end of its output."""
    try:
        done = subprocess.run(
            command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=timeout, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CannotInstallError(f"{what}: {error}") from error
    if done.returncode != 0:
        raise CannotInstallError(f"{what}: {done.stdout.decode(errors='replace').strip()[-400:]}")


@asynccontextmanager
async def running(
    command: Sequence[str], folder: Path, port: int, environment: Mapping[str, str]
) -> AsyncIterator[None]:
    """The program, from when it listens on `port` until the block ends."""
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, env=dict(environment), stdout=log, stderr=log)
        try:
            await _listening(process, port, folder / "server.log")
            yield
        finally:
            process.terminate()
            try:
                await asyncio.to_thread(process.wait, 20)
            except subprocess.TimeoutExpired:
                process.kill()


async def _listening(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    for _ in range(600):
        if process.poll() is not None:
            break
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            await asyncio.sleep(0.1)
        else:
            writer.close()
            return
    raise CannotInstallError(f"it does not start: {log.read_text(errors='replace').strip()[-800:]}")
