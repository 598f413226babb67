"""`whispr demo`: the client library's demonstration, over an instance of its own unless told otherwise."""

import asyncio
import shutil
import signal
import tempfile
from pathlib import Path

from rich.console import Console

from whispr.cli.places import instance_settings
from whispr.cli.terminal import TerminalProgress
from whispr.instance.catalog import present
from whispr.instance.ports import free_port
from whispr.instance.up import Instance


def demonstrate(url: str | None) -> int:
    """Runs the demonstration at `url`, or over a fresh instance that is gone afterwards."""
    console = Console()
    if url is not None:
        return asyncio.run(_show(url.rstrip("/"), console))
    folder = Path(tempfile.mkdtemp(prefix="whispr-demo-"))
    try:
        return asyncio.run(_with_instance(folder, console))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


async def _show(url: str, console: Console) -> int:
    from whispr.client import demo

    return await demo.run(url, console)


async def _with_instance(folder: Path, console: Console) -> int:
    # The demonstration sends as fast as it can; limits would only slow down what it shows.
    settings = instance_settings(
        data=folder / "data", port=free_port(), environment="development", rate_limits="off"
    )
    progress = TerminalProgress(console)
    instance = Instance(settings, present(), progress)
    demonstration = asyncio.current_task()
    if demonstration is not None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, demonstration.cancel)
    try:
        await instance.start()
        progress.quiet()
        return await _show(instance.url, console)
    finally:
        progress.quiet()
        await instance.stop()
        instance.destroy()
