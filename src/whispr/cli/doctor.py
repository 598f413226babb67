"""`whispr doctor`."""

import importlib.metadata
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from whispr.cli.places import instance_settings, repository
from whispr.cli.status import examine as examine_parts
from whispr.instance import gateway, valkey
from whispr.instance.accounts import reachable, unprivileged_account
from whispr.instance.catalog import present
from whispr.instance.errors import InstanceError
from whispr.instance.layout import Layout
from whispr.instance.ports import is_free
from whispr.instance.postgres import packaged_binaries
from whispr.instance.settings import InstanceSettings

OLDEST_PYTHON = (3, 11)
ENOUGH_DISK = 1 << 30
ENOUGH_FILES = 4096
ENOUGH_MEMORY = 1 << 30
CONNECT_SECONDS = 5

Mark = Literal["ok", "note", "missing"]
SIGNS = {"ok": "[green]✓[/green]", "note": "[yellow]•[/yellow]", "missing": "[red]✗[/red]"}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at. `missing` means that `whispr up` cannot work so; `advice` says what to do."""

    mark: Mark
    name: str
    text: str
    advice: str = ""


def examine(data: Path | None) -> int:
    """Prints all findings; returns 1 when something needed is missing."""
    console = Console()
    findings = list(look(data))
    for finding in findings:
        console.print(f"{SIGNS[finding.mark]} {finding.name:<14} ", end="", highlight=False)
        console.print(finding.text, markup=False, highlight=False, soft_wrap=True)
        if finding.advice:
            console.print(f"{'':17}→ {finding.advice}", markup=False, highlight=False, soft_wrap=True)
    missing = sum(finding.mark == "missing" for finding in findings)
    closing = (
        "Everything that `whispr up` needs is here." if not missing else f"{missing} needed and missing."
    )
    console.print(closing, markup=False, highlight=False)
    return 1 if missing else 0


def look(data: Path | None) -> Iterator[Finding]:
    """Every finding about this machine and the instance over `data`."""
    yield _python()
    yield _packages()
    try:
        settings = instance_settings(data=data)
    except InstanceError as error:
        yield Finding("missing", "settings", str(error), "Correct or unset the variable.")
        return
    yield _postgres(settings)
    yield _valkey(settings)
    yield _gateway(settings)
    yield _services(settings)
    yield from _instance(settings)
    yield from _machine(settings)
    yield _tool("node", "runs the tests with the unmodified phoenix.js client; without it they are skipped")
    yield _tool("git", "needed for .ci/run")
    yield _tool("uv", "installs requirements fast; the launcher fetches its own where there is none")


def _python() -> Finding:
    text = f"{platform.python_version()} ({sys.executable}) on {platform.system()} {platform.machine()}"
    if sys.version_info < OLDEST_PYTHON:
        return Finding("missing", "Python", text, "Install Python 3.11 or newer, or set WHISPR_PYTHON.")
    return Finding("ok", "Python", text)


def _packages() -> Finding:
    """Compares what is installed with the pinned versions."""
    try:
        pinned = (repository() / "requirements" / "runtime.txt").read_text()
    except (InstanceError, OSError):
        return Finding("note", "packages", "not compared: no repository here")
    different = []
    pins = re.findall(r"^([A-Za-z0-9_.-]+)==([^\s;\\]+)(?: ; (.*?))?(?: \\)?$", pinned, re.MULTILINE)
    for name, wanted, condition in pins:
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            if condition:
                continue
            found = "missing"
        if found != wanted:
            different.append(f"{name} {found} instead of {wanted}")
    if different:
        advice = "Remove .venv and start ./whispr again."
        return Finding("missing", "packages", "; ".join(different), advice)
    return Finding("ok", "packages", f"{len(pins)} pinned, all as pinned")


def _postgres(settings: InstanceSettings) -> Finding:
    if settings.postgres_url is not None:
        return _external_postgres(settings.postgres_url)
    try:
        text = _first_line([str(packaged_binaries() / "bin" / "postgres"), "--version"])
        account = unprivileged_account()
    except (InstanceError, OSError, subprocess.SubprocessError) as error:
        return Finding(
            "missing", "PostgreSQL", str(error), "Set WHISPR_POSTGRES_URL to a PostgreSQL 15 or newer."
        )
    if account is None:
        return Finding("ok", "PostgreSQL", f"{text}, embedded")
    place = (
        "the data folder"
        if reachable(settings.data, account)
        else "/var/lib/whispr, for it cannot reach the data folder"
    )
    return Finding(
        "ok",
        "PostgreSQL",
        f"{text}, embedded; as you are root it runs as {account.name} with its data in {place}",
    )


def _external_postgres(url: str) -> Finding:
    import psycopg

    try:
        with psycopg.connect(url, connect_timeout=CONNECT_SECONDS) as connection:
            version = connection.info.server_version
    except psycopg.Error as error:
        return Finding(
            "missing", "PostgreSQL", f"not reachable: {error}".strip(), "Check WHISPR_POSTGRES_URL."
        )
    text = f"{version // 10000}.{version % 10000} at WHISPR_POSTGRES_URL"
    if version < 150_000:
        return Finding("missing", "PostgreSQL", text, "Whispr needs 15 or newer.")
    return Finding("ok", "PostgreSQL", text)


def _valkey(settings: InstanceSettings) -> Finding:
    if settings.valkey_url is not None:
        return _external_valkey(settings.valkey_url)
    try:
        text = _first_line([str(valkey.binary()), "--version"])
    except (InstanceError, OSError, subprocess.SubprocessError) as error:
        return Finding(
            "missing", "Valkey", str(error), "Set WHISPR_VALKEY_URL to a Valkey or Redis 7 or newer."
        )
    version = re.search(r"v=(\S+)", text)
    return Finding("ok", "Valkey", f"{version[1] if version else text}, embedded")


def _external_valkey(url: str) -> Finding:
    import redis

    try:
        with redis.Redis.from_url(
            url, socket_timeout=CONNECT_SECONDS, socket_connect_timeout=CONNECT_SECONDS
        ) as client:
            information = client.info("server")
    except (redis.RedisError, ValueError) as error:
        return Finding("missing", "Valkey", f"not reachable: {error}", "Check WHISPR_VALKEY_URL.")
    version = information.get("valkey_version") or information.get("redis_version")
    return Finding("ok", "Valkey", f"{version} at WHISPR_VALKEY_URL")


def _gateway(settings: InstanceSettings) -> Finding:
    try:
        kind = gateway.choose(settings.gateway)
    except InstanceError as error:
        return Finding("missing", "gateway", str(error), "Unset WHISPR_GATEWAY.")
    if kind == "envoy":
        return Finding("ok", "gateway", f"Envoy {gateway.envoy_version()}")
    reason = (
        "asked for by WHISPR_GATEWAY"
        if settings.gateway == "builtin"
        else "Envoy has no wheel for this platform"
    )
    return Finding(
        "note",
        "gateway",
        f"built in, {reason}",
        "Tokens and limits are then checked by the services alone, which is safe.",
    )


def _services(settings: InstanceSettings) -> Finding:
    counts = {entry.name: settings.workers(entry.name) for entry in present()}
    names = [name if count == 1 else f"{name} ({count} workers)" for name, count in counts.items()]
    processors = os.cpu_count() or 1
    if max(counts.values(), default=1) <= processors:
        return Finding("ok", "services", ", ".join(names))
    return Finding(
        "note",
        "services",
        ", ".join(names),
        f"More workers than the {processors} processors of this machine only take memory.",
    )


def _instance(settings: InstanceSettings) -> Iterator[Finding]:
    record = Layout(settings.data).read_record()
    if record is not None:
        yield Finding(
            "ok", "instance", f"{settings.data} has one at {record.get('public')}; see `whispr status`"
        )
        yield from _running(record)
        return
    yield Finding("ok", "instance", f"none runs from {settings.data}")
    if is_free(settings.port, settings.host):
        yield Finding("ok", "port", f"{settings.port} is free")
    else:
        yield Finding(
            "missing", "port", f"{settings.port} is taken by another program", "Choose one with --port."
        )


def _running(record: dict[str, Any]) -> Iterator[Finding]:
    """What is wrong with the processes of a running instance."""
    for part in examine_parts(record):
        if part["state"] != "ready":
            text = f"{part['name']} is {part['state']}"
            yield Finding("note", "part", text, "Look at its log; `whispr up` starts it again.")


def _machine(settings: InstanceSettings) -> Iterator[Finding]:
    folder = next(parent for parent in (settings.data, *settings.data.parents) if parent.exists())
    if not os.access(folder, os.W_OK | os.X_OK):
        yield Finding(
            "missing", "data", f"{folder} is not writable by you", "Choose another folder with --data."
        )
    free = shutil.disk_usage(folder).free
    advice = "" if free > ENOUGH_DISK else "Make room: PostgreSQL alone wants more."
    yield Finding(
        "ok" if free > ENOUGH_DISK else "note", "disk", f"{free / 2**30:.1f} GiB free in {folder}", advice
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    advice = "" if memory >= ENOUGH_MEMORY else "An instance uses about 600 MiB."
    yield Finding("ok" if memory >= ENOUGH_MEMORY else "note", "memory", f"{memory / 2**30:.1f} GiB", advice)
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    enough = files == resource.RLIM_INFINITY or files >= ENOUGH_FILES
    text = "unlimited" if files == resource.RLIM_INFINITY else str(files)
    advice = "" if enough else "Raise it (ulimit -Hn): every open socket of a person needs two or three."
    yield Finding("ok" if enough else "note", "open files", f"{text} allowed per process", advice)
    yield _temporary()


def _temporary() -> Finding:
    folder = Path(tempfile.gettempdir())
    # PostgreSQL's socket lies there, and a socket's path may have 107 bytes on Linux and 103 on macOS.
    if len(os.fsencode(folder)) > 60:
        return Finding(
            "missing",
            "temporary",
            f"the path {folder} is too long for a Unix socket",
            "Set TMPDIR to a short one.",
        )
    return Finding("ok", "temporary", str(folder))


def _tool(name: str, purpose: str) -> Finding:
    path = shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))
    if path is None:
        return Finding("note", name, "not installed", purpose[0].upper() + purpose[1:] + ".")
    try:
        return Finding("ok", name, _first_line([path, "--version"]))
    except (OSError, subprocess.SubprocessError) as error:
        return Finding("note", name, f"{path} does not run: {error}", purpose)


def _first_line(command: list[str]) -> str:
    outcome = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    return outcome.stdout.strip().partition("\n")[0]
