"""This process' own certificate: loaded from a folder, taken up again when the folder changes, without a restart."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from whispr.kit.clock import Clock, SystemClock
from whispr.kit.mtls.authority import CA, CERT, KEY
from whispr.kit.telemetry import get_logger, metrics

log = get_logger(__name__)

_Fingerprint = tuple[tuple[str, int, int, int], ...]


class IdentityUnusable(Exception):
    """The folder holds no certificate, key and trust bundle that belong together."""


@dataclass(frozen=True, slots=True)
class _Loaded:
    certificate: bytes
    key: bytes
    roots: bytes
    expires_at: datetime


class WorkloadIdentity:
    """The certificate, key and trust bundle in `directory` (`cert.pem`, `key.pem`, `ca.pem`).

    Raises `IdentityUnusable` if they cannot be used at first. Later a broken folder keeps what was loaded before, so that a
    bad renewal is a warning and not an outage. Safe to use from several threads: gRPC asks from its own.
    """

    def __init__(self, directory: Path, clock: Clock | None = None) -> None:
        self._dir = directory
        self._clock = clock or SystemClock()
        self._lock = threading.Lock()
        self._listeners: list[Callable[[], None]] = []
        self._fingerprint = self._look()
        self._loaded = _load(directory)
        self._version = 1
        metrics.certificate_expiry.set(self._loaded.expires_at.timestamp())

    @property
    def version(self) -> int:
        """Grows by one with each certificate or bundle taken up; channels made under an older one want rebuilding."""
        return self._version

    @property
    def expires_at(self) -> datetime:
        """The end of the present certificate."""
        return self._loaded.expires_at

    def on_rotation(self, callback: Callable[[], None]) -> None:
        """Call `callback` after each rotation, in the thread that noticed it."""
        self._listeners.append(callback)

    def refresh(self) -> bool:
        """Take up what is in the folder if it changed. Cheap when it did not; returns whether it did."""
        with self._lock:
            fingerprint = self._look()
            if fingerprint == self._fingerprint:
                return False
            try:
                loaded = _load(self._dir)
            except IdentityUnusable as error:
                # The fingerprint is not kept, so the next look tries again: this may be a write in progress.
                log.warning("certificate not taken up", error=str(error))
                return False
            self._fingerprint, self._loaded = fingerprint, loaded
            self._version += 1
        metrics.certificate_expiry.set(loaded.expires_at.timestamp())
        metrics.certificate_rotations.inc()
        log.info("certificate taken up", expires_at=loaded.expires_at.isoformat(), version=self._version)
        for callback in self._listeners:
            callback()
        return True

    async def run(self, interval: float = 5.0) -> None:
        """A supervised loop that looks for a new certificate every `interval` seconds."""
        while True:
            self.refresh()
            await asyncio.sleep(interval)

    async def ready(self) -> None:
        """A check of readiness: raises `IdentityUnusable` once the certificate has expired."""
        self.refresh()
        if self._clock.now() >= self._loaded.expires_at:
            raise IdentityUnusable("The certificate has expired.")

    def server_credentials(self) -> grpc.ServerCredentials:
        """Credentials of a server that demands a client certificate and shows the newest of ours to each new connection."""
        shown = self._version

        def fetch() -> grpc.ServerCertificateConfiguration | None:
            nonlocal shown
            self.refresh()
            if shown == self._version:
                return None
            shown = self._version
            return self._server_configuration()

        return grpc.dynamic_ssl_server_credentials(
            self._server_configuration(),
            fetch,  # type: ignore[arg-type]  # the stubs do not know that None means "no change"
            require_client_authentication=True,
        )

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """Credentials of a client as of now. They do not follow a rotation: compare `version` and make the channel again."""
        self.refresh()
        loaded = self._loaded
        return grpc.ssl_channel_credentials(loaded.roots, loaded.key, loaded.certificate)

    @staticmethod
    def channel_options(service: str) -> list[tuple[str, str]]:
        """Channel options that make the server prove to be `service`, whatever address it was reached at."""
        return [("grpc.ssl_target_name_override", f"{service}-service")]

    def _server_configuration(self) -> grpc.ServerCertificateConfiguration:
        loaded = self._loaded
        return grpc.ssl_server_certificate_configuration([(loaded.key, loaded.certificate)], loaded.roots)

    def _look(self) -> _Fingerprint:
        found = []
        for name in (CERT, KEY, CA):
            path = self._dir / name
            try:
                status = path.stat()
            except OSError:
                continue
            found.append((name, status.st_ino, status.st_mtime_ns, status.st_size))
        return tuple(found)


def _load(directory: Path) -> _Loaded:
    try:
        # Resolved once: all three are then read from one version, even if the folder is swapped meanwhile.
        version = (directory / CERT).resolve(strict=True).parent
        source = version if all((version / name).exists() for name in (KEY, CA)) else directory
        certificate, key, roots = ((source / name).read_bytes() for name in (CERT, KEY, CA))
        leaf = x509.load_pem_x509_certificate(certificate)
        public = serialization.load_pem_private_key(key, password=None).public_key()
        x509.load_pem_x509_certificates(roots)
    except (OSError, ValueError, TypeError) as error:
        raise IdentityUnusable(f"{directory}: {type(error).__name__}: {error}") from None
    spki = (serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    if leaf.public_key().public_bytes(*spki) != public.public_bytes(*spki):
        raise IdentityUnusable(f"{directory}: the key does not belong to the certificate.")
    return _Loaded(certificate, key, roots, leaf.not_valid_after_utc)
