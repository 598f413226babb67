from __future__ import annotations

import re

from tests.kit.channels.conftest import Connect, Serve

from whispr.kit.telemetry import metrics


def value(name: str) -> float:
    found = re.search(rf"^{re.escape(name)} (\S+)$", metrics.exposition().decode(), re.MULTILINE)
    return float(found[1]) if found else 0.0


async def test_what_happens_is_counted(serve: Serve, connect: Connect) -> None:
    names = [
        "whispr_channels_sockets",
        "whispr_channels_channels",
        "whispr_channels_frames_in_total",
        "whispr_channels_frames_out_total",
        "whispr_channels_malformed_total",
        'whispr_channels_joins_total{outcome="ok"}',
        'whispr_channels_joins_total{outcome="refused"}',
    ]
    before = {name: value(name) for name in names}
    _, port = await serve()
    client = await connect(port)
    await client.join("room:a")
    await client.join("room:b", {"refuse": True})
    client.text("?")
    await client.next()
    assert [value(name) - before[name] for name in names] == [1, 1, 3, 3, 1, 1, 1]
