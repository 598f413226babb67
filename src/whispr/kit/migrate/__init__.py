"""Schema migrations: Alembic revisions in plain SQL, one history per service.

A revision is `services/<service>/migrations/NNNN_<what>.py` with `upgrade()` and `downgrade()` that call
`op.execute("…")`. Both run with lock and statement timeouts, so that a migration that would stall a live system fails
instead, and under an advisory lock, so that replicas that start together migrate once.
"""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine

import whispr

_PACKAGE = Path(whispr.__file__).parent


def alembic_config(service: str, url: str) -> Config:
    """Alembic's configuration for the database of `service` at `url` (postgresql://…)."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    # Folders are separated by line breaks: a path may hold spaces, and on no system does a folder hold a line break.
    config.set_main_option("path_separator", "newline")
    config.set_main_option(
        "version_locations", str(_PACKAGE / "services" / service / "migrations").replace("%", "%%")
    )
    config.set_main_option("sqlalchemy.url", driver_url(url).replace("%", "%%"))
    config.attributes["service"] = service
    return config


def driver_url(url: str) -> str:
    """The same database for SQLAlchemy with psycopg 3, which runs several statements in one call."""
    for scheme in ("postgresql://", "postgres://"):
        if url.startswith(scheme):
            return "postgresql+psycopg://" + url[len(scheme) :]
    return url


def upgrade(service: str, url: str, target: str = "head") -> None:
    """Bring the database of `service` to `target`. Doing it again changes nothing."""
    command.upgrade(alembic_config(service, url), target)


def downgrade(service: str, url: str, target: str = "base") -> None:
    """Take the database of `service` back to `target`."""
    command.downgrade(alembic_config(service, url), target)


def current(service: str, url: str) -> str | None:
    """The revision the database stands at; None before the first."""
    engine = create_engine(driver_url(url))
    try:
        with engine.connect() as connection:
            return MigrationContext.configure(connection).get_current_revision()
    finally:
        engine.dispose()


def head(service: str) -> str | None:
    """The newest revision in the code."""
    return ScriptDirectory.from_config(alembic_config(service, "postgresql://unused")).get_current_head()
