"""The REST door: people's own profile, other people's, contacts, blocks and quotas."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict, Field

from whispr.kit.http import (
    Body,
    CallerDep,
    CursorParam,
    InvalidCursor,
    LimitParam,
    Page,
    Problem,
    decode_cursor,
    encode_cursor,
    new_router,
)
from whispr.services.user.models import (
    Audience,
    Position,
    Profile,
    PublicProfile,
    Quotas,
    Relation,
    RelationPage,
    Senders,
)
from whispr.services.user.service import UserService


class PrivacyView(BaseModel):
    """What others may see and do. "contacts" means the people whom the owner has added."""

    last_seen: Audience
    online: Audience
    profile: Audience = Field(description="Display name and picture.")
    read_receipts: bool = Field(description="Whether others are told what was read.")
    messages: Senders = Field(description="Who may write.")
    groups: Senders = Field(description="Who may add to groups.")


class PrivacyChange(BaseModel):
    """Some or all of the privacy choices; what is left out stays.

    Unlike elsewhere an unknown name is refused: a mistyped choice that seems accepted would leave its author exposed.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    last_seen: Audience | None = None
    online: Audience | None = None
    profile: Audience | None = None
    read_receipts: bool | None = None
    messages: Senders | None = None
    groups: Senders | None = None


class ProfileView(BaseModel):
    """The caller's own profile."""

    id: UUID
    user_id: UUID = Field(description="The same as `id`, under the name other objects refer to people by.")
    username: str
    display_name: str | None
    avatar_media_id: UUID | None
    locale: str = Field(description="BCP 47 language tag.")
    time_zone: str = Field(description="IANA time zone.")
    privacy: PrivacyView
    created_at: datetime
    updated_at: datetime


class ProfileChange(Body):
    """What to change; what is left out stays, null clears (locale and time zone return to the default)."""

    display_name: str | None = Field(None, max_length=1024, description="1 to 64 characters on one line.")
    avatar_media_id: UUID | None = None
    locale: str | None = Field(None, max_length=256, description='BCP 47 language tag, e.g. "pt-BR".')
    time_zone: str | None = Field(None, max_length=256, description='IANA time zone, e.g. "Europe/Paris".')
    privacy: PrivacyChange | None = None


class PublicProfileView(BaseModel):
    """What the caller is shown of a person; what the person hides is null."""

    id: UUID
    user_id: UUID = Field(description="The same as `id`, under the name other objects refer to people by.")
    username: str
    display_name: str | None
    avatar_media_id: UUID | None
    is_contact: bool = Field(description="Whether the caller has added this person.")
    is_blocked: bool = Field(description="Whether the caller has blocked this person.")


class ContactView(PublicProfileView):
    """A contact."""

    added_at: datetime


class BlockView(PublicProfileView):
    """A person the caller keeps away."""

    blocked_at: datetime


class QuotaView(BaseModel):
    """A limit with its use."""

    limit: int
    used: int


class StorageQuotaView(QuotaView):
    """Bytes; `reserved` is what uploads under way have set aside."""

    reserved: int


class QuotasView(BaseModel):
    """All limits of the caller."""

    storage_bytes: StorageQuotaView
    contacts: QuotaView
    blocks: QuotaView


class ExportView(BaseModel):
    """Everything the user service keeps of the caller."""

    profile: ProfileView
    contacts: list[ContactView]
    blocks: list[BlockView]
    quotas: QuotasView
    exported_at: datetime


_UNAUTHENTICATED: dict[int | str, dict[str, Any]] = {401: {"model": Problem}}
_NOT_FOUND: dict[int | str, dict[str, Any]] = {404: {"model": Problem}}
_CONFLICT: dict[int | str, dict[str, Any]] = {409: {"model": Problem}}


def build_router(service: UserService) -> APIRouter:
    """`/api/v1/users`."""
    router = new_router(prefix="/api/v1/users", tags=["users"], responses=_UNAUTHENTICATED)
    _add_own(router, service)
    _add_contacts(router, service)
    _add_blocks(router, service)
    # Last: "/{user_id}" would otherwise take "/me" for an id.
    _add_others(router, service)
    return router


def _add_own(router: APIRouter, service: UserService) -> None:
    @router.get("/me", responses=_NOT_FOUND)
    async def get_own_profile(caller: CallerDep) -> ProfileView:
        """The caller's own profile."""
        return _own(await service.profiles.own(caller.user_id))

    @router.patch("/me", responses=_NOT_FOUND)
    async def change_own_profile(caller: CallerDep, body: ProfileChange) -> ProfileView:
        """Change the caller's own profile."""
        changes = {name: getattr(body, name) for name in body.model_fields_set if name != "privacy"}
        if body.privacy is not None:
            changes["privacy"] = body.privacy.model_dump(exclude_none=True)
        return _own(await service.profiles.update(caller.user_id, changes))

    @router.get("/me/quotas", responses=_NOT_FOUND)
    async def get_own_quotas(caller: CallerDep) -> QuotasView:
        """The caller's limits and what is used of them."""
        return _quotas(await service.storage.quotas(caller.user_id))

    @router.get("/me/export", responses=_NOT_FOUND)
    async def export_own_data(caller: CallerDep) -> ExportView:
        """Everything kept of the caller here, lists in full; five times a day."""
        data = await service.export.of(caller.user_id)
        return ExportView(
            profile=_own(data.profile),
            contacts=[_contact(item) for item in data.contacts],
            blocks=[_block(item) for item in data.blocks],
            quotas=_quotas(data.quotas),
            exported_at=data.exported_at,
        )


def _add_contacts(router: APIRouter, service: UserService) -> None:
    @router.get("/me/contacts")
    async def list_contacts(
        caller: CallerDep, limit: LimitParam = 50, cursor: CursorParam = None
    ) -> Page[ContactView]:
        """The caller's contacts in the order of adding."""
        page = await service.relations.contacts(caller.user_id, _after(cursor), limit)
        return Page(items=[_contact(item) for item in page.items], next_cursor=_cursor(page))

    @router.put("/me/contacts/{user_id}", status_code=204, responses=_NOT_FOUND | _CONFLICT)
    async def add_contact(caller: CallerDep, user_id: UUID) -> None:
        """Add a person to the caller's contacts. Adding them again changes nothing."""
        await service.relations.add_contact(caller.user_id, user_id)

    @router.delete("/me/contacts/{user_id}", status_code=204)
    async def remove_contact(caller: CallerDep, user_id: UUID) -> None:
        """Remove a person from the caller's contacts, if they are in them."""
        await service.relations.remove_contact(caller.user_id, user_id)


def _add_blocks(router: APIRouter, service: UserService) -> None:
    @router.get("/me/blocks")
    async def list_blocks(
        caller: CallerDep, limit: LimitParam = 50, cursor: CursorParam = None
    ) -> Page[BlockView]:
        """The people the caller keeps away, in the order of blocking."""
        page = await service.relations.blocks(caller.user_id, _after(cursor), limit)
        return Page(items=[_block(item) for item in page.items], next_cursor=_cursor(page))

    @router.put("/me/blocks/{user_id}", status_code=204, responses=_NOT_FOUND | _CONFLICT)
    async def block_user(caller: CallerDep, user_id: UUID) -> None:
        """Keep a person away. They are not told, and they leave the caller's contacts."""
        await service.relations.block(caller.user_id, user_id)

    @router.delete("/me/blocks/{user_id}", status_code=204)
    async def unblock_user(caller: CallerDep, user_id: UUID) -> None:
        """Lift a block, if there is one."""
        await service.relations.unblock(caller.user_id, user_id)


def _add_others(router: APIRouter, service: UserService) -> None:
    @router.get("")
    async def search_users(
        caller: CallerDep, username: Annotated[str, Query(max_length=256, description="Exact username.")]
    ) -> Page[PublicProfileView]:
        """The person of exactly that username, or nobody."""
        found = await service.profiles.search(caller.user_id, username)
        return Page(items=[_public(profile) for profile in found])

    @router.get("/{user_id}", responses=_NOT_FOUND)
    async def get_user(caller: CallerDep, user_id: UUID) -> PublicProfileView:
        """What the caller is shown of a person."""
        return _public(await service.profiles.view(caller.user_id, user_id))


def _after(cursor: str | None) -> Position | None:
    if cursor is None:
        return None
    position = decode_cursor(cursor, Position)
    try:
        position.created_at.astimezone(UTC)
    except OverflowError as error:
        # The first or last hours of the calendar, in a zone that puts them outside it: nobody was handed that.
        raise InvalidCursor from error
    return position


def _cursor(page: RelationPage) -> str | None:
    return encode_cursor(page.next) if page.next is not None else None


def _own(profile: Profile) -> ProfileView:
    return ProfileView(
        id=profile.user_id,
        user_id=profile.user_id,
        username=profile.username,
        display_name=profile.display_name,
        avatar_media_id=profile.avatar_media_id,
        locale=profile.locale,
        time_zone=profile.time_zone,
        privacy=PrivacyView(**profile.privacy.as_dict()),
        created_at=profile.created_at,
        updated_at=profile.updated_at,
    )


def _shown(profile: PublicProfile) -> dict[str, Any]:
    return {
        "id": profile.user_id,
        "user_id": profile.user_id,
        "username": profile.username,
        "display_name": profile.display_name,
        "avatar_media_id": profile.avatar_media_id,
        "is_contact": profile.is_contact,
        "is_blocked": profile.is_blocked,
    }


def _public(profile: PublicProfile) -> PublicProfileView:
    return PublicProfileView(**_shown(profile))


def _contact(relation: Relation) -> ContactView:
    return ContactView(**_shown(relation.user), added_at=relation.created_at)


def _block(relation: Relation) -> BlockView:
    return BlockView(**_shown(relation.user), blocked_at=relation.created_at)


def _quotas(quotas: Quotas) -> QuotasView:
    storage = quotas.storage
    return QuotasView(
        storage_bytes=StorageQuotaView(limit=storage.limit, used=storage.used, reserved=storage.reserved),
        contacts=QuotaView(limit=quotas.contacts_limit, used=quotas.contacts_used),
        blocks=QuotaView(limit=quotas.blocks_limit, used=quotas.blocks_used),
    )
