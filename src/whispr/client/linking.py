"""Making a new device one of an account's, with the help of a device that is.

The device there is shows a token (as a QR code, say), the new one claims it with its public keys, and both show a check
code that is made of token and keys. A server that swaps the keys shows the two people's eyes, or the one person's, two
different codes.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from typing import Final
from uuid import UUID

from whispr.client.account import Account
from whispr.client.encoding import encode_base64
from whispr.client.failures import ClientError
from whispr.client.models import Claim, Link, LinkStatus, SecondFactor, Session
from whispr.client.rest import RestClient

CODE_CONTEXT: Final = b"whispr-device-link-v1"
FINISH_CONTEXT: Final = b"whispr-device-link-finish-v1"
ASK_EVERY: Final = 1.0


class WrongCheckCode(ClientError):
    """The two devices do not speak of the same keys: somebody is in between, or a digit was mistaken."""


def check_code(token: str, link_id: UUID, identity_key: bytes, signing_key: bytes) -> str:
    """Six digits."""
    material = CODE_CONTEXT + link_id.bytes + identity_key + signing_key
    digest = hmac.digest(token.encode(), material, hashlib.sha256)
    return f"{int.from_bytes(digest[:8], 'big') % 1_000_000:06}"


class Linking:
    """Both sides raise ApiError (`link_expired`, `link_refused`, `link_used`, …) and Unreachable."""

    def __init__(self, rest: RestClient, account: Account) -> None:
        self._rest = rest
        self._account = account

    # The device there is

    async def begin(self, password: str, second_factor: SecondFactor | None = None) -> Link:
        """A link that lasts a minute. Its token is for the new device alone."""
        return await self._rest.begin_link(password, second_factor)

    async def status(self, link: Link) -> LinkStatus:
        """What has become of it. Raises WrongCheckCode when the server's code is not that of the keys it names."""
        status = await self._rest.link_status(link.link_id)
        if status.device is not None and status.check_code not in (None, self._code(link, status)):
            raise WrongCheckCode("the server names a code that is not that of the device's keys")
        return status

    async def confirm(self, link: Link, shown: str) -> None:
        """Let the device in. `shown` is the code on its screen. Raises WrongCheckCode, and lets nothing in."""
        status = await self.status(link)
        if status.device is None:
            # Confirmed unseen, the code would prove nothing.
            raise WrongCheckCode("the server shows no device that claims the link")
        if shown != self._code(link, status):
            raise WrongCheckCode("the code on the new device is another")
        await self._rest.confirm_link(link.link_id, shown)

    async def refuse(self, link: Link) -> None:
        await self._rest.refuse_link(link.link_id)

    # The new device

    async def claim(self, token: str, name: str, platform: str) -> Claim:
        """Offer this device's keys; show `check_code`. Repeated after a lost answer, it is the same claim.

        Raises WrongCheckCode, AlreadyRegistered.
        """
        claim = await self._rest.claim_link(token, self._account.offer("link", token, name, platform))
        identity = self._account.identity
        if claim.check_code != check_code(token, claim.link_id, identity.identity_key, identity.signing_key):
            raise WrongCheckCode("the server did not take this device's own keys")
        return claim

    async def finish(self, token: str) -> Session:
        """Wait for the other device to confirm, and log in."""
        signature = encode_base64(self._account.identity.sign(FINISH_CONTEXT + token.encode()))
        while True:
            session = await self._rest.finish_link(token, signature)
            if session is not None:
                self._account.entered()
                return session
            await asyncio.sleep(ASK_EVERY)

    def _code(self, link: Link, status: LinkStatus) -> str:
        device = status.device
        if device is None:
            return ""
        return check_code(link.token, link.link_id, device.identity_key, device.signing_key)
