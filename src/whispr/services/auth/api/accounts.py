"""Routes of registration, login, sessions, password and account, and the key set."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal
from uuid import UUID

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from whispr.kit.http import (
    CallerDep,
    CursorParam,
    IdempotencyKey,
    LimitParam,
    Page,
    Problem,
    client_ip,
    decode_cursor,
    encode_cursor,
    new_router,
)
from whispr.kit.identity import Caller
from whispr.services.auth.api.forms import LoginForm, PasswordForm, RefreshForm, RegisterForm, StepUpForm
from whispr.services.auth.models import Origin, Platform, SessionRecord, Tokens
from whispr.services.auth.service import Auth


class SessionTokens(BaseModel):
    """`expires_in` is the access token's life in seconds. The refresh token works once."""

    user_id: UUID
    device_id: UUID
    session_id: UUID
    access_token: str
    token_type: Literal["Bearer"] = "Bearer"  # noqa: S105 (a kind of token, none itself)
    expires_in: int
    refresh_token: str


class SessionInfo(BaseModel):
    """A living session; `id` is its session_id."""

    id: UUID
    session_id: UUID
    device_id: UUID
    device_name: str
    platform: Platform
    created_at: datetime
    last_used_at: datetime
    expires_at: datetime
    current: bool


REFUSED: dict[int | str, dict[str, Any]] = {401: {"model": Problem}}


def account_router(auth: Auth) -> APIRouter:
    """Everything one does with an account, signed in or not yet."""
    router = new_router(tags=["auth"])

    @router.post("/api/v1/auth/register", status_code=201, responses={409: {"model": Problem}})
    async def register(form: RegisterForm, request: Request, key: IdempotencyKey = None) -> SessionTokens:
        """Make an account with its first device."""
        device = form.device.device()
        return session_tokens(
            await auth.entry.register(form.username, form.password, device, _origin(request), key)
        )

    @router.post("/api/v1/auth/login", responses={**REFUSED, 409: {"model": Problem}})
    async def log_in(form: LoginForm, request: Request, key: IdempotencyKey = None) -> SessionTokens:
        """Open a session on a new device (`device`) or a known one (`device_id`).

        401 `totp_required` asks for the second factor, `bad_totp_code` refuses it, and `device_expired` says that the
        device was away for too long and must be linked anew.
        """
        return session_tokens(
            await auth.entry.log_in(
                form.username,
                form.password,
                _origin(request),
                device=form.device.device() if form.device is not None else None,
                device_id=form.device_id,
                codes=form.codes(),
                idempotency_key=key,
            )
        )

    @router.post("/api/v1/auth/refresh", responses=REFUSED)
    async def refresh(form: RefreshForm, request: Request) -> SessionTokens:
        """Exchange a refresh token. Sent again within 10 seconds it gives the same successor; later it ends the session."""
        return session_tokens(
            await auth.sessions.refresh(form.refresh_token, form.device_id, _origin(request))
        )

    @router.post("/api/v1/auth/logout", status_code=204, responses=REFUSED)
    async def log_out(caller: CallerDep) -> Response:
        """End this session."""
        await auth.sessions.log_out(caller)
        return Response(status_code=204)

    @router.get("/api/v1/auth/sessions", responses=REFUSED)
    async def list_sessions(
        caller: CallerDep, limit: LimitParam = 50, cursor: CursorParam = None
    ) -> Page[SessionInfo]:
        """The caller's living sessions, oldest first."""
        after = decode_cursor(cursor, UUID) if cursor else None
        found = await auth.sessions.page(caller, after, limit + 1)
        more = encode_cursor(found[limit - 1].id) if len(found) > limit else None
        return Page(items=[_info(session, caller) for session in found[:limit]], next_cursor=more)

    @router.delete(
        "/api/v1/auth/sessions/{session_id}", status_code=204, responses={**REFUSED, 404: {"model": Problem}}
    )
    async def end_session(session_id: UUID, caller: CallerDep) -> Response:
        """End one of the caller's sessions."""
        await auth.sessions.end(caller, session_id)
        return Response(status_code=204)

    @router.put("/api/v1/auth/password", status_code=204, responses={**REFUSED, 403: {"model": Problem}})
    async def change_password(form: PasswordForm, caller: CallerDep) -> Response:
        """Change the password and end all other sessions."""
        await auth.accounts.change_password(caller, form.current_password, form.new_password, form.codes())
        return Response(status_code=204)

    @router.delete("/api/v1/auth/account", status_code=204, responses={**REFUSED, 403: {"model": Problem}})
    async def delete_account(form: StepUpForm, caller: CallerDep) -> Response:
        """Delete the account, here and in every service. The username is never given out again."""
        await auth.accounts.delete(caller, form.password, form.codes())
        return Response(status_code=204)

    @router.get("/.well-known/jwks.json")
    async def jwks(request: Request, response: Response) -> dict[str, Any]:
        """The keys that access tokens are signed with (RFC 7517, EdDSA)."""
        await auth.limits.jwks(_origin(request))
        response.headers["Cache-Control"] = "public, max-age=300"
        return await auth.source.jwks()

    return router


def _origin(request: Request) -> Origin:
    return Origin(client_ip(request))


def session_tokens(tokens: Tokens) -> SessionTokens:
    """SESSION, as every way in answers it."""
    return SessionTokens(
        user_id=tokens.user_id,
        device_id=tokens.device_id,
        session_id=tokens.session_id,
        access_token=tokens.access_token,
        expires_in=tokens.expires_in,
        refresh_token=tokens.refresh_token,
    )


def _info(session: SessionRecord, caller: Caller) -> SessionInfo:
    return SessionInfo(
        id=session.id,
        session_id=session.id,
        device_id=session.device_id,
        device_name=session.device_name,
        platform=session.platform,
        created_at=session.created_at,
        last_used_at=session.last_used_at,
        expires_at=session.expires_at,
        current=session.id == caller.session_id,
    )
