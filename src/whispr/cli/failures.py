"""Turns failures that the operator can do something about into a message and an exit status."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

UNUSABLE = 69


@contextmanager
def told() -> Iterator[None]:
    """Prints the failures of starting and of settings instead of their traces."""
    try:
        yield
    except Exception as error:
        text = _plain(error)
        if text is None:
            raise
        sys.stderr.write(f"whispr: {text}\n")
        sys.exit(UNUSABLE)


def _plain(error: BaseException) -> str | None:
    """The message for a failure that needs no trace. Looked up late: most commands load none of these modules."""
    from whispr.instance.errors import InstanceError

    if isinstance(error, ExceptionGroup) and len(error.exceptions) == 1:
        return _plain(error.exceptions[0])
    if isinstance(error, InstanceError):
        return str(error)
    settings = sys.modules.get("whispr.kit.settings")
    if settings is not None and isinstance(error, settings.SettingsError):
        return str(error)
    return None
