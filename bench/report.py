"""What a scenario prints: the machine, a table, and the same as JSON."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

_WIDEST = 9
"""Columns that fit a terminal; a table with more is turned on its side."""


def percentile(ordered: Sequence[float], share: float) -> float:
    """The value below which `share` (0–1) of the `ordered` values lie; NaN of none."""
    if not ordered:
        return float("nan")
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def machine() -> str:
    """Processor, cores, kernel and Python of this machine, in a line."""
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    return f"{model}, {os.cpu_count()} cores, {platform.system()} {platform.release()}, Python {platform.python_version()}"


def publish(scenario: str, setting: str, rows: list[dict[str, Any]], **more: Any) -> None:
    """Print `rows` (one shape) as a table, then everything as one line of JSON."""
    console = Console(width=140)
    date = datetime.now(UTC).strftime("%Y-%m-%d")
    table = Table(title=f"{scenario}, {date}")
    names = list(rows[0]) if rows else []
    if len(names) > _WIDEST:
        table.add_column("")
        for _ in rows:
            table.add_column(justify="right")
        table.show_header = False
        for name in names:
            table.add_row(name, *(_shown(row[name]) for row in rows))
    else:
        for name in names:
            table.add_column(name, justify="right")
        for row in rows:
            table.add_row(*(_shown(value) for value in row.values()))
    console.print(table)
    console.print(machine(), setting, sep="\n", style="dim", highlight=False)
    result = {
        "scenario": scenario,
        "date": date,
        "machine": machine(),
        "setting": setting,
        "rows": rows,
        **more,
    }
    print(json.dumps(result))


def _shown(value: Any) -> str:
    return (
        f"{value:,.1f}"
        if isinstance(value, float)
        else f"{value:,}"
        if isinstance(value, int)
        else str(value)
    )
