"""Certificates are right, change without a gap, and decide who gets through a real TLS handshake."""

from __future__ import annotations

import asyncio
import os
import stat
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID
from hypothesis import given
from hypothesis import strategies as st

from whispr.kit.clock import ManualClock
from whispr.kit.mtls import (
    IdentityUnusable,
    LocalCA,
    WorkloadIdentity,
    peer_service,
    spiffe_from_xfcc,
    spiffe_id,
    spiffe_service,
)

METHOD = "/test.Who/Who"
CALL_TIMEOUT = 5.0


def _leaf(directory: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate((directory / "cert.pem").read_bytes())


def _roots(pem: bytes) -> list[x509.Certificate]:
    return x509.load_pem_x509_certificates(pem)


# --- what is issued --------------------------------------------------------------------------------------------------


def test_leaf_says_who_it_is_and_what_it_is_for(tmp_path: Path) -> None:
    LocalCA(tmp_path / "ca").issue("messaging", tmp_path / "messaging", ttl=timedelta(hours=1))
    leaf = _leaf(tmp_path / "messaging")
    [root] = _roots((tmp_path / "messaging" / "ca.pem").read_bytes())

    leaf.verify_directly_issued_by(root)
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == [
        "spiffe://cluster.local/ns/whispr/sa/messaging-service"
    ]
    assert names.get_values_for_type(x509.DNSName) == ["messaging-service", "localhost"]
    assert [str(ip) for ip in names.get_values_for_type(x509.IPAddress)] == ["127.0.0.1"]
    assert set(leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == {
        ExtendedKeyUsageOID.SERVER_AUTH,
        ExtendedKeyUsageOID.CLIENT_AUTH,
    }
    usage = leaf.extensions.get_extension_for_class(x509.KeyUsage)
    assert usage.critical
    assert usage.value.digital_signature
    assert not usage.value.key_cert_sign
    constraints = leaf.extensions.get_extension_for_class(x509.BasicConstraints)
    assert constraints.critical
    assert not constraints.value.ca
    key = leaf.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    assert isinstance(key.curve, ec.SECP256R1)
    left = leaf.not_valid_after_utc - datetime.now(UTC)
    assert timedelta(minutes=59) < left <= timedelta(hours=1)


def test_root_may_sign_leaves_and_nothing_else(tmp_path: Path) -> None:
    [root] = _roots(LocalCA(tmp_path / "ca").bundle())
    constraints = root.extensions.get_extension_for_class(x509.BasicConstraints)
    assert constraints.critical
    assert (constraints.value.ca, constraints.value.path_length) == (True, 0)
    usage = root.extensions.get_extension_for_class(x509.KeyUsage).value
    assert usage.key_cert_sign
    assert not usage.digital_signature


def test_every_certificate_has_its_own_serial_and_key(tmp_path: Path) -> None:
    ca = LocalCA(tmp_path / "ca")
    leaves = []
    for _ in range(3):
        ca.issue("auth", tmp_path / "auth")
        leaves.append(_leaf(tmp_path / "auth"))
    assert len({leaf.serial_number for leaf in leaves}) == 3
    assert len({leaf.public_key().public_numbers() for leaf in leaves}) == 3  # type: ignore[union-attr]


def test_keys_are_for_their_owner_only(tmp_path: Path) -> None:
    LocalCA(tmp_path / "ca").issue("auth", tmp_path / "auth")
    for path in (tmp_path / "ca" / "roots.json", tmp_path / "auth" / "key.pem"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    for directory in (tmp_path / "ca", tmp_path / "auth"):
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700, directory
    assert b"PRIVATE" not in (tmp_path / "ca" / "ca.pem").read_bytes()


def test_the_authority_survives_a_restart(tmp_path: Path) -> None:
    first = LocalCA(tmp_path / "ca").bundle()
    assert LocalCA(tmp_path / "ca").bundle() == first


def test_issuing_again_and_again_leaves_no_litter(tmp_path: Path) -> None:
    ca = LocalCA(tmp_path / "ca")
    for _ in range(4):
        ca.issue("auth", tmp_path / "auth")
        for version in (tmp_path / "auth").glob("..?*"):
            if not version.is_symlink():
                os.utime(version, (0, 0))
    ca.issue("auth", tmp_path / "auth")
    names = sorted(entry.name for entry in (tmp_path / "auth").iterdir())
    assert [name for name in names if not name.startswith("..")] == ["ca.pem", "cert.pem", "key.pem"]
    assert len([name for name in names if name.startswith("..") and name != "..data"]) == 1


@pytest.mark.parametrize("service", ["", "../auth", "Auth", "a b", "auth/x", "auth-service/ns", "é"])
def test_a_name_that_has_no_spiffe_id_gets_no_certificate(tmp_path: Path, service: str) -> None:
    with pytest.raises(ValueError, match="not a SPIFFE id"):
        LocalCA(tmp_path / "ca").issue(service, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_renew_issues_at_half_life_and_not_before(tmp_path: Path) -> None:
    clock = ManualClock()
    ca = LocalCA(tmp_path / "ca", clock=clock)
    assert ca.renew("auth", tmp_path / "auth", ttl=timedelta(hours=2))
    clock.advance(59 * 60)
    assert not ca.renew("auth", tmp_path / "auth", ttl=timedelta(hours=2))
    clock.advance(2 * 60)
    assert ca.renew("auth", tmp_path / "auth", ttl=timedelta(hours=2))
    assert not ca.renew("auth", tmp_path / "auth", ttl=timedelta(hours=2))


@pytest.mark.parametrize("damage", ["cert.pem", "ca.pem", "garbage", "other service"])
def test_renew_repairs_what_cannot_be_used(tmp_path: Path, damage: str) -> None:
    ca = LocalCA(tmp_path / "ca")
    ca.issue("user" if damage == "other service" else "auth", tmp_path / "auth")
    if damage == "garbage":
        (tmp_path / "auth" / "cert.pem").write_text("garbage")
    elif damage.endswith(".pem"):
        (tmp_path / "auth" / damage).unlink()
    assert ca.renew("auth", tmp_path / "auth")
    WorkloadIdentity(tmp_path / "auth")
    assert not ca.renew("auth", tmp_path / "auth")


def test_root_rotation_overlaps_trust(tmp_path: Path) -> None:
    clock = ManualClock()
    ca = LocalCA(tmp_path / "ca", clock=clock)
    [old] = _roots(ca.bundle())
    lead, ttl = timedelta(hours=1), timedelta(hours=2)

    ca.rotate_root(lead=lead, leaf_ttl=ttl)
    both = _roots(ca.bundle())
    assert both[0] == old
    assert len(both) == 2
    new = both[1]
    assert ca.renew("auth", tmp_path / "auth", timedelta(days=9)), "the wider bundle must reach the workloads"
    _leaf(tmp_path / "auth").verify_directly_issued_by(old)

    ca.rotate_root(lead=lead, leaf_ttl=ttl)
    assert _roots(ca.bundle()) == both, "a second rotation during the first would leave three roots"

    clock.advance(lead.total_seconds() + 1)
    assert ca.renew("auth", tmp_path / "auth", timedelta(days=9)), (
        "a long-lived leaf must not outlast its root"
    )
    _leaf(tmp_path / "auth").verify_directly_issued_by(new)
    assert _roots(ca.bundle()) == both, "leaves of the old root are still out there"

    clock.advance(ttl.total_seconds() + 600)
    assert _roots(ca.bundle()) == [new]


def test_roots_are_rotated_before_they_end(tmp_path: Path) -> None:
    clock = ManualClock()
    ca = LocalCA(tmp_path / "ca", clock=clock)
    [first] = _roots(ca.bundle())
    clock.advance(timedelta(days=280).total_seconds())
    assert first in _roots(ca.bundle())
    assert len(_roots(ca.bundle())) == 2
    clock.advance(timedelta(days=3).total_seconds())
    [second] = _roots(ca.bundle())
    assert second != first


def test_after_a_sleep_longer_than_the_root_there_is_a_new_one(tmp_path: Path) -> None:
    clock = ManualClock()
    ca = LocalCA(tmp_path / "ca", clock=clock)
    [first] = _roots(ca.bundle())
    clock.advance(timedelta(days=800).total_seconds())
    [second] = _roots(ca.bundle())
    assert second != first
    assert ca.renew("auth", tmp_path / "auth")
    _leaf(tmp_path / "auth").verify_directly_issued_by(second)


# --- what is loaded --------------------------------------------------------------------------------------------------


def test_workload_takes_up_a_renewal(tmp_path: Path) -> None:
    ca = LocalCA(tmp_path / "ca")
    ca.issue("auth", tmp_path / "auth", ttl=timedelta(hours=1))
    identity = WorkloadIdentity(tmp_path / "auth")
    heard: list[int] = []
    identity.on_rotation(lambda: heard.append(identity.version))
    assert not identity.refresh()
    assert identity.version == 1
    before = identity.expires_at

    ca.issue("auth", tmp_path / "auth", ttl=timedelta(hours=3))
    assert identity.refresh()
    assert identity.version == 2
    assert identity.expires_at > before + timedelta(hours=1)
    assert heard == [2]
    assert not identity.refresh()


def test_workload_keeps_what_it_has_when_the_folder_breaks(tmp_path: Path) -> None:
    ca = LocalCA(tmp_path / "ca")
    ca.issue("auth", tmp_path / "auth")
    ca.issue("user", tmp_path / "user")
    identity = WorkloadIdentity(tmp_path / "auth")

    real = (tmp_path / "auth" / "key.pem").resolve()
    own_key = real.read_bytes()
    real.write_bytes((tmp_path / "user" / "key.pem").read_bytes())
    assert not identity.refresh(), "a key that is not the certificate's must not be taken up"
    real.unlink()
    assert not identity.refresh()
    assert identity.version == 1

    real.write_bytes(own_key)
    assert identity.refresh(), "once whole again, it is taken up"


@pytest.mark.parametrize("missing", ["cert.pem", "key.pem", "ca.pem"])
def test_workload_without_a_whole_identity_does_not_start(tmp_path: Path, missing: str) -> None:
    LocalCA(tmp_path / "ca").issue("auth", tmp_path / "auth")
    (tmp_path / "auth" / missing).resolve().unlink()
    with pytest.raises(IdentityUnusable):
        WorkloadIdentity(tmp_path / "auth")


def test_workload_reads_plain_files_too(tmp_path: Path) -> None:
    LocalCA(tmp_path / "ca").issue("auth", tmp_path / "auth")
    plain = tmp_path / "plain"
    plain.mkdir()
    for name in ("cert.pem", "key.pem", "ca.pem"):
        (plain / name).write_bytes((tmp_path / "auth" / name).read_bytes())
    assert WorkloadIdentity(plain).version == 1


async def test_workload_is_unready_once_expired(tmp_path: Path) -> None:
    clock = ManualClock()
    LocalCA(tmp_path / "ca", clock=clock).issue("auth", tmp_path / "auth", ttl=timedelta(minutes=10))
    identity = WorkloadIdentity(tmp_path / "auth", clock=clock)
    await identity.ready()
    clock.advance(601)
    with pytest.raises(IdentityUnusable, match="expired"):
        await identity.ready()


def test_a_reader_never_sees_a_mismatched_pair(tmp_path: Path) -> None:
    ca = LocalCA(tmp_path / "ca")
    ca.issue("auth", tmp_path / "auth")
    done = threading.Event()
    problems: list[str] = []
    reads = 0

    def read() -> None:
        nonlocal reads
        while not done.is_set():
            try:
                WorkloadIdentity(tmp_path / "auth")
                reads += 1
            except IdentityUnusable as error:
                problems.append(str(error))

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(40):
        ca.issue("auth", tmp_path / "auth")
    done.set()
    reader.join()
    assert reads > 0
    assert problems == []


# --- who gets through ------------------------------------------------------------------------------------------------


@asynccontextmanager
async def _serving(identity: WorkloadIdentity) -> AsyncIterator[str]:
    async def who(request: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        return (peer_service(context.auth_context()) or "nobody").encode()

    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("test.Who", {"Who": grpc.unary_unary_rpc_method_handler(who)}),)
    )
    port = server.add_secure_port("127.0.0.1:0", identity.server_credentials())
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


async def _who(address: str, credentials: grpc.ChannelCredentials, service: str = "auth") -> str:
    # A subchannel pool of its own: gRPC would otherwise answer over the connection of an earlier, equal channel.
    options = [*WorkloadIdentity.channel_options(service), ("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.secure_channel(address, credentials, options=options) as channel:
        answer: bytes = await channel.unary_unary(METHOD, None, None)(b"", timeout=CALL_TIMEOUT)
        return answer.decode()


async def _refused(address: str, credentials: grpc.ChannelCredentials, service: str = "auth") -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await _who(address, credentials, service)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE, caught.value.details()


def _identity(
    ca: LocalCA, service: str, directory: Path, ttl: timedelta = timedelta(hours=1)
) -> WorkloadIdentity:
    ca.issue(service, directory, ttl)
    return WorkloadIdentity(directory)


async def test_a_service_of_this_authority_gets_through_and_is_known_by_name(tmp_path: Path) -> None:
    ca = LocalCA(tmp_path / "ca")
    async with _serving(_identity(ca, "auth", tmp_path / "auth")) as address:
        for service in ("messaging", "user"):
            client = _identity(ca, service, tmp_path / service)
            assert await _who(address, client.channel_credentials()) == service


async def test_no_certificate_is_refused(tmp_path: Path) -> None:
    ca = LocalCA(tmp_path / "ca")
    async with _serving(_identity(ca, "auth", tmp_path / "auth")) as address:
        await _refused(address, grpc.ssl_channel_credentials(ca.bundle()))


async def test_plain_text_is_refused(tmp_path: Path) -> None:
    ca = LocalCA(tmp_path / "ca")
    async with (
        _serving(_identity(ca, "auth", tmp_path / "auth")) as address,
        grpc.aio.insecure_channel(address) as channel,
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary(METHOD, None, None)(b"", timeout=CALL_TIMEOUT)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_foreign_authority_is_refused_on_both_sides(tmp_path: Path) -> None:
    ca, foreign = LocalCA(tmp_path / "ca"), LocalCA(tmp_path / "foreign")
    ours = _identity(ca, "messaging", tmp_path / "ours")
    theirs = _identity(foreign, "messaging", tmp_path / "theirs")
    key, certificate = ((tmp_path / "theirs" / name).read_bytes() for name in ("key.pem", "cert.pem"))
    async with _serving(_identity(ca, "auth", tmp_path / "auth")) as address:
        # It trusts us, we do not trust it: the server refuses.
        await _refused(address, grpc.ssl_channel_credentials(ca.bundle(), key, certificate))
        # It does not trust us: the client refuses.
        await _refused(address, theirs.channel_credentials())
        assert await _who(address, ours.channel_credentials()) == "messaging"


async def test_an_expired_certificate_is_refused_on_both_sides(tmp_path: Path) -> None:
    yesterday = ManualClock(datetime.now(UTC) - timedelta(days=1))
    old, ca = LocalCA(tmp_path / "ca", clock=yesterday), LocalCA(tmp_path / "ca")
    expired_client = _identity(old, "messaging", tmp_path / "expired")
    async with _serving(_identity(ca, "auth", tmp_path / "auth")) as address:
        await _refused(address, expired_client.channel_credentials())
    good_client = _identity(ca, "messaging", tmp_path / "messaging")
    async with _serving(_identity(old, "auth", tmp_path / "auth-expired")) as address:
        await _refused(address, good_client.channel_credentials())


async def test_a_client_that_reached_the_wrong_service_hangs_up(tmp_path: Path) -> None:
    ca = LocalCA(tmp_path / "ca")
    client = _identity(ca, "messaging", tmp_path / "messaging")
    async with _serving(_identity(ca, "media", tmp_path / "media")) as address:
        await _refused(address, client.channel_credentials(), "auth")
        assert await _who(address, client.channel_credentials(), "media") == "messaging"


async def test_a_certificate_of_another_domain_proves_no_service(tmp_path: Path) -> None:
    ca = LocalCA(tmp_path / "ca")
    elsewhere = LocalCA(tmp_path / "ca", trust_domain="elsewhere.example")
    client = _identity(elsewhere, "messaging", tmp_path / "messaging")
    async with _serving(_identity(ca, "auth", tmp_path / "auth")) as address:
        assert await _who(address, client.channel_credentials()) == "nobody"


async def test_both_sides_rotate_while_running(tmp_path: Path) -> None:
    past = ManualClock(datetime.now(UTC) - timedelta(hours=5))
    ca = LocalCA(tmp_path / "ca", clock=past)
    server = _identity(ca, "auth", tmp_path / "auth", timedelta(hours=6))
    client = _identity(ca, "messaging", tmp_path / "messaging", timedelta(hours=6))
    [old_root] = _roots(ca.bundle())
    async with _serving(server) as address:
        before = client.channel_credentials()
        options = WorkloadIdentity.channel_options("auth")
        async with grpc.aio.secure_channel(address, before, options=options) as lasting:
            assert await lasting.unary_unary(METHOD, None, None)(b"", timeout=CALL_TIMEOUT) == b"messaging"

            ca.rotate_root(lead=timedelta(hours=1), leaf_ttl=timedelta(hours=1))
            assert ca.renew("auth", tmp_path / "auth")
            assert ca.renew("messaging", tmp_path / "messaging")
            assert await _who(address, client.channel_credentials()) == "messaging"

            # The new root signs: first only one side has a leaf of it, then both.
            past.advance(timedelta(minutes=70).total_seconds())
            ca.issue("auth", tmp_path / "auth", timedelta(hours=5))
            assert await _who(address, client.channel_credentials()) == "messaging"
            ca.issue("messaging", tmp_path / "messaging", timedelta(hours=5))
            assert await _who(address, client.channel_credentials()) == "messaging"

            # The old root leaves.
            past.advance(timedelta(minutes=60).total_seconds())
            [new_root] = _roots(ca.bundle())
            assert new_root != old_root
            assert ca.renew("auth", tmp_path / "auth", timedelta(hours=5))
            assert ca.renew("messaging", tmp_path / "messaging", timedelta(hours=5))
            assert await _who(address, client.channel_credentials()) == "messaging"
            assert client.version == 4
            assert server.version == 4

            # A certificate of the root that is gone opens nothing any more, yet what was open stays open.
            await _refused(address, before)
            assert await lasting.unary_unary(METHOD, None, None)(b"", timeout=CALL_TIMEOUT) == b"messaging"


async def test_run_notices_a_renewal_by_itself(tmp_path: Path) -> None:
    ca = LocalCA(tmp_path / "ca")
    identity = _identity(ca, "auth", tmp_path / "auth")
    rotated = asyncio.Event()
    identity.on_rotation(rotated.set)
    loop = asyncio.create_task(identity.run(interval=0.01))
    ca.issue("auth", tmp_path / "auth")
    await asyncio.wait_for(rotated.wait(), 5)
    loop.cancel()
    assert identity.version == 2


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("service", ["auth", "user", "messaging", "api-gateway"])
def test_spiffe_id_and_back(service: str) -> None:
    assert spiffe_service(spiffe_id(service)) == service
    assert spiffe_service(spiffe_id(service, "example.org", "prod"), "example.org", "prod") == service


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "spiffe://cluster.local/ns/whispr/sa/auth",
        "spiffe://cluster.local/ns/whispr/sa/-service",
        "spiffe://cluster.local/ns/whispr/sa/auth-service/",
        "spiffe://cluster.local/ns/whispr/sa/auth-service\n",
        "spiffe://cluster.local/ns/whispr/sa/../auth-service",
        "spiffe://cluster.local/ns/other/sa/auth-service",
        "spiffe://other.local/ns/whispr/sa/auth-service",
        "spiffe://cluster.local:443/ns/whispr/sa/auth-service",
        "SPIFFE://cluster.local/ns/whispr/sa/auth-service",
        "https://cluster.local/ns/whispr/sa/auth-service",
        " spiffe://cluster.local/ns/whispr/sa/auth-service",
    ],
)
def test_what_is_not_exactly_an_id_names_no_service(uri: str) -> None:
    assert spiffe_service(uri) is None


AUTH = "spiffe://cluster.local/ns/whispr/sa/auth-service"
MEDIA = "spiffe://cluster.local/ns/whispr/sa/media-service"


@pytest.mark.parametrize(
    ("header", "uri"),
    [
        (f"By={AUTH};Hash=ab12;URI={MEDIA}", MEDIA),
        (f'By={AUTH};Hash=ab12;Subject="O=a,CN=b;URI={AUTH}";URI={MEDIA}', MEDIA),
        (f'Subject="say \\"hi\\", URI={AUTH}";URI="{MEDIA}";DNS=media', MEDIA),
        # The caller's own element comes first; ours was appended.
        (f"By=x;URI={AUTH},By=y;URI={MEDIA}", MEDIA),
        (f"uri={MEDIA}", MEDIA),
        (f"URI={AUTH},By=y;Hash=1", None),
        (f"URI={AUTH};URI={MEDIA}", None),
        (f"By={AUTH};Hash=1", None),
        (f'Subject="CN=x;URI={AUTH}', None),
        ("URI=https://example.org", None),
        ("URI=", None),
        ("", None),
        (f"URI={AUTH};" + "x" * 20_000, None),
    ],
)
def test_the_sidecars_header(header: str, uri: str | None) -> None:
    assert spiffe_from_xfcc(header) == uri


@given(st.text(alphabet='By=;,"\\URI:/spife ', max_size=200))
def test_a_caller_cannot_speak_past_the_sidecar(sent: str) -> None:
    # Envoy appends its element to what a caller sent. Whatever that was, it must not become the identity.
    found = spiffe_from_xfcc(f"{sent},By=y;Hash=1;URI={MEDIA}")
    assert found in (MEDIA, None)


def test_a_peer_with_several_ids_or_none_proves_nothing() -> None:
    assert peer_service({"peer_spiffe_id": [AUTH.encode()]}) == "auth"
    assert peer_service({"peer_spiffe_id": [AUTH.encode(), MEDIA.encode()]}) is None
    assert peer_service({}) is None
    assert peer_service({"x509_common_name": [b"auth-service"]}) is None


def test_the_lock_is_shared_between_authorities(tmp_path: Path) -> None:
    # Two processes starting at once on an empty folder must end up with one root.
    bundles: list[bytes] = []
    barrier = threading.Barrier(4)

    def start() -> None:
        barrier.wait()
        bundles.append(LocalCA(tmp_path / "ca").bundle())

    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(bundles) == 4
    assert len(set(bundles)) == 1
    assert not list((tmp_path / "ca").glob(".*"))
