from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import PositiveFloat

from whispr.kit import telemetry
from whispr.kit.live import FeatureOff, Live, LiveSettings, LiveSettingsInvalid


class Taken(LiveSettings):
    typing: bool = True
    presence: bool = True
    message_rate: PositiveFloat | None = None


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "live.json"


@pytest.fixture
def write(path: Path) -> Callable[..., None]:
    def write(**sections: Any) -> None:
        scratch = path.with_suffix(".new")
        scratch.write_text(json.dumps(sections))
        scratch.replace(path)

    return write


def make(path: Path | None) -> Live:
    live = Live(path, "messaging")
    live.declare(Taken)
    return live


async def test_without_a_file_everything_is_as_it_was_started(path: Path) -> None:
    for live in (make(None), make(path)):
        live.reload()
        assert live.flag("typing")
        live.require("typing")
        assert live.value("message_rate", 20.0) == 20.0
        await live.ready()


async def test_what_the_file_says_holds_from_the_start_and_when_it_changes(
    path: Path, write: Callable[..., None]
) -> None:
    write(messaging={"typing": False})
    live = make(path)
    seen: list[float] = []
    live.on_change(lambda: seen.append(live.value("message_rate", 20.0)))
    assert seen == [20.0], "told at once of what holds already"
    with pytest.raises(FeatureOff) as refused:
        live.require("typing")
    assert (refused.value.code, refused.value.fields) == ("feature_off", {"feature": "typing"})
    assert live.flag("presence")
    write(messaging={"message_rate": 5}, auth={"what auth takes": "is checked by auth"})
    assert not live.flag("typing"), "nothing changes before the file is looked at"
    live.reload()
    assert live.flag("typing")
    assert seen == [20.0, 5.0]
    live.reload()
    assert seen == [20.0, 5.0], "nobody is told twice"
    path.unlink()
    live.reload()
    assert seen == [20.0, 5.0, 20.0], "without the file it is as it was started"


@pytest.mark.parametrize(
    "text",
    [
        '{"messaging": {"typing": "off"}}',
        '{"messaging": {"typing": null}}',
        '{"messaging": {"message_rate": 0}}',
        '{"messaging": {"message_rate": true}}',
        '{"messaging": {"no such name": 1}}',
        '{"messaging": ["typing"]}',
        '{"mesaging": {"typing": true}}',
        '{"common": {"log_level": "loud"}}',
        "[]",
        "{",
        "\xff",
    ],
)
async def test_a_file_that_is_not_valid_changes_nothing_and_is_told(
    path: Path, write: Callable[..., None], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write(messaging={"typing": False, "message_rate": 7})
    live = make(path)
    path.write_bytes(text.encode("latin-1"))
    live.reload()
    assert not live.flag("typing")
    assert live.value("message_rate", 20.0) == 7
    with pytest.raises(LiveSettingsInvalid):
        await live.ready()
    assert "whispr_live_settings_valid 0.0" in telemetry.metrics.exposition().decode()
    assert "live_settings_refused" in capsys.readouterr().out
    write(messaging={"typing": True})
    live.reload()
    assert live.flag("typing")
    await live.ready()
    assert "whispr_live_settings_valid 1.0" in telemetry.metrics.exposition().decode()
    assert 'whispr_feature_on{feature="typing"} 1.0' in telemetry.metrics.exposition().decode()


async def test_a_file_of_the_same_size_and_time_is_another_file(
    path: Path, write: Callable[..., None]
) -> None:
    write(messaging={"message_rate": 5})
    live = make(path)
    facts = path.stat()
    write(messaging={"message_rate": 6})
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    live.reload()
    assert live.value("message_rate", 20.0) == 6


def test_an_undeclared_name_is_a_mistake_of_ours(path: Path) -> None:
    with pytest.raises(KeyError):
        make(path).flag("tipping")


def test_the_level_of_a_logger_in_use_can_be_changed(capsys: pytest.CaptureFixture[str]) -> None:
    log = telemetry.get_logger("test.live")
    try:
        log.error("first")
        log.info("unheard")
        telemetry.set_level("info")
        log.info("heard")
        telemetry.set_level("error")
        log.info("unheard again")
    finally:
        telemetry.set_level("error")
    output = capsys.readouterr().out
    assert '"heard"' in output
    assert "unheard" not in output
