from __future__ import annotations

import asyncio

from whispr.kit.supervisor import Supervisor


async def test_a_crashed_loop_is_started_again_and_others_never_notice() -> None:
    starts, calm, done = 0, 0, asyncio.Event()

    async def crashing() -> None:
        nonlocal starts
        starts += 1
        if starts == 3:
            done.set()
            await asyncio.Event().wait()
        raise RuntimeError("crash")

    async def steady() -> None:
        nonlocal calm
        calm += 1
        await asyncio.Event().wait()

    supervisor = Supervisor(backoff=0.001)
    supervisor.add("crashing", crashing)
    supervisor.add("steady", steady)
    supervisor.start()
    await asyncio.wait_for(done.wait(), 5)
    assert (starts, calm) == (3, 1)
    await supervisor.stop()


async def test_a_loop_that_keeps_crashing_ends_the_process_loudly() -> None:
    async def hopeless() -> None:
        raise RuntimeError("always")

    supervisor = Supervisor(max_restarts=3, backoff=0.001)
    supervisor.add("hopeless", hopeless)
    supervisor.start()
    reason = await asyncio.wait_for(supervisor.gave_up(), 5)
    assert "hopeless" in str(reason)
    assert "always" in str(reason)
    await supervisor.stop()


async def test_a_loop_that_returns_is_finished() -> None:
    runs = 0

    async def once() -> None:
        nonlocal runs
        runs += 1

    supervisor = Supervisor(backoff=0.001)
    supervisor.add("once", once)
    supervisor.start()
    await asyncio.sleep(0.02)
    assert runs == 1
    await supervisor.stop()


async def test_stopping_waits_until_loops_have_cleaned_up() -> None:
    cleaned = False

    async def tidy() -> None:
        nonlocal cleaned
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            cleaned = True

    supervisor = Supervisor()
    supervisor.add("tidy", tidy)
    supervisor.start()
    await asyncio.sleep(0)
    await supervisor.stop()
    assert cleaned


async def test_stopping_ends_a_loop_that_lost_its_cancellation() -> None:
    lost: list[bool] = []

    async def loop() -> None:
        while True:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                if lost:
                    raise
                lost.append(True)

    supervisor = Supervisor()
    supervisor.add("forgetful", loop)
    supervisor.start()
    await asyncio.sleep(0)
    async with asyncio.timeout(5):
        await supervisor.stop()
    assert lost
