"""What may change while a process runs: feature flags, and those settings that are safe to change.

One JSON file for all services of an instance, `{"common": {…}, "messaging": {…}, "auth": {…}}`, looked at every two
seconds. A service declares what it takes as a `LiveSettings` model. A file with an unknown name or a bad value changes
nothing: the old values stay, an error is logged, and readiness shows it. What is not in the file is as it was started.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from whispr.kit.errors import Unavailable
from whispr.kit.settings import SERVICES
from whispr.kit.telemetry import get_logger, metrics

log = get_logger(__name__)

COMMON: Final = "common"
POLL_SECONDS: Final = 2.0

_valid = metrics.gauge(
    "live_settings_valid", "1 while the file of live settings is what this process goes by."
)
_valid.set(1)
_feature_on = metrics.gauge("feature_on", "1 while a feature is switched on.", ("feature",))

T = TypeVar("T")


class FeatureOff(Unavailable):
    """This feature is switched off at the moment."""

    code = "feature_off"


class LiveSettingsInvalid(Unavailable):
    """The file of live settings is not valid; the old values hold."""

    code = "live_settings_invalid"


class LiveSettings(BaseModel):
    """What a service takes. A `bool` field is a feature flag, on by default; any other is a setting, None by default: as
    it was started."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    @classmethod
    def flags(cls) -> list[str]:
        """The names of the feature flags."""
        return [name for name, field in cls.model_fields.items() if field.annotation is bool]


class CommonLive(LiveSettings):
    """What every service takes."""

    log_level: Literal["debug", "info", "warning", "error"] | None = None


class Live:
    """The present values, for the service `service`. Without a `path` everything is as it was started, for ever.

    `run` is the supervised loop. Reading a value is reading a dictionary.
    """

    def __init__(self, path: Path | None, service: str) -> None:
        self._path = path
        self._service = service
        self._models: dict[str, type[LiveSettings]] = {COMMON: CommonLive, service: LiveSettings}
        self._values: dict[str, Any] = CommonLive().model_dump()
        self._seen: object = None
        self._is_valid = True
        self._listeners: list[Callable[[], None]] = []

    def declare(self, model: type[LiveSettings]) -> None:
        """Take what `model` describes, and read the file. Once, before anything asks."""
        self._models[self._service] = model
        self._values |= model().model_dump()
        self._seen = None
        self.reload()

    def flag(self, name: str) -> bool:
        """Whether a declared feature is switched on."""
        on: bool = self._values[name]
        return on

    def require(self, name: str) -> None:
        """Raises `FeatureOff` where a declared feature is switched off."""
        if not self._values[name]:
            raise FeatureOff(feature=name)

    def value(self, name: str, started: T) -> T:
        """A declared setting; `started` where the file says nothing."""
        found: T | None = self._values[name]
        return started if found is None else found

    def on_change(self, callback: Callable[[], None]) -> None:
        """Call `callback` now and whenever values have changed. It must not raise."""
        self._listeners.append(callback)
        callback()

    async def ready(self) -> None:
        """Raises `LiveSettingsInvalid` while the file is refused."""
        if not self._is_valid:
            raise LiveSettingsInvalid

    async def run(self) -> None:
        """Look at the file, for ever."""
        while self._path is not None:
            self.reload()
            await asyncio.sleep(POLL_SECONDS)

    def reload(self) -> None:
        """Read the file if it is not the one that was read last."""
        stamp = _stamp(self._path)
        if stamp == self._seen:
            return
        self._seen = stamp
        try:
            values = self._read()
        except ValueError as error:
            self._is_valid = False
            log.error("live_settings_refused", problem=str(error))  # noqa: TRY400 (a trace says nothing more)
        else:
            self._is_valid = True
            self._take(values)
        _valid.set(self._is_valid)

    def _read(self) -> dict[str, Any]:
        document = read(self._path) if self._path is not None else {}
        values: dict[str, Any] = {}
        for section, model in self._models.items():
            values |= checked(model, section, document.get(section, {})).model_dump()
        return values

    def _take(self, values: dict[str, Any]) -> None:
        changed = {name: value for name, value in values.items() if self._values.get(name) != value}
        self._values = values
        for name in self._models[self._service].flags():
            _feature_on.labels(name).set(values[name])
        if changed:
            log.warning("live_settings_changed", **changed)
            for listener in self._listeners:
                listener()


def read(path: Path) -> dict[str, Any]:
    """The file's sections; none where there is no file. Raises ValueError for what is no such file."""
    try:
        document = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(document, dict):
        raise ValueError(f"{path} does not hold an object")  # noqa: TRY004 (of the file, not of an argument)
    strangers = document.keys() - {COMMON, *SERVICES}
    if strangers:
        raise ValueError(f"there is no service {', '.join(sorted(strangers))}")
    return document


def checked(model: type[LiveSettings], section: str, values: object) -> LiveSettings:
    """`values` as `model`. Raises ValueError naming what is wrong."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        problems = [
            f"{'.'.join([section, *map(str, item['loc'])])}: {item['msg']}" for item in error.errors()
        ]
        raise ValueError("; ".join(problems)) from None


def _stamp(path: Path | None) -> tuple[int, int, int] | str:
    """Something that differs for another file or content. The inode too: one that was replaced may have the same times."""
    try:
        facts = path.stat() if path is not None else None
    except OSError:
        facts = None
    return "none" if facts is None else (facts.st_ino, facts.st_mtime_ns, facts.st_size)
