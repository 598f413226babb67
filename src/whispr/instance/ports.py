"""Free TCP ports on loopback."""

import random
import socket
from collections.abc import Collection

from whispr.instance.errors import InstanceError

# Below the range that kernels hand to outgoing connections (from 32768 on Linux, 49152 on macOS). A port of that
# range could be taken by any client's socket in the moment in which a killed service is started again.
FIRST, LAST = 20_000, 32_000
ATTEMPTS = 500


def is_free(port: int, host: str = "127.0.0.1") -> bool:
    """True when a server could listen on `host:port` now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # Connections in TIME_WAIT of an earlier run do not stop a server from listening again.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def free_port(taken: Collection[int] = ()) -> int:
    """A port nobody listens on, not in `taken`. Chosen at random, so that two instances seldom meet."""
    chooser = random.SystemRandom()
    for _ in range(ATTEMPTS):
        port = chooser.randint(FIRST, LAST)
        if port not in taken and is_free(port):
            return port
    raise InstanceError(f"No free TCP port between {FIRST} and {LAST} on 127.0.0.1.")


def answers(host: str, port: int) -> bool:
    """True when a server accepts connections there: one with SO_REUSEPORT would let us listen beside it unseen."""
    try:
        with socket.create_connection((host, port), timeout=0.5):
            return True
    except OSError:
        return False
