"""Base64 as contracts write binary values in JSON: standard alphabet, padded."""

from __future__ import annotations

import base64
import binascii


def encode_base64(value: bytes) -> str:
    return base64.b64encode(value).decode()


def decode_base64(value: str) -> bytes:
    """Raises ValueError for anything that is not strict base64."""
    try:
        return base64.b64decode(value, validate=True)
    except binascii.Error as error:
        raise ValueError(str(error)) from error
