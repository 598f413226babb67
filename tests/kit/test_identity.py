"""Access tokens: only auth's own, unexpired and unrevoked ones pass, and each refusal has its stable code."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nacl.signing import SigningKey

from whispr.kit import identity as identity_module
from whispr.kit.cache import Cache
from whispr.kit.clock import ManualClock
from whispr.kit.errors import Failure, InvalidToken, SessionRevoked, TokenExpired
from whispr.kit.identity import (
    LEEWAY,
    MAX_TOKEN_LIFETIME,
    REVOCATIONS_CHANNEL,
    Identity,
    IdentityUnavailable,
    Revocation,
    encode_revocation,
)

KEY = SigningKey(bytes(range(32)))
USER, DEVICE, SESSION = uuid4(), uuid4(), uuid4()
MINUTES_10 = 600.0


def b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def jwk(kid: str, key: SigningKey) -> dict[str, str]:
    return {
        "kty": "OKP",
        "crv": "Ed25519",
        "alg": "EdDSA",
        "use": "sig",
        "kid": kid,
        "x": b64(bytes(key.verify_key)),
    }


def signed(header: object, claims: object, key: SigningKey = KEY) -> str:
    message = f"{b64(json.dumps(header).encode())}.{b64(json.dumps(claims).encode())}"
    return f"{message}.{b64(key.sign(message.encode()).signature)}"


class Auth:
    """What auth would answer: a key set and a list of revocations, and whether it can be reached."""

    def __init__(self) -> None:
        self.keys = {"k1": KEY}
        self.revoked: list[Revocation] = []
        self.asked_since: list[datetime] = []
        self.jwks_calls = 0
        self.away = False
        self.raw: dict[str, Any] | None = None

    async def jwks(self) -> dict[str, Any]:
        self.jwks_calls += 1
        if self.away:
            raise ConnectionError("auth is away")
        return (
            self.raw if self.raw is not None else {"keys": [jwk(kid, key) for kid, key in self.keys.items()]}
        )

    async def revocations(self, since: datetime) -> list[Revocation]:
        self.asked_since.append(since)
        if self.away:
            raise ConnectionError("auth is away")
        return [revocation for revocation in self.revoked if revocation.at >= since]


class World:
    """One verifier with its auth, its clock and a real Valkey."""

    def __init__(self, cache: Cache, poll_interval: float, jwks_interval: float) -> None:
        self.clock = ManualClock()
        self.auth = Auth()
        self.cache = cache
        self.identity = Identity(
            self.auth, cache, self.clock, poll_interval=poll_interval, jwks_interval=jwks_interval
        )
        self.heard: list[Revocation] = []
        self.identity.on_revocation(self.heard.append)

    def claims(self, **changes: Any) -> dict[str, Any]:
        now = self.clock.time()
        claims = {
            "iss": "whispr",
            "aud": "whispr",
            "sub": str(USER),
            "did": str(DEVICE),
            "sid": str(SESSION),
            "roles": ["admin"],
            "iat": now,
            "nbf": now,
            "exp": now + MINUTES_10,
            "jti": str(uuid4()),
        }
        claims.update(changes)
        return {name: value for name, value in claims.items() if value is not ...}

    def token(self, kid: str = "k1", key: SigningKey = KEY, **changes: Any) -> str:
        return signed({"alg": "EdDSA", "kid": kid, "typ": "JWT"}, self.claims(**changes), key)

    def revocation(self, subject: str, subject_id: UUID, at: datetime | None = None) -> Revocation:
        return Revocation(subject, subject_id, at or self.clock.now())  # type: ignore[arg-type]

    async def publish(self, revocation: Revocation) -> None:
        await self.cache.publish(REVOCATIONS_CHANNEL, encode_revocation(revocation))


async def eventually(holds: Callable[[], bool], seconds: float = 5.0) -> None:
    async with asyncio.timeout(seconds):
        while not holds():
            await asyncio.sleep(0.005)


@asynccontextmanager
async def a_world(
    valkey_url: str, poll_interval: float = 3600, jwks_interval: float = 3600, *, running: bool = False
) -> AsyncIterator[World]:
    cache = Cache(valkey_url)
    world = World(cache, poll_interval, jwks_interval)
    loops = []
    try:
        await world.identity.start()
        if running:
            loops = [asyncio.create_task(cache.run()), asyncio.create_task(world.identity.run())]
            await eventually(lambda: REVOCATIONS_CHANNEL in cache.subscribed)
        yield world
    finally:
        for loop in loops:
            loop.cancel()
        await asyncio.gather(*loops, return_exceptions=True)
        await cache.close()


@pytest.fixture
async def world(valkey_url: str) -> AsyncIterator[World]:
    async with a_world(valkey_url) as made:
        yield made


def refused(world: World, token: str, failure: type[Failure] = InvalidToken) -> None:
    with pytest.raises(failure) as caught:
        world.identity.verify(token)
    assert type(caught.value).code == failure.code
    assert caught.value.detail == failure.__doc__, "a refusal says no more than its kind"
    assert caught.value.fields == {}


# --- what passes -----------------------------------------------------------------------------------------------------


async def test_a_token_proves_person_device_and_session(world: World) -> None:
    claims = world.claims(iat=world.clock.time())
    caller = world.identity.verify(signed({"alg": "EdDSA", "kid": "k1"}, claims))
    assert (caller.user_id, caller.device_id, caller.session_id) == (USER, DEVICE, SESSION)
    assert caller.roles == {"admin"}
    assert (caller.issued_at, caller.expires_at) == (claims["iat"], claims["exp"])


@pytest.mark.parametrize("header", [{}, {"typ": "JWT"}, {"typ": "at+jwt"}])
@pytest.mark.parametrize(
    "changes", [{"aud": ["other", "whispr"]}, {"roles": ...}, {"jti": ...}, {"more": {"a": [1]}}]
)
async def test_permitted_variants_pass(world: World, header: dict[str, Any], changes: dict[str, Any]) -> None:
    token = signed({"alg": "EdDSA", "kid": "k1", **header}, world.claims(**changes))
    assert world.identity.verify(token).user_id == USER


async def test_whole_seconds_pass(world: World) -> None:
    now = int(world.clock.time())
    assert world.identity.verify(world.token(iat=now, nbf=now, exp=now + 600)).expires_at == now + 600


async def test_a_clock_slightly_ahead_at_the_issuer_is_forgiven(world: World) -> None:
    ahead = world.clock.time() + LEEWAY - 1
    world.identity.verify(world.token(iat=ahead, nbf=ahead, exp=ahead + 600))


async def test_a_verified_token_is_not_verified_twice(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    token = world.token()
    first = world.identity.verify(token)
    world.auth.keys = {}
    monkeypatch.setattr(world.identity, "_check", None)
    assert world.identity.verify("".join(token)) is first


async def test_the_memory_of_verified_tokens_is_bounded(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(identity_module, "_VERIFIED_TOKENS", 3)
    tokens = [world.token() for _ in range(3)]
    for token in tokens:
        world.identity.verify(token)
    world.identity.verify(tokens[0])
    world.identity.verify(world.token())
    kept = list(world.identity._verified)
    assert len(kept) == 3
    assert tokens[0] in kept, "the most recently used stay"
    assert tokens[1] not in kept


async def test_refused_tokens_take_no_memory(world: World) -> None:
    for _ in range(10):
        refused(world, world.token(key=SigningKey.generate()))
    assert len(world.identity._verified) == 0


# --- what does not ---------------------------------------------------------------------------------------------------


@given(data=st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
async def test_no_changed_token_passes(world: World, data: st.DataObject) -> None:
    token = world.token()
    position = data.draw(st.integers(0, len(token) - 1))
    how = data.draw(st.sampled_from(["replace", "insert", "delete"]))
    char = data.draw(st.characters(codec="utf-8"))
    changed = {
        "replace": token[:position] + char + token[position + 1 :],
        "insert": token[:position] + char + token[position:],
        "delete": token[:position] + token[position + 1 :],
    }[how]
    if changed != token:
        refused(world, changed)


@given(
    st.one_of(st.text(max_size=300), st.from_regex(r"[\w-]{0,80}\.[\w-]{0,80}\.[\w-]{0,90}", fullmatch=True))
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_no_made_up_token_passes(world: World, token: str) -> None:
    refused(world, token)


@given(
    header=st.dictionaries(
        st.sampled_from(["alg", "kid", "typ", "crit"]), st.one_of(st.none(), st.text(), st.lists(st.text()))
    ),
    claims=st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(),
        lambda inner: (
            st.lists(inner) | st.dictionaries(st.sampled_from(["iss", "aud", "sub", "iat", "exp"]), inner)
        ),
        max_leaves=8,
    ),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_no_shape_of_header_or_claims_crashes(world: World, header: object, claims: object) -> None:
    # Properly signed, so that the claims are reached.
    refused(world, signed(header, claims))
    refused(world, signed({"alg": "EdDSA", "kid": "k1"}, claims))


@pytest.mark.parametrize(
    "alg", ["none", "None", "NONE", "nOnE", "", "HS256", "ES256", "RS256", "Ed25519", "eddsa", None, 1]
)
async def test_only_one_algorithm_exists(world: World, alg: object) -> None:
    header = {"alg": alg, "kid": "k1"}
    refused(world, signed(header, world.claims()))
    head, body, _ = signed(header, world.claims()).split(".")
    refused(world, f"{head}.{body}.")


async def test_the_public_key_is_no_hmac_secret(world: World) -> None:
    public = bytes(KEY.verify_key)
    for secret in (public, b64(public).encode(), public.hex().encode(), json.dumps(jwk("k1", KEY)).encode()):
        for alg in ("HS256", "EdDSA"):
            message = f"{b64(json.dumps({'alg': alg, 'kid': 'k1'}).encode())}.{b64(json.dumps(world.claims()).encode())}"
            mac = hmac.new(secret, message.encode(), hashlib.sha256).digest()
            refused(world, f"{message}.{b64(mac)}")
            refused(world, f"{message}.{b64(mac + mac)}")


@pytest.mark.parametrize(
    "header",
    [
        {"crit": ["exp"]},
        {"crit": []},
        {"b64": False},
        {"jku": "https://evil.example/jwks.json"},
        {"x5u": "https://evil.example/cert.pem"},
        {"jwk": jwk("k1", SigningKey(bytes(32)))},
        {"typ": "JWE"},
        {"kid": ["k1"]},
        {"kid": None},
        {"kid": ""},
        {"kid": "../k1"},
    ],
)
async def test_headers_that_would_tell_us_how_to_believe_are_refused(
    world: World, header: dict[str, Any]
) -> None:
    refused(world, signed({"alg": "EdDSA", "kid": "k1", **header}, world.claims()))


async def test_a_key_in_the_token_is_not_believed(world: World) -> None:
    thief = SigningKey.generate()
    refused(world, signed({"alg": "EdDSA", "kid": "k1", "jwk": jwk("k1", thief)}, world.claims(), thief))
    refused(world, signed({"alg": "EdDSA", "jwk": jwk("k1", thief)}, world.claims(), thief))


async def test_another_key_under_a_known_id_is_refused(world: World) -> None:
    refused(world, world.token(key=SigningKey.generate()))


@pytest.mark.parametrize(
    "changes",
    [
        {"iss": "other"},
        {"iss": ...},
        {"iss": ["whispr"]},
        {"aud": "other"},
        {"aud": []},
        {"aud": ...},
        {"aud": {"whispr": 1}},
        {"sub": ...},
        {"sub": "alice"},
        {"did": ...},
        {"did": ""},
        {"sid": ...},
        {"sid": 7},
        {"iat": ...},
        {"nbf": ...},
        {"exp": ...},
        {"exp": None},
        {"exp": "9999999999"},
        {"exp": True},
        {"exp": 1e308},
        {"roles": "admin"},
        {"roles": [1]},
        {"roles": ["r"] * 17},
    ],
)
async def test_wrong_or_missing_claims_are_refused(world: World, changes: dict[str, Any]) -> None:
    refused(world, world.token(**changes))


async def test_tokens_from_the_future_are_refused(world: World) -> None:
    later = world.clock.time() + LEEWAY + 1
    refused(world, world.token(nbf=later))
    refused(world, world.token(iat=later, nbf=world.clock.time(), exp=later + 600))


async def test_a_token_that_could_outlive_its_revocation_is_refused(world: World) -> None:
    now = world.clock.time()
    world.identity.verify(world.token(iat=now, exp=now + MAX_TOKEN_LIFETIME))
    refused(world, world.token(iat=now, exp=now + MAX_TOKEN_LIFETIME + 1))
    refused(world, world.token(iat=now, exp=now))


async def test_expiry_is_exact_and_has_its_own_code(world: World) -> None:
    token = world.token()
    world.clock.advance(MINUTES_10 - 0.5)
    world.identity.verify(token)
    world.clock.advance(0.5)
    refused(world, token, TokenExpired)
    refused(world, token, TokenExpired)
    assert TokenExpired.code == "token_expired"


async def test_an_expired_forgery_is_a_forgery(world: World) -> None:
    token = world.token(key=SigningKey.generate())
    world.clock.advance(MINUTES_10 + 1)
    refused(world, token, InvalidToken)


async def test_sizes_are_bounded(world: World) -> None:
    fitting = world.token(more="x" * 2000)
    assert len(fitting) < 4096
    world.identity.verify(fitting)
    refused(world, world.token(more="x" * 4000))
    refused(world, "." * 10_000_000)


async def test_deep_nesting_is_refused(world: World) -> None:
    deep = b"[" * 1100 + b"]" * 1100
    head = b64(json.dumps({"alg": "EdDSA", "kid": "k1"}).encode())
    for body in (deep, b'{"more":' + deep + b"}"):
        refused(world, f"{b64(body)}.{b64(body)}.{b64(bytes(64))}"[:4096])
        message = f"{head}.{b64(body)}"
        refused(world, f"{message}.{b64(KEY.sign(message.encode()).signature)}")


async def test_one_token_has_one_spelling(world: World) -> None:
    token = world.token()
    head, body, signature = token.split(".")
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    # The last character of 64 encoded bytes holds four bits that mean nothing.
    other = signature[:-1] + alphabet[alphabet.index(signature[-1]) ^ 1]
    for spelling in (
        f"{token}=",
        f"{token}==",
        f" {token}",
        f"{token}\n",
        f"{head}.{body}.{other}",
        f"{head}=.{body}.{signature}",
    ):
        refused(world, spelling)


# --- keys change -----------------------------------------------------------------------------------------------------


async def test_a_new_key_is_found_at_first_sight(world: World) -> None:
    new = SigningKey.generate()
    world.auth.keys["k2"] = new
    token = world.token("k2", new)
    refused(world, token, InvalidToken)
    assert (await world.identity.verify_async(token)).user_id == USER
    assert world.identity.verify(token).user_id == USER


async def test_a_synchronous_look_at_a_new_key_brings_it_soon(
    valkey_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(identity_module, "_LOOK_SPACING", 0.01)
    async with a_world(valkey_url, running=True) as world:
        new = SigningKey.generate()
        world.auth.keys["k2"] = new
        token = world.token("k2", new)
        refused(world, token)
        await eventually(lambda: world.auth.jwks_calls == 2)
        assert world.identity.verify(token).user_id == USER


async def test_made_up_key_ids_do_not_hold_up_the_refresh(valkey_url: str) -> None:
    async with a_world(valkey_url, jwks_interval=0.01, running=True) as world:
        await eventually(lambda: world.auth.jwks_calls >= 3)
        refused(world, world.token("made-up"))
        calls = world.auth.jwks_calls
        await eventually(lambda: world.auth.jwks_calls >= calls + 3, 1.0)


async def test_made_up_key_ids_do_not_flood_auth(world: World) -> None:
    calls = world.auth.jwks_calls
    tokens = [world.token(f"made-up-{n}") for n in range(50)]
    outcomes = await asyncio.gather(*map(world.identity.verify_async, tokens), return_exceptions=True)
    assert all(isinstance(outcome, InvalidToken) for outcome in outcomes)
    assert world.auth.jwks_calls == calls + 1


async def test_a_withdrawn_key_proves_nothing_even_for_tokens_seen_before(valkey_url: str) -> None:
    async with a_world(valkey_url, jwks_interval=0.01, running=True) as world:
        new = SigningKey.generate()
        world.auth.keys["k2"] = new
        old_token, new_token = world.token(), world.token("k2", new)
        await world.identity.verify_async(new_token)
        world.identity.verify(old_token)
        del world.auth.keys["k1"]
        await eventually(lambda: old_token not in world.identity._verified)
        refused(world, old_token)
        world.identity.verify(new_token)


async def test_another_key_under_the_same_id_withdraws_the_first(valkey_url: str) -> None:
    async with a_world(valkey_url, jwks_interval=0.01, running=True) as world:
        token = world.token()
        world.identity.verify(token)
        world.auth.keys["k1"] = SigningKey.generate()
        await eventually(lambda: token not in world.identity._verified)
        refused(world, token)


@pytest.mark.parametrize(
    "raw",
    [
        {},
        {"keys": []},
        {"keys": [{"kty": "EC", "kid": "k1"}]},
        {"keys": [{**jwk("k1", KEY), "x": "AA"}]},
        {"keys": [{**jwk("k1", KEY), "use": "enc"}]},
        {"keys": [{**jwk("k1", KEY), "alg": "HS256"}]},
        {"keys": "k1"},
    ],
)
async def test_a_broken_key_set_does_not_lock_everyone_out(world: World, raw: dict[str, Any]) -> None:
    world.auth.raw = raw
    calls = world.auth.jwks_calls
    with pytest.raises(InvalidToken):
        await world.identity.verify_async(world.token("unknown"))
    assert world.auth.jwks_calls == calls + 1
    world.identity.verify(world.token())


# --- auth is away ----------------------------------------------------------------------------------------------------


async def test_without_auth_at_the_start_it_is_unready_and_goes_on_trying(
    valkey_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(identity_module, "_RETRY", (0.01,))
    cache = Cache(valkey_url)
    world = World(cache, 3600, 3600)
    world.auth.away = True
    await world.identity.start()
    with pytest.raises(IdentityUnavailable):
        await world.identity.ready()
    with pytest.raises(IdentityUnavailable) as caught:
        await world.identity.verify_async(world.token())
    assert caught.value.code == "identity_unavailable"
    assert caught.value.retry_after is not None

    loop = asyncio.create_task(world.identity.run())
    world.auth.away = False
    await eventually(lambda: world.identity._keys != {} and world.identity._polled_until is not None)
    await world.identity.ready()
    assert world.identity.verify(world.token()).user_id == USER
    loop.cancel()
    await cache.close()


async def test_keys_alone_are_not_enough(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    # Before the first answer about revocations, an ended session would pass.
    monkeypatch.setattr(world.identity, "_polled_until", None)
    with pytest.raises(IdentityUnavailable):
        await world.identity.ready()
    with pytest.raises(IdentityUnavailable):
        world.identity.verify(world.token())


async def test_tokens_go_on_being_verified_while_auth_is_away(valkey_url: str) -> None:
    async with a_world(valkey_url, poll_interval=0.01, jwks_interval=0.01, running=True) as world:
        world.auth.away = True
        calls = world.auth.jwks_calls
        await eventually(lambda: world.auth.jwks_calls > calls)
        world.identity.verify(world.token())
        await world.identity.ready()


# --- revocation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("subject", "subject_id"), [("session", SESSION), ("device", DEVICE), ("user", USER)]
)
async def test_a_pushed_revocation_reaches_listeners_and_refuses(
    valkey_url: str, subject: str, subject_id: UUID
) -> None:
    async with a_world(valkey_url, running=True) as world:
        token = world.token()
        caller = world.identity.verify(token)
        assert not world.identity.revoked(caller)
        revocation = world.revocation(subject, subject_id)
        await world.publish(revocation)
        await eventually(lambda: bool(world.heard), 1.0)
        assert world.heard == [revocation]
        assert world.identity.revoked(caller)
        refused(world, token, SessionRevoked)
        refused(world, world.token(iat=world.clock.time() - 1), SessionRevoked)


async def test_a_revocation_of_others_refuses_nobody_else(world: World) -> None:
    for subject in ("session", "device", "user"):
        world.identity.learn(world.revocation(subject, uuid4()))
        # An id of one kind means nothing as an id of another.
        world.identity.learn(
            world.revocation(subject, {"session": USER, "device": SESSION, "user": DEVICE}[subject])
        )
    assert world.identity.verify(world.token()).user_id == USER


async def test_a_later_login_of_a_revoked_device_or_person_passes(world: World) -> None:
    world.identity.learn(world.revocation("device", DEVICE))
    world.identity.learn(world.revocation("user", USER))
    refused(world, world.token(), SessionRevoked)
    world.clock.advance(0.001)
    assert world.identity.verify(world.token()).device_id == DEVICE


async def test_a_revoked_session_never_comes_back(world: World) -> None:
    world.identity.learn(world.revocation("session", SESSION))
    world.clock.advance(60)
    refused(world, world.token(), SessionRevoked)


async def test_a_missed_hint_is_found_by_asking(valkey_url: str) -> None:
    async with a_world(valkey_url, poll_interval=0.02, running=True) as world:
        token = world.token()
        world.identity.verify(token)
        world.auth.revoked.append(world.revocation("session", SESSION))
        await eventually(lambda: bool(world.heard))
        refused(world, token, SessionRevoked)


async def test_a_lost_subscription_is_followed_by_asking(valkey_url: str) -> None:
    async with a_world(valkey_url, running=True) as world:
        world.auth.revoked.append(world.revocation("session", SESSION))
        asked = len(world.auth.asked_since)
        await world.cache.client.client_kill_filter(_type="pubsub")
        await eventually(lambda: bool(world.heard))
        assert len(world.auth.asked_since) > asked
        refused(world, world.token(), SessionRevoked)


async def test_polls_overlap(world: World) -> None:
    first = world.clock.now()
    world.clock.advance(15)
    await world.identity._poll()
    assert world.auth.asked_since[0] <= first - timedelta(seconds=MAX_TOKEN_LIFETIME)
    assert world.auth.asked_since[1] == first - timedelta(seconds=60)


async def test_a_revocation_learned_before_the_start_is_in_force(valkey_url: str) -> None:
    cache = Cache(valkey_url)
    world = World(cache, 3600, 3600)
    world.auth.revoked.append(world.revocation("session", SESSION, world.clock.now() - timedelta(minutes=9)))
    await world.identity.start()
    refused(world, world.token(iat=world.clock.time() - 595), SessionRevoked)
    await cache.close()


async def test_each_revocation_is_told_once(world: World) -> None:
    revocation = world.revocation("session", SESSION)
    world.auth.revoked.append(revocation)
    world.identity.learn(revocation)
    await world.identity._poll()
    world.identity.learn(revocation, "push")
    assert world.heard == [revocation]


async def test_a_failing_listener_does_not_silence_the_others(valkey_url: str) -> None:
    async with a_world(valkey_url) as world:
        later: list[Revocation] = []

        def fail(revocation: Revocation) -> None:
            raise RuntimeError("no")

        world.identity.on_revocation(fail)
        world.identity.on_revocation(later.append)
        world.identity.learn(world.revocation("user", USER))
        assert len(world.heard) == len(later) == 1


@pytest.mark.parametrize("hint", [b"", b"{", b"null", b'{"subject":"planet","id":"x","at":1}', b"\xff\xfe"])
async def test_a_malformed_hint_only_makes_us_ask(valkey_url: str, hint: bytes) -> None:
    async with a_world(valkey_url, running=True) as world:
        asked = len(world.auth.asked_since)
        await world.cache.publish(REVOCATIONS_CHANNEL, hint)
        await eventually(lambda: len(world.auth.asked_since) > asked)
        world.identity.verify(world.token())
        await world.publish(world.revocation("user", USER))
        await eventually(lambda: bool(world.heard))


async def test_a_hint_without_an_offset_is_utc(valkey_url: str) -> None:
    async with a_world(valkey_url, running=True) as world:
        naive = world.clock.now().replace(tzinfo=None).isoformat()
        hint = json.dumps({"subject": "user", "id": str(USER), "at": naive}).encode()
        await world.cache.publish(REVOCATIONS_CHANNEL, hint)
        await eventually(lambda: bool(world.heard))
        assert world.heard[0].at == world.clock.now()


async def test_revocations_are_forgotten_when_no_token_can_outlive_them(world: World) -> None:
    token = world.token()
    world.identity.learn(world.revocation("session", SESSION))
    world.clock.advance(MAX_TOKEN_LIFETIME)
    await world.identity._poll()
    refused(world, world.token(), SessionRevoked)
    world.clock.advance(LEEWAY + 1)
    await world.identity._poll()
    assert world.identity._revoked == {"session": {}, "device": {}, "user": {}}
    refused(world, token, TokenExpired)
    world.identity.learn(world.revocation("session", SESSION, world.clock.now() - timedelta(hours=2)))
    assert world.identity._revoked["session"] == {}, "an old one is not remembered again"
