"""How the other services call `scheduling`."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import msgspec

from whispr.contracts import scheduling_pb2, scheduling_pb2_grpc
from whispr.kit.grpc import Channel


@dataclass(frozen=True, slots=True)
class Job:
    """A job as scheduling knows it. `key` is the caller's name for it; `revision` counts the caller's changes."""

    id: UUID
    key: str
    revision: int
    type: str
    status: str
    run_at: datetime
    attempts: int
    last_error: str


class SchedulingClient:
    """`scheduling.SchedulingService`. Every method raises the failure that `scheduling` raised, or `Unavailable`."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._stub = scheduling_pb2_grpc.SchedulingServiceStub(channel.grpc)

    async def schedule_job(
        self,
        operation_id: UUID,
        key: str,
        revision: int,
        type: str,  # noqa: A002 - the job's word for it
        run_at: datetime,
        payload: dict[str, Any],
        *,
        user_id: UUID | None = None,
    ) -> Job:
        """Plan a job, or plan it anew; an older revision than one that is known changes nothing."""
        request = scheduling_pb2.ScheduleJobRequest(
            operation_id=str(operation_id),
            key=key,
            revision=revision,
            type=type,
            payload=msgspec.json.encode(payload).decode(),
            user_id="" if user_id is None else str(user_id),
        )
        request.run_at.FromDatetime(run_at)
        return _job(await self._channel.call(self._stub.ScheduleJob, request, timeout=5.0, idempotent=True))

    async def cancel_job(self, operation_id: UUID, key: str, revision: int) -> None:
        """Let no revision up to this one run any more. Unknown ones, too, so that a late call plans nothing."""
        request = scheduling_pb2.CancelJobRequest(operation_id=str(operation_id), key=key, revision=revision)
        await self._channel.call(self._stub.CancelJob, request, timeout=5.0, idempotent=True)

    async def get_job(self, key: str) -> Job:
        """One of the calling service's jobs. Raises a failure of the kind `not_found`."""
        request = scheduling_pb2.GetJobRequest(key=key)
        return _job(await self._channel.call(self._stub.GetJob, request, timeout=2.0, idempotent=True))


def _job(job: scheduling_pb2.Job) -> Job:
    return Job(
        id=UUID(job.id),
        key=job.key,
        revision=job.revision,
        type=job.type,
        status=job.status,
        run_at=job.run_at.ToDatetime(UTC),
        attempts=job.attempts,
        last_error=job.last_error,
    )
