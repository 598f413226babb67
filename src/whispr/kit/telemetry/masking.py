"""What a log line or a span may not say: secrets go, personal data becomes a pseudonym.

Masking works by key (`token`, `user_id`, `ip`, …) and, for free text such as messages and tracebacks of libraries, by
shape (a JWT, a bearer header, a password in a URL). Both run on every line, because one forgotten call site is enough.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any
from uuid import UUID

HIDDEN = "***"

_SECRET_KEYS = frozenset(
    {
        "auth",
        "authorization",
        "body",
        "ciphertext",
        "claims",
        "content",
        "cookie",
        "credentials",
        "envelopes",
        "headers",
        "password_hash",
        "payload",
        "private_key",
        "query_string",
        "secret_key",
        "signing_key",
    }
)
_SECRET_SUFFIXES = (
    "token",
    "tokens",
    "password",
    "passwords",
    "secret",
    "secrets",
    "signature",
    "prekey",
    "prekeys",
)
_PERSON_KEYS = frozenset(
    f"{who}_id"
    for who in (
        "actor",
        "author",
        "blocked",
        "blocker",
        "caller",
        "contact",
        "member",
        "owner",
        "person",
        "recipient",
        "sender",
        "subject",
        "user",
        "viewer",
    )
) | {"sub", "user"}
_ADDRESS_KEYS = frozenset({"ip", "client_ip", "remote_ip", "peer", "remote_addr", "x-forwarded-for"})
_NAME_KEYS = frozenset({"username", "display_name", "email", "phone"})

# An address has 32 bits: an unkeyed hash of it is undone by trying them all. The key lives as long as the process,
# which is long enough to see that two lines speak of one address.
_ADDRESS_KEY = secrets.token_bytes(16)

# (pattern, replacement), applied in order. The detail of a unique violation quotes the row, asyncpg's complaint about an
# argument quotes the argument: both can be a name, a token or a ciphertext.
_SHAPES: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"eyJ[\w-]{4,}\.[\w-]*\.?[\w-]*"), HIDDEN),
    (re.compile(r"(?i)\b(bearer|basic)\s+[^\s\"',]+"), rf"\1 {HIDDEN}"),
    (
        re.compile(
            r"(?i)([\w-]*(?:token|password|secret|signature|authorization)[\"']?\s*[=:]\s*[\"']?)[^\s\"'&,;)}]+"
        ),
        rf"\1{HIDDEN}",
    ),
    (re.compile(r"(\w+://[^\s:/@]*):[^\s/@]+@"), rf"\1:{HIDDEN}@"),
    (re.compile(r"\)=\([^)]*\)"), f")=({HIDDEN})"),
    (re.compile(r"(for query argument \$\d+): .*"), rf"\1: {HIDDEN}"),
)
_SUSPECT = re.compile(
    r"eyJ|(?i:bearer|basic|token|password|secret|signature|authorization|query argument)|://[^/\s]*@|\)=\("
)
_IPV4 = re.compile(r"\b(?!127\.|0\.0\.0\.0)(?:\d{1,3}\.){3}\d{1,3}\b")
_MAX_DEPTH = 6
_INT64 = 1 << 63

_Masker = Callable[[Any, int], Any]


def text(value: str) -> str:
    """`value` without anything that looks like a credential."""
    if _SUSPECT.search(value) is None:
        return value
    for pattern, replacement in _SHAPES:
        value = pattern.sub(replacement, value)
    return value


def foreign_text(value: str) -> str:
    """`text` for libraries' own messages, which also like to quote the peer's address."""
    return _IPV4.sub("ip", text(value))


@lru_cache(maxsize=8192)
def person(user_id: str) -> str:
    """A stable pseudonym of a user id: lines of one person can be joined, the person not be named."""
    return "u#" + hashlib.blake2s(user_id.encode(), digest_size=6).hexdigest()


def address(ip: str) -> str:
    """A pseudonym of a network address that holds within this process."""
    return "ip#" + hashlib.blake2s(ip.encode(), digest_size=5, key=_ADDRESS_KEY).hexdigest()


def _hide(value: Any, depth: int) -> Any:
    return None if value is None else HIDDEN


def _person(value: Any, depth: int) -> Any:
    if value is None:
        return None
    if isinstance(value, list | tuple | set | frozenset):
        return [_person(item, depth) for item in value]
    return person(str(value))


def _address(value: Any, depth: int) -> Any:
    return None if value is None else address(str(value))


def _name(value: Any, depth: int) -> Any:
    return None if value is None else str(value)[:1] + HIDDEN


def _plain(value: Any, depth: int) -> Any:
    if isinstance(value, str):
        return text(value)
    if isinstance(value, int):
        return value if -_INT64 <= value < _INT64 else str(value)
    if value is None or isinstance(value, float | UUID):
        return value
    if isinstance(value, bytes | bytearray | memoryview):
        return f"<{len(value)} bytes>"
    if depth >= _MAX_DEPTH:
        return HIDDEN
    if isinstance(value, Mapping):
        return {str(key): by_key(str(key), item, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item, depth + 1) for item in value]
    return text(str(value))


@lru_cache(maxsize=2048)
def _masker(key: str) -> _Masker:
    key = key.lower()
    if key in _SECRET_KEYS or key.endswith(_SECRET_SUFFIXES):
        return _hide
    if key in _PERSON_KEYS or (key.endswith("_ids") and key[:-1] in _PERSON_KEYS):
        return _person
    if key in _ADDRESS_KEYS:
        return _address
    if key in _NAME_KEYS:
        return _name
    return _plain


def by_key(key: str, value: Any, depth: int = 0) -> Any:
    """`value` as it may be written under `key`; containers are masked inside."""
    return _masker(key)(value, depth)
