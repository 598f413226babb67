from __future__ import annotations

import asyncio
import time

import pytest

from whispr.kit.pressure import CALM_SECONDS, HIGH_SECONDS, RISE_TICKS, Pressure
from whispr.kit.telemetry import metrics


class Hands:
    """A monotonic clock that a test moves."""

    def __init__(self) -> None:
        self.at = 0.0

    def __call__(self) -> float:
        return self.at


def is_high(pressure: Pressure) -> bool:
    return pressure.high


def press(pressure: Pressure) -> None:
    for _ in range(RISE_TICKS):
        pressure.observe(HIGH_SECONDS * 1.1)


def calm(pressure: Pressure, hands: Hands) -> None:
    pressure.observe(0.0)
    hands.at += CALM_SECONDS * 1.1
    pressure.observe(0.0)


def test_a_hiccup_is_no_overload_and_what_lasts_is() -> None:
    pressure = Pressure(Hands())
    for _ in range(RISE_TICKS - 1):
        pressure.observe(HIGH_SECONDS * 1.1)
    pressure.observe(0.0)
    assert not is_high(pressure)
    assert not pressure.shed("typing")
    press(pressure)
    assert is_high(pressure)
    assert pressure.shed("typing", 3)
    assert 'whispr_shed_total{what="typing"}' in metrics.exposition().decode()


def test_one_long_stop_is_overload_at_once() -> None:
    pressure = Pressure(Hands())
    pressure.observe(RISE_TICKS * HIGH_SECONDS * 1.1)
    assert is_high(pressure)


def test_work_that_waits_is_overload_though_the_loop_is_in_time() -> None:
    age, pressure = [0.0], Pressure(Hands())
    pressure.watch(lambda: age[0])
    pressure.observe(0.0)
    assert not is_high(pressure)
    age[0] = 10.0
    pressure.observe(0.0)
    assert is_high(pressure)


def test_it_is_over_only_after_a_while_and_then_that_is_told() -> None:
    hands, told = Hands(), list[bool]()
    pressure = Pressure(hands)
    pressure.on_calm(lambda: told.append(pressure.high))
    press(pressure)
    pressure.observe(0.0)
    hands.at += CALM_SECONDS * 0.9
    pressure.observe(0.0)
    assert is_high(pressure)
    pressure.observe(HIGH_SECONDS * 0.6)
    hands.at += CALM_SECONDS * 0.9
    pressure.observe(0.0)
    assert is_high(pressure), "the time without lag begins anew"
    assert told == []
    calm(pressure, hands)
    assert not is_high(pressure)
    assert told == [False]


async def test_a_loop_that_lags_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("whispr.kit.pressure.TICK_SECONDS", 0.1)
    pressure = Pressure()
    running = asyncio.create_task(pressure.run())
    await asyncio.sleep(0.01)
    # Nothing runs on the event loop meanwhile.
    time.sleep(RISE_TICKS * HIGH_SECONDS + 0.3)
    async with asyncio.timeout(2):
        while not pressure.high:
            await asyncio.sleep(0.01)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
