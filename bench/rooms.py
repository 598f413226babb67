"""Members in conversations, and whether everything that was promised to them is true in the end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sized
from typing import Any
from uuid import UUID

import httpx

from bench.convergence import portrait
from bench.load import gather_bounded, open_conversation
from bench.member import Member
from whispr.client.models import Message

GROUP = 10
SETTLE_SECONDS = 120.0

Room = list[Member]


async def settle(url: str, devices: int) -> list[Room]:
    """Half of the devices in pairs with an envelope each, half in groups with a shared ciphertext, led by the first.

    The leader of a group has somebody to add and to remove.
    """
    members = await gather_bounded([lambda: Member.register(url)] * devices, 4)
    in_groups = devices // 2 // GROUP * GROUP
    rooms = [members[start : start + GROUP] for start in range(0, in_groups, GROUP)]
    rooms += [members[start : start + 2] for start in range(in_groups, devices - 1, 2)]
    async with httpx.AsyncClient(timeout=60) as http:
        for room in rooms:
            people = [member.person for member in room]
            conversation = await open_conversation(http, url, people[0], people[1:])
            for member in room:
                member.conversation = conversation
                if len(room) == 2:
                    member.others = [other.person.device_id for other in room if other is not member]
            room[0].leads = True
            if len(room) > 2:
                guest = await Member.register(url)
                room[0].guest = guest.person
                await guest.rest.close()
    return rooms


async def check(url: str, rooms: list[Room]) -> tuple[list[str], int]:
    """What is not as promised, in words, and how many events the logs hold."""
    wrong: list[str] = []
    stored = 0
    for room in rooms:
        log = await _log(room[0])
        stored += len(log)
        await _all_given(room, len(log))
        wrong += await _check_room(url, room, log)
    return wrong, stored


async def _log(member: Member) -> list[tuple[int, str]]:
    found: list[tuple[int, str]] = []
    while True:
        page = await member.rest.events(
            UUID(member.conversation), after_seq=found[-1][0] if found else 0, limit=100
        )
        found += [(event.seq, event.event) for event in page.items]
        if not page.more:
            return found


async def _messages(member: Member) -> list[Message]:
    found: list[Message] = []
    while True:
        page = await member.rest.messages(
            UUID(member.conversation), after_seq=found[-1].seq if found else 0, limit=100
        )
        found += page.items
        if not page.items:
            return found


async def _all_given(room: Room, size: int) -> None:
    deadline = time.monotonic() + SETTLE_SECONDS
    while any(len(member.given) < size for member in room) and time.monotonic() < deadline:
        await asyncio.sleep(0.2)


async def _check_room(url: str, room: Room, log: list[tuple[int, str]]) -> list[str]:
    wrong: list[str] = []
    if [seq for seq, _ in log] != list(range(1, len(log) + 1)):
        wrong.append("the log has holes or repeats a seq")
    pins = {str(pin.message_id) for pin in await room[0].rest.pins(UUID(room[0].conversation))}
    for member in room:
        name = member.person.device_id[-6:]
        messages = await _messages(member)
        found = [
            *_check_given(member, log),
            *_check_copy(member, messages),
            *_check_wishes(member, messages, pins),
            *member.troubles,
        ]
        wrong += [f"{name}: {line}" for line in found]
    return wrong + await _check_guest(url, room[0])


def _check_given(member: Member, log: list[tuple[int, str]]) -> list[str]:
    if member.given == log:
        return []
    return [f"was given {len(member.given)} of {len(log)} events, or not in order, or others"]


def _check_copy(member: Member, messages: list[Message]) -> list[str]:
    """The state that its events led to is the state that a fresh fetch brings."""
    fresh = {message.id: portrait(message) for message in messages}
    followed = member.copy.messages()
    unlike = [message_id for message_id, state in fresh.items() if followed.get(message_id) != state]
    wrong = [f"{len(unlike)} messages are not as a fresh fetch has them"] if unlike else []
    if followed.keys() != fresh.keys():
        wrong.append(f"has {len(followed)} messages where a fresh fetch has {len(fresh)}")
    return wrong


def _check_wishes(member: Member, messages: list[Message], pins: set[str]) -> list[str]:
    wishes, me = member.wishes, member.person.user_id
    by_client_id = {str(message.client_id): message for message in messages}
    by_id: dict[str, Any] = {str(message.id): message for message in messages}
    lost = [
        client_id
        for client_id, ack in wishes.sent.items()
        if client_id not in by_client_id or by_client_id[client_id].seq != ack.seq
    ]
    unsent = [client_id for client_id in wishes.scheduled if client_id not in by_client_id]
    unchanged = [
        message_id
        for message_id, signature in wishes.signatures.items()
        if message_id not in wishes.uncertain
        and message_id in by_id
        and by_id[message_id].signature != signature
    ]
    unreacted = [
        key
        for key, wanted in wishes.reactions.items()
        if f"{key[0]} {key[1]}" not in wishes.uncertain
        and not by_id[key[0]].is_deleted
        and wanted
        != any(item.reaction == key[1] and UUID(me) in item.user_ids for item in by_id[key[0]].reactions)
    ]
    unpinned = [
        message_id
        for message_id, wanted in wishes.pins.items()
        if f"{message_id} pin" not in wishes.uncertain
        and not by_id[message_id].is_deleted
        and wanted != (message_id in pins)
    ]
    found: dict[str, Sized] = {
        "acknowledged messages are missing or have another seq": lost,
        "scheduled messages were not sent": unsent,
        "acknowledged edits or deletions are not in force": unchanged,
        "acknowledged reactions are not in force": unreacted,
        "acknowledged pins are not in force": unpinned,
    }
    wrong = [f"{len(things)} {what}" for what, things in found.items() if things]
    if len(by_client_id) != len(messages):
        wrong.append("a message is stored twice")
    return wrong


async def _check_guest(url: str, leader: Member) -> list[str]:
    """The guest is in or out as was acknowledged, and reads nothing when out."""
    if leader.guest is None or "guest" in leader.wishes.uncertain:
        return []
    conversation = await leader.rest.conversation(UUID(leader.conversation))
    is_in = any(str(member.user_id) == leader.guest.user_id for member in conversation.members or [])
    wrong = [] if is_in == leader.wishes.guest else ["the guest is not in or out as was acknowledged"]
    async with httpx.AsyncClient() as http:
        answer = await http.get(
            f"{url}/api/v1/conversations/{leader.conversation}/messages",
            headers={"Authorization": f"Bearer {leader.guest.token}"},
        )
    # Its token may have run out in a long run, which refuses as well.
    if not leader.wishes.guest and answer.status_code == 200:
        wrong.append("the guest reads on after its removal")
    return wrong
