"""The REST API, typed. One `RestClient` is one login (or none yet)."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Generic, TypeVar
from urllib.parse import quote
from uuid import UUID

import msgspec

from whispr.client.failures import ApiError
from whispr.client.http import HttpClient, decode
from whispr.client.models import (
    Claim,
    Conversation,
    Device,
    DeviceKeys,
    EventsPage,
    Link,
    LinkStatus,
    Message,
    MessagesPage,
    Pin,
    Profile,
    Report,
    ScheduledMessage,
    SecondFactor,
    Session,
    UserKeys,
)

T = TypeVar("T")


class RestClient(HttpClient):
    """Every method raises ApiError, Unreachable or, where a login is needed, SessionEnded."""

    # Accounts and devices

    async def register(
        self, username: str, password: str, device: Mapping[str, Any], *, idempotency_key: str | None = None
    ) -> Session:
        body = {"username": username, "password": password, "device": device}
        return await self._enter("/api/v1/auth/register", body, idempotency_key)

    async def login(
        self,
        username: str,
        password: str,
        *,
        device: Mapping[str, Any] | None = None,
        device_id: UUID | None = None,
        second_factor: SecondFactor | None = None,
        idempotency_key: str | None = None,
    ) -> Session:
        """With `device` on a new device, with `device_id` on one the account has.

        An account with a second factor answers `totp_required` without one.
        """
        body: dict[str, Any] = {"username": username, "password": password, **_fields(second_factor)}
        if device is not None:
            body["device"] = device
        if device_id is not None:
            body["device_id"] = str(device_id)
        return await self._enter("/api/v1/auth/login", body, idempotency_key)

    async def logout(self) -> None:
        await self.request("POST", "/api/v1/auth/logout")
        self.ended()

    async def devices(self) -> list[Device]:
        """One's own devices."""
        answer = msgspec.json.decode((await self.request("GET", "/api/v1/devices")).content)
        items = answer["items"] if isinstance(answer, dict) else answer
        return [msgspec.convert({"device_id": item.get("id"), **item}, Device) for item in items]

    async def remove_device(self, device_id: UUID) -> None:
        await self.request("DELETE", f"/api/v1/devices/{device_id}")

    # A second factor

    async def totp(self) -> dict[str, Any]:
        """`{enabled, recovery_codes_left}`."""
        return await self.get("/api/v1/auth/totp", dict[str, Any])

    async def begin_totp(self, password: str) -> dict[str, str]:
        """`{secret, otpauth_uri}` for an authenticator. In force after `confirm_totp`."""
        return decode(
            await self.request("POST", "/api/v1/auth/totp", json={"password": password}), dict[str, str]
        )

    async def confirm_totp(self, code: str) -> list[str]:
        """Recovery codes, each good for one login without the authenticator."""
        answer = await self.request("POST", "/api/v1/auth/totp/confirm", json={"code": code})
        return decode(answer, dict[str, list[str]])["recovery_codes"]

    async def remove_totp(self, password: str, code: str) -> None:
        await self.request("DELETE", "/api/v1/auth/totp", json={"password": password, "code": code})

    # Linking a device: the first four by the device there is, the last two by the new one

    async def begin_link(self, password: str, second_factor: SecondFactor | None = None) -> Link:
        body = {"password": password, **_fields(second_factor)}
        return decode(await self.request("POST", "/api/v1/devices/link", json=body), Link)

    async def link_status(self, link_id: UUID) -> LinkStatus:
        return await self.get(f"/api/v1/devices/link/{link_id}", LinkStatus)

    async def confirm_link(self, link_id: UUID, check_code: str) -> None:
        await self.request("POST", f"/api/v1/devices/link/{link_id}/confirm", json={"check_code": check_code})

    async def refuse_link(self, link_id: UUID) -> None:
        await self.request("DELETE", f"/api/v1/devices/link/{link_id}")

    async def claim_link(self, token: str, device: Mapping[str, Any]) -> Claim:
        body = {"token": token, "device": device}
        return decode(
            await self.request("POST", "/api/v1/devices/link/claim", json=body, authorized=False), Claim
        )

    async def finish_link(self, token: str, signature: str) -> Session | None:
        """The new device's login, or None while the other device has not confirmed."""
        body = {"token": token, "signature": signature}
        answer = await self.request("POST", "/api/v1/devices/link/finish", json=body, authorized=False)
        return self.adopt(decode(answer, Session)) if answer.status_code == 201 else None

    # Keys

    async def upload_keys(
        self,
        signed_prekey: Mapping[str, Any],
        one_time_prekeys: Sequence[Mapping[str, Any]],
        pq_last_resort_prekey: Mapping[str, Any] | None = None,
        pq_one_time_prekeys: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """Replace the lasting prekeys and add one-time keys (at most 100 of each kind). The same again changes nothing."""
        body: dict[str, Any] = {"signed_prekey": signed_prekey, "one_time_prekeys": one_time_prekeys}
        if pq_last_resort_prekey is not None:
            body["pq_last_resort_prekey"] = pq_last_resort_prekey
        if pq_one_time_prekeys:
            body["pq_one_time_prekeys"] = pq_one_time_prekeys
        await self.request("PUT", "/api/v1/keys", json=body)

    async def key_counts(self) -> dict[str, Any]:
        return await self.get("/api/v1/keys", dict[str, Any])

    async def user_keys(self, user_id: UUID) -> UserKeys:
        """Bundles of all a person's devices. Takes a one-time key of each."""
        return await self.get(f"/api/v1/keys/{user_id}", UserKeys)

    async def device_keys(self, user_id: UUID, device_id: UUID) -> DeviceKeys | None:
        """One device's bundle, or None if the person has no such device. Takes a one-time key."""
        try:
            keys = await self.get(f"/api/v1/keys/{user_id}/{device_id}", UserKeys)
        except ApiError as error:
            if error.status == 404:
                return None
            raise
        return next((device for device in keys.devices if device.device_id == device_id), None)

    # People

    async def profile(self, user_id: UUID) -> Profile:
        return await self.get(f"/api/v1/users/{user_id}", Profile)

    async def find_user(self, username: str) -> Profile | None:
        """By exact name."""
        answer = await self.request("GET", "/api/v1/users", params={"username": username})
        found = msgspec.json.decode(answer.content)
        items = found.get("items", [found])
        return msgspec.convert(items[0], Profile, strict=False) if items else None

    async def update_profile(self, **fields: Any) -> Profile:
        """`display_name`, `avatar_media_id`, `locale`, `time_zone`, `privacy`."""
        return decode(await self.request("PATCH", "/api/v1/users/me", json=fields), Profile)

    async def my_profile(self) -> Profile:
        return await self.get("/api/v1/users/me", Profile)

    async def block(self, user_id: UUID) -> None:
        await self.request("PUT", f"/api/v1/users/me/blocks/{user_id}")

    async def unblock(self, user_id: UUID) -> None:
        await self.request("DELETE", f"/api/v1/users/me/blocks/{user_id}")

    async def add_contact(self, user_id: UUID, **fields: Any) -> None:
        await self.request("PUT", f"/api/v1/users/me/contacts/{user_id}", json=fields)

    # Conversations and messages

    async def create_conversation(
        self, kind: str, member_ids: Sequence[UUID], metadata: Mapping[str, Any] | None = None
    ) -> Conversation:
        body: dict[str, Any] = {"type": kind, "member_ids": [str(member) for member in member_ids]}
        if metadata is not None:
            body["metadata"] = metadata
        return decode(await self.request("POST", "/api/v1/conversations", json=body), Conversation)

    async def conversation(self, conversation_id: UUID) -> Conversation:
        return await self.get(f"/api/v1/conversations/{conversation_id}", Conversation)

    def conversations(self) -> AsyncIterator[Conversation]:
        """All of one's conversations, page by page."""
        return self._items("/api/v1/conversations", _Page[Conversation])

    async def add_members(self, conversation_id: UUID, user_ids: Sequence[UUID]) -> None:
        body = {"member_ids": [str(user_id) for user_id in user_ids]}
        await self.request("POST", f"/api/v1/conversations/{conversation_id}/members", json=body)

    async def remove_member(self, conversation_id: UUID, user_id: UUID) -> None:
        await self.request("DELETE", f"/api/v1/conversations/{conversation_id}/members/{user_id}")

    async def leave(self, conversation_id: UUID) -> None:
        await self.request("DELETE", f"/api/v1/conversations/{conversation_id}")

    async def send_message(self, message: Mapping[str, Any]) -> Message:
        """`POST /messages`; idempotent by its `client_id`."""
        return decode(await self.request("POST", "/api/v1/messages", json=message), Message)

    async def messages(
        self,
        conversation_id: UUID,
        *,
        after_seq: int | None = None,
        before_seq: int | None = None,
        limit: int = 50,
    ) -> MessagesPage:
        params = {"limit": limit, "after_seq": after_seq, "before_seq": before_seq}
        return await self.get(f"/api/v1/conversations/{conversation_id}/messages", MessagesPage, params)

    async def events(self, conversation_id: UUID, *, after_seq: int = 0, limit: int = 100) -> EventsPage:
        params = {"after_seq": after_seq, "limit": limit}
        return await self.get(f"/api/v1/conversations/{conversation_id}/events", EventsPage, params)

    # What is done to messages

    async def edit_message(self, message_id: UUID, content: Mapping[str, Any], signature: str) -> None:
        body = {"content": content, "signature": signature}
        await self.request("PATCH", f"/api/v1/messages/{message_id}", json=body)

    async def delete_message(self, message_id: UUID) -> None:
        await self.request("DELETE", f"/api/v1/messages/{message_id}")

    async def add_reaction(self, message_id: UUID, reaction: str) -> None:
        await self.request("PUT", f"/api/v1/messages/{message_id}/reactions/{quote(reaction, safe='')}")

    async def remove_reaction(self, message_id: UUID, reaction: str) -> None:
        await self.request("DELETE", f"/api/v1/messages/{message_id}/reactions/{quote(reaction, safe='')}")

    async def pin(self, conversation_id: UUID, message_id: UUID) -> None:
        await self.request("PUT", f"/api/v1/conversations/{conversation_id}/pins/{message_id}")

    async def unpin(self, conversation_id: UUID, message_id: UUID) -> None:
        await self.request("DELETE", f"/api/v1/conversations/{conversation_id}/pins/{message_id}")

    async def pins(self, conversation_id: UUID) -> list[Pin]:
        return [pin async for pin in self._items(f"/api/v1/conversations/{conversation_id}/pins", _Page[Pin])]

    async def report(self, message_id: UUID, report: Mapping[str, Any]) -> Report:
        return decode(
            await self.request("POST", f"/api/v1/messages/{message_id}/report", json=report), Report
        )

    # Scheduled messages

    async def schedule_message(self, message: Mapping[str, Any]) -> UUID:
        """`POST /messages` with `send_at`; the same again answers the same id."""
        return decode(await self.request("POST", "/api/v1/messages", json=message), _Scheduled).scheduled_id

    def scheduled_messages(self, status: str | None = None) -> AsyncIterator[ScheduledMessage]:
        """One's own, page by page."""
        return self._items("/api/v1/scheduled-messages", _Page[ScheduledMessage], status=status)

    async def change_scheduled(self, scheduled_id: UUID, change: Mapping[str, Any]) -> None:
        await self.request("PATCH", f"/api/v1/scheduled-messages/{scheduled_id}", json=change)

    async def cancel_scheduled(self, scheduled_id: UUID) -> None:
        await self.request("DELETE", f"/api/v1/scheduled-messages/{scheduled_id}")

    async def _items(self, path: str, page_type: type[_Page[T]], **params: str | None) -> AsyncIterator[T]:
        """Everything of a list, page by page."""
        cursor: str | None = None
        while True:
            answer = await self.request("GET", path, params={"limit": "100", "cursor": cursor, **params})
            page = decode(answer, page_type)
            for item in page.items:
                yield item
            cursor = page.next_cursor
            if cursor is None:
                return

    async def _enter(self, path: str, body: Mapping[str, Any], idempotency_key: str | None) -> Session:
        answer = await self.request(
            "POST", path, json=body, authorized=False, idempotency_key=idempotency_key
        )
        return self.adopt(decode(answer, Session))


class _Page(msgspec.Struct, Generic[T], frozen=True):
    items: list[T]
    next_cursor: str | None = None


class _Scheduled(msgspec.Struct, frozen=True):
    scheduled_id: UUID


def _fields(second_factor: SecondFactor | None) -> dict[str, str]:
    if second_factor is None:
        return {}
    said = {"totp_code": second_factor.totp_code, "recovery_code": second_factor.recovery_code}
    return {name: code for name, code in said.items() if code is not None}
