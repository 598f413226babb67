"""The commands. Each loads what it needs when it runs, so that `whispr --help` answers at once."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

HELP = """
The backend of an end-to-end-encrypted messenger, on one machine with one command.

[bold]First steps[/bold]

  whispr up       start everything: PostgreSQL, Valkey, services, gateway
  whispr demo     watch people exchange encrypted messages
  whispr doctor   see what is installed, reachable, missing, and what to do

[bold]Where things are[/bold]

An instance keeps all it has in one folder, .whispr in the repository
unless --data says otherwise. Two instances with their own --data and
--port run side by side. Ctrl-C stops an instance cleanly; after a crash
the next `whispr up` mends what is left.

[bold]Settings[/bold]

Environment variables that begin with WHISPR_; options override them.
WHISPR_PORT, WHISPR_DATA          as --port and --data
WHISPR_POSTGRES_URL               use this PostgreSQL (an administrator's URL)
WHISPR_VALKEY_URL                 use this Valkey or Redis
WHISPR_GATEWAY                    auto, envoy or builtin
WHISPR_MESSAGING_WORKERS          as --messaging-workers
WHISPR_RATE_LIMITS                on or off; off is for tests and benches
WHISPR_ENVIRONMENT                development, test, staging or production
Each service has its own too: WHISPR_AUTH_…, WHISPR_MESSAGING_…

[bold]Exit status[/bold]

0 done; 1 a check or a test failed; 2 wrong usage; 3 not running;
69 something needed is missing or taken; 70 a service gave up;
78 a wrong setting.
"""

app = typer.Typer(
    name="whispr",
    help=HELP,
    no_args_is_help=True,
    rich_markup_mode="rich",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
admin = typer.Typer(
    help="Gives and takes roles, in force at a person's next login or refresh; changes what may change while it runs.",
    no_args_is_help=True,
)
app.add_typer(admin, name="admin", rich_help_panel="Run")

Data = Annotated[
    Path | None,
    typer.Option("--data", metavar="DIR", help="The instance's folder. Default: .whispr in the repository."),
]
PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False}


def _version(wanted: bool) -> None:
    if wanted:
        import whispr

        typer.echo(f"whispr {whispr.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    """The command line of Whispr."""


@app.command(rich_help_panel="Run")
def up(
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="The public port. Default: WHISPR_PORT or 8080.")
    ] = None,
    data: Data = None,
    messaging_workers: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=64,
            metavar="N",
            help="Processes of messaging that share its ports. Default: WHISPR_MESSAGING_WORKERS or 1.",
        ),
    ] = None,
    log: Annotated[bool, typer.Option("--log", help="Print the logs of all processes here too.")] = False,
) -> None:
    """Start everything and stay until Ctrl-C.

    PostgreSQL and Valkey come from wheels unless WHISPR_POSTGRES_URL (an administrator's URL) and WHISPR_VALKEY_URL name
    others. Databases are made and migrated, every service runs as its own process and is started again when it ends, and
    one gateway stands before them. DIR/run.json lists addresses and pids, DIR/logs the logs.
    """
    import asyncio

    from rich.console import Console

    from whispr.cli.places import instance_settings
    from whispr.cli.terminal import TerminalProgress
    from whispr.instance.catalog import present
    from whispr.instance.up import Instance, supervise

    settings = instance_settings(port=port, data=data, messaging_workers=messaging_workers)
    progress = TerminalProgress(Console())
    try:
        asyncio.run(supervise(Instance(settings, present(), progress), show_logs=log))
    finally:
        progress.quiet()


@app.command(rich_help_panel="Run")
def serve(service: Annotated[str, typer.Argument(help="auth, user, messaging, …")]) -> None:
    """Run one service in this process, with all it needs in WHISPR_ variables.

    This is what `whispr up` and the container image start. The public port is WHISPR_HTTP_BIND, the others are
    WHISPR_GRPC_BIND and WHISPR_INTERNAL_BIND (health and metrics).
    """
    from whispr.instance.catalog import present
    from whispr.instance.serving import serve as serve_here

    names = [entry.name for entry in present()]
    if service not in names:
        raise typer.BadParameter(f"there is no service {service!r}; there are {', '.join(names)}")
    raise typer.Exit(serve_here(service))


@app.command(rich_help_panel="Run")
def migrate(
    services: Annotated[list[str] | None, typer.Argument(help="Which ones. Default: all.")] = None,
    down_to: Annotated[
        str | None, typer.Option(metavar="REVISION", help="Go back to this revision, or to `base`.")
    ] = None,
    show: Annotated[bool, typer.Option("--show", help="Only say where each database stands.")] = False,
    data: Data = None,
) -> None:
    """Bring the services' databases to the newest revision.

    `whispr up` does so by itself. A database is the one of WHISPR_<SERVICE>_DATABASE_URL, else that of the running
    instance. Going up again changes nothing; every revision can be taken back.
    """
    from whispr.cli.databases import migrate_services

    migrate_services(services or [], down_to=down_to, only_show=show, data=data)


@app.command(rich_help_panel="Run")
def status(
    data: Data = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Say what runs, where, and whether it is ready. Exit status 3 when nothing runs, 1 when something is not ready."""
    from whispr.cli.status import report

    raise typer.Exit(report(data, as_json=as_json))


@app.command(rich_help_panel="Run")
def doctor(data: Data = None) -> None:
    """Look at this machine: what is installed, in which version, what is reachable, what is missing, what to do.

    Exit status 1 when something is missing that `whispr up` needs.
    """
    from whispr.cli.doctor import examine

    raise typer.Exit(examine(data))


@app.command(rich_help_panel="Try")
def demo(
    url: Annotated[
        str | None, typer.Option(help="A running instance. Default: one of its own, gone afterwards.")
    ] = None,
) -> None:
    """Watch two people with two devices each and a group of five exchange encrypted messages."""
    from whispr.cli.demonstration import demonstrate

    raise typer.Exit(demonstrate(url))


@app.command(rich_help_panel="Try", context_settings=PASS_ON)
def bench(
    context: typer.Context,
    name: Annotated[str | None, typer.Argument(help="Which scenario. Default: list them.")] = None,
) -> None:
    """Measure: run a scenario of bench/. What follows the name goes to the scenario (`--help` explains it)."""
    from whispr.cli.benches import list_scenarios, run_scenario

    if name is None:
        list_scenarios()
    else:
        raise typer.Exit(run_scenario(name, context.args))


@app.command(rich_help_panel="Develop", context_settings={**PASS_ON, "help_option_names": []})
def test(context: typer.Context) -> None:
    """Run the tests over real servers. Arguments go to pytest: `whispr test tests/kit -k outbox`."""
    from whispr.cli.places import repository

    os.chdir(repository())
    chosen = any(argument.startswith(("-n", "--numprocesses", "--pdb")) for argument in context.args)
    # By module, so that what a module's tests share is started once.
    parallel = [] if chosen else ["-n", "2", "--dist", "loadscope"]
    command = [sys.executable, "-m", "pytest", *parallel, *context.args]
    sys.stdout.flush()
    os.execv(command[0], command)  # noqa: S606 (pytest takes the place of this process, signals included)


@app.command(rich_help_panel="Develop")
def check() -> None:
    """Lint, types, walls and generated contracts: what must hold besides the tests."""
    from whispr.cli.checks import run_checks

    raise typer.Exit(run_checks())


@app.command(rich_help_panel="Develop")
def contracts() -> None:
    """Write src/whispr/contracts from proto/ and openapi/ from the services' routes."""
    from whispr.cli.contracts import write_openapi, write_protos
    from whispr.cli.places import repository

    write_protos(repository())
    write_openapi(repository() / "openapi")


@admin.command()
def grant(
    username: str,
    role: Annotated[str, typer.Argument(help="admin or moderator")],
    data: Data = None,
) -> None:
    """Give USERNAME the ROLE."""
    from whispr.cli.roles import change_role

    raise typer.Exit(change_role(username, role, granted=True, data=data))


@admin.command()
def revoke(
    username: str,
    role: Annotated[str, typer.Argument(help="admin or moderator")],
    data: Data = None,
) -> None:
    """Take the ROLE from USERNAME."""
    from whispr.cli.roles import change_role

    raise typer.Exit(change_role(username, role, granted=False, data=data))


@admin.command()
def flags(data: Data = None) -> None:
    """List the features that can be switched off, and the settings that can be changed, while everything runs."""
    from whispr.cli.live import list_live

    list_live(data)


@admin.command()
def flag(name: str, state: Annotated[str, typer.Argument(help="on or off")], data: Data = None) -> None:
    """Switch the feature NAME on or off. Running processes take it within two seconds."""
    from whispr.cli.live import switch

    switch(name, state, data)


@admin.command(name="set")
def set_live(
    name: str,
    value: Annotated[str, typer.Argument(help="the new value, or `default`: as it was started")],
    data: Data = None,
) -> None:
    """Give the setting NAME another VALUE. Running processes take it within two seconds."""
    from whispr.cli.live import change

    change(name, value, data)
