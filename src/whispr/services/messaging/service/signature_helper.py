"""The process that checks signatures for `signatures`. It imports next to nothing, to be there at once and small."""

from __future__ import annotations

import contextlib
import struct
import sys
from typing import BinaryIO, Final

import nacl.bindings
from nacl.exceptions import BadSignatureError

COUNT: Final = struct.Struct("<I")
RECORD: Final = struct.Struct("32s32s64s")
"""Public key, what was signed, signature."""


def is_signed(key: bytes, message: bytes, signature: bytes) -> bool:
    """Whether `signature` is that of `message` by `key`."""
    try:
        nacl.bindings.crypto_sign_open(signature + message, key)
    except (BadSignatureError, ValueError):
        return False
    return True


def serve(source: BinaryIO, sink: BinaryIO) -> None:
    """Answer batches (a count, then so many records) with one byte for each record, until the pipe ends."""
    while len(head := source.read(COUNT.size)) == COUNT.size:
        (count,) = COUNT.unpack(head)
        records = source.read(count * RECORD.size)
        if len(records) < count * RECORD.size:
            return
        sink.write(bytes(is_signed(*claim) for claim in RECORD.iter_unpack(records)))
        sink.flush()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt, BrokenPipeError):
        serve(sys.stdin.buffer, sys.stdout.buffer)
