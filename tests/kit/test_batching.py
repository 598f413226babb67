"""Questions that come together are answered together, each with its own answer."""

from __future__ import annotations

import asyncio

import pytest

from whispr.kit.batching import Batcher
from whispr.kit.errors import Unavailable


class Oracle:
    """Doubles numbers; answers wait for `gate`."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.batches: list[list[int]] = []

    async def answer(self, questions: list[int]) -> list[int]:
        self.batches.append(questions)
        await self.gate.wait()
        if -1 in questions:
            raise Unavailable("asked for")
        return [2 * question for question in questions]


async def _settled() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_what_is_asked_at_once_goes_in_one_batch() -> None:
    oracle = Oracle()
    oracle.gate.set()
    batcher = Batcher(oracle.answer)
    assert await asyncio.gather(*(batcher.ask(number) for number in range(5))) == [0, 2, 4, 6, 8]
    assert oracle.batches == [[0, 1, 2, 3, 4]]


async def test_batches_grow_while_the_lanes_are_busy_and_stay_within_their_size() -> None:
    oracle = Oracle()
    batcher = Batcher(oracle.answer, largest=3, lanes=2)
    asking: list[asyncio.Task[int]] = []
    for number in (1, 2):
        asking.append(asyncio.create_task(batcher.ask(number)))
        await _settled()
    asking += [asyncio.create_task(batcher.ask(number)) for number in range(3, 8)]
    await _settled()
    assert oracle.batches == [[1], [2]], "both lanes are taken"
    oracle.gate.set()
    assert await asyncio.gather(*asking) == [2 * number for number in range(1, 8)]
    assert [len(batch) for batch in oracle.batches[2:]] == [3, 2]


async def test_a_failure_reaches_everybody_in_its_batch_and_nobody_else() -> None:
    oracle = Oracle()
    oracle.gate.set()
    batcher = Batcher(oracle.answer)
    answers = await asyncio.gather(batcher.ask(1), batcher.ask(-1), return_exceptions=True)
    assert [type(answer) for answer in answers] == [Unavailable, Unavailable]
    assert await batcher.ask(4) == 8


async def test_whoever_gives_up_is_not_asked_for_and_harms_nobody() -> None:
    oracle = Oracle()
    batcher = Batcher(oracle.answer, lanes=1)
    first = asyncio.create_task(batcher.ask(1))
    await _settled()
    second, third = asyncio.create_task(batcher.ask(2)), asyncio.create_task(batcher.ask(3))
    await _settled()
    first.cancel()
    second.cancel()
    oracle.gate.set()
    assert await third == 6
    assert oracle.batches == [[1], [3]]
    with pytest.raises(asyncio.CancelledError):
        await first


async def test_whoever_was_just_answered_may_ask_again_at_once() -> None:
    async def double(questions: list[int]) -> list[int]:
        await asyncio.sleep(0)
        return [2 * question for question in questions]

    batcher = Batcher(double, lanes=1)
    async with asyncio.timeout(2):
        for number in range(20):
            assert await batcher.ask(number) == 2 * number


async def test_questions_that_keep_coming_are_held_apart() -> None:
    oracle = Oracle()
    oracle.gate.set()
    batcher = Batcher(oracle.answer, largest=3, span=0.5)
    for number in range(5):
        assert await batcher.ask(number) == 2 * number
    assert oracle.batches == [[0], [1], [2], [3], [4]], "whoever asks a few things waits for nothing"
    first = asyncio.create_task(batcher.ask(5))
    await _settled()
    second = asyncio.create_task(batcher.ask(6))
    assert [await first, await second] == [10, 12]
    assert oracle.batches[5:] == [[5, 6]], "the sixth waits, and the seventh goes along"


async def test_full_batches_are_not_held_apart_and_leave_no_debt() -> None:
    oracle = Oracle()
    oracle.gate.set()
    batcher = Batcher(oracle.answer, largest=2, span=0.5)
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(5):
        # One span each would be 100 s.
        await asyncio.gather(*(batcher.ask(number) for number in range(400)))
    assert [len(batch) for batch in oracle.batches] == [2] * 200
    asked = loop.time()
    await batcher.ask(1)
    assert loop.time() - asked < 2, "no more than a span"
