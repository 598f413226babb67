"""What `/readyz` on the public port says: the answers of all services, in one."""

import asyncio
import json
import time

from aiohttp import ClientError, ClientSession, ClientTimeout, web

CACHE_SECONDS = 0.5
ASK_SECONDS = 3.0


class Readiness:
    """Asks `/readyz` on the internal port of each service in `ports`; serves the sum on a loopback port."""

    def __init__(self, ports: dict[str, int]) -> None:
        self._ports = ports
        self._session: ClientSession | None = None
        self._runner: web.AppRunner | None = None
        self._answer: tuple[float, dict[str, bool]] = (float("-inf"), {})
        self._asking = asyncio.Lock()
        self.draining = False

    async def start(self, port: int) -> None:
        self._session = ClientSession(timeout=ClientTimeout(total=ASK_SECONDS))
        application = web.Application()
        application.router.add_get("/readyz", self._respond)
        self._runner = web.AppRunner(application, access_log=None, handle_signals=False, shutdown_timeout=0.5)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", port).start()

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
        if self._session is not None:
            await self._session.close()

    async def services(self) -> dict[str, bool]:
        """Each service and whether it is ready; at most CACHE_SECONDS old, so that nobody can ask the services often."""
        async with self._asking:
            asked, answer = self._answer
            if time.monotonic() - asked > CACHE_SECONDS:
                ready = await asyncio.gather(*(self.is_ready(name) for name in self._ports))
                answer = dict(zip(self._ports, ready, strict=True))
                self._answer = (time.monotonic(), answer)
            return answer

    def forget(self) -> None:
        """Ask anew: a process was replaced, and what its predecessor answered says nothing of it."""
        self._answer = (float("-inf"), {})

    async def is_ready(self, service: str) -> bool:
        return await self._get(f"http://127.0.0.1:{self._ports[service]}/readyz")

    async def reaches(self, url: str) -> bool:
        """True when `url` answers 200."""
        return await self._get(url)

    async def _get(self, url: str) -> bool:
        if self._session is None:
            return False
        try:
            async with self._session.get(url) as answer:
                return answer.status == 200
        except (ClientError, TimeoutError):
            return False

    async def _respond(self, _: web.Request) -> web.Response:
        services = await self.services()
        ready = all(services.values()) and not self.draining
        document = {
            "status": "ready" if ready else "draining" if self.draining else "unavailable",
            "services": {name: "ready" if state else "unavailable" for name, state in services.items()},
        }
        return web.Response(
            status=200 if ready else 503,
            body=json.dumps(document).encode(),
            content_type="application/json",
            headers={"cache-control": "no-store"},
        )
