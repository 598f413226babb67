"""Joining with a device: linked from one that is there, and with a second factor."""

from __future__ import annotations

import base64
import hashlib
import hmac
import struct
from uuid import UUID

from whispr.client.demo.stage import PASSWORD, Stage
from whispr.client.failures import ApiError
from whispr.client.linking import WrongCheckCode
from whispr.client.models import SecondFactor

STEP = 30


async def linking(stage: Stage, group: UUID) -> None:
    stage.step("Cleo links a laptop", "Her phone shows a token, both show a check code made of the new keys.")
    phone = stage.of("Cleo's phone").client
    laptop = await stage.unpack("Cleo", "laptop")
    link = await phone.linking.begin(PASSWORD)
    claim = await laptop.client.claim_link(link.token)
    status = await phone.linking.status(link)
    stage.console.print(
        f"   Phone: [bold]{status.check_code}[/bold]   Laptop: [bold]{claim.check_code}[/bold]"
    )
    stage.check("both show the same check code", status.check_code == claim.check_code)
    wrong = f"{(int(claim.check_code) + 1) % 1_000_000:06}"
    try:
        await phone.linking.confirm(link, wrong)
    except WrongCheckCode:
        refused = True
    else:
        refused = False
    stage.check("another code lets nothing in", refused)
    await phone.linking.confirm(link, claim.check_code)
    await laptop.client.finish_link(link.token)
    await stage.switch_on(laptop)
    stage.check("the laptop is Cleo's", laptop.client.user_id == phone.user_id)
    await stage.until(lambda: group in laptop.client.conversations.ids())
    await stage.say("Cleo's laptop", group, "Hello from my laptop.", stage.everyone_in_group())


async def second_factor(stage: Stage, group: UUID) -> None:
    stage.step("Dan's second factor", "A password alone no longer makes a device his.")
    dan = stage.of("Dan's phone").client
    secret = (await dan.rest.begin_totp(PASSWORD))["secret"]
    # The one before the present one: each serves once, and the login is to have the present one.
    recovery = await dan.rest.confirm_totp(_code(secret, stage.now() - STEP))
    stage.check("he has ten recovery codes", len(set(recovery)) == 10)
    laptop = await stage.unpack("Dan", "laptop")
    answers = []
    for codes in (None, SecondFactor(totp_code=_wrong(secret, stage.now()))):
        try:
            await laptop.client.login(stage.name("Dan"), PASSWORD, codes)
        except ApiError as error:
            answers.append(error.code)
    stage.console.print(
        f"   Without a code: [bold]{answers[0]}[/bold], with a wrong one: [bold]{answers[1]}[/bold]."
    )
    stage.check("without the code nobody comes in", answers == ["totp_required", "bad_totp_code"])
    await laptop.client.login(stage.name("Dan"), PASSWORD, SecondFactor(totp_code=_code(secret, stage.now())))
    await stage.switch_on(laptop)
    await stage.until(lambda: group in laptop.client.conversations.ids())
    await stage.say("Dan's laptop", group, "It took two keys to get in here.", stage.everyone_in_group())
    tablet = await stage.unpack("Dan", "tablet")
    await tablet.client.login(stage.name("Dan"), PASSWORD, SecondFactor(recovery_code=recovery[0]))
    await stage.switch_on(tablet)
    stage.check("a recovery code does, once", (await dan.rest.totp())["recovery_codes_left"] == 9)


def _code(secret: str, at: float) -> str:
    """What an authenticator shows (RFC 6238)."""
    digest = hmac.digest(base64.b32decode(secret), struct.pack(">Q", int(at) // STEP), hashlib.sha1)
    offset = digest[-1] & 15
    return f"{(struct.unpack('>I', digest[offset : offset + 4])[0] & 0x7FFFFFFF) % 1_000_000:06}"


def _wrong(secret: str, at: float) -> str:
    near = {_code(secret, at + STEP * n) for n in range(-2, 3)}
    return next(code for code in (f"{n:06}" for n in range(10)) if code not in near)
