"""What `up` counts: itself, the processes it keeps running, and what the gateway's process says of itself."""

from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
from aiohttp import ClientError, ClientSession, ClientTimeout, UnixConnector, web
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from whispr.instance.gateway import METRICS_PATH
from whispr.instance.supervision import Child, Family

# Well below the ten seconds after which Prometheus gives up, so that it is told why.
ASK_SECONDS = 3.0
AWAY = "The gateway does not answer: it has not started, or is being started again.\n"


class Metrics:
    """The pages of `up` for Prometheus. The registry is this object's own: tests run several instances in one process.

    `socket` gives the path at which the gateway's process tells what it counts, None while there is none.
    """

    def __init__(self, family: Family, socket: Callable[[], Path | None]) -> None:
        self._socket = socket
        self._registry = CollectorRegistry(auto_describe=False)
        ProcessCollector(registry=self._registry)
        self._registry.register(Parts(family))

    def routes(self) -> list[web.RouteDef]:
        """`/metrics` of this process and the parts, `/metrics/gateway` of the gateway (503 while it is away)."""
        return [web.get("/metrics", self._respond), web.get("/metrics/gateway", self._respond_of_gateway)]

    async def _respond(self, _: web.Request) -> web.Response:
        return page(generate_latest(self._registry))

    async def _respond_of_gateway(self, _: web.Request) -> web.Response:
        socket = self._socket()
        text = None if socket is None else await read(socket)
        return web.Response(status=503, text=AWAY) if text is None else page(text)


class Parts(Collector):
    """Each supervised part, read when Prometheus asks. A server that is not this instance's own is no part of it."""

    def __init__(self, family: Family) -> None:
        self._family = family

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        for kind, name, text, measure in MEASURES:
            samples = kind(f"whispr_part_{name}", text, labels=["part"])
            for child in self._family.children.values():
                samples.add_metric([child.name], measure(child))
            yield samples


def _resident(child: Child) -> float:
    # The number of a process that has ended may be a stranger's by now.
    if child.pid is None or not child.running:
        return 0.0
    try:
        return float(psutil.Process(child.pid).memory_info().rss)
    except psutil.Error:
        return 0.0


Kind = type[CounterMetricFamily] | type[GaugeMetricFamily]
MEASURES: tuple[tuple[Kind, str, str, Callable[[Child], float]], ...] = (
    (GaugeMetricFamily, "up", "1 while the part's process runs.", lambda child: float(child.running)),
    (
        CounterMetricFamily,
        "restarts",
        "Times the part's process ended unasked and was started again.",
        lambda child: child.restarts,
    ),
    (
        GaugeMetricFamily,
        "started_seconds",
        "When the part's present process was started, in seconds since 1970.",
        lambda child: child.started_at,
    ),
    (
        GaugeMetricFamily,
        "resident_bytes",
        "Memory of the part's process, without those it has started itself; 0 when it is gone.",
        _resident,
    ),
)


async def read(socket: Path) -> bytes | None:
    """What the gateway's process behind `socket` counts, as Prometheus text; None when it does not answer in time."""
    try:
        async with (
            ClientSession(
                connector=UnixConnector(str(socket)), timeout=ClientTimeout(total=ASK_SECONDS)
            ) as session,
            # Envoy has thousands of numbers for things that never happen here.
            session.get(f"http://gateway{METRICS_PATH}?usedonly", raise_for_status=True) as answer,
        ):
            return await answer.read()
    except (ClientError, TimeoutError):
        return None


def page(text: bytes) -> web.Response:
    """An answer to Prometheus."""
    return web.Response(body=text, headers={"content-type": CONTENT_TYPE_PLAIN_0_0_4})
