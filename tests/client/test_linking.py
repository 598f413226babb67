"""Making a device one's own with another device's help, and a login with a second factor, over the real services."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import struct
from collections.abc import AsyncIterator
from uuid import uuid4

import httpx
import msgspec
import pytest

from tests.client.test_client import Device, People, name, until
from tests.stack import PASSWORD, Stack
from whispr.client import ApiError, SecondFactor, Store, WrongCheckCode
from whispr.client.crypto.identity import DeviceIdentity
from whispr.client.linking import check_code
from whispr.client.models import Link


@pytest.fixture
async def people(stack: Stack) -> AsyncIterator[People]:
    made = People(stack)
    yield made
    for device in made.devices:
        await device.client.stop()


def newcomer(people: People, store: Store | None = None) -> Device:
    device = Device(people.stack, store)
    people.devices.append(device)
    return device


async def test_a_linked_device_has_its_own_keys_and_reads_and_writes(people: People) -> None:
    ada, ben = await people.new(), await people.new()
    conversation = await ada.client.direct(ben.client.user_id)
    await ada.client.send_text(conversation, "before")
    link = await ada.client.linking.begin(PASSWORD)
    assert (await ada.client.linking.status(link)).status == "waiting"
    new = newcomer(people)
    claim = await new.client.claim_link(link.token)
    assert (await new.client.claim_link(link.token)) == claim
    await until(lambda: any(n.name == "device_link_claimed" for n in ada.notices))
    status = await ada.client.linking.status(link)
    assert status.device is not None
    assert status.device.signing_key == new.client.account.identity.signing_key
    await ada.client.linking.confirm(link, claim.check_code)
    await new.client.finish_link(link.token)
    await new.client.start()
    assert new.client.user_id == ada.client.user_id
    assert new.client.device_id != ada.client.device_id
    await until(lambda: conversation in new.client.conversations.ids())
    await ben.client.send_text(conversation, "hello, both of you")
    await new.hears("hello, both of you")
    await ada.hears("before", "hello, both of you")
    await new.client.send_text(conversation, "from the new one")
    await ben.hears("before", "hello, both of you", "from the new one")
    assert ben.client.engine.sessions.post_quantum(new.client.device_id)


async def test_a_wrong_code_lets_nothing_in_and_a_refusal_ends_the_link(people: People) -> None:
    ada, new = await people.new(), newcomer(people)
    link = await ada.client.linking.begin(PASSWORD)
    with pytest.raises(WrongCheckCode):
        await ada.client.linking.confirm(link, "000000")  # nobody is there yet
    claim = await new.client.claim_link(link.token)
    with pytest.raises(WrongCheckCode):
        await ada.client.linking.confirm(link, f"{(int(claim.check_code) + 1) % 1_000_000:06}")
    assert (await ada.client.linking.status(link)).status == "claimed"
    await ada.client.linking.refuse(link)
    with pytest.raises(ApiError) as refused:
        await new.client.finish_link(link.token)
    assert refused.value.code == "link_refused"
    with pytest.raises(ApiError) as wrong:
        await ada.client.linking.begin("not the password")
    assert wrong.value.status == 403


async def test_a_server_that_swaps_keys_is_found_out(people: People) -> None:
    """It answers the claim with its own keys' code, or shows the other device its own keys."""
    ada, new = await people.new(), newcomer(people)
    link = await ada.client.linking.begin(PASSWORD)
    mallory = DeviceIdentity.generate()
    mallorys = check_code(link.token, link.link_id, mallory.identity_key, mallory.signing_key)
    forged = {"link_id": str(link.link_id), "check_code": mallorys, "expires_in": 60}
    gateway, handle = new.gateway, new.gateway.handle_async_request

    async def lying(request: httpx.Request) -> httpx.Response:
        if request.url.path.endswith("/claim"):
            await handle(request)
            return httpx.Response(202, json=forged)
        return await handle(request)

    gateway.handle_async_request = lying  # type: ignore[method-assign]
    with pytest.raises(WrongCheckCode):
        await new.client.claim_link(link.token)
    gateway.handle_async_request = handle  # type: ignore[method-assign]
    claim = await new.client.claim_link(link.token)
    elsewhere = msgspec.structs.replace(link, token="A" * 43)
    with pytest.raises(WrongCheckCode):
        await ada.client.linking.status(elsewhere)
    with pytest.raises(WrongCheckCode):
        await ada.client.linking.confirm(link, mallorys)
    assert claim.check_code == check_code(
        link.token,
        link.link_id,
        new.client.account.identity.identity_key,
        new.client.account.identity.signing_key,
    )


async def test_a_link_is_for_a_minute_and_is_used_once(people: People) -> None:
    ada, new, late = await people.new(), newcomer(people), newcomer(people)
    link = await ada.client.linking.begin(PASSWORD)
    await new.client.claim_link(link.token)
    with pytest.raises(ApiError) as used:
        await late.client.claim_link(link.token)
    assert used.value.code == "link_used"
    people.stack.clock.advance(301)
    with pytest.raises(ApiError) as expired:
        await new.client.finish_link(link.token)
    assert expired.value.code in ("link_expired", "link_not_found")
    with pytest.raises(ApiError):
        await newcomer(people).client.claim_link(Link(uuid4(), "B" * 43, 60).token)


async def test_a_device_that_stops_while_linking_goes_on(people: People) -> None:
    ada, store = await people.new(), Store()
    link = await ada.client.linking.begin(PASSWORD)
    first = newcomer(people, store)
    claim = await first.client.claim_link(link.token)
    waiting = asyncio.create_task(first.client.finish_link(link.token))
    await asyncio.sleep(0.1)
    waiting.cancel()
    again = newcomer(people, store)
    assert (await again.client.claim_link(link.token)).check_code == claim.check_code
    await ada.client.linking.confirm(link, claim.check_code)
    await again.client.finish_link(link.token)
    assert len(await ada.client.rest.devices()) == 2


# The second factor


def code_of(secret: str, at: float) -> str:
    """RFC 6238."""
    digest = hmac.new(base64.b32decode(secret), struct.pack(">Q", int(at) // 30), hashlib.sha1).digest()
    offset = digest[-1] & 15
    return f"{(struct.unpack('>I', digest[offset : offset + 4])[0] & 0x7FFFFFFF) % 1_000_000:06}"


async def test_a_login_with_a_second_factor(people: People) -> None:
    who = name()
    ada, clock = await people.new(who), people.stack.clock
    secret = (await ada.client.rest.begin_totp(PASSWORD))["secret"]
    recovery = await ada.client.rest.confirm_totp(code_of(secret, clock.time()))
    assert (await ada.client.rest.totp())["enabled"]
    clock.advance(30)
    new = newcomer(people)
    for codes in (None, SecondFactor(totp_code="000000"), SecondFactor(recovery_code="no-such-code")):
        with pytest.raises(ApiError) as refused:
            await new.client.login(who, PASSWORD, codes)
        assert refused.value.code == ("totp_required" if codes is None else "bad_totp_code")
    await new.client.login(who, PASSWORD, SecondFactor(totp_code=code_of(secret, clock.time())))
    other = newcomer(people)
    await other.client.login(who, PASSWORD, SecondFactor(recovery_code=recovery[0]))
    with pytest.raises(ApiError):
        await newcomer(people).client.login(who, PASSWORD, SecondFactor(recovery_code=recovery[0]))
    assert len(await ada.client.rest.devices()) == 3
    with pytest.raises(ApiError) as step_up:
        await ada.client.linking.begin(PASSWORD)
    assert step_up.value.code == "totp_required"
    clock.advance(30)
    await ada.client.linking.begin(PASSWORD, SecondFactor(totp_code=code_of(secret, clock.time())))
    clock.advance(30)
    await ada.client.rest.remove_totp(PASSWORD, code_of(secret, clock.time()))
    await newcomer(people).client.login(who, PASSWORD)
