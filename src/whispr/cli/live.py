"""`whispr admin flags`, `flag` and `set`: what may change while an instance runs."""

import importlib
import inspect
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from whispr.cli.places import instance_settings
from whispr.instance.catalog import present
from whispr.instance.errors import InstanceError
from whispr.instance.layout import Layout, write_private
from whispr.kit.live import COMMON, CommonLive, LiveSettings, checked, read

ON_OFF = {"on": True, "off": False}
AS_STARTED = "default"


def list_live(data: Path | None) -> None:
    """Prints every flag and setting with its value."""
    document = _read(_file(data))
    table = Table(box=None, pad_edge=False)
    for heading in ("name", "of", "value"):
        table.add_column(heading)
    for section, model in _sections():
        values = checked(model, section, document.get(section, {})).model_dump()
        for name, value in values.items():
            if name in model.flags():
                shown = "on" if value else "off"
            else:
                shown = "as started" if value is None else str(value)
            table.add_row(name, section, shown)
    Console().print(table)


def switch(flag: str, state: str, data: Path | None) -> None:
    """Switches a feature on or off. Raises InstanceError."""
    section, model, name = _find(flag)
    if name not in model.flags():
        raise InstanceError(f"{name} is a setting: use `whispr admin set {name} VALUE`.")
    if state not in ON_OFF:
        raise InstanceError(f"{name} is switched on or off, not {state!r}.")
    _change(section, model, name, None if ON_OFF[state] else False, data)


def change(setting: str, value: str, data: Path | None) -> None:
    """Gives a setting another value; `default` takes it out of the file. Raises InstanceError."""
    section, model, name = _find(setting)
    if name in model.flags():
        raise InstanceError(f"{name} is a feature: use `whispr admin flag {name} on|off`.")
    _change(section, model, name, None if value == AS_STARTED else _parsed(value), data)


def _change(section: str, model: type[LiveSettings], name: str, value: Any, data: Path | None) -> None:
    path = _file(data)
    document = _read(path)
    values = {**document.get(section, {}), name: value}
    if value is None:
        del values[name]
    try:
        checked(model, section, values)
    except ValueError as error:
        raise InstanceError(str(error)) from None
    write_private(path, json.dumps({**document, section: values}, indent=1) + "\n")
    shown = {True: "on", False: "off", None: "as it was started"}.get(value, value)
    if value is None and name in model.flags():
        shown = "on"
    Console().print(
        f"{section}.{name} is {shown}. Running processes take it within two seconds.", markup=False
    )


def _file(data: Path | None) -> Path:
    given = os.environ.get("WHISPR_LIVE_SETTINGS")
    path = Path(given) if given else Layout(instance_settings(data=data).data).live
    if not path.parent.is_dir():
        raise InstanceError(f"There is no instance in {path.parent}. Start one with `whispr up`.")
    return path


def _read(path: Path) -> dict[str, Any]:
    try:
        return read(path)
    except ValueError as error:
        raise InstanceError(f"{error}. Mend or remove {path}.") from None


def _sections() -> Iterator[tuple[str, type[LiveSettings]]]:
    """What each service that exists takes."""
    yield COMMON, CommonLive
    for entry in present():
        module = importlib.import_module(f"whispr.services.{entry.name}.settings")
        for _, value in inspect.getmembers(module, inspect.isclass):
            if issubclass(value, LiveSettings) and value.__module__ == module.__name__:
                yield entry.name, value


def _find(name: str) -> tuple[str, type[LiveSettings], str]:
    """The section and model of `name`, which may be written with its section before it."""
    wanted, dot, short = name.rpartition(".")
    found = [
        (section, model, short)
        for section, model in _sections()
        if short in model.model_fields and (not dot or section == wanted)
    ]
    if not found:
        raise InstanceError(f"There is no flag or setting {name!r}. `whispr admin flags` lists them.")
    if len(found) > 1:
        raise InstanceError(f"Say of which service: {', '.join(f'{part[0]}.{short}' for part in found)}.")
    return found[0]


def _parsed(value: str) -> Any:
    """Numbers as numbers; everything else is text."""
    try:
        parsed = json.loads(value)
    except ValueError:
        return value
    return parsed if isinstance(parsed, int | float) else value
