"""An authenticator app, written from RFC 6238 and not from the code under test."""

from __future__ import annotations

import base64
import hashlib
import hmac
import struct
from dataclasses import dataclass
from typing import Any

from tests.services.auth.house import AuthHouse
from tests.stack import PASSWORD, Person

STEP = 30


@dataclass
class Authenticator:
    """What a person scanned."""

    secret: str

    def code(self, at: float) -> str:
        counter = struct.pack(">Q", int(at) // STEP)
        digest = hmac.new(base64.b32decode(self.secret), counter, hashlib.sha1).digest()
        offset = digest[-1] & 15
        number = struct.unpack(">I", digest[offset : offset + 4])[0] & 0x7FFFFFFF
        return f"{number % 1_000_000:06}"

    def wrong(self, at: float) -> str:
        """A code that is good at no time near `at`."""
        near = {self.code(at + STEP * n) for n in range(-3, 4)}
        return next(code for code in (f"{n:06}" for n in range(100)) if code not in near)


async def set_up(house: AuthHouse, person: Person) -> tuple[Authenticator, list[str]]:
    """Turn the second factor on; the clock moves on, so that the next code is a new one."""
    begun = await house.call("POST", "/auth/totp", person, {"password": PASSWORD})
    assert begun.status_code == 201, begun.text
    app = Authenticator(begun.json()["secret"])
    code = app.code(house.clock.time())
    confirmed = await house.call("POST", "/auth/totp/confirm", person, {"code": code})
    assert confirmed.status_code == 200, confirmed.text
    house.clock.advance(STEP)
    return app, list(confirmed.json()["recovery_codes"])


async def spend(house: AuthHouse, app: Authenticator) -> dict[str, Any]:
    """A code that was not used before."""
    house.clock.advance(STEP)
    return {"totp_code": app.code(house.clock.time())}
