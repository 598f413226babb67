"""Where the root keys come from: a file of this machine or the environment. They are never in the database."""

from __future__ import annotations

import os
import secrets
import stat
from base64 import b64decode, b64encode
from pathlib import Path
from typing import Protocol

import msgspec

from whispr.kit.settings import SettingsError
from whispr.services.auth.models import RootKeys
from whispr.services.auth.settings import AuthSettings

KEY_BYTES = 32


class RootKeySource(Protocol):
    """A place that keeps root keys."""

    def load(self) -> RootKeys:
        """The ring. Raises `SettingsError` naming what is wrong and what to do."""


class _Ring(msgspec.Struct, forbid_unknown_fields=True):
    primary: str
    keys: dict[str, str]


def _parse(text: bytes, where: str) -> RootKeys:
    # The error must not quote the text: it is the secret itself.
    try:
        ring = msgspec.json.decode(text, type=_Ring)
        keys = {name: b64decode(value, validate=True) for name, value in ring.keys.items()}
    except (msgspec.MsgspecError, ValueError):
        raise SettingsError(f'{where}: is not {{"primary": ID, "keys": {{ID: BASE64}}}}') from None
    if ring.primary not in keys or any(len(key) != KEY_BYTES for key in keys.values()):
        raise SettingsError(f"{where}: needs {KEY_BYTES}-byte keys, the primary one among them")
    return RootKeys(ring.primary, keys)


def new_ring() -> bytes:
    """A fresh ring of one key, as JSON."""
    name = f"root-{secrets.token_hex(4)}"
    return msgspec.json.encode(_Ring(name, {name: b64encode(secrets.token_bytes(KEY_BYTES)).decode()}))


class EnvironmentKeys:
    """The ring in `WHISPR_AUTH_KEYRING`."""

    def __init__(self, text: str) -> None:
        self._text = text

    def load(self) -> RootKeys:
        return _parse(self._text.encode(), "WHISPR_AUTH_KEYRING")


class FileKeys:
    """The ring in a file of mode 0600; `create` makes it when it is missing."""

    def __init__(self, path: Path, *, create: bool) -> None:
        self._path = path
        self._create = create

    def load(self) -> RootKeys:
        where = f"WHISPR_AUTH_KEYRING_FILE: {self._path}"
        if not self._path.exists():
            if not self._create:
                raise SettingsError(
                    f"{where} does not exist. Put the ring there, or set WHISPR_AUTH_KEYRING_CREATE=true once to make "
                    "a new one; what lies encrypted in the database can only be read with the ring it was written with"
                )
            self._make()
        try:
            descriptor = os.open(self._path, os.O_RDONLY)
        except OSError as error:
            raise SettingsError(f"{where}: {error.strerror}") from None
        with os.fdopen(descriptor, "rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            if mode & 0o027:
                raise SettingsError(f"{where}: mode {mode:04o} lets others at the keys; use `chmod 600`")
            return _parse(file.read(65536), where)

    def _make(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._path.with_name(f"{self._path.name}.{os.getpid()}.new")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(new_ring())
            file.flush()
            os.fsync(file.fileno())
        try:
            # Linking fails where renaming would overwrite: of two processes that start together both use the first's.
            os.link(temporary, self._path)
        except FileExistsError:
            pass
        finally:
            temporary.unlink()


def root_key_source(settings: AuthSettings, environment: str) -> RootKeySource:
    """The source the settings name. Raises `SettingsError` if they name none."""
    if settings.keyring is not None:
        return EnvironmentKeys(settings.keyring.get_secret_value())
    if settings.keyring_file is None:
        raise SettingsError("WHISPR_AUTH_KEYRING_FILE or WHISPR_AUTH_KEYRING is needed")
    create = settings.keyring_create
    return FileKeys(
        settings.keyring_file, create=environment in ("development", "test") if create is None else create
    )
