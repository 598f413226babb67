"""Makes the services' databases and migrates them. Run as a process of its own, so that the supervisor, which lives as
long as the instance, does not carry Alembic and two database drivers in memory.

Reads one JSON document from standard input, `{"admin_url", "exclusive", "databases": [{"service", "name", "role", "password"
| null, "url"}]}`, and writes a line of JSON per step: `{"service", "step", "revision"?}`. A database without `password` was
made by someone else and is only migrated. With `exclusive` the server is ours alone, and a lost password may be set anew.
"""

import json
import sys
from typing import Any

import psycopg

from whispr.instance import store
from whispr.instance.errors import InstanceError
from whispr.kit import migrate

OLDEST_SERVER = 150_000
CONNECT_SECONDS = 10


def tell(service: str, step: str, **more: Any) -> None:
    sys.stdout.write(json.dumps({"service": service, "step": step, **more}) + "\n")
    sys.stdout.flush()


def provide(admin_url: str, databases: list[dict[str, Any]], *, exclusive: bool) -> None:
    """Makes the roles and databases that are missing. Raises InstanceError."""
    with psycopg.connect(admin_url, autocommit=True, connect_timeout=CONNECT_SECONDS) as admin:
        version = store.server_version(admin)
        if version < OLDEST_SERVER:
            raise InstanceError(f"PostgreSQL is version {version // 10_000}; Whispr needs 15 or newer.")
        for database in databases:
            _provide_role(admin, database, exclusive=exclusive)
            if not store.database_exists(admin, database["name"]):
                store.grant_membership(admin, database["role"])
                store.create_database(admin, database["name"], database["role"])
                tell(database["service"], "created")


def _provide_role(admin: psycopg.Connection, database: dict[str, Any], *, exclusive: bool) -> None:
    role, password = database["role"], database["password"]
    if not store.role_exists(admin, role):
        store.create_role(admin, role, password)
    elif not _can_enter(database["url"], admin.info.dbname):
        if not exclusive:
            raise InstanceError(
                f"The role {role} exists in the PostgreSQL of WHISPR_POSTGRES_URL with a password of another instance. "
                f"Set WHISPR_{database['service'].upper()}_DATABASE_URL, or give this instance a server of its own."
            )
        store.change_password(admin, role, password)


def _can_enter(url: str, maintenance: str) -> bool:
    """True when the role of `url` has the password of `url`. Tried on the `maintenance` database, which is always there."""
    try:
        psycopg.connect(url, dbname=maintenance, connect_timeout=CONNECT_SECONDS).close()
    except psycopg.OperationalError:
        return False
    return True


def migrate_all(databases: list[dict[str, Any]]) -> None:
    for database in databases:
        service, url = database["service"], database["url"]
        if migrate.current(service, url) != migrate.head(service):
            tell(service, "migrating")
            migrate.upgrade(service, url)
        tell(service, "ready", revision=migrate.head(service))


def main() -> int:
    order = json.load(sys.stdin)
    databases = order["databases"]
    ours = [database for database in databases if database["password"] is not None]
    try:
        if ours:
            provide(order["admin_url"], ours, exclusive=order["exclusive"])
        migrate_all(databases)
    except (InstanceError, psycopg.Error) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
