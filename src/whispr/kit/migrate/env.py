"""Alembic's entry point, run by `whispr.kit.migrate` for every service."""

from __future__ import annotations

import zlib

from alembic import context
from sqlalchemy import Connection, create_engine, pool, text

LOCK_TIMEOUT = "4s"
STATEMENT_TIMEOUT = "60s"


def run() -> None:
    url = context.config.get_main_option("sqlalchemy.url")
    assert url is not None
    engine = create_engine(url, poolclass=pool.NullPool)
    with engine.connect() as connection:
        _migrate(connection)


def _migrate(connection: Connection) -> None:
    key = zlib.crc32(f"whispr-migrate-{context.config.attributes.get('service', '')}".encode())
    connection.execute(text("SELECT pg_advisory_lock(:key)"), {"key": key})
    connection.execute(text(f"SET lock_timeout = '{LOCK_TIMEOUT}'"))
    connection.execute(text(f"SET statement_timeout = '{STATEMENT_TIMEOUT}'"))
    connection.commit()
    try:
        context.configure(connection=connection, transaction_per_migration=True)
        with context.begin_transaction():
            context.run_migrations()
        connection.commit()
    finally:
        connection.rollback()
        connection.execute(text("SELECT pg_advisory_unlock(:key)"), {"key": key})
        connection.commit()


run()
