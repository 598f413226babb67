"""How fast messages may come: each limit by itself, together, and over nodes."""

from __future__ import annotations

import asyncio
from uuid import UUID, uuid4

import pytest

from whispr.kit.cache import Cache
from whispr.kit.clock import ManualClock
from whispr.kit.errors import RateLimited
from whispr.services.messaging.service import pace as module
from whispr.services.messaging.service.pace import Pace, Rate, SendingPace

AMPLE = Rate(1_000, 100_000)


def sending_pace(clock: ManualClock, cache: Cache, **limits: Rate) -> SendingPace:
    return SendingPace(
        clock, cache, **{"device": AMPLE, "user": AMPLE, "member": AMPLE, "conversation": AMPLE, **limits}
    )


def taken(pace: SendingPace, device: UUID, user: UUID, conversation: UUID, most: int = 1_000) -> int:
    """How many messages are let through."""
    for number in range(most):
        try:
            pace.count(device, user, conversation)
        except RateLimited:
            return number
    return most


async def test_a_burst_and_then_the_rate(messaging_cache: Cache) -> None:
    clock = ManualClock()
    pace = Pace(clock, rate=2, burst=5, name="reads")
    who = uuid4()
    for _ in range(5):
        pace.count(who)
    with pytest.raises(RateLimited) as refused:
        pace.count(who)
    assert (refused.value.retry_after, refused.value.fields) == (0.5, {"limit": "reads"})
    pace.count(uuid4())
    clock.advance(0.5)
    pace.count(who)
    with pytest.raises(RateLimited):
        pace.count(who)
    clock.advance(1_000)
    for _ in range(5):
        pace.count(who)
    with pytest.raises(RateLimited):
        pace.count(who)


@pytest.mark.parametrize("limit", ["device", "user", "member", "conversation"])
async def test_each_limit_holds_and_says_its_name(messaging_cache: Cache, limit: str) -> None:
    pace = sending_pace(ManualClock(), messaging_cache, **{limit: Rate(1, 3)})
    ids = uuid4(), uuid4(), uuid4()
    assert taken(pace, *ids) == 3
    with pytest.raises(RateLimited) as refused:
        pace.count(*ids)
    assert refused.value.fields == {"limit": limit}
    assert refused.value.retry_after == 1


async def test_whom_a_limit_concerns(messaging_cache: Cache) -> None:
    few = Rate(1, 3)
    device, user, conversation, other = (uuid4() for _ in range(4))
    for limit, concerned, spared in (
        ("device", (device, user, other), (other, user, conversation)),
        ("user", (other, user, other), (device, other, conversation)),
        ("member", (other, user, conversation), (device, user, other)),
        ("conversation", (other, other, conversation), (device, user, other)),
    ):
        pace = sending_pace(ManualClock(), messaging_cache, **{limit: few})
        assert taken(pace, device, user, conversation) == 3
        assert taken(pace, *concerned) == 0, limit
        assert taken(pace, *spared) == 3, limit


async def test_what_one_limit_refuses_does_not_use_up_the_others(messaging_cache: Cache) -> None:
    pace = sending_pace(ManualClock(), messaging_cache, user=Rate(1, 10), conversation=Rate(1, 4))
    device, user, conversation = uuid4(), uuid4(), uuid4()
    assert taken(pace, device, user, conversation) == 4
    for _ in range(100):
        assert taken(pace, device, user, conversation) == 0
    assert taken(pace, device, user, uuid4()) == 4
    assert taken(pace, device, user, uuid4()) == 2


async def test_limits_change_while_running(messaging_cache: Cache) -> None:
    pace = sending_pace(ManualClock(), messaging_cache, user=Rate(1, 3))
    ids = uuid4(), uuid4(), uuid4()
    assert taken(pace, *ids) == 3
    pace.user.change(1, 3)
    assert taken(pace, *ids) == 0
    pace.user.change(1, 5)
    assert taken(pace, *ids) == 5


async def test_what_other_nodes_told_does_not_outlast_a_changed_rate(messaging_cache: Cache) -> None:
    clock = ManualClock()
    pace = sending_pace(clock, messaging_cache, user=Rate(0.01, 8))
    ids = uuid4(), uuid4(), uuid4()
    assert taken(pace, *ids) == 8
    await pace.share()
    pace.user.change(100, 80)
    assert taken(pace, *ids, most=20) == 20
    await pace.share()
    assert taken(pace, *ids) >= 60


async def test_other_nodes_hear_of_who_is_busy(messaging_cache: Cache) -> None:
    clock = ManualClock()
    # Slow enough that what a second forgives is nothing.
    limit = Rate(0.1, 80)
    here, there = (sending_pace(clock, messaging_cache, user=limit) for _ in range(2))
    user = uuid4()
    assert taken(here, uuid4(), user, uuid4(), most=60) == 60
    await here.share()
    # The other node asks when the person becomes busy there too.
    assert taken(there, uuid4(), user, uuid4(), most=5) == 5
    await there.share()
    assert 13 <= taken(there, uuid4(), user, uuid4()) <= 16
    await here.share()
    assert taken(here, uuid4(), user, uuid4()) == 20
    await here.share()
    await there.share()
    assert taken(there, uuid4(), user, uuid4()) == 0
    clock.advance(100_000)
    assert taken(there, uuid4(), user, uuid4()) == 80


async def test_a_steady_sender_within_the_rate_is_never_refused(messaging_cache: Cache) -> None:
    clock = ManualClock()
    nodes = [sending_pace(clock, messaging_cache, user=Rate(30, 300)) for _ in range(2)]
    user = uuid4()
    for _ in range(4):
        for _ in range(14):
            for node in nodes:
                node.count(uuid4(), user, uuid4())
            clock.advance(1 / 14)
            await asyncio.sleep(1 / 14)
        for node in nodes:
            await node.share()


async def test_without_valkey_each_node_counts_by_itself() -> None:
    cache = Cache("redis://127.0.0.1:9", timeout=0.2)
    pace = sending_pace(ManualClock(), cache, user=Rate(1, 8))
    user = uuid4()
    assert taken(pace, uuid4(), user, uuid4(), most=6) == 6
    await pace.share()
    assert taken(pace, uuid4(), user, uuid4()) == 2
    await cache.close()


async def test_memory_is_bounded_and_the_busy_are_not_forgotten_first(
    messaging_cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MAX_KEYS", 100)
    clock = ManualClock()
    pace = Pace(clock, rate=1, burst=2)
    busy = uuid4()
    clock.advance(100)
    for _ in range(500):
        pace.count(uuid4())
        clock.advance(2)
    pace.count(busy)
    pace.count(busy)
    for _ in range(90):
        pace.count(uuid4())
    assert len(pace._limit._uses) <= 100
    with pytest.raises(RateLimited):
        pace.count(busy)
