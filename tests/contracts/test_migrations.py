"""Every service's history of migrations goes up, down and up again, and ends where it ended before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest
from alembic.script import ScriptDirectory

import whispr
from whispr.kit import migrate

SERVICES = sorted(path.parent.name for path in Path(whispr.__file__).parent.glob("services/*/migrations"))

Schema = set[tuple[str, ...]]


def schema(url: str) -> Schema:
    """Columns, indices, constraints, triggers and functions of the database, as the server describes them."""
    statements = (
        """SELECT 'column', table_name, column_name, data_type, is_nullable, coalesce(column_default, '')
        FROM information_schema.columns WHERE table_schema = 'public'""",
        "SELECT 'index', tablename, indexname, indexdef FROM pg_indexes WHERE schemaname = 'public'",
        """SELECT 'constraint', conrelid::regclass::text, conname, pg_get_constraintdef(oid)
        FROM pg_constraint WHERE connamespace = 'public'::regnamespace""",
        """SELECT 'trigger', tgrelid::regclass::text, tgname, pg_get_triggerdef(oid)
        FROM pg_trigger WHERE NOT tgisinternal""",
        "SELECT 'function', proname, prosrc FROM pg_proc WHERE pronamespace = 'public'::regnamespace",
    )
    with psycopg.connect(url) as connection:
        rows = {tuple(map(str, row)) for statement in statements for row in connection.execute(statement)}
    return {row for row in rows if "alembic_version" not in row}


@pytest.mark.parametrize("service", SERVICES)
def test_up_down_and_up_again(service: str, new_database: Callable[[str], str]) -> None:
    url = new_database(f"migrations_{service}")
    script = ScriptDirectory.from_config(migrate.alembic_config(service, url))
    revisions = [revision.revision for revision in reversed(list(script.walk_revisions()))]
    schemas = [schema(url)]
    for revision in revisions:
        migrate.upgrade(service, url, revision)
        schemas.append(schema(url))
        assert migrate.current(service, url) == revision
    for index in range(len(revisions), 0, -1):
        migrate.downgrade(service, url, revisions[index - 2] if index > 1 else "base")
        assert schema(url) == schemas[index - 1], (
            f"downgrade of {revisions[index - 1]} leaves something behind"
        )
    migrate.upgrade(service, url)
    assert schema(url) == schemas[-1]
    migrate.upgrade(service, url)
    assert migrate.current(service, url) == migrate.head(service)


@pytest.mark.parametrize("service", SERVICES)
def test_times_have_a_zone(service: str, database: Callable[[str], str]) -> None:
    assert not [
        row
        for row in schema(database(service))
        if row[0] == "column" and row[3].startswith("timestamp without")
    ]


@pytest.mark.parametrize("service", SERVICES)
def test_a_history_has_one_head(service: str) -> None:
    script = ScriptDirectory.from_config(migrate.alembic_config(service, "postgresql://unused"))
    assert len(script.get_heads()) == 1
