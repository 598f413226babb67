"""The objects clients keep with a conversation: metadata and a member's own settings."""

from __future__ import annotations

import math
from typing import Any, Final

import msgspec

from whispr.services.messaging.models.failures import DocumentTooLarge, InvalidDocument

MAX_DOCUMENT_BYTES: Final = 8 * 1024
MAX_DOCUMENT_DEPTH: Final = 32


def check_document(document: dict[str, Any]) -> None:
    """Refuse what PostgreSQL cannot hold, or what is larger than 8 KiB. Raises `InvalidDocument`."""
    try:
        size = len(msgspec.json.encode(document))
        _check_node(document, MAX_DOCUMENT_DEPTH)
    except (ValueError, OverflowError, RecursionError, TypeError) as error:
        raise InvalidDocument from error
    if size > MAX_DOCUMENT_BYTES:
        raise DocumentTooLarge(limit=MAX_DOCUMENT_BYTES)


def _check_node(node: Any, depth: int) -> None:
    if depth == 0:
        raise ValueError("too deep")
    if isinstance(node, str):
        if "\0" in node:
            raise ValueError("NUL")
    elif isinstance(node, float):
        if not math.isfinite(node):
            raise ValueError("not a number")
    elif isinstance(node, dict):
        for key, value in node.items():
            _check_node(key, depth)
            _check_node(value, depth - 1)
    elif isinstance(node, list):
        for value in node:
            _check_node(value, depth - 1)
