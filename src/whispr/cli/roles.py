"""`whispr admin grant` and `revoke`."""

import asyncio
from pathlib import Path

import typer

from whispr.cli.databases import database_url
from whispr.kit.errors import Failure
from whispr.services.auth import app as auth

FAILED = 1


def change_role(username: str, role: str, *, granted: bool, data: Path | None) -> int:
    """Gives or takes `role`; says what happened; returns the exit status."""
    change = auth.grant_role if granted else auth.revoke_role
    try:
        changed = asyncio.run(change(database_url("auth", data), username, role))
    except Failure as failure:
        typer.echo(f"whispr: {failure.detail} ({failure.code})", err=True)
        return FAILED
    if not changed:
        typer.echo(f"{username} {'is already' if granted else 'is not'} {role}.")
    elif granted:
        typer.echo(f"{username} is {role} from the next login or refresh on.")
    else:
        typer.echo(f"{username} is no longer {role} from the next login or refresh on.")
    return 0
