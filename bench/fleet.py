"""Generator processes: a process may hold 20,000 descriptors, and the far end of many connections takes many of them."""

from __future__ import annotations

import asyncio
import multiprocessing
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, suppress
from multiprocessing.connection import Connection
from typing import Any, Self

import uvloop

Make = Callable[..., Any]


class Fleet(AbstractAsyncContextManager["Fleet"]):
    """Processes that each hold one object and run its coroutines one after the other.

    `arguments` has one tuple per process: what `make` is called with there, on the process' event loop.
    """

    def __init__(self, make: Make, arguments: Sequence[tuple[Any, ...]]) -> None:
        context = multiprocessing.get_context("spawn")
        self._threads = ThreadPoolExecutor(len(arguments))
        self._pipes: list[Connection] = []
        self._processes = []
        for given in arguments:
            near, far = context.Pipe()
            process = context.Process(target=_serve, args=(far, make, given), daemon=True)
            process.start()
            far.close()
            self._pipes.append(near)
            self._processes.append(process)

    def __len__(self) -> int:
        return len(self._pipes)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            await asyncio.to_thread(process.join, 20)
            process.kill()
        self._threads.shutdown()

    async def call(self, method: str, *arguments: Any) -> list[Any]:
        """Run `method` in every process at once; the results in order. An exception there is raised here."""
        return await self.call_each(method, [arguments] * len(self))

    async def call_each(self, method: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """`call` with arguments of its own for each process."""
        loop = asyncio.get_running_loop()
        for pipe, given in zip(self._pipes, arguments, strict=True):
            pipe.send((method, given))
        answers = await asyncio.gather(
            *(loop.run_in_executor(self._threads, pipe.recv) for pipe in self._pipes)
        )
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        return answers


def _serve(pipe: Connection, make: Make, arguments: tuple[Any, ...]) -> None:
    with suppress(EOFError, KeyboardInterrupt):
        uvloop.run(_answer(pipe, make, arguments))


async def _answer(pipe: Connection, make: Make, arguments: tuple[Any, ...]) -> None:
    held = make(*arguments)
    while True:
        method, given = await asyncio.to_thread(pipe.recv)
        try:
            answer = await getattr(held, method)(*given)
        except Exception:  # noqa: BLE001 - it is raised again where the result is wanted
            answer = RuntimeError(f"{method} in a generator process:\n{traceback.format_exc()}")
        pipe.send(answer)
