"""SPIFFE ids: `spiffe://{trust domain}/ns/{namespace}/sa/{service}-service`, as Kubernetes and Istio spell them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

_ID = re.compile(
    r"spiffe://([a-z0-9._-]{1,255})/ns/([a-z0-9-]{1,63})/sa/([a-z][a-z0-9-]{0,54})-service", re.ASCII
)
_MAX_XFCC = 16 * 1024


def spiffe_id(service: str, trust_domain: str = "cluster.local", namespace: str = "whispr") -> str:
    """The SPIFFE id of `service`. Raises ValueError for a name that has none."""
    uri = f"spiffe://{trust_domain}/ns/{namespace}/sa/{service}-service"
    if _ID.fullmatch(uri) is None:
        raise ValueError(f"{uri!r} is not a SPIFFE id of a service")
    return uri


def spiffe_service(uri: str, trust_domain: str = "cluster.local", namespace: str = "whispr") -> str | None:
    """The service `uri` names, or None unless it is exactly an id of this trust domain and namespace."""
    match = _ID.fullmatch(uri)
    if match is None or match[1] != trust_domain or match[2] != namespace:
        return None
    return match[3]


def peer_service(
    auth_context: Mapping[str, Iterable[bytes]],
    trust_domain: str = "cluster.local",
    namespace: str = "whispr",
) -> str | None:
    """The service at the other end of a gRPC connection (`context.auth_context()`), or None if it did not prove one."""
    # gRPC sets this property only for a certificate with exactly one, well-formed SPIFFE id.
    uris = list(auth_context.get("peer_spiffe_id", ()))
    if len(uris) != 1:
        return None
    return spiffe_service(uris[0].decode("utf-8", "replace"), trust_domain, namespace)


def spiffe_from_xfcc(header: str) -> str | None:
    """The SPIFFE id in a sidecar's `x-forwarded-client-cert`, or None where it holds none or several.

    Only believable inside a mesh, where nothing but the sidecar reaches this port. Of several elements the last counts:
    it was appended by our own sidecar, those before it are what the caller sent.
    """
    if len(header) > _MAX_XFCC:
        return None
    elements = list(_split(header, ","))
    if not elements:
        return None
    uris = []
    for pair in _split(elements[-1], ";"):
        key, _, value = pair.partition("=")
        if key.strip().lower() == "uri":
            uris.append(_unquote(value.strip()))
    return uris[0] if len(uris) == 1 and uris[0].startswith("spiffe://") else None


def _split(value: str, separator: str) -> Iterator[str]:
    """Split outside double quotes; a subject such as `"O=a,CN=b"` holds separators."""
    start, quoted, escaped = 0, False, False
    for index, char in enumerate(value):
        if escaped:
            escaped = False
        elif char == "\\" and quoted:
            escaped = True
        elif char == '"':
            quoted = not quoted
        elif char == separator and not quoted:
            yield value[start:index]
            start = index + 1
    yield value[start:]


def _unquote(value: str) -> str:
    if len(value) >= 2 and value[0] == value[-1] == '"':
        return re.sub(r"\\(.)", r"\1", value[1:-1])
    return value
