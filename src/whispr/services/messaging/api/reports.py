"""The route that reports a message."""

from __future__ import annotations

import binascii
from typing import Annotated, Any, Literal
from uuid import UUID

from fastapi import APIRouter, Response
from pydantic import BaseModel, ConfigDict, Field

from whispr.kit.errors import Invalid
from whispr.kit.http import Body, CallerDep, Problem
from whispr.services.messaging.api import answers
from whispr.services.messaging.models import MAX_CONTENT_BYTES
from whispr.services.messaging.models.abuse import Report, ReportReason, Reveal
from whispr.services.messaging.service.reports import FRANKING_KEY_BYTES, Reports

_MAX_COMMENT = 2_000
_MAX_PLAINTEXT_TEXT = 4 * ((MAX_CONTENT_BYTES + 2) // 3)
_BASE64 = {"contentEncoding": "base64"}


class RevealBody(Body):
    """What the message said, with the key that came with it inside the encryption."""

    plaintext: Annotated[str, Field(max_length=_MAX_PLAINTEXT_TEXT, json_schema_extra=_BASE64)]
    franking_key: Annotated[
        str, Field(max_length=128, description="Of 16 to 64 bytes.", json_schema_extra=_BASE64)
    ]


class ReportBody(Body):
    """Why the message is reported."""

    reason: Literal["spam", "abuse", "violence", "illegal", "other"]
    comment: Annotated[str, Field(max_length=_MAX_COMMENT)] | None = None
    reveal: RevealBody | None = Field(
        None, description="Verified against the message's commitment, and kept with the report."
    )


class ReportView(BaseModel):
    """A report. `is_verified`: the revealed plaintext is what the sender committed to."""

    report_id: UUID
    is_verified: bool

    model_config = ConfigDict(extra="forbid")


def add_routes(router: APIRouter, reports: Reports) -> None:
    """Put the route on `router`."""
    responses: dict[int | str, dict[str, Any]] = {
        200: {"model": ReportView, "description": "You had reported it before."},
        404: {"model": Problem},
    }

    @router.post(
        "/messages/{message_id}/report",
        status_code=201,
        response_model=ReportView,
        responses=responses,
        tags=["messages"],
    )
    async def report_message(caller: CallerDep, message_id: UUID, body: ReportBody) -> Response:
        """Report a message one can see to moderation.

        With `reveal`, the plaintext is verified against the `commitment` of the message in its present state
        (HMAC-SHA-256 under `franking_key`): 422 `franking_mismatch` if it is not what the sender wrote, 422 `not_franked`
        if the message has no commitment or was deleted. Without it, nobody can know what the message said.
        """
        report, is_new = await reports.submit(
            message_id, caller.user_id, ReportReason(body.reason), body.comment, _reveal(body.reveal)
        )
        return answers.json_answer(_view(report), 201 if is_new else 200)


def _view(report: Report) -> dict[str, Any]:
    return {"report_id": report.id, "is_verified": report.is_verified}


def _reveal(body: RevealBody | None) -> Reveal | None:
    if body is None:
        return None
    reveal = Reveal(_decoded("plaintext", body.plaintext), _decoded("franking_key", body.franking_key))
    shortest, longest = FRANKING_KEY_BYTES
    if not shortest <= len(reveal.franking_key) <= longest:
        raise Invalid(f"reveal.franking_key is not of {shortest} to {longest} bytes.")
    return reveal


def _decoded(name: str, text: str) -> bytes:
    try:
        return binascii.a2b_base64(text.encode(), strict_mode=True)
    except ValueError:
        raise Invalid(f"reveal.{name} is not base64.") from None
