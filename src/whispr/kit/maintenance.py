"""Upkeep of a service's own database on request: `kit.MaintenanceService`, the same in every service.

Nobody else has credentials for the database, so whoever plans the work (scheduling) can only ask for it by name.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from whispr.contracts import kit_pb2, kit_pb2_grpc
from whispr.kit.db import Connection, Database
from whispr.kit.errors import Invalid
from whispr.kit.telemetry import get_logger

log = get_logger(__name__)

# Seconds. Just under the longest deadline a call is given, so that PostgreSQL stops by itself and answers why.
STATEMENT_SECONDS = 55.0


class UnknownTask(Invalid):
    """There is no such maintenance task."""

    code = "unknown_task"


class Maintenance:
    """The tasks `vacuum`, `analyze`, `reindex` and `log_retention` over every table of one database.

    `log_retention` is the service's own: it deletes what has served its time and answers how many rows that were.
    """

    def __init__(self, database: Database, *, log_retention: Callable[[], Awaitable[int]]) -> None:
        self._database = database
        self._tasks: dict[str, Callable[[], Awaitable[int]]] = {
            "vacuum": lambda: self._each_table("VACUUM"),
            "analyze": lambda: self._each_table("ANALYZE"),
            "reindex": self._mend_indexes,
            "log_retention": log_retention,
        }

    async def run(self, task: str) -> int:
        """Do `task`; how many tables, indexes or rows it touched. Raises `UnknownTask`. May be repeated."""
        work = self._tasks.get(task)
        if work is None:
            raise UnknownTask(task=task)
        return await work()

    def register(self, server: grpc.aio.Server) -> None:
        """Put `kit.MaintenanceService` on a server."""
        kit_pb2_grpc.add_MaintenanceServiceServicer_to_server(_Servicer(self), server)

    async def _each_table(self, verb: str) -> int:
        async with self._database.connection() as conn:
            tables = await _tables(conn)
            for table in tables:
                await conn.execute(f"{verb} {table}", timeout=STATEMENT_SECONDS)
        return len(tables)

    async def _mend_indexes(self) -> int:
        """Drop what an interrupted concurrent build left over and rebuild what is marked invalid."""
        async with self._database.connection() as conn:
            broken = await _invalid_indexes(conn)
            for index, is_leftover in broken:
                verb = "DROP INDEX CONCURRENTLY IF EXISTS" if is_leftover else "REINDEX INDEX CONCURRENTLY"
                await conn.execute(f"{verb} {index}", timeout=STATEMENT_SECONDS)
        return len(broken)


class _Servicer(kit_pb2_grpc.MaintenanceServiceServicer):
    def __init__(self, maintenance: Maintenance) -> None:
        self._maintenance = maintenance

    async def RunMaintenance(  # noqa: N802
        self, request: kit_pb2.RunMaintenanceRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> kit_pb2.RunMaintenanceResponse:
        started = time.perf_counter()
        affected = await self._maintenance.run(request.task)
        seconds = time.perf_counter() - started
        log.info("maintenance_done", task=request.task, affected=affected, seconds=round(seconds, 3))
        return kit_pb2.RunMaintenanceResponse(task=request.task, affected=affected, seconds=seconds)


async def _tables(conn: Connection) -> list[str]:
    """The tables of the current schema, quoted; partitions are reached through their parent."""
    rows = await conn.fetch(
        """
        SELECT c.oid::regclass::text AS name FROM pg_class c
        WHERE c.relkind IN ('r', 'p') AND NOT c.relispartition AND c.relnamespace = current_schema()::regnamespace
        ORDER BY c.relname
        """
    )
    return [row["name"] for row in rows]


async def _invalid_indexes(conn: Connection) -> list[tuple[str, bool]]:
    """Invalid indexes of the current schema, and whether each is a leftover beside a valid one."""
    rows = await conn.fetch(
        r"""
        SELECT c.oid::regclass::text AS name, c.relname ~ '_cc(new|old)\d*$' AS leftover
        FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid
        WHERE NOT i.indisvalid AND c.relkind = 'i' AND c.relnamespace = current_schema()::regnamespace
        ORDER BY c.relname
        """
    )
    return [(row["name"], row["leftover"]) for row in rows]
