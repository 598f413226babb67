"""`whispr migrate`, and the way to a service's database from the command line."""

import os
from pathlib import Path

import typer

from whispr.cli.places import instance_settings, running
from whispr.instance.catalog import present
from whispr.instance.errors import InstanceError
from whispr.instance.layout import Layout
from whispr.instance.servers import url_of


def database_url(service: str, data: Path | None) -> str:
    """The database of `service`: from the environment, else of the running instance. Raises InstanceError."""
    given = os.environ.get(f"WHISPR_{service.upper()}_DATABASE_URL")
    if given:
        return given
    record = running(data)
    name = f"whispr_{service}"
    password = Layout(instance_settings(data=data).data).secret(f"database-{service}")
    return url_of(record["postgres"]["url"], name, name, password)


def migrate_services(names: list[str], *, down_to: str | None, only_show: bool, data: Path | None) -> None:
    """Migrates the databases of `names`, or of all services, and says where each stands."""
    from whispr.kit import migrate

    known = [entry.name for entry in present()]
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise InstanceError(f"There is no service {', '.join(unknown)}; there are {', '.join(known)}.")
    if down_to is not None and len(names) != 1:
        raise InstanceError("Going back is done for one service at a time: name it.")
    for service in names or known:
        url = database_url(service, data)
        if not only_show and down_to is None:
            migrate.upgrade(service, url)
        elif down_to is not None and not only_show:
            migrate.downgrade(service, url, down_to)
        present_revision, newest = migrate.current(service, url), migrate.head(service)
        remark = "newest" if present_revision == newest else f"newest is {newest}"
        typer.echo(f"{service:<12} {present_revision or 'base'} ({remark})")
