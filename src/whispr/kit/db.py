"""PostgreSQL: a pool per process, transactions, and one meaning for "the database is away".

Store functions take a `Connection` first and hold the SQL. A lost server shows as `Unavailable` with the code
`database_unavailable`, never as a driver's exception.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import weakref
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, TypeAlias

import asyncpg
import msgspec

from whispr.kit.errors import Unavailable
from whispr.kit.telemetry import metrics

Connection: TypeAlias = "asyncpg.Connection[Any] | asyncpg.pool.PoolConnectionProxy[Any]"

# The server went away, is starting or stopping, is out of something, or somebody ended the statement (SQLSTATE classes
# 08, 53, 57 and 58). Anything else a statement raises is a defect of ours or a conflict the caller handles.
LOST_CONNECTION: tuple[type[BaseException], ...] = (
    OSError,
    asyncio.TimeoutError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    asyncpg.PostgresConnectionError,
    asyncpg.InsufficientResourcesError,
    asyncpg.OperatorInterventionError,
    asyncpg.PostgresSystemError,
)

_databases: weakref.WeakSet[Database] = weakref.WeakSet()


class DatabaseUnavailable(Unavailable):
    """The database is not available. Try again."""

    code = "database_unavailable"

    def __init__(self, detail: str | None = None) -> None:
        super().__init__(detail, retry_after=1)


class Database:
    """A pool of connections to one service's database.

    `acquire_timeout` (seconds) is how long a caller waits for a connection, a restarting server included: a crash of
    PostgreSQL that its supervisor mends in time is a delay and no error. `settings` are server settings of every
    connection.

    Nobody may leave anything behind in a session (SET, LISTEN, session locks, open cursors): it is not cleared between
    uses, which would cost each use a round trip of its own.
    """

    def __init__(
        self,
        url: str,
        *,
        pool_size: int = 10,
        acquire_timeout: float = 5.0,
        command_timeout: float = 30.0,
        application_name: str = "whispr",
        settings: Mapping[str, str] | None = None,
    ) -> None:
        self._url = url
        self._pool_size = pool_size
        self._acquire_timeout = acquire_timeout
        self._command_timeout = command_timeout
        self._application_name = application_name
        self._settings = dict(settings or {})
        self._pool: asyncpg.Pool[Any] | None = None
        _databases.add(self)

    async def open(self, timeout: float = 30.0) -> None:
        """Create the pool; waits up to `timeout` seconds for the server. Raises `DatabaseUnavailable`."""
        deadline = asyncio.get_running_loop().time() + timeout
        while True:
            try:
                self._pool = await asyncpg.create_pool(
                    self._url,
                    min_size=1,
                    max_size=self._pool_size,
                    command_timeout=self._command_timeout,
                    timeout=5.0,
                    max_inactive_connection_lifetime=300.0,
                    init=_prepare_connection,
                    reset=_clear_nothing,
                    server_settings={
                        "application_name": self._application_name,
                        "timezone": "UTC",
                        **self._settings,
                    },
                )
                return
            except LOST_CONNECTION as error:
                if asyncio.get_running_loop().time() > deadline:
                    raise DatabaseUnavailable from error
                await asyncio.sleep(0.2)

    async def close(self) -> None:
        """Give every connection back; connections still in use are cut after five seconds."""
        if self._pool is None:
            return
        pool, self._pool = self._pool, None
        try:
            await asyncio.wait_for(pool.close(), 5)
        except LOST_CONNECTION:
            pool.terminate()

    async def ready(self) -> None:
        """Raise `DatabaseUnavailable` unless the server answers a query now."""
        async with self.connection(acquire_timeout=1.0) as connection:
            await connection.fetchval("SELECT 1", timeout=1.0)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Connections idle, connections in use, and the most there may be."""
        if self._pool is None:
            return 0, 0, 0
        idle = self._pool.get_idle_size()
        return idle, self._pool.get_size() - idle, self._pool.get_max_size()

    @asynccontextmanager
    async def connection(self, *, acquire_timeout: float | None = None) -> AsyncIterator[Connection]:
        """A connection in autocommit: each statement is its own transaction."""
        timeout = self._acquire_timeout if acquire_timeout is None else acquire_timeout
        connection = await self._acquire(timeout)
        try:
            yield connection
        except LOST_CONNECTION as error:
            metrics.db_failures.inc()
            raise DatabaseUnavailable from error
        finally:
            await self._release(connection)

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Connection]:
        """A transaction, committed when the block ends without an exception.

        `DatabaseUnavailable` on leaving may mean that the commit happened and its answer was lost: writes must be
        safe to repeat.
        """
        async with self.connection() as connection, connection.transaction():
            yield connection

    async def _acquire(self, timeout: float) -> asyncpg.pool.PoolConnectionProxy[Any]:
        if self._pool is None:
            raise DatabaseUnavailable("The database pool is closed.")
        loop = asyncio.get_running_loop()
        asked = loop.time()
        deadline = asked + timeout
        while True:
            try:
                connection = await self._pool.acquire(timeout=max(0.05, deadline - loop.time()))
                metrics.db_acquire_seconds.observe(loop.time() - asked)
                return connection
            except LOST_CONNECTION as error:
                if loop.time() + 0.1 > deadline or self._pool is None:
                    metrics.db_failures.inc()
                    raise DatabaseUnavailable from error
                await asyncio.sleep(random.uniform(0.05, 0.15))

    async def _release(self, connection: asyncpg.pool.PoolConnectionProxy[Any]) -> None:
        if self._pool is None:
            return
        # A transaction left open is rolled back, which fails on a dead server; the pool has dropped the connection then.
        with contextlib.suppress(*LOST_CONNECTION):
            await self._pool.release(connection, timeout=2.0)


async def _prepare_connection(connection: Connection) -> None:
    for name in ("json", "jsonb"):
        await connection.set_type_codec(
            name,
            schema="pg_catalog",
            encoder=lambda value: msgspec.json.encode(value).decode(),
            decoder=msgspec.json.decode,
        )


async def _clear_nothing(_connection: Connection) -> None:
    """In place of the statement that clears the session. The pool has rolled back what was left open by then."""


def _pools(position: int) -> Callable[[], float]:
    """Adds up over the pools of this process, when the metrics are read."""
    return lambda: sum(database.sizes[position] for database in _databases)


for _position, _state in enumerate(("idle", "used", "max")):
    metrics.db_connections.labels(state=_state).set_function(_pools(_position))
