"""Signing keys and where the root keys come from."""

from __future__ import annotations

import asyncio
import base64
from pathlib import Path
from typing import Any
from uuid import uuid4

import jwt
import msgspec
import pytest
from tests.services.auth.house import ORIGIN, AuthHouse, caller_of, register, rules

from whispr.kit.cache import Cache
from whispr.kit.clock import ManualClock
from whispr.kit.errors import InvalidToken
from whispr.kit.identity import Identity
from whispr.kit.settings import SettingsError
from whispr.services.auth.adapters import EnvironmentKeys, FileKeys, new_ring, root_key_source
from whispr.services.auth.service import Auth
from whispr.services.auth.service.vault import Unreadable, Vault, open_under, seal_under
from whispr.services.auth.settings import DAY, AuthSettings


async def kids(auth: Auth) -> list[str]:
    return [key["kid"] for key in (await auth.source.jwks())["keys"]]


async def signed_by(auth: Auth) -> str:
    token = await auth.signing.access_token(uuid4(), uuid4(), uuid4(), ["admin"])
    return str(jwt.get_unverified_header(token)["kid"])


async def test_the_key_set_is_what_verifiers_expect(house: AuthHouse) -> None:
    answer = await house.http.get(f"{house.auth.url}/.well-known/jwks.json")
    assert answer.status_code == 200
    assert answer.headers["cache-control"] == "public, max-age=300"
    for key in answer.json()["keys"]:
        assert set(key) == {"kty", "crv", "x", "kid", "use", "alg"}
        assert (key["kty"], key["crv"], key["alg"], key["use"]) == ("OKP", "Ed25519", "EdDSA", "sig")
        assert len(base64.urlsafe_b64decode(key["x"] + "=")) == 32
    async with house.as_service("media") as media:
        assert await media.jwks() == answer.json()


async def test_a_key_is_published_before_it_signs_and_kept_after(fresh_url: str, valkey_url: str) -> None:
    clock = ManualClock()
    async with rules(fresh_url, valkey_url, clock) as auth:
        (first,) = await kids(auth)
        clock.advance(30 * DAY - 3601)
        await auth.signing.tend()
        assert await kids(auth) == [first]
        clock.advance(1)
        await auth.signing.tend()
        _, second = await kids(auth)
        assert await signed_by(auth) == first
        clock.advance(3599)
        assert await signed_by(auth) == first
        clock.advance(1)
        assert await signed_by(auth) == second
        clock.advance(600 + 300)
        await auth.signing.tend()
        assert await kids(auth) == [first, second]
        clock.advance(1)
        await auth.signing.tend()
        assert await kids(auth) == [second]


async def test_no_token_is_refused_through_a_rotation(fresh_url: str, valkey_url: str) -> None:
    """A verifier that reads the key set every five minutes, and tokens of every minute of two rotations."""
    clock, cache = ManualClock(), Cache(valkey_url)
    async with rules(fresh_url, valkey_url, clock, signing_key_days=0.1) as auth:
        identity = Identity(auth.source, cache, clock)
        await identity.start()
        user, device, session = uuid4(), uuid4(), uuid4()
        seen = set()
        for minute in range(6 * 60):
            clock.advance(60)
            await auth.signing.tend()
            if minute % 5 == 0:
                await identity._refresh()
            token = await auth.signing.access_token(user, device, session, [])
            seen.add(jwt.get_unverified_header(token)["kid"])
            assert identity.verify(token).user_id == user
        assert len(seen) >= 3
    await cache.close()


async def test_rotating_now_still_gives_notice(fresh_url: str, valkey_url: str) -> None:
    clock = ManualClock()
    async with rules(fresh_url, valkey_url, clock) as auth:
        first = await signed_by(auth)
        rotated, second = await auth.signing.rotate(force=True)
        assert rotated
        assert await auth.signing.rotate(force=True) == (False, second)
        assert await signed_by(auth) == first
        clock.advance(3600)
        assert await signed_by(auth) == second


async def test_replicas_that_start_together_make_one_key(fresh_url: str, valkey_url: str) -> None:
    clock = ManualClock()
    async with rules(fresh_url, valkey_url, clock) as one, rules(fresh_url, valkey_url, clock) as two:
        await asyncio.gather(*(auth.signing.load() for auth in (one, two, one, two)))
        assert await kids(one) == await kids(two)
        assert len(await kids(one)) == 1
        clock.advance(30 * DAY)
        await asyncio.gather(one.signing.tend(), two.signing.tend())
        assert await kids(one) == await kids(two)
        assert len(await kids(one)) == 2


async def test_private_keys_are_not_in_the_database_in_clear(fresh_url: str, valkey_url: str) -> None:
    async with rules(fresh_url, valkey_url, ManualClock()) as auth:
        await auth.signing.load()
        private = auth.signing._keys[0].private.private_bytes_raw()
        async with auth.signing._db.connection() as connection:
            (row,) = await connection.fetch("SELECT * FROM signing_keys")
        assert all(private not in value for value in row.values() if isinstance(value, bytes))


async def test_a_key_of_another_house_proves_nothing(fresh_url: str, rules_url: str, valkey_url: str) -> None:
    clock, cache = ManualClock(), Cache(valkey_url)
    async with rules(fresh_url, valkey_url, clock) as ours, rules(rules_url, valkey_url, clock) as theirs:
        identity = Identity(ours.source, cache, clock)
        await identity.start()
        token = await theirs.signing.access_token(uuid4(), uuid4(), uuid4(), [])
        with pytest.raises(InvalidToken):
            await identity.verify_async(token)
    await cache.close()


async def test_rotation_by_rpc_is_repeatable(house: AuthHouse) -> None:
    async with house.as_service("scheduling") as scheduling:
        for kind in ("token_keys", "signing_keys"):
            operation = uuid4()
            first = await scheduling.rotate_keys(operation, kind, force=True)
            assert first[0]
            assert await scheduling.rotate_keys(operation, kind, force=True) == first
            assert await scheduling.rotate_keys(uuid4(), kind) == (False, first[1])
    person = await house.register()
    assert (await house.call("GET", "/devices", person)).status_code == 200


# --- root keys ---


def settings(**values: Any) -> AuthSettings:
    return AuthSettings(
        database_url="postgresql://nowhere", **{"keyring": None, "keyring_file": None, **values}
    )


def test_the_file_is_made_private_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "keyring.json"
    source = root_key_source(settings(keyring_file=path), "development")
    first = source.load()
    assert path.stat().st_mode & 0o777 == 0o600
    assert source.load() == first
    assert list(path.parent.iterdir()) == [path]


def test_production_makes_no_ring_by_itself(tmp_path: Path) -> None:
    path = tmp_path / "keyring.json"
    with pytest.raises(SettingsError, match="WHISPR_AUTH_KEYRING_FILE"):
        root_key_source(settings(keyring_file=path), "production").load()
    assert root_key_source(settings(keyring_file=path, keyring_create=True), "production").load().keys
    with pytest.raises(SettingsError):
        root_key_source(
            settings(keyring_file=tmp_path / "no.json", keyring_create=False), "development"
        ).load()


@pytest.mark.parametrize("mode", [0o644, 0o604, 0o620, 0o602, 0o666])
def test_a_ring_others_can_get_at_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "keyring.json"
    path.write_bytes(new_ring())
    path.chmod(mode)
    with pytest.raises(SettingsError, match="chmod 600"):
        FileKeys(path, create=False).load()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        '{"primary": "a", "keys": {}}',
        '{"primary": "a", "keys": {"b": "' + "A" * 43 + '="}}',
        '{"primary": "a", "keys": {"a": "c2hvcnQ="}}',
        '{"primary": "a", "keys": {"a": "not base64!"}}',
    ],
)
def test_a_broken_ring_is_refused_without_quoting_it(text: str) -> None:
    with pytest.raises(SettingsError, match="WHISPR_AUTH_KEYRING") as failure:
        EnvironmentKeys(text).load()
    assert "c2hvcnQ" not in str(failure.value)


def test_the_environment_comes_first(tmp_path: Path) -> None:
    ring = new_ring()
    chosen = settings(keyring=ring.decode(), keyring_file=tmp_path / "unused.json")
    assert root_key_source(chosen, "production").load().primary == msgspec.json.decode(ring)["primary"]
    assert not (tmp_path / "unused.json").exists()
    assert ring.decode() not in repr(chosen)
    with pytest.raises(SettingsError):
        root_key_source(settings(), "development")


def test_what_is_sealed_opens_for_its_purpose_only() -> None:
    vault = Vault(EnvironmentKeys(new_ring().decode()).load())
    sealed = vault.seal(b"secret", "one purpose")
    assert vault.open(vault.primary, sealed, "one purpose") == b"secret"
    for root, blob, purpose in (
        (vault.primary, sealed, "another"),
        (vault.primary, sealed[:-1] + bytes([sealed[-1] ^ 1]), "one purpose"),
        ("unknown", sealed, "one purpose"),
    ):
        with pytest.raises(Unreadable):
            vault.open(root, blob, purpose)
    hidden = seal_under(b"k" * 32, b"content", b"p")
    assert open_under(b"k" * 32, hidden, b"p") == b"content"
    with pytest.raises(Unreadable):
        open_under(b"j" * 32, hidden, b"p")


async def test_auth_does_not_start_with_the_wrong_ring(
    house: AuthHouse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await house.register()
    monkeypatch.setenv("WHISPR_AUTH_KEYRING_FILE", str(tmp_path / "other.json"))
    with pytest.raises(SettingsError, match="the ring lacks"):
        await house.another_node("auth")


async def test_a_session_survives_a_change_of_every_key(fresh_url: str, valkey_url: str) -> None:
    clock = ManualClock()
    async with rules(fresh_url, valkey_url, clock) as auth:
        _, tokens = await register(auth)
        await auth.signing.rotate(force=True)
        clock.advance(2 * 3600)
        await auth.signing.tend()
        refreshed = await auth.sessions.refresh(tokens.refresh_token, None, ORIGIN)
        assert refreshed.session_id == caller_of(tokens).session_id
