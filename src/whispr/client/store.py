"""The client's local state: a key-value store in one encrypted file, or in memory.

File layout: an 8-byte magic, a header (argon2id parameters, salt, the data key wrapped by the passphrase) and then a
journal of frames. One frame is one transaction: every record it writes, sealed with XChaCha20-Poly1305 under
the data key. A frame's number in the file is authenticated with it, so frames cannot be reordered, repeated
or cut out of the middle.

Crash safety: `transaction()` returns after the frame is on the disk (fsync). A crash while a frame is being
appended leaves an incomplete tail, which belongs to a transaction that never returned and is dropped at the next opening.
When most of the journal is outdated, or `compact()` is called, it is rewritten into a new file that atomically replaces
the old one; until then what was deleted is still in it, encrypted.

What encryption cannot do here: whoever may write the file can put an older copy in its place. Ratchets
would then repeat keys, so a backup of this file must never be restored on a live device.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Final, TypeVar

import msgspec
from argon2.low_level import Type, hash_secret_raw
from nacl.bindings import (
    crypto_aead_xchacha20poly1305_ietf_decrypt as _open,
)
from nacl.bindings import (
    crypto_aead_xchacha20poly1305_ietf_encrypt as _seal,
)
from nacl.exceptions import CryptoError as SealBroken

from .failures import StoreCorrupted, StoreInUse, WrongPassphrase

MAGIC: Final = b"WHISPR\x00\x01"
NONCE: Final = 24
_LENGTH: Final = struct.Struct(">I")
_COMPACT_FLOOR: Final = 1 << 20

T = TypeVar("T")


class KdfCost(msgspec.Struct, frozen=True):
    """argon2id cost: passes, memory in KiB, lanes. The default is RFC 9106's second recommendation."""

    passes: int = 3
    memory: int = 65536
    lanes: int = 4


class _Header(msgspec.Struct, frozen=True):
    cost: KdfCost
    salt: bytes
    nonce: bytes
    wrapped_key: bytes


class Store:
    """Records (bytes) by space and key, written in transactions that are atomic and durable.

    `Store()` keeps everything in memory. `Store.open(path, passphrase)` opens or creates the encrypted file;
    it is locked against a second process until `close()`. Not thread-safe: one event loop uses it, and a
    transaction never spans an await.
    """

    def __init__(self) -> None:
        self._records: dict[str, dict[str, bytes]] = {}
        self._journal: _Journal | None = None
        self._writes: dict[tuple[str, str], bytes | None] | None = None

    @classmethod
    def open(cls, path: Path, passphrase: str, cost: KdfCost | None = None) -> Store:
        """Open the file at `path`, creating it if it does not exist.

        `cost` counts for a new file only. Raises WrongPassphrase, StoreCorrupted, StoreInUse.
        """
        store = cls()
        store._journal = _Journal(path, passphrase, cost or KdfCost(), store._records)
        return store

    def close(self) -> None:
        if self._journal is not None:
            self._journal.close()

    def compact(self) -> None:
        """Rewrite the file, so that it holds nothing that was deleted or replaced. Raises OSError, and harms nothing."""
        if self._journal is not None:
            self._journal.compact({})

    def get(self, space: str, key: str) -> bytes | None:
        if self._writes is not None and (space, key) in self._writes:
            return self._writes[space, key]
        return self._records.get(space, {}).get(key)

    def keys(self, space: str) -> list[str]:
        """Keys of a space in ascending order, pending writes included."""
        keys = set(self._records.get(space, ()))
        for (written_space, key), value in (self._writes or {}).items():
            if written_space == space:
                (keys.discard if value is None else keys.add)(key)
        return sorted(keys)

    def put(self, space: str, key: str, value: bytes) -> None:
        self._pending()[space, key] = value

    def delete(self, space: str, key: str) -> None:
        self._pending()[space, key] = None

    def load(self, space: str, key: str, kind: type[T]) -> T | None:
        """Read a record as `kind`."""
        raw = self.get(space, key)
        return None if raw is None else msgspec.msgpack.decode(raw, type=kind)

    def save(self, space: str, key: str, value: Any) -> None:
        self.put(space, key, msgspec.msgpack.encode(value))

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """All writes inside are kept together or, when the block raises, not at all. Nests into the outer one."""
        if self._writes is not None:
            yield
            return
        self._writes = {}
        try:
            yield
            if self._writes and self._journal is not None:
                self._journal.append(self._writes)
            _apply(self._records, self._writes)
        finally:
            self._writes = None

    def _pending(self) -> dict[tuple[str, str], bytes | None]:
        if self._writes is None:
            raise RuntimeError("a write needs an open transaction")
        return self._writes


class _Journal:
    def __init__(
        self, path: Path, passphrase: str, cost: KdfCost, records: dict[str, dict[str, bytes]]
    ) -> None:
        self._path = path
        self._records = records
        self._frames = 0
        self._file: BinaryIO
        self._lock = _lock(path)
        try:
            if path.exists():
                self._file = path.open("r+b")
                self._header, self._key = _unlock(self._file, passphrase)
                self._replay()
            else:
                self._key = os.urandom(32)
                self._header = _wrap(self._key, passphrase, cost)
                self._file = self._rewrite()
        except BaseException:
            self._lock.close()
            raise
        self._size = self._file.seek(0, os.SEEK_END)
        self._compact_at = max(_COMPACT_FLOOR, 2 * self._size)

    def append(self, writes: dict[tuple[str, str], bytes | None]) -> None:
        start = self._size
        try:
            self._size += self._write_frame(
                self._file, self._frames, [(s, k, v) for (s, k), v in writes.items()]
            )
            self._file.flush()
            os.fsync(self._file.fileno())
        except BaseException:
            # Half a frame must not stay between whole ones: everything after it would be unreadable.
            with contextlib.suppress(OSError):
                self._file.seek(start)
                self._file.truncate(start)
            self._size = start
            raise
        self._frames += 1
        if self._size > self._compact_at:
            try:
                self.compact(writes)
            except OSError:
                # The transaction is on the disk already; a full disk only puts the tidying off.
                self._compact_at = 2 * self._size

    def close(self) -> None:
        self._file.close()
        self._lock.close()

    def compact(self, writes: dict[tuple[str, str], bytes | None]) -> None:
        _apply(self._records, writes)
        old = self._file
        self._file = self._rewrite()
        old.close()
        self._size = self._file.seek(0, os.SEEK_END)
        self._compact_at = max(_COMPACT_FLOOR, 2 * self._size)

    def _rewrite(self) -> BinaryIO:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{self._path.name}.", dir=self._path.parent)
        temporary = Path(name)
        try:
            with os.fdopen(handle, "wb") as file:
                header = msgspec.msgpack.encode(self._header)
                file.write(MAGIC + _LENGTH.pack(len(header)) + header)
                rows: list[tuple[str, str, bytes | None]] = [
                    (space, key, value)
                    for space, keys in self._records.items()
                    for key, value in keys.items()
                ]
                if rows:
                    self._write_frame(file, 0, rows)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self._path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        directory = os.open(self._path.parent, os.O_RDONLY)
        try:
            # Without this the rename itself may be forgotten by a power cut, and with it every later frame.
            os.fsync(directory)
        finally:
            os.close(directory)
        self._frames = 1 if rows else 0
        return self._path.open("r+b")

    def _write_frame(self, file: BinaryIO, number: int, rows: list[tuple[str, str, bytes | None]]) -> int:
        nonce = os.urandom(NONCE)
        sealed = _seal(msgspec.msgpack.encode(rows), _frame_name(number), nonce, self._key)
        return file.write(_LENGTH.pack(len(sealed)) + nonce + sealed)

    def _replay(self) -> None:
        whole = self._file.tell()
        while frame := _read_frame(self._file):
            nonce, sealed = frame
            try:
                rows = msgspec.msgpack.decode(
                    _open(sealed, _frame_name(self._frames), nonce, self._key),
                    type=list[tuple[str, str, bytes | None]],
                )
            except (SealBroken, ValueError) as error:
                if not self._file.read().strip(b"\x00"):
                    break  # a power cut may leave the last frame with its full length and parts of it unwritten
                raise StoreCorrupted(f"frame {self._frames} of {self._path} does not open") from error
            _apply(self._records, {(space, key): value for space, key, value in rows})
            self._frames += 1
            whole = self._file.tell()
        self._file.seek(whole)
        self._file.truncate(whole)


def _apply(records: dict[str, dict[str, bytes]], writes: dict[tuple[str, str], bytes | None]) -> None:
    for (space, key), value in writes.items():
        if value is None:
            records.get(space, {}).pop(key, None)
        else:
            records.setdefault(space, {})[key] = value


def _frame_name(number: int) -> bytes:
    return b"whispr-store-frame" + struct.pack(">Q", number)


def _read_frame(file: BinaryIO) -> tuple[bytes, bytes] | None:
    """The next whole frame, or None at the end or where the last one is incomplete."""
    prefix = file.read(_LENGTH.size)
    if len(prefix) < _LENGTH.size:
        return None
    (length,) = _LENGTH.unpack(prefix)
    body = file.read(NONCE + length)
    return (body[:NONCE], body[NONCE:]) if len(body) == NONCE + length else None


def _lock(path: Path) -> BinaryIO:
    path.parent.mkdir(parents=True, exist_ok=True)
    # A file of its own: the store itself is replaced when it is rewritten, and a lock stays with the old inode.
    lock = path.with_name(path.name + ".lock").open("wb")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.close()
        raise StoreInUse(f"{path} is open in another process") from error
    return lock


def _wrap(key: bytes, passphrase: str, cost: KdfCost) -> _Header:
    salt, nonce = os.urandom(16), os.urandom(NONCE)
    wrapped = _seal(key, _header_name(cost, salt), nonce, _stretch(passphrase, salt, cost))
    return _Header(cost, salt, nonce, wrapped)


def _unlock(file: BinaryIO, passphrase: str) -> tuple[_Header, bytes]:
    if file.read(len(MAGIC)) != MAGIC:
        raise StoreCorrupted("not a Whispr store")
    try:
        (length,) = _LENGTH.unpack(file.read(_LENGTH.size))
        header = msgspec.msgpack.decode(file.read(length), type=_Header)
        wrapping_key = _stretch(passphrase, header.salt, header.cost)
    except (struct.error, msgspec.DecodeError, ValueError) as error:
        raise StoreCorrupted("the header is damaged") from error
    try:
        return header, _open(
            header.wrapped_key, _header_name(header.cost, header.salt), header.nonce, wrapping_key
        )
    except SealBroken as error:
        raise WrongPassphrase("the passphrase does not open this store") from error


def _header_name(cost: KdfCost, salt: bytes) -> bytes:
    return b"whispr-store-key" + msgspec.msgpack.encode(cost) + salt


def _stretch(passphrase: str, salt: bytes, cost: KdfCost) -> bytes:
    return hash_secret_raw(
        passphrase.encode(), salt, cost.passes, cost.memory, cost.lanes, hash_len=32, type=Type.ID
    )
