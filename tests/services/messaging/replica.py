"""A device's own copy of a conversation: the rules by which applying events leads to what a fresh fetch shows."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

ERASED = {
    "content": {},
    "content_sha256": "",
    "signature": "",
    "media_ids": [],
    "reactions": [],
    "is_deleted": True,
}


class Replica:
    """`cursor`: the last event applied. `misses_members`: events with changes of members may be purged; fetch them."""

    def __init__(self, user_id: str, cursor: int = 0) -> None:
        self.user_id = user_id
        self.cursor = cursor
        self.misses_members = False
        self.messages: dict[str, dict[str, Any]] = {}
        self.pins: dict[str, tuple[str, str]] = {}
        self.members: dict[str, tuple[str, str]] = {}

    def copy(self) -> Replica:
        return deepcopy(self)

    def apply(self, event: dict[str, Any]) -> None:
        """Take one entry of the log."""
        if event["seq"] > self.cursor + 1:
            # What lies between is purged, or from before this person came (again).
            self._forget_until(event["seq"] - 1)
            self.misses_members = True
        self.cursor = event["seq"]
        handle = getattr(self, f"_{event['event']}", None)
        assert handle is not None, f"an event that no device knows: {event}"
        handle(event["payload"])

    def state(self) -> dict[str, Any]:
        """To be compared; the order of reactions is not part of it."""
        messages = {
            message_id: {
                **message,
                "reactions": {item["reaction"]: frozenset(item["user_ids"]) for item in message["reactions"]},
            }
            for message_id, message in self.messages.items()
        }
        return {"messages": messages, "pins": self.pins, "members": self.members}

    def _forget_until(self, seq: int) -> None:
        for message_id in [key for key, message in self.messages.items() if message["seq"] <= seq]:
            del self.messages[message_id]
            self.pins.pop(message_id, None)

    def _standing(self, message_id: str) -> dict[str, Any] | None:
        message = self.messages.get(message_id)
        return None if message is None or message["is_deleted"] else message

    def _new_message(self, message: dict[str, Any]) -> None:
        self.messages[message["id"]] = deepcopy(message)

    def _message_edited(self, payload: dict[str, Any]) -> None:
        self._new_message(payload["message"])

    def _message_deleted(self, payload: dict[str, Any]) -> None:
        message = self.messages.get(payload["message_id"])
        if message is not None:
            message.update(deepcopy(ERASED))
            message.pop("edited_device_id", None)
            self.pins.pop(payload["message_id"], None)

    def _reaction_added(self, payload: dict[str, Any]) -> None:
        message = self._standing(payload["message_id"])
        if message is None:
            return
        for item in message["reactions"]:
            if item["reaction"] == payload["reaction"]:
                if payload["user_id"] not in item["user_ids"]:
                    item["user_ids"].append(payload["user_id"])
                return
        message["reactions"].append({"reaction": payload["reaction"], "user_ids": [payload["user_id"]]})

    def _reaction_removed(self, payload: dict[str, Any]) -> None:
        message = self._standing(payload["message_id"])
        if message is None:
            return
        for item in message["reactions"]:
            if item["reaction"] == payload["reaction"] and payload["user_id"] in item["user_ids"]:
                item["user_ids"].remove(payload["user_id"])
        message["reactions"] = [item for item in message["reactions"] if item["user_ids"]]

    def _message_pinned(self, payload: dict[str, Any]) -> None:
        if self._standing(payload["message_id"]) is not None:
            self.pins[payload["message_id"]] = (payload["user_id"], payload["pinned_at"])

    def _message_unpinned(self, payload: dict[str, Any]) -> None:
        self.pins.pop(payload["message_id"], None)

    def _history_purged(self, payload: dict[str, Any]) -> None:
        self._forget_until(payload["until_seq"])

    def _member_added(self, payload: dict[str, Any]) -> None:
        if payload["user_id"] == self.user_id:
            self._forget_until(payload["seq"])
        self.members[payload["user_id"]] = (payload["role"], payload["joined_at"])

    def _member_updated(self, payload: dict[str, Any]) -> None:
        if payload["user_id"] in self.members:
            _, joined_at = self.members[payload["user_id"]]
            self.members[payload["user_id"]] = (payload["role"], joined_at)

    def _member_removed(self, payload: dict[str, Any]) -> None:
        self.members.pop(payload["user_id"], None)

    def _conversation_updated(self, payload: dict[str, Any]) -> None:
        """Whole in each event; nothing to put together."""
