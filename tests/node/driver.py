"""The npm `phoenix` client, driven from Python. See phoenix.mjs for the commands and events."""

from __future__ import annotations

import asyncio
import hashlib
import json
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


class Unavailable(Exception):
    """Why the client cannot be run on this machine."""


def install() -> Path:
    """The folder whose node_modules hold the clients, installed on first use and kept outside the repository.

    Raises `Unavailable` where Node, npm or the registry is missing.
    """
    npm = shutil.which("npm")
    if shutil.which("node") is None or npm is None:
        raise Unavailable("node and npm are not installed")
    manifest = (HERE / "package.json").read_bytes()
    folder = Path(tempfile.gettempdir()) / f"whispr-node-{hashlib.sha256(manifest).hexdigest()[:16]}"
    if (folder / "complete").exists():
        return folder
    folder.mkdir(exist_ok=True)
    (folder / "package.json").write_bytes(manifest)
    command = [npm, "install", "--no-audit", "--no-fund", "--no-package-lock", "--ignore-scripts"]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    except subprocess.TimeoutExpired:
        raise Unavailable("the npm registry does not answer") from None
    if done.returncode != 0:
        raise Unavailable(f"npm install failed: {done.stderr.strip()[-300:]}")
    (folder / "complete").touch()
    return folder


class PhoenixClient:
    """One Node process. Events that were waited past are kept and can still be found."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.events: list[dict[str, Any]] = []
        self._arrived = asyncio.Condition()
        self._reader = asyncio.create_task(self._read())

    def do(self, command: str, socket: str = "s", **arguments: Any) -> None:
        """Send one command."""
        assert self._process.stdin is not None
        line = json.dumps({"do": command, "socket": socket, **arguments})
        self._process.stdin.write(line.encode() + b"\n")

    async def wait(self, on: str, timeout: float = 15.0, **members: Any) -> dict[str, Any]:
        """Take the earliest event of this kind whose members are these, waiting for it if need be."""
        async with asyncio.timeout(timeout), self._arrived:
            while True:
                for position, event in enumerate(self.events):
                    if event["on"] == on and members.items() <= event.items():
                        del self.events[position]
                        return event
                if self._reader.done():
                    raise AssertionError(f"the client ended while waiting for {on} {members}: {self.events}")
                await self._arrived.wait()

    async def _read(self) -> None:
        assert self._process.stdout is not None
        while line := await self._process.stdout.readline():
            async with self._arrived:
                self.events.append(json.loads(line))
                self._arrived.notify_all()
        async with self._arrived:
            self._arrived.notify_all()

    async def stop(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            async with asyncio.timeout(5):
                await self._process.wait()
        except TimeoutError:
            self._process.kill()
            await self._process.wait()
        await asyncio.gather(self._reader, return_exceptions=True)


@asynccontextmanager
async def phoenix_client() -> AsyncIterator[PhoenixClient]:
    """A running client. Raises `Unavailable`."""
    folder = await asyncio.to_thread(install)
    process = await asyncio.create_subprocess_exec(
        "node",
        str(HERE / "phoenix.mjs"),
        str(folder),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=2**22,
    )
    client = PhoenixClient(process)
    try:
        yield client
    finally:
        await client.stop()
