"""Routes of the second factor."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Response
from pydantic import BaseModel

from whispr.kit.http import CallerDep, IdempotencyKey, Problem, new_router
from whispr.services.auth.api.forms import TotpConfirmationForm, TotpForm, TotpRemovalForm
from whispr.services.auth.service import Auth

REFUSED: dict[int | str, dict[str, Any]] = {401: {"model": Problem}}
PROVEN: dict[int | str, dict[str, Any]] = {**REFUSED, 403: {"model": Problem}}


class TotpSecret(BaseModel):
    """`secret` in base32, to be typed; `otpauth_uri`, to be shown as a QR code."""

    secret: str
    otpauth_uri: str


class RecoveryCodes(BaseModel):
    """Shown once. Each stands in for a code of the authenticator once."""

    recovery_codes: list[str]


class TotpState(BaseModel):
    enabled: bool
    recovery_codes_left: int


def second_factor_router(auth: Auth) -> APIRouter:
    """The caller's own second factor."""
    router = new_router(tags=["second factor"])

    @router.post("/api/v1/auth/totp", status_code=201, responses={**PROVEN, 409: {"model": Problem}})
    async def begin_totp(form: TotpForm, caller: CallerDep, key: IdempotencyKey = None) -> TotpSecret:
        """Make a secret for an authenticator (RFC 6238: SHA-1, 30 seconds, 6 digits). In force when confirmed."""
        made = await auth.second_factor.begin(caller, form.password, key)
        return TotpSecret(secret=made.secret, otpauth_uri=made.uri)

    @router.post("/api/v1/auth/totp/confirm", responses={**PROVEN, 409: {"model": Problem}})
    async def confirm_totp(form: TotpConfirmationForm, caller: CallerDep) -> RecoveryCodes:
        """Turn the second factor on with a code of the authenticator."""
        return RecoveryCodes(recovery_codes=await auth.second_factor.confirm(caller, form.code))

    @router.delete("/api/v1/auth/totp", status_code=204, responses=PROVEN)
    async def remove_totp(form: TotpRemovalForm, caller: CallerDep) -> Response:
        """Turn the second factor off."""
        await auth.second_factor.remove(caller, form.password, form.code)
        return Response(status_code=204)

    @router.get("/api/v1/auth/totp", responses=REFUSED)
    async def totp_state(caller: CallerDep) -> TotpState:
        """Is the second factor on, and how many recovery codes are left?"""
        state = await auth.second_factor.state(caller)
        return TotpState(enabled=state.enabled, recovery_codes_left=state.recovery_codes_left)

    return router
