"""The loopback port of `up` itself: `/readyz`, which the gateway passes on, and what is for this machine only."""

import asyncio
import json
import time
from collections.abc import Iterable, Mapping, Sequence

from aiohttp import ClientError, ClientSession, ClientTimeout, web

CACHE_SECONDS = 0.5
ASK_SECONDS = 3.0


class Readiness:
    """Asks `/readyz` on the internal port of each worker of each service; serves the sum on a loopback port.

    `ports` are the internal ports of a service's workers. A service some of whose workers are away is `degraded`: the
    others serve on, and a load balancer that took the whole instance out for it would make an outage of a restart.
    `pages` are served beside it; the gateway leads to none of them.
    """

    def __init__(self, ports: Mapping[str, Sequence[int]], pages: Iterable[web.RouteDef] = ()) -> None:
        self._ports = ports
        self._pages = tuple(pages)
        self._session: ClientSession | None = None
        self._runner: web.AppRunner | None = None
        self._answer: tuple[float, dict[str, str]] = (float("-inf"), {})
        self._asking = asyncio.Lock()
        self.draining = False

    async def start(self, port: int) -> None:
        self._session = ClientSession(timeout=ClientTimeout(total=ASK_SECONDS))
        application = web.Application()
        application.router.add_get("/readyz", self._respond)
        application.router.add_routes(self._pages)
        self._runner = web.AppRunner(application, access_log=None, handle_signals=False, shutdown_timeout=0.5)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", port).start()

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
        if self._session is not None:
            await self._session.close()

    async def services(self) -> dict[str, str]:
        """Each service: `ready`, `degraded` or `unavailable`; at most CACHE_SECONDS old, so that nobody can ask often."""
        async with self._asking:
            asked, answer = self._answer
            if time.monotonic() - asked > CACHE_SECONDS:
                states = await asyncio.gather(*(self._state(ports) for ports in self._ports.values()))
                answer = dict(zip(self._ports, states, strict=True))
                self._answer = (time.monotonic(), answer)
            return answer

    def forget(self) -> None:
        """Ask anew: a process was replaced, and what its predecessor answered says nothing of it."""
        self._answer = (float("-inf"), {})

    async def _state(self, ports: Sequence[int]) -> str:
        ready = await asyncio.gather(*(self.reaches(f"http://127.0.0.1:{port}/readyz") for port in ports))
        return "ready" if all(ready) else "degraded" if any(ready) else "unavailable"

    async def reaches(self, url: str) -> bool:
        """True when `url` answers 200."""
        if self._session is None:
            return False
        try:
            async with self._session.get(url) as answer:
                return answer.status == 200
        except (ClientError, TimeoutError):
            return False

    async def _respond(self, _: web.Request) -> web.Response:
        services = await self.services()
        states = {"draining"} if self.draining else set(services.values())
        status = next(
            (state for state in ("draining", "unavailable", "degraded") if state in states), "ready"
        )
        return web.Response(
            status=200 if status in ("ready", "degraded") else 503,
            body=json.dumps({"status": status, "services": services}).encode(),
            content_type="application/json",
            headers={"cache-control": "no-store"},
        )
