"""The same 1:1 messages through Whispr, ejabberd and Synapse, each durable in PostgreSQL, on this machine in one run.

First as fast as each goes with a few messages under way in each pair, then at the same paced rates. A message counts when
the other person's client has it; each server has stored it by then. ejabberd archives with mod_mam (`always`); nothing
but Whispr checks signatures. The others are installed into folders of their own the first time.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import uvloop

from bench.instance import own_instance
from bench.report import publish
from bench.rivals import ejabberd, synapse, whispr
from bench.rivals.talk import CannotInstallError, Talk, closed_loop, paced

SYSTEMS = ("whispr", "ejabberd", "synapse")
MOST_OF_CAPACITY = 0.9
"""A rate above this share of what a server carried at most is not offered to it."""


async def _drive(name: str, talk: Talk, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    # Caches, plans and pools of connections fill first.
    await closed_loop(talk, 2, arguments.window, 1)
    if isinstance(talk, whispr.WhisprTalk):
        talk.prepare(1_000_000, int(arguments.seconds * arguments.prepared))
    rows = [await closed_loop(talk, arguments.seconds, arguments.window, 1_000_000)]
    for place, rate in enumerate(arguments.rates):
        if rate > MOST_OF_CAPACITY * rows[0]["delivered/s"]:
            break
        first = (2 + place) * 1_000_000
        if isinstance(talk, whispr.WhisprTalk):
            talk.prepare(first, int(rate * arguments.seconds / talk.pairs) + 1)
        rows.append(await paced(talk, rate, arguments.seconds, first))
    return [{"server": name, **row} for row in rows]


async def _measure(arguments: argparse.Namespace) -> int:
    rows: list[dict[str, Any]] = []
    missing: dict[str, str] = {}
    folder = arguments.folder
    with own_instance() as instance:
        admin_url = instance.run["postgres"]["url"]
        talks: dict[str, Callable[[], AbstractAsyncContextManager[Talk]]] = {
            "whispr": lambda: whispr.talking(instance, arguments.pairs),
            "ejabberd": lambda: ejabberd.talking(_fresh(folder / "ejabberd"), admin_url, arguments.pairs),
            "synapse": lambda: synapse.talking(_fresh(folder / "synapse"), admin_url, arguments.pairs),
        }
        for name in arguments.systems:
            try:
                async with talks[name]() as talk:
                    rows += await _drive(name, talk, arguments)
            except CannotInstallError as reason:
                missing[name] = str(reason)
                print(f"{name} is left out: {reason}", flush=True)
            await asyncio.sleep(5)
    publish(
        "comparison",
        f"{arguments.pairs} pairs, one way, {arguments.window} messages under way in each where it goes as fast as it can, {arguments.seconds:g} s each; PostgreSQL (fsync on, the same for all), the load "
        "generator and all servers on the same machine; Whispr past the gateway, one messaging process",
        rows,
        ratios=_ratios(rows),
        missing=missing,
    )
    for name, ratio in _ratios(rows).items():
        print(f"whispr carries {ratio['messages']:.1f} times the messages of {name}", flush=True)
    return 1 if missing else 0


def _ratios(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """How many times the messages Whispr carried, and its share of the other's P99 at each rate that both carried."""
    own = {row["offered"]: row for row in rows if row["server"] == "whispr"}
    ratios: dict[str, dict[str, float]] = {}
    for row in rows:
        if row["server"] == "whispr" or row["offered"] not in own:
            continue
        found = ratios.setdefault(row["server"], {})
        ours = own[row["offered"]]
        if row["offered"] == "as fast as it goes":
            found["messages"] = ours["delivered/s"] / max(row["delivered/s"], 0.001)
        found[f"P99 at {row['offered']}"] = ours["P99 ms"] / row["P99 ms"]
    return ratios


def _fresh(folder: Path) -> Path:
    """What is installed stays; what an earlier run left does not."""
    shutil.rmtree(folder / "run", ignore_errors=True)
    return folder


def main(argv: list[str]) -> int:
    """`whispr bench comparison [--pairs N] [--rates …] [--systems …] [--folder DIR]`; status 1 when one could not be had."""
    parser = argparse.ArgumentParser(prog="whispr bench comparison", description=__doc__)
    parser.add_argument("--pairs", type=int, default=100)
    parser.add_argument("--window", type=int, default=4, help="messages under way in each pair, unpaced")
    parser.add_argument("--seconds", type=float, default=10, help="length of each measurement")
    parser.add_argument(
        "--rates", type=float, nargs="+", default=[20, 500, 1_000, 2_000], help="paced messages a second"
    )
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument(
        "--prepared", type=int, default=120, help="messages a second and pair signed beforehand"
    )
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path.home() / ".cache" / "whispr-bench",
        help="where the others are installed",
    )
    return uvloop.run(_measure(parser.parse_args(argv)))
