"""The command line: `whispr up · serve · migrate · test · bench · demo · doctor · status · admin`."""

import sys


def main() -> None:
    """Runs the command that the arguments name. What the operator must know is said in one sentence, without a trace."""
    from whispr.cli.commands import app
    from whispr.cli.failures import told

    with told():
        app(prog_name="whispr")
    sys.exit(0)
