"""What the pages say of settings and proofs is so."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic_core import PydanticUndefined
from pydantic_settings import BaseSettings

import whispr
from whispr.instance.settings import InstanceSettings
from whispr.kit.settings import CommonSettings, ServiceSettings

REPOSITORY = Path(__file__).parents[2]
DOCS = REPOSITORY / "docs"
# Where nothing is given these depend on the machine or on other variables; the page says so in words.
IN_WORDS = {"WHISPR_DATA", "WHISPR_AUTH_KEYRING_CREATE"}


def settings_classes() -> Iterator[type[BaseSettings]]:
    yield from (CommonSettings, InstanceSettings)
    for path in sorted(Path(whispr.__file__).parent.glob("services/*/settings.py")):
        module = importlib.import_module(f"whispr.services.{path.parent.name}.settings")
        yield from (
            value
            for value in vars(module).values()
            if isinstance(value, type) and issubclass(value, ServiceSettings) and value is not ServiceSettings
        )


def defaults() -> dict[str, set[str]]:
    """Each variable with the defaults it has, as the page writes them: "" for none, "required" where there must be one."""
    found: dict[str, set[str]] = {}
    for settings in settings_classes():
        prefix = str(settings.model_config["env_prefix"])
        for name, field in settings.model_fields.items():
            found.setdefault(f"{prefix}{name.upper()}", set()).add(written(field.default))
    return found


def written(default: Any) -> str:
    if default is PydanticUndefined:
        return "required"
    if default is None:
        return ""
    if isinstance(default, bool):
        return str(default).lower()
    return str(int(default)) if isinstance(default, float) and default.is_integer() else str(default)


def documented() -> dict[str, set[str]]:
    """Each variable in a table of the page's settings with the defaults given there."""
    page = (DOCS / "operations.md").read_text()
    section = page.partition("\n## Settings\n")[2].partition("\n## ")[0]
    found: dict[str, set[str]] = {}
    for line in section.splitlines():
        if not line.startswith("| `WHISPR_"):
            continue
        variables, default = (cell.strip() for cell in line.split("|")[1:3])
        names = re.findall(r"`([^`]+)`", variables)
        values = re.findall(r"`([^`]+)`", default) or [default]
        assert len(values) in (1, len(names)), line
        for name, value in zip(names, values * len(names) if len(values) == 1 else values, strict=False):
            found.setdefault(name, set()).add(value)
    return found


def test_operations_names_every_setting_and_no_other() -> None:
    assert set(documented()) == set(defaults())


def test_operations_gives_the_defaults_that_hold() -> None:
    page, code = documented(), defaults()
    wrong = {
        name: (page[name], code[name])
        for name in page.keys() & code.keys() - IN_WORDS
        if page[name] != code[name]
    }
    assert wrong == {}


def cited() -> list[tuple[str, str | None]]:
    """Each file a row of the requirements calls its proof, with the test's name."""
    page = (DOCS / "requirements.md").read_text()
    found = re.findall(r"`((?:[\w.-]+/)+[\w.-]+\.(?:py|mjs))(?:::(\w+))?`", page)
    return sorted({(path, name or None) for path, name in found}, key=str)


def test_every_proof_that_is_cited_exists() -> None:
    proofs = cited()
    assert len(proofs) > 100, "the page is read as it is written"
    missing = []
    for path, name in proofs:
        file = REPOSITORY / path if path.startswith("bench/") else REPOSITORY / "tests" / path
        if not file.is_file() or (name is not None and name not in functions(file)):
            missing.append(path if name is None else f"{path}::{name}")
    assert missing == []


def functions(file: Path) -> set[str]:
    tree = ast.parse(file.read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


@pytest.mark.parametrize(
    "page", [*sorted(DOCS.rglob("*.md")), *sorted(REPOSITORY.glob("*.md"))], ids=lambda page: page.name
)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text())
    broken = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert broken == []
