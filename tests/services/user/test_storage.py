"""Storage is reserved before it is used, never below zero, never above the limit, and every change may be repeated."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Literal
from uuid import UUID, uuid4

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.services.user.conftest import World

from whispr.kit.errors import Failure
from whispr.services.user import store
from whispr.services.user.models import (
    InvalidBytes,
    OperationConflict,
    QuotaExceeded,
    ReservationNotFound,
    ReservationSettled,
    StorageAction,
    StorageRequest,
    StorageUnderflow,
    StorageUsage,
    UserNotFound,
)

LIMIT = 1000


async def limited_person(world: World, limit: int = LIMIT) -> UUID:
    user_id = await world.person()
    async with world.database.connection() as conn:
        await store.set_storage_limit(conn, user_id, limit)
    return user_id


async def update(
    world: World,
    user_id: UUID,
    action: StorageAction,
    size: int = 0,
    reservation_id: UUID | None = None,
    operation_id: UUID | None = None,
) -> StorageUsage:
    return await world.service.storage.update(
        StorageRequest(operation_id or uuid4(), user_id, action, size, reservation_id)
    )


async def usage(world: World, user_id: UUID) -> tuple[int, int]:
    storage = (await world.service.storage.quotas(user_id)).storage
    return storage.used, storage.reserved


async def test_quotas_start_at_the_settings_and_count_lists(world: World) -> None:
    user_id, other, third = [await world.person() for _ in range(3)]
    await world.service.relations.add_contact(user_id, other)
    await world.service.relations.block(user_id, third)
    quotas = await world.service.storage.quotas(user_id)
    assert quotas.storage == StorageUsage(limit=1024**3, used=0, reserved=0)
    assert (quotas.contacts_used, quotas.blocks_used) == (1, 1)
    with pytest.raises(UserNotFound):
        await world.service.storage.quotas(uuid4())


async def test_reserve_then_commit_then_free(world: World) -> None:
    user_id, upload = await limited_person(world), uuid4()
    assert await update(world, user_id, "reserve", 600, upload) == StorageUsage(LIMIT, 0, 600)
    assert await update(world, user_id, "commit", 500, upload) == StorageUsage(LIMIT, 500, 0)
    assert await update(world, user_id, "free", 200) == StorageUsage(LIMIT, 300, 0)


async def test_commit_of_zero_takes_what_was_reserved(world: World) -> None:
    user_id, upload = await limited_person(world), uuid4()
    await update(world, user_id, "reserve", 600, upload)
    assert await update(world, user_id, "commit", 0, upload) == StorageUsage(LIMIT, 600, 0)


async def test_the_operation_names_a_reservation_that_has_no_name(world: World) -> None:
    user_id, operation = await limited_person(world), uuid4()
    await update(world, user_id, "reserve", 100, operation_id=operation)
    assert await update(world, user_id, "commit", 0, operation) == StorageUsage(LIMIT, 100, 0)


async def test_the_limit_counts_what_is_reserved(world: World) -> None:
    user_id = await limited_person(world)
    await update(world, user_id, "reserve", 1000)
    with pytest.raises(QuotaExceeded) as refusal:
        await update(world, user_id, "reserve", 1)
    assert refusal.value.fields == {"limit": LIMIT, "available": 0}


async def test_a_commit_may_grow_only_within_the_limit(world: World) -> None:
    user_id, upload = await limited_person(world), uuid4()
    await update(world, user_id, "reserve", 600, upload)
    with pytest.raises(QuotaExceeded):
        await update(world, user_id, "commit", 1001, upload)
    assert await usage(world, user_id) == (0, 600), "a refused change leaves no trace"
    assert await update(world, user_id, "commit", 1000, upload) == StorageUsage(LIMIT, 1000, 0)


async def test_above_a_lowered_limit_people_may_only_shrink(world: World) -> None:
    user_id, upload = await limited_person(world), uuid4()
    await update(world, user_id, "reserve", 900, upload)
    async with world.database.connection() as conn:
        await store.set_storage_limit(conn, user_id, 100)
    assert await update(world, user_id, "commit", 900, upload) == StorageUsage(100, 900, 0)
    with pytest.raises(QuotaExceeded):
        await update(world, user_id, "reserve", 1)
    assert await update(world, user_id, "free", 100) == StorageUsage(100, 800, 0)


async def test_uploads_at_once_cannot_both_take_the_last_room(world: World) -> None:
    user_id = await limited_person(world)
    answers = await asyncio.gather(
        *(update(world, user_id, "reserve", 300) for _ in range(8)), return_exceptions=True
    )
    assert sum(isinstance(answer, QuotaExceeded) for answer in answers) == 5
    assert await usage(world, user_id) == (0, 900)


async def test_a_repeated_request_gets_its_first_answer_and_changes_nothing(world: World) -> None:
    user_id, operation, upload = await limited_person(world), uuid4(), uuid4()
    answers = await asyncio.gather(
        *(update(world, user_id, "reserve", 300, upload, operation) for _ in range(5))
    )
    assert answers == [StorageUsage(LIMIT, 0, 300)] * 5
    await update(world, user_id, "commit", 0, upload)
    assert await update(world, user_id, "reserve", 300, upload, operation) == answers[0]
    assert await usage(world, user_id) == (300, 0)


async def test_an_operation_serves_one_request(world: World) -> None:
    user_id, other, operation = await limited_person(world), await limited_person(world), uuid4()
    await update(world, user_id, "reserve", 300, operation_id=operation)
    for person, action, size in ((user_id, "reserve", 301), (user_id, "free", 300), (other, "reserve", 300)):
        with pytest.raises(OperationConflict):
            await update(world, person, action, size, operation_id=operation)  # type: ignore[arg-type]
    assert await usage(world, other) == (0, 0)


async def test_a_refused_operation_may_be_tried_again(world: World) -> None:
    user_id, operation = await limited_person(world), uuid4()
    full = uuid4()
    await update(world, user_id, "reserve", 1000, full)
    with pytest.raises(QuotaExceeded):
        await update(world, user_id, "reserve", 10, operation_id=operation)
    await update(world, user_id, "release", 0, full)
    assert await update(world, user_id, "reserve", 10, operation_id=operation) == StorageUsage(LIMIT, 0, 10)


async def test_a_reservation_ends_once(world: World) -> None:
    user_id, committed, released = await limited_person(world), uuid4(), uuid4()
    await update(world, user_id, "reserve", 10, committed)
    await update(world, user_id, "commit", 0, committed)
    await update(world, user_id, "reserve", 10, released)
    await update(world, user_id, "release", 0, released)
    await update(world, user_id, "release", 0, released)
    for action, upload in (
        ("commit", committed),
        ("release", committed),
        ("commit", released),
        ("reserve", released),
    ):
        with pytest.raises(ReservationSettled):
            await update(world, user_id, action, 10, upload)  # type: ignore[arg-type]
    assert await usage(world, user_id) == (10, 0)


async def test_a_release_that_overtakes_its_reserve_wins(world: World) -> None:
    user_id, upload = await limited_person(world), uuid4()
    await update(world, user_id, "release", 0, upload)
    with pytest.raises(ReservationSettled):
        await update(world, user_id, "reserve", 10, upload)
    assert await usage(world, user_id) == (0, 0)


async def test_reservations_of_others_and_unknown_ones_are_not_found(world: World) -> None:
    owner, thief, upload = await limited_person(world), await limited_person(world), uuid4()
    await update(world, owner, "reserve", 10, upload)
    for action in ("commit", "release", "reserve"):
        with pytest.raises(ReservationNotFound):
            await update(world, thief, action, 10, upload)
    for action in ("commit", "release"):
        with pytest.raises(ReservationNotFound):
            await update(world, owner, action, 10)  # type: ignore[arg-type]
    with pytest.raises(ReservationNotFound):
        await update(world, owner, "commit", 10, uuid4())
    assert await usage(world, owner) == (0, 10)


@pytest.mark.parametrize(
    ("action", "size"), [("reserve", 0), ("reserve", -1), ("free", 0), ("commit", -1), ("reserve", 2**50 + 1)]
)
async def test_byte_counts_that_make_no_sense(world: World, action: StorageAction, size: int) -> None:
    user_id = await limited_person(world)
    with pytest.raises(InvalidBytes):
        await update(world, user_id, action, size, uuid4())


async def test_nothing_is_freed_that_is_not_used(world: World) -> None:
    user_id = await limited_person(world)
    await update(world, user_id, "reserve", 100)
    with pytest.raises(StorageUnderflow):
        await update(world, user_id, "free", 1)
    assert await usage(world, user_id) == (0, 100)


async def test_abandoned_reservations_expire_and_may_still_be_committed_while_there_is_room(
    world: World,
) -> None:
    user_id, slow, abandoned = await limited_person(world), uuid4(), uuid4()
    await update(world, user_id, "reserve", 400, slow)
    await update(world, user_id, "reserve", 600, abandoned)
    await world.service.storage.expire_reservations()
    assert await usage(world, user_id) == (0, 1000), "not before their time"
    world.clock.advance(world.settings.reservation_seconds)
    assert await world.service.storage.expire_reservations() >= 2
    assert await usage(world, user_id) == (0, 0)
    assert await update(world, user_id, "commit", 0, slow) == StorageUsage(LIMIT, 400, 0)
    await update(world, user_id, "release", 0, abandoned)
    await update(world, user_id, "reserve", 600)
    assert await usage(world, user_id) == (400, 600)


async def test_expiry_and_commits_at_once_agree_on_the_sum(world: World) -> None:
    person = await limited_person(world, 10_000)
    uploads = [uuid4() for _ in range(12)]
    for upload in uploads:
        await update(world, person, "reserve", 10, upload)
    world.clock.advance(world.settings.reservation_seconds)
    await asyncio.gather(
        *(update(world, person, "commit", 0, upload) for upload in uploads),
        *(world.service.storage.expire_reservations() for _ in range(3)),
    )
    assert await usage(world, person) == (120, 0)


async def test_old_operations_and_reservations_are_forgotten(world: World) -> None:
    user_id, operation, open_upload = await limited_person(world), uuid4(), uuid4()
    await update(world, user_id, "reserve", 10, operation_id=operation)
    await update(world, user_id, "commit", 0, operation)
    world.clock.advance(world.settings.operation_retention_days * 86_400 + 1)
    await update(world, user_id, "reserve", 5, open_upload)
    assert await world.service.storage.forget_operations() >= 3
    async with world.database.connection() as conn:
        assert await store.operation(conn, operation) is None
        assert await store.lock_reservation(conn, operation) is None
        assert await store.lock_reservation(conn, open_upload) is not None
    assert await usage(world, user_id) == (10, 5)


async def test_the_erased_store_nothing_and_may_be_freed(world: World) -> None:
    user_id = await limited_person(world)
    await update(world, user_id, "reserve", 100)
    await world.service.erasure.erase(user_id)
    assert (await update(world, user_id, "free", 100)).used == 0
    assert (await update(world, user_id, "release", 0, uuid4())).reserved == 0
    for action in ("reserve", "commit"):
        with pytest.raises(UserNotFound):
            await update(world, user_id, action, 10, uuid4())
    with pytest.raises(UserNotFound):
        await update(world, uuid4(), "reserve", 10)


@dataclass
class Model:
    """What the counters should be, told in the simplest way."""

    used: int = 0
    reservations: dict[UUID, tuple[str, int]] = field(default_factory=dict)

    @property
    def reserved(self) -> int:
        return sum(size for state, size in self.reservations.values() if state == "reserved")

    def apply(self, request: StorageRequest) -> bool:
        """Whether the change is allowed."""
        name = request.reservation_id or request.operation_id
        state, size = self.reservations.get(name, ("none", 0))
        match request.action, state:
            case "reserve", "none" if self.used + self.reserved + request.bytes <= LIMIT:
                self.reservations[name] = ("reserved", request.bytes)
            case "commit", "reserved" | "expired":
                held = size if state == "reserved" else 0
                actual = request.bytes or size
                if actual > held and self.used + self.reserved - held + actual > LIMIT:
                    return False
                self.reservations[name] = ("committed", size)
                self.used += actual
            case "release", "none" | "released" | "reserved" | "expired":
                self.reservations[name] = ("released", 0)
            case "free", _ if request.bytes <= self.used:
                self.used -= request.bytes
            case _:
                return False
        return True

    def expire(self) -> None:
        for name, (state, size) in self.reservations.items():
            if state == "reserved":
                self.reservations[name] = ("expired", size)


Step = tuple[Literal["reserve", "commit", "release", "free", "expire", "repeat"], int, int]

STEPS = st.lists(
    st.tuples(
        st.sampled_from(["reserve", "reserve", "commit", "release", "free", "expire", "repeat"]),
        st.integers(1, 700),
        st.integers(0, 4),
    ),
    min_size=1,
    max_size=14,
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS)
async def test_any_sequence_of_changes_keeps_the_books(world: World, steps: list[Step]) -> None:
    user_id = await limited_person(world)
    uploads = [uuid4() for _ in range(5)]
    model = Model()
    done: list[tuple[StorageRequest, StorageUsage]] = []
    for action, size, which in steps:
        if action == "expire":
            world.clock.advance(world.settings.reservation_seconds)
            await world.service.storage.expire_reservations()
            model.expire()
        elif action == "repeat":
            if done:
                request, answer = done[which % len(done)]
                assert await world.service.storage.update(request) == answer
        else:
            reservation = None if action == "free" else uploads[which]
            request = StorageRequest(uuid4(), user_id, action, size, reservation)
            allowed = model.apply(request)
            try:
                done.append((request, await world.service.storage.update(request)))
                assert allowed, request
            except Failure:
                assert not allowed, request
        used, reserved = await usage(world, user_id)
        assert (used, reserved) == (model.used, model.reserved)
        assert used >= 0
        assert reserved >= 0
        assert used + reserved <= LIMIT


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS)
async def test_changes_at_once_never_break_the_bounds(world: World, steps: list[Step]) -> None:
    user_id = await limited_person(world)
    uploads = [uuid4() for _ in range(5)]
    requests = [
        StorageRequest(uuid4(), user_id, action, size, None if action == "free" else uploads[which])
        for action, size, which in steps
        if action != "expire" and action != "repeat"
    ]
    answers = await asyncio.gather(
        *(world.service.storage.update(request) for request in requests for _ in range(2)),
        return_exceptions=True,
    )
    assert all(isinstance(answer, StorageUsage | Failure) for answer in answers)
    used, reserved = await usage(world, user_id)
    committed = freed = 0
    for request, first, second in zip(requests, answers[::2], answers[1::2], strict=True):
        if isinstance(first, StorageUsage) and isinstance(second, StorageUsage):
            assert first == second, "the same request has one answer"
        if isinstance(first, StorageUsage) or isinstance(second, StorageUsage):
            committed += request.bytes if request.action == "commit" else 0
            freed += request.bytes if request.action == "free" else 0
    assert used == committed - freed
    assert 0 <= used + reserved <= LIMIT
    async with world.database.connection() as conn:
        held = await conn.fetchval(
            "SELECT coalesce(sum(bytes), 0) FROM storage_reservations WHERE user_id = $1 AND state = 'reserved'",
            user_id,
        )
    assert reserved == held
