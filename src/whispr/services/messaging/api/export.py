"""The route of a person's own data."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from fastapi.responses import StreamingResponse

from whispr.kit.http import CallerDep
from whispr.services.messaging.service.export import Export

_LINES = "application/x-ndjson"
_ANSWER: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "One JSON object a line, each with a `type`: `export` first, then `membership`, `conversation`,"
        " `pin`, `message`, `scheduled_message`, `report`, `restriction` and `device_cursor`, and `end` last, with"
        " `is_complete`.",
        "content": {_LINES: {"schema": {"type": "string"}}},
    }
}


def add_routes(router: APIRouter, export: Export) -> None:
    """Put the routes on `router`."""

    @router.get("/export/messaging", response_class=StreamingResponse, responses=_ANSWER, tags=["export"])
    async def export_messaging(caller: CallerDep) -> StreamingResponse:
        """Everything kept of the caller and everything they can read, as the calling device gets it; five times a day.

        An answer without a line of the type `end` was cut off.
        """
        lines = await export.begin(caller.user_id, caller.device_id)
        return StreamingResponse(
            lines,
            media_type=_LINES,
            headers={
                "Content-Disposition": 'attachment; filename="whispr-messaging.ndjson"',
                "Cache-Control": "no-store",
            },
        )
