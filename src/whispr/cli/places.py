"""Where the command line finds things: settings with options applied, the repository, a running instance."""

from pathlib import Path
from typing import Any

from pydantic import ValidationError

import whispr
from whispr.instance.errors import InstanceError
from whispr.instance.layout import Layout
from whispr.instance.settings import InstanceSettings


def repository() -> Path:
    """The repository's root. Raises InstanceError where whispr was installed without one."""
    root = Path(whispr.__file__).resolve().parents[2]
    if not (root / "pyproject.toml").exists():
        raise InstanceError("This command needs the repository, and whispr runs from an installed package.")
    return root


def instance_settings(**options: Any) -> InstanceSettings:
    """Settings from the environment, overridden by those options that are not None. Raises InstanceError."""
    try:
        return InstanceSettings(**{name: value for name, value in options.items() if value is not None})
    except ValidationError as error:
        lines = [
            f"WHISPR_{'_'.join(map(str, item['loc'])).upper()}: {item['msg']}" if item["loc"] else item["msg"]
            for item in error.errors()
        ]
        raise InstanceError("; ".join(lines)) from None


def running(data: Path | None) -> dict[str, Any]:
    """run.json of the instance over `data`. Raises InstanceError when none runs."""
    root = instance_settings(data=data).data
    record = Layout(root).read_record()
    if record is None:
        raise InstanceError(f"No instance runs from {root}. Start one with `whispr up`.")
    return record
