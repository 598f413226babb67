"""Routes of linking a new device from one that is there."""

from __future__ import annotations

from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from whispr.kit.http import Body, CallerDep, IdempotencyKey, Problem, client_ip, new_router
from whispr.services.auth.api.accounts import SessionTokens, session_tokens
from whispr.services.auth.api.forms import DeviceForm, Key32, Signature, StepUpForm
from whispr.services.auth.models import Link, LinkStatus, Origin, Platform, Tokens
from whispr.services.auth.service import Auth

PROBLEM: dict[str, Any] = {"model": Problem}
OWNED: dict[int | str, dict[str, Any]] = {401: PROBLEM, 404: PROBLEM}
BY_TOKEN: dict[int | str, dict[str, Any]] = {404: PROBLEM, 409: PROBLEM}

LinkToken = Annotated[
    str, Field(pattern=r"^[A-Za-z0-9_\-]{43}$", description="From the screen of the other device.")
]


class ClaimForm(Body):
    """`device` as at login, with all keys it starts with."""

    token: LinkToken
    device: DeviceForm


class ConfirmForm(Body):
    check_code: Annotated[str, Field(pattern=r"^[0-9]{6}$", description="What the new device shows.")]


class FinishForm(Body):
    """`signature`: Ed25519 by the claimed signing key over `"whispr-device-link-finish-v1"` ‖ token (ASCII).

    Without it whoever saw the token on the screen could fetch the session.
    """

    token: LinkToken
    signature: Signature


class BegunLink(BaseModel):
    """`token` is for the new device alone, claims the link once, and is good for `expires_in` seconds."""

    link_id: UUID
    token: str
    expires_in: int


class ClaimedLinkView(BaseModel):
    """`check_code` is to be compared and confirmed on the other device within `expires_in` seconds.

    It is HMAC-SHA-256, keyed with the token (ASCII), over `"whispr-device-link-v1"` ‖ link_id (16 bytes) ‖ identity_key
    ‖ signing_key: the first 8 bytes as a big-endian number, modulo 1,000,000. Compute it on both devices.
    """

    link_id: UUID
    check_code: str
    expires_in: int


class ClaimingDevice(BaseModel):
    name: str
    platform: Platform
    registration_id: int
    identity_key: Key32
    signing_key: Key32


class LinkView(BaseModel):
    """`device` and `check_code` are there from the claim until the link ends."""

    link_id: UUID
    status: LinkStatus
    device: ClaimingDevice | None = None
    check_code: str | None = None


class LinkProgress(BaseModel):
    status: LinkStatus


def link_router(auth: Auth) -> APIRouter:
    """Both ends of a link."""
    router = new_router(tags=["linking"])

    @router.post("/api/v1/devices/link", status_code=201, responses={**OWNED, 403: PROBLEM, 409: PROBLEM})
    async def begin_link(form: StepUpForm, caller: CallerDep, key: IdempotencyKey = None) -> BegunLink:
        """Begin to link a new device. Ends a link of this device that is under way."""
        begun = await auth.links.begin(caller, form.password, form.codes(), key)
        return BegunLink(link_id=begun.id, token=begun.token, expires_in=begun.expires_in)

    @router.post("/api/v1/devices/link/claim", status_code=202, responses=BY_TOKEN)
    async def claim_link(form: ClaimForm, request: Request) -> ClaimedLinkView:
        """On the new device, without a session: bring the device and its keys. May be repeated with the same."""
        claimed = await auth.links.claim(form.token, form.device.device(), Origin(client_ip(request)))
        return ClaimedLinkView(
            link_id=claimed.id, check_code=claimed.check_code, expires_in=claimed.expires_in
        )

    @router.post(
        "/api/v1/devices/link/finish",
        status_code=201,
        response_model=SessionTokens,
        responses={**BY_TOKEN, 202: {"model": LinkProgress}},
    )
    async def finish_link(form: FinishForm, request: Request) -> SessionTokens | Response:
        """On the new device: its session once the link is confirmed, 202 before. May be repeated."""
        outcome = await auth.links.finish(form.token, form.signature, Origin(client_ip(request)))
        if isinstance(outcome, Tokens):
            return session_tokens(outcome)
        return JSONResponse(LinkProgress(status=outcome).model_dump(), status_code=202)

    @router.get("/api/v1/devices/link/{link_id}", responses=OWNED)
    async def get_link(link_id: UUID, caller: CallerDep) -> LinkView:
        """How far a link is, for the device that began it."""
        link, status = await auth.links.get(caller, link_id)
        return _view(link, status)

    @router.post(
        "/api/v1/devices/link/{link_id}/confirm",
        status_code=204,
        responses={**OWNED, 403: PROBLEM, 409: PROBLEM},
    )
    async def confirm_link(link_id: UUID, form: ConfirmForm, caller: CallerDep) -> Response:
        """On the device that began it: let the new device in. The third wrong code ends the link."""
        await auth.links.confirm(caller, link_id, form.check_code)
        return Response(status_code=204)

    @router.delete("/api/v1/devices/link/{link_id}", status_code=204, responses={**OWNED, 409: PROBLEM})
    async def refuse_link(link_id: UUID, caller: CallerDep) -> Response:
        """On any device of the person: end the link."""
        await auth.links.refuse(caller, link_id)
        return Response(status_code=204)

    return router


def _view(link: Link, status: LinkStatus) -> LinkView:
    shown = link.device if status in ("claimed", "confirmed") else None
    if shown is None:
        return LinkView(link_id=link.id, status=status)
    device = ClaimingDevice(
        name=shown.name,
        platform=shown.platform,
        registration_id=shown.registration_id,
        identity_key=shown.identity_key,
        signing_key=shown.signing_key,
    )
    return LinkView(link_id=link.id, status=status, device=device, check_code=link.check_code)
