"""What the tests of instances share: stand-in services, and a place to run from."""

import asyncio
import base64
import json
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

STANDIN = Path(__file__).with_name("standin.py")
ISSUER = "whispr"


def b64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


class Signer:
    """Makes access tokens as auth does."""

    def __init__(self) -> None:
        self._key = Ed25519PrivateKey.generate()

    @property
    def jwks(self) -> str:
        public = self._key.public_key().public_bytes_raw()
        key = {
            "kty": "OKP",
            "crv": "Ed25519",
            "alg": "EdDSA",
            "use": "sig",
            "kid": "one",
            "x": b64url(public),
        }
        return json.dumps({"keys": [key]})

    def token(self, subject: str = "u1", **claims: Any) -> str:
        now = int(time.time())
        body = {
            "iss": ISSUER,
            "aud": "whispr",
            "sub": subject,
            "iat": now,
            "nbf": now,
            "exp": now + 600,
            **claims,
        }
        header = {"alg": "EdDSA", "typ": "JWT", "kid": "one"}
        signed = ".".join(b64url(json.dumps(part).encode()) for part in (header, body))
        return f"{signed}.{b64url(self._key.sign(signed.encode()))}"


@pytest.fixture(scope="session")
def signer() -> Signer:
    return Signer()


@pytest.fixture(scope="session")
def standin_environment(signer: Signer) -> Iterator[None]:
    os.environ["WHISPR_AUTH_JWKS"] = signer.jwks
    yield
    del os.environ["WHISPR_AUTH_JWKS"]


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that PostgreSQL's user can reach when the tests run as root, which pytest's own is not."""
    folder = Path(tempfile.mkdtemp(prefix="whispr test "))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def standin_command(service: str) -> list[str]:
    return [sys.executable, str(STANDIN), service]


def listening(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=0.2):
            return True
    except OSError:
        return False


def samples(text: bytes | None) -> dict[str, float]:
    """The samples of Prometheus' text: each name with its labels as it is written there, and the value."""
    assert text is not None, "nobody answered"
    lines = [line for line in text.decode().splitlines() if line and not line.startswith("#")]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


async def eventually(check: Callable[[], bool | Awaitable[bool]], seconds: float = 20.0) -> None:
    """Waits for `check`; fails after `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        answer = check()
        if not isinstance(answer, bool):
            answer = await answer
        if answer:
            return
        assert time.monotonic() < deadline, "it did not happen"
        await asyncio.sleep(0.05)
