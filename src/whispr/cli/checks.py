"""`whispr check`: everything that must hold besides the tests."""

import filecmp
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from whispr.cli.contracts import PACKAGE, write_openapi, write_protos
from whispr.cli.places import repository

SOURCES = ("src", "tests", "bench")


def run_checks() -> int:
    """Runs every check, also after one has failed; returns 1 when any did."""
    root, console = repository(), Console()
    folders = [folder for folder in SOURCES if (root / folder).exists()]
    checks: dict[str, Callable[[], str]] = {
        "ruff check": lambda: _tool(root, "ruff", "check", *folders),
        "ruff format": lambda: _tool(root, "ruff", "format", "--check", *folders),
        "mypy --strict": lambda: _tool(root, "mypy"),
        "import-linter": lambda: _tool(root, "lint-imports", "--no-cache"),
        "contracts": lambda: stale_contracts(root),
    }
    failed = []
    for name, check in checks.items():
        complaint = check()
        if complaint:
            failed.append(name)
            console.print(complaint, markup=False, highlight=False, soft_wrap=True)
        console.print(f"{name:<16} {'failed' if complaint else 'holds'}", markup=False, highlight=False)
    return 1 if failed else 0


def _tool(root: Path, name: str, *arguments: str) -> str:
    """What a tool of the environment complains about; empty when it does not."""
    command = [str(Path(sys.executable).parent / name), *arguments]
    outcome = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    return "" if outcome.returncode == 0 else (outcome.stdout + outcome.stderr).strip() or f"{name} failed"


def stale_contracts(root: Path) -> str:
    """Which generated files differ from what their sources give now; empty when none."""
    with tempfile.TemporaryDirectory() as scratch:
        fresh = Path(scratch)
        write_protos(root, fresh)
        write_openapi(fresh / "openapi")
        stale = [
            *_differences(fresh / PACKAGE, root / "src" / PACKAGE, "*_pb2*"),
            *_differences(fresh / "openapi", root / "openapi", "*.json"),
        ]
    return "" if not stale else "Run `whispr contracts` and commit: " + ", ".join(stale)


def _differences(fresh: Path, kept: Path, pattern: str) -> list[str]:
    names = {path.name for folder in (fresh, kept) for path in folder.glob(pattern)}
    return sorted(
        str(kept / name)
        for name in names
        if not ((fresh / name).exists() and (kept / name).exists())
        or not filecmp.cmp(fresh / name, kept / name, shallow=False)
    )
