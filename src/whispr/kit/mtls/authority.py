"""The certificate authority of one machine: EC P-256, short-lived leaves, roots that change without a gap in trust."""

from __future__ import annotations

import fcntl
import ipaddress
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from whispr.kit.clock import Clock, SystemClock
from whispr.kit.mtls.spiffe import spiffe_id

ROOT_TTL = timedelta(days=365)
ROOT_RENEWAL = timedelta(days=90)
LEAF_TTL = timedelta(hours=24)

# Clocks of one machine agree, but a container's may be set back by a second or two at start.
_SKEW = timedelta(minutes=5)

CERT, KEY, CA = "cert.pem", "key.pem", "ca.pem"
_CURRENT = "..data"
_GRACE_SECONDS = 60.0


class _Root(msgspec.Struct, frozen=True):
    """A root and when it may sign and be trusted."""

    certificate: str
    key: str
    signs_from: datetime
    trusted_until: datetime


@dataclass(frozen=True, slots=True)
class _Signer:
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey


class LocalCA:
    """A CA whose state lives in `directory` (created with mode 0700): `roots.json` (0600, keys) and `ca.pem` (trust bundle).

    Creating it in an empty folder makes the first root. Several processes may share the folder.
    """

    def __init__(
        self,
        directory: Path,
        trust_domain: str = "cluster.local",
        namespace: str = "whispr",
        clock: Clock | None = None,
    ) -> None:
        self._dir = directory
        self._trust_domain = trust_domain
        self._namespace = namespace
        self._clock = clock or SystemClock()
        self._dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        with self._locked():
            self._keep_roots()

    def bundle(self) -> bytes:
        """The PEM certificates to trust now: the present root and, around a rotation, its neighbour."""
        with self._locked():
            return self._bundle(self._keep_roots())

    def issue(self, service: str, directory: Path, ttl: timedelta = LEAF_TTL) -> None:
        """Write a fresh `cert.pem`, `key.pem` (0600) and `ca.pem` for `service` into `directory`, all three at once.

        The layout is that of a Kubernetes secret mount (links into `..data`, which is swapped), so a reader that resolves
        the folder first never pairs a new key with an old certificate.
        """
        with self._locked():
            roots = self._keep_roots()
            signer = self._signer(roots)
            key = ec.generate_private_key(ec.SECP256R1())
            certificate = self._leaf(signer, service, key, ttl)
            _publish(
                directory,
                {
                    CERT: certificate.public_bytes(serialization.Encoding.PEM),
                    KEY: _key_pem(key),
                    CA: self._bundle(roots),
                },
            )

    def renew(self, service: str, directory: Path, ttl: timedelta = LEAF_TTL) -> bool:
        """Issue if what is in `directory` is missing, unreadable, past half its life or not of the present roots.

        Call it often (it is cheap when nothing is due); returns whether it issued. Half a life leaves the other half for
        an outage of whatever calls this.
        """
        if not self._due(service, directory):
            return False
        self.issue(service, directory, ttl)
        return True

    def rotate_root(self, lead: timedelta = LEAF_TTL, leaf_ttl: timedelta = LEAF_TTL) -> None:
        """Add a new root: trusted at once, signing after `lead`; the old one is trusted until its last leaf has expired.

        `lead` is the time in which every workload gets the new bundle (`renew` sees to it). Signing at once would show new
        leaves to peers that do not know the new root yet. Rotating again before the new root signs does nothing.
        """
        with self._locked():
            roots = self._keep_roots()
            self._rotate(roots, lead, leaf_ttl)

    def _due(self, service: str, directory: Path) -> bool:
        try:
            certificate = x509.load_pem_x509_certificate((directory / CERT).read_bytes())
            bundle = (directory / CA).read_bytes()
            names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        except (OSError, ValueError, x509.ExtensionNotFound):
            return True
        start, end = certificate.not_valid_before_utc + _SKEW, certificate.not_valid_after_utc
        with self._locked():
            roots = self._keep_roots()
        signer = x509.load_pem_x509_certificate(self._signing(roots).certificate.encode())
        return (
            self._clock.now() >= start + (end - start) / 2
            or bundle != self._bundle(roots)
            # A leaf of the old root, however long it may live, must be gone before that root is.
            or certificate.issuer != signer.subject
            or self._id(service) not in names.get_values_for_type(x509.UniformResourceIdentifier)
        )

    def _id(self, service: str) -> str:
        return spiffe_id(service, self._trust_domain, self._namespace)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        descriptor = os.open(self._dir / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _keep_roots(self) -> list[_Root]:
        """The trusted roots, oldest first; drops expired ones, makes the first one, rotates when the last one ages."""
        now = self._clock.now()
        stored = self._read()
        roots = [root for root in stored if root.trusted_until > now]
        if not any(root.signs_from <= now for root in roots):
            # Nothing that may sign is left (first start, or a long sleep): no leaf of the old root is valid either.
            roots = [self._make_root(now)]
        if roots != stored:
            self._write(roots)
        if roots[-1].trusted_until - now < ROOT_RENEWAL:
            roots = self._rotate(roots, LEAF_TTL, LEAF_TTL)
        return roots

    def _rotate(self, roots: list[_Root], lead: timedelta, leaf_ttl: timedelta) -> list[_Root]:
        now = self._clock.now()
        if roots[-1].signs_from > now:
            return roots
        new = self._make_root(now + lead)
        until = now + lead + leaf_ttl + _SKEW
        old = [msgspec.structs.replace(root, trusted_until=min(root.trusted_until, until)) for root in roots]
        self._write([*old, new])
        return [*old, new]

    def _signing(self, roots: list[_Root]) -> _Root:
        return [root for root in roots if root.signs_from <= self._clock.now()][-1]

    def _signer(self, roots: list[_Root]) -> _Signer:
        root = self._signing(roots)
        key = serialization.load_pem_private_key(root.key.encode(), password=None)
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise TypeError("The root's key is not an elliptic-curve key.")
        return _Signer(x509.load_pem_x509_certificate(root.certificate.encode()), key)

    def _bundle(self, roots: list[_Root]) -> bytes:
        return "".join(root.certificate for root in roots).encode()

    def _read(self) -> list[_Root]:
        try:
            return msgspec.json.decode((self._dir / "roots.json").read_bytes(), type=list[_Root])
        except FileNotFoundError:
            return []

    def _write(self, roots: list[_Root]) -> None:
        _replace(self._dir / "roots.json", msgspec.json.encode(roots), 0o600)
        _replace(self._dir / CA, self._bundle(roots), 0o644)

    def _make_root(self, signs_from: datetime) -> _Root:
        now = self._clock.now()
        key = ec.generate_private_key(ec.SECP256R1())
        # A name of its own: verifiers look roots up by name, and two of one name with different keys confuse some.
        name = x509.Name(
            [
                x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Whispr"),
                x509.NameAttribute(NameOID.COMMON_NAME, f"Whispr local CA {secrets.token_hex(4)}"),
            ]
        )
        identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - _SKEW)
            .not_valid_after(now + ROOT_TTL)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(cert_sign=True), critical=True)
            .add_extension(identifier, critical=False)
            .sign(key, hashes.SHA256())
        )
        pem = certificate.public_bytes(serialization.Encoding.PEM).decode()
        return _Root(pem, _key_pem(key).decode(), signs_from, now + ROOT_TTL)

    def _leaf(
        self, signer: _Signer, service: str, key: ec.EllipticCurvePrivateKey, ttl: timedelta
    ) -> x509.Certificate:
        now = self._clock.now()
        issuer_id = signer.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
        return (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{service}-service")]))
            .issuer_name(signer.certificate.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - _SKEW)
            .not_valid_after(min(now + ttl, signer.certificate.not_valid_after_utc))
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(cert_sign=False), critical=True)
            .add_extension(
                x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]),
                critical=False,
            )
            .add_extension(
                x509.SubjectAlternativeName(
                    [
                        x509.UniformResourceIdentifier(self._id(service)),
                        x509.DNSName(f"{service}-service"),
                        x509.DNSName("localhost"),
                        x509.IPAddress(ipaddress.IPv4Address("127.0.0.1")),
                    ]
                ),
                critical=False,
            )
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer_id), critical=False
            )
            .sign(signer.key, hashes.SHA256())
        )


def _usage(*, cert_sign: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not cert_sign,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=cert_sign,
        crl_sign=cert_sign,
        encipher_only=False,
        decipher_only=False,
    )


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _write_new(path: Path, content: bytes, mode: int) -> None:
    # The mode is set when the file is made: a chmod afterwards would leave a moment in which others may read the key.
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _replace(path: Path, content: bytes, mode: int) -> None:
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    try:
        _write_new(temporary, content, mode)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _publish(directory: Path, files: dict[str, bytes]) -> None:
    """Put `files` into `directory` in one step: a new version folder, then one rename of the link to it."""
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    version = directory / f"..{secrets.token_hex(8)}"
    version.mkdir(mode=0o700)
    for name, content in files.items():
        _write_new(version / name, content, 0o600 if name == KEY else 0o644)
    _relink(directory / _CURRENT, version.name)
    for name in files:
        if not (directory / name).is_symlink():
            _relink(directory / name, f"{_CURRENT}/{name}")
    # A version stays for a while: a reader may have resolved the link just before it was swapped.
    oldest = version.stat().st_mtime - _GRACE_SECONDS
    for entry in directory.glob("..?*"):
        if entry.is_dir() and not entry.is_symlink() and entry.stat().st_mtime < oldest:
            shutil.rmtree(entry, ignore_errors=True)


def _relink(link: Path, target: str) -> None:
    temporary = link.with_name(f".{link.name.lstrip('.')}.{secrets.token_hex(6)}")
    temporary.symlink_to(target)
    temporary.replace(link)
