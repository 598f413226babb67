"""Questions that come at the same time, answered together.

Statements and remote calls cost far more than what they carry. One is asked as soon as a lane is free, with whatever has
come by then, so batches grow with the load and a lone question goes at once. Where questions keep coming, batches are a span
apart: many processes with a little to ask each would wear out the one they all ask.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, Generic, TypeVar

from whispr.kit.errors import Unavailable

SPAN: Final = 0.02
"""Seconds. What somebody waits for may wait that much longer for others' questions, where many come."""

# So many batches may follow each other at once before they are held apart: a person who comes has several questions.
_BURST: Final = 5

Q = TypeVar("Q")
A = TypeVar("A")


class Batcher(Generic[Q, A]):
    """`answer(questions)` gives the answers in the order of the questions, and is what `ask` raises when it fails.

    At most `lanes` batches of at most `largest` questions are under way. A question is asked after it was put, never
    answered from a batch that began before. Where they keep coming, batches begin `span` seconds apart.
    """

    def __init__(
        self,
        answer: Callable[[list[Q]], Awaitable[Sequence[A]]],
        *,
        largest: int = 100,
        lanes: int = 1,
        span: float = SPAN,
    ) -> None:
        self._answer = answer
        self._largest = largest
        self._lanes = lanes
        self._span = span
        self._waiting: deque[tuple[Q, asyncio.Future[A]]] = deque()
        self._working: set[asyncio.Task[None]] = set()
        self._is_starting = False
        self._busy = 0
        # When the next batch would be on time, if one came every span.
        self._due = 0.0

    async def ask(self, question: Q) -> A:
        """The answer to one question."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[A] = loop.create_future()
        self._waiting.append((question, future))
        # A task starts in the next round of the loop: what is asked in this one goes along.
        if not self._is_starting and self._busy < self._lanes:
            self._is_starting = True
            self._busy += 1
            task = loop.create_task(self._work())
            self._working.add(task)
            task.add_done_callback(self._working.discard)
        return await future

    async def _work(self) -> None:
        self._is_starting = False
        try:
            while self._waiting:
                await self._hold_apart()
                batch: list[tuple[Q, asyncio.Future[A]]] = []
                while self._waiting and len(batch) < self._largest:
                    question, future = self._waiting.popleft()
                    # Whoever has given up need not be asked for.
                    if not future.done():
                        batch.append((question, future))
                if batch:
                    await self._serve(batch)
        finally:
            # Here, not when the task is found done: who is answered last may ask again before that, and would wait for
            # a lane that has ended.
            self._busy -= 1

    async def _hold_apart(self) -> None:
        now = asyncio.get_running_loop().time()
        # Full batches, which nobody holds apart, must leave no debt that the next small one would wait for.
        self._due = min(max(self._due, now) + self._span, now + (_BURST + 1) * self._span)
        wait = self._due - now - _BURST * self._span
        if wait > 0 and len(self._waiting) < self._largest:
            await asyncio.sleep(wait)

    async def _serve(self, batch: list[tuple[Q, asyncio.Future[A]]]) -> None:
        try:
            answers = await self._answer([question for question, _ in batch])
        except asyncio.CancelledError:
            self._fail(batch, Unavailable(retry_after=1))
            raise
        except Exception as error:  # noqa: BLE001 - it belongs to those who asked
            self._fail(batch, error)
            return
        for (_, future), answer in zip(batch, answers, strict=True):
            if not future.done():
                future.set_result(answer)

    @staticmethod
    def _fail(batch: list[tuple[Q, asyncio.Future[A]]], error: Exception) -> None:
        for _, future in batch:
            if not future.done():
                future.set_exception(error)
