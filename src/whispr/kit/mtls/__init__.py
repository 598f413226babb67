"""Mutual TLS between services: who they are (SPIFFE ids), who vouches for them (a local CA), how they show it.

On one machine `LocalCA` issues short-lived certificates and `WorkloadIdentity` takes up new ones while running. In a mesh
the sidecar does both, and the caller's identity comes in a header (`spiffe_from_xfcc`).
"""

from __future__ import annotations

from whispr.kit.mtls.authority import LocalCA
from whispr.kit.mtls.spiffe import peer_service, spiffe_from_xfcc, spiffe_id, spiffe_service
from whispr.kit.mtls.workload import IdentityUnusable, WorkloadIdentity

__all__ = [
    "IdentityUnusable",
    "LocalCA",
    "WorkloadIdentity",
    "peer_service",
    "spiffe_from_xfcc",
    "spiffe_id",
    "spiffe_service",
]
