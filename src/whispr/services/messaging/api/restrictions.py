"""Routes of restrictions, for administrators."""

from __future__ import annotations

from datetime import datetime
from typing import Any
from uuid import UUID

from fastapi import APIRouter, Response
from pydantic import BaseModel, ConfigDict, Field

from whispr.kit.http import AdminDep, CursorParam, LimitParam, Page, Problem, decode_cursor, encode_cursor
from whispr.services.messaging.api import answers
from whispr.services.messaging.service.restrictions import Restrictions
from whispr.services.messaging.service.volume import Volume

Responses = dict[int | str, dict[str, Any]]

_FIRST = UUID(int=0)
_FORBIDDEN: Responses = {403: {"model": Problem}}


class RestrictionView(BaseModel):
    """A person who may for a while write only to people who know them."""

    user_id: UUID
    reason: str = Field(description="The threshold that was passed, such as `messages_per_minute`.")
    until: datetime
    created_at: datetime

    model_config = ConfigDict(extra="forbid")


def add_routes(router: APIRouter, restrictions: Restrictions, volume: Volume) -> None:
    """Put the routes on `router`."""

    @router.get(
        "/restrictions", response_model=Page[RestrictionView], responses=_FORBIDDEN, tags=["restrictions"]
    )
    async def list_restrictions(
        caller: AdminDep, limit: LimitParam = 50, cursor: CursorParam = None
    ) -> Response:
        """Who is restricted now. Needs the role `admin`."""
        after = decode_cursor(cursor, UUID) if cursor is not None else _FIRST
        page, following = await restrictions.list_page(after, limit)
        return answers.json_answer(
            {"items": page, "next_cursor": encode_cursor(following) if following is not None else None}
        )

    @router.delete(
        "/restrictions/{user_id}",
        status_code=204,
        responses=_FORBIDDEN | {404: {"model": Problem}},
        tags=["restrictions"],
    )
    async def lift_restriction(caller: AdminDep, user_id: UUID) -> None:
        """End a restriction before its time. Needs the role `admin`."""
        await volume.lift(user_id)
