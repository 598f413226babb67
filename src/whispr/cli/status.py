"""`whispr status`."""

import json
import math
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from whispr.cli.places import running
from whispr.instance.errors import InstanceError

NOT_READY, NOT_RUNNING = 1, 3
ASK_SECONDS = 3.0


def report(data: Path | None, *, as_json: bool) -> int:
    """Prints the state of the instance over `data`; returns the exit status."""
    console = Console()
    try:
        record = running(data)
    except InstanceError as error:
        console.print(str(error), markup=False, highlight=False, soft_wrap=True)
        return NOT_RUNNING
    parts = examine(record)
    if as_json:
        document = {
            "public": record["public"],
            "ready": all(p["state"] == "ready" for p in parts),
            "parts": parts,
        }
        console.print_json(json.dumps(document))
    else:
        console.print(_table(record["public"], parts))
    if not _alive(record.get("pid")):
        return NOT_RUNNING
    return 0 if all(part["state"] == "ready" for part in parts) else NOT_READY


def examine(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Each part of the instance with its address, pid, memory in MiB and state: ready, not ready or stopped.

    A server that is not this instance's own has no pid. Every part is asked: that a process lives says little.
    """
    parts = []
    for name, answers in (("postgres", _postgres_answers), ("valkey", _valkey_answers)):
        url, pid = record[name]["url"], record[name]["pid"]
        parts.append(_part(name, url.rpartition("@")[2], pid, _server_state(url, pid, answers)))
    for name, service in record["services"].items():
        for number, worker in enumerate(service.get("workers", [service]), start=1):
            state = _readiness(f"{worker['internal']}/readyz") if _alive(worker["pid"]) else "stopped"
            title = name if number == 1 else f"{name}-{number}"
            parts.append(_part(title, service["http"], worker["pid"], state))
    gateway = record["gateway"]
    state = _readiness(f"{record['public']}/readyz") if _alive(gateway["pid"]) else "stopped"
    parts.append(_part(f"gateway ({gateway['kind']})", record["public"], gateway["pid"], state))
    return parts


def _part(name: str, address: str, pid: int | None, state: str) -> dict[str, Any]:
    return {"name": name, "address": address, "pid": pid, "memory_mib": _memory(pid), "state": state}


def _table(public: str, parts: list[dict[str, Any]]) -> Table:
    table = Table(title=f"whispr on {public}", title_justify="left", box=None, pad_edge=False)
    for heading in ("part", "state", "address", "pid", "MiB"):
        table.add_column(heading, justify="right" if heading in {"pid", "MiB"} else "left")
    for part in parts:
        colour = "green" if part["state"] == "ready" else "red"
        memory = "" if part["memory_mib"] is None else str(part["memory_mib"])
        state = f"[{colour}]{part['state']}[/{colour}]"
        table.add_row(part["name"], state, part["address"], str(part["pid"] or "external"), memory)
    return table


def _alive(pid: int | None) -> bool:
    try:
        return pid is not None and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _memory(pid: int | None) -> int | None:
    try:
        return None if pid is None else round(psutil.Process(pid).memory_info().rss / 2**20)
    except psutil.Error:
        return None


def _server_state(url: str, pid: int | None, answers: Callable[[str], bool]) -> str:
    # While an instance is starting it has no URL yet, and an empty one would ask whatever this machine's default is.
    if not url or (pid is not None and not _alive(pid)):
        return "stopped"
    return "ready" if answers(url) else "not ready"


def _postgres_answers(url: str) -> bool:
    import psycopg

    try:
        # The client library takes whole seconds.
        psycopg.connect(url, connect_timeout=math.ceil(ASK_SECONDS)).close()
    except psycopg.Error:
        return False
    return True


def _valkey_answers(url: str) -> bool:
    import redis
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    try:
        with redis.Redis.from_url(
            url,
            socket_timeout=ASK_SECONDS,
            socket_connect_timeout=ASK_SECONDS,
            # Repeated, a server that does not answer would take several times as long.
            retry=Retry(NoBackoff(), 0),
        ) as client:
            return bool(client.ping())
    except (redis.RedisError, ValueError):
        return False


def _readiness(url: str) -> str:
    try:
        with urllib.request.urlopen(url, timeout=ASK_SECONDS) as answer:  # noqa: S310 (an address of run.json)
            return "ready" if answer.status == 200 else "not ready"
    except (urllib.error.URLError, OSError):
        return "not ready"
