"""Routes of prekeys."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from fastapi import APIRouter
from pydantic import BaseModel, Field

from whispr.kit.http import CallerDep, Problem, new_router
from whispr.services.auth.api.forms import CheckForm, Key32, MlKem768, Signature, UploadForm
from whispr.services.auth.models import Bundle, PrekeyCounts
from whispr.services.auth.service import Auth

REFUSED: dict[int | str, dict[str, Any]] = {401: {"model": Problem}}
MISSING: dict[int | str, dict[str, Any]] = {**REFUSED, 404: {"model": Problem}}
CONFLICTING: dict[int | str, dict[str, Any]] = {**REFUSED, 409: {"model": Problem}}


class Counts(BaseModel):
    """What the server holds of the calling device. Below 10 one-time keys it is time to upload."""

    one_time_prekeys: int
    pq_one_time_prekeys: int
    signed_prekey_id: int
    pq_last_resort_prekey_id: int | None


class Checked(BaseModel):
    """The keys agree."""

    matches: bool = True


class SignedPrekeyView(BaseModel):
    key_id: int
    public_key: Key32
    signature: Signature


class OneTimePrekeyView(BaseModel):
    key_id: int
    public_key: Key32


class PqPrekeyView(BaseModel):
    key_id: int
    public_key: MlKem768
    signature: Signature


class BundleView(BaseModel):
    """What opens a session with one device."""

    device_id: UUID
    registration_id: int
    identity_key: Key32
    signing_key: Key32
    signed_prekey: SignedPrekeyView
    one_time_prekey: OneTimePrekeyView | None = Field(
        description="Handed out to nobody else; null when used up."
    )
    pq_prekey: PqPrekeyView | None = Field(
        description="One-time as long as there are such, else the last resort."
    )


class UserKeys(BaseModel):
    user_id: UUID
    devices: list[BundleView]


def key_router(auth: Auth) -> APIRouter:
    """The key server."""
    router = new_router(tags=["keys"])

    @router.put("/api/v1/keys", responses={**CONFLICTING, **MISSING})
    async def upload_keys(form: UploadForm, caller: CallerDep) -> Counts:
        """Upload prekeys of the calling device. Lasting keys replace, one-time keys are added; may be repeated."""
        return _counts(await auth.prekeys.upload(caller, form.upload()))

    @router.get("/api/v1/keys", responses=MISSING)
    async def count_keys(caller: CallerDep) -> Counts:
        """How many prekeys the server holds of the calling device."""
        return _counts(await auth.prekeys.counts(caller))

    @router.post("/api/v1/keys/check", responses={**CONFLICTING, **MISSING})
    async def check_keys(form: CheckForm, caller: CallerDep) -> Checked:
        """Does the server hand out the keys the device believes it does? 409 if not: upload them again."""
        await auth.prekeys.check(caller, form.digest)
        return Checked()

    @router.get("/api/v1/keys/{user_id}", responses=MISSING)
    async def claim_keys(user_id: UUID, caller: CallerDep) -> UserKeys:
        """Keys to open sessions with every active device of a person but the calling one."""
        bundles = await auth.prekeys.claim(caller, user_id)
        return UserKeys(user_id=user_id, devices=[_view(bundle) for bundle in bundles])

    @router.get("/api/v1/keys/{user_id}/{device_id}", responses=MISSING)
    async def claim_device_keys(user_id: UUID, device_id: UUID, caller: CallerDep) -> UserKeys:
        """Keys to open a session with one device."""
        bundles = await auth.prekeys.claim(caller, user_id, device_id)
        return UserKeys(user_id=user_id, devices=[_view(bundle) for bundle in bundles])

    return router


def _counts(counts: PrekeyCounts) -> Counts:
    return Counts(
        one_time_prekeys=counts.one_time_prekeys,
        pq_one_time_prekeys=counts.pq_one_time_prekeys,
        signed_prekey_id=counts.signed_prekey_id,
        pq_last_resort_prekey_id=counts.pq_last_resort_prekey_id,
    )


def _view(bundle: Bundle) -> BundleView:
    signed, one_time, pq = bundle.signed_prekey, bundle.one_time_prekey, bundle.pq_prekey
    return BundleView(
        device_id=bundle.device_id,
        registration_id=bundle.registration_id,
        identity_key=bundle.identity_key,
        signing_key=bundle.signing_key,
        signed_prekey=SignedPrekeyView(
            key_id=signed.key_id, public_key=signed.public_key, signature=signed.signature
        ),
        one_time_prekey=OneTimePrekeyView(key_id=one_time.key_id, public_key=one_time.public_key)
        if one_time
        else None,
        pq_prekey=PqPrekeyView(key_id=pq.key_id, public_key=pq.public_key, signature=pq.signature or b"")
        if pq
        else None,
    )
