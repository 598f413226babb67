from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from whispr.kit.channels.liveness import IdleWheel


class Member:
    def __init__(self, name: str = "") -> None:
        self.name = name
        self.last_seen = 0
        self.wheel_slot = -1


class Time:
    def __init__(self) -> None:
        self.value = 1000.0

    def __call__(self) -> float:
        return self.value


@given(st.lists(st.tuples(st.floats(0.1, 40), st.booleans()), max_size=60))
def test_due_exactly_when_silent_for_the_timeout(steps: list[tuple[float, bool]]) -> None:
    time = Time()
    wheel = IdleWheel(60, monotonic=time)
    member = Member()
    wheel.add(member)
    heard = time.value
    for delay, speaks in steps:
        time.value += delay
        due = wheel.advance()
        silent = time.value - heard
        # Both ends of the silence are rounded to ticks of 5 seconds.
        if due:
            assert due == [member]
            assert silent >= 60
            return
        assert silent < 60 + 2 * wheel.tick
        if speaks:
            member.last_seen = wheel.now
            heard = time.value


def test_members_that_left_are_not_due() -> None:
    time = Time()
    wheel = IdleWheel(60, monotonic=time)
    members = [Member(), Member()]
    for member in members:
        wheel.add(member)
    wheel.discard(members[0])
    wheel.discard(members[0])
    time.value += 1000
    assert wheel.advance() == [members[1]]
    time.value += 1000
    assert wheel.advance() == []


def test_members_who_come_at_any_time_are_all_found() -> None:
    time = Time()
    wheel = IdleWheel(60, monotonic=time)
    due: set[str] = set()
    for n in range(300):
        wheel.add(Member(str(n)))
        time.value += 1.7
        due |= {member.name for member in wheel.advance()}  # type: ignore[attr-defined]
    time.value += 70
    due |= {member.name for member in wheel.advance()}  # type: ignore[attr-defined]
    assert due == {str(n) for n in range(300)}
