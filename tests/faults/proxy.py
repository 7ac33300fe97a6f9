"""An HTTP proxy on loopback that treats requests as an object store in trouble does."""

import asyncio
import random
import threading
from dataclasses import dataclass

from aiohttp import ClientSession, ClientTimeout, web


@dataclass
class Faults:
    """Shares of requests that are answered with 503, cut in the middle, or delayed; others pass."""

    refused: float = 0.0
    cut: float = 0.0
    slow: float = 0.0
    seconds: float = 0.5
    hurt: int = 0


class FaultProxy:
    """Runs while the context is; ``url`` is where clients go instead of to ``target``."""

    def __init__(self, target: str, faults: Faults, seed: int) -> None:
        self.target, self.faults, self.rng = target, faults, random.Random(seed)
        self.url = ""
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(),), daemon=True)

    def __enter__(self) -> "FaultProxy":
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)

    async def _serve(self) -> None:
        app = web.Application(client_max_size=1 << 30)
        app.router.add_route("*", "/{path:.*}", self._pass)
        # Signatures cover the address that the client called, and the server behind sees the same one.
        self._session = ClientSession(auto_decompress=False, timeout=ClientTimeout(60))
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        self._ready.set()
        await self._stop.wait()
        await self._session.close()
        await runner.cleanup()

    async def _pass(self, request: web.Request) -> web.StreamResponse:
        draw, faults = self.rng.random(), self.faults
        if draw < faults.refused:
            faults.hurt += 1
            return web.Response(status=503, text="<Error><Code>SlowDown</Code></Error>", content_type="application/xml")
        if draw < faults.refused + faults.slow:
            faults.hurt += 1
            await asyncio.sleep(faults.seconds)
        headers = {k: v for k, v in request.headers.items() if k.lower() not in ("transfer-encoding", "expect")}
        async with self._session.request(
            request.method, f"{self.target}{request.raw_path}", headers=headers, data=await request.read()
        ) as answer:
            body = await answer.read()
            if faults.refused + faults.slow <= draw < faults.refused + faults.slow + faults.cut:
                faults.hurt += 1
                return await self._cut(request, answer.status, dict(answer.headers), body)
            kept = {k: v for k, v in answer.headers.items() if k.lower() not in ("transfer-encoding", "connection")}
            return web.Response(status=answer.status, headers=kept, body=None if request.method == "HEAD" else body)

    async def _cut(self, request: web.Request, status: int, headers: dict[str, str], body: bytes) -> web.StreamResponse:
        """Half of the answer, then nothing."""
        response = web.StreamResponse(status=status, headers={"Content-Length": headers.get("Content-Length", "0")})
        await response.prepare(request)
        if body:
            await response.write(body[: len(body) // 2])
        assert request.transport is not None
        request.transport.abort()
        return response
