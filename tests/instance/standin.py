"""A service's process for tests of what stands around services: doors that answer with what they were asked.

`GET /.well-known/jwks.json` gives the document of WHISPR_AUTH_JWKS, `/slow` waits, `/die` ends the process at once.
"""

import asyncio
import json
import os
import sys

from aiohttp import WSMsgType, web


async def echo(request: web.Request) -> web.StreamResponse:
    if request.path == "/.well-known/jwks.json":
        return web.Response(text=os.environ["WHISPR_AUTH_JWKS"], content_type="application/json")
    if request.path.endswith("/die"):
        os._exit(9)
    body = await request.read()
    seen = {
        "service": sys.argv[1],
        "pid": os.getpid(),
        "port": request.transport.get_extra_info("sockname")[1] if request.transport else None,
        "method": request.method,
        "path": request.raw_path,
        "headers": {name.lower(): value for name, value in request.headers.items()},
        "size": len(body),
        "environment": {name: value for name, value in os.environ.items() if name.startswith("WHISPR_")},
    }
    return web.Response(text=json.dumps(seen), content_type="application/json")


async def ready(_: web.Request) -> web.Response:
    return web.Response(text="{}", content_type="application/json")


async def socket(request: web.Request) -> web.WebSocketResponse:
    response = web.WebSocketResponse(protocols=["phoenix"])
    await response.prepare(request)
    async for message in response:
        if message.type is WSMsgType.TEXT and message.data == "close":
            await response.close(code=1012, message=b"restart")
        elif message.type is WSMsgType.TEXT:
            await response.send_str(f"{request.query.get('token')}:{message.data}")
        elif message.type is WSMsgType.BINARY:
            await response.send_bytes(message.data)
    return response


async def listen(bind: str, method: str, handler: object) -> None:
    application = web.Application(client_max_size=2**26)
    application.router.add_route(method, "/{path:.*}", handler)  # type: ignore[arg-type]
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    host, _, port = bind.rpartition(":")
    await web.TCPSite(runner, host, int(port)).start()


async def main() -> None:
    await listen(os.environ["WHISPR_HTTP_BIND"], "*", echo)
    if "WHISPR_OWN_HTTP_BIND" in os.environ:
        await listen(os.environ["WHISPR_OWN_HTTP_BIND"], "*", echo)
    await listen(os.environ["WHISPR_INTERNAL_BIND"], "*", ready)
    if "WHISPR_MESSAGING_SOCKET_BIND" in os.environ:
        await listen(os.environ["WHISPR_MESSAGING_SOCKET_BIND"], "GET", socket)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
