"""`whispr bench`: scenarios are modules of bench/ with `main(argv) -> int`."""

import ast
import importlib
import sys
from pathlib import Path

from rich.console import Console

from whispr.cli.places import repository
from whispr.instance.errors import InstanceError


def scenarios(folder: Path) -> dict[str, str]:
    """Name and first line of the description of each scenario, without running any."""
    found = {}
    for path in sorted(folder.glob("*.py")):
        if path.stem.startswith("_"):
            continue
        tree = ast.parse(path.read_text())
        if any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body):
            found[path.stem.replace("_", "-")] = (ast.get_docstring(tree) or "").partition("\n")[0]
    return found


def list_scenarios() -> None:
    console = Console()
    for name, line in scenarios(repository() / "bench").items():
        console.print(f"  {name:<24} {line}", markup=False, highlight=False, soft_wrap=True)


def run_scenario(name: str, arguments: list[str]) -> int:
    """Runs the scenario `name`; returns its exit status. Raises InstanceError when there is none."""
    root = repository()
    known = scenarios(root / "bench")
    if name not in known:
        raise InstanceError(f"There is no bench {name}; there are {', '.join(known)}.")
    sys.path.insert(0, str(root))
    module = importlib.import_module(f"bench.{name.replace('-', '_')}")
    return int(module.main(arguments))
