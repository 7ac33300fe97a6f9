"""An HTTP proxy on loopback that treats requests as an object store in trouble does."""

import asyncio
import random
import threading
from dataclasses import dataclass

from aiohttp import ClientSession, ClientTimeout, web


@dataclass
class Faults:
    """Shares of requests that come to harm; others pass.

    Attributes:
        refused: answered with 503.
        failed: carried out, and answered with 500 all the same.
        cut: carried out, and the answer ends in its middle.
        lost: the connection ends before anything is carried out.
        slow: delayed by ``seconds``.
        hurt: how many have come to harm so far.
    """

    refused: float = 0.0
    failed: float = 0.0
    cut: float = 0.0
    lost: float = 0.0
    slow: float = 0.0
    seconds: float = 0.5
    hurt: int = 0

    def draw(self, rng: random.Random) -> str | None:
        """What happens to the next request."""
        left = rng.random()
        for kind in ("refused", "failed", "cut", "lost", "slow"):
            left -= getattr(self, kind)
            if left < 0:
                self.hurt += 1
                return kind
        return None


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
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()  # those whose connection was cut
        await asyncio.sleep(0)

    async def _pass(self, request: web.Request) -> web.StreamResponse:
        fault = self.faults.draw(self.rng)
        if fault == "refused":
            return _trouble(503, "SlowDown")
        if fault == "lost":
            return _gone(request)
        if fault == "slow":
            await asyncio.sleep(self.faults.seconds)
        headers = {k: v for k, v in request.headers.items() if k.lower() not in ("transfer-encoding", "expect")}
        async with self._session.request(
            request.method, f"{self.target}{request.raw_path}", headers=headers, data=await request.read()
        ) as answer:
            body = await answer.read()
            if fault == "failed":
                return _trouble(500, "InternalError")
            if fault == "cut":
                return await self._cut(request, answer.status, body)
            kept = {k: v for k, v in answer.headers.items() if k.lower() not in ("transfer-encoding", "connection")}
            return web.Response(status=answer.status, headers=kept, body=None if request.method == "HEAD" else body)

    async def _cut(self, request: web.Request, status: int, body: bytes) -> web.StreamResponse:
        """Half of the answer, if it has a body, then nothing."""
        response = web.StreamResponse(status=status, headers={"Content-Length": str(len(body))})
        if len(body) > 1 and request.method != "HEAD":
            await response.prepare(request)
            await response.write(body[: len(body) // 2])
        return _gone(request)


def _gone(request: web.Request) -> web.StreamResponse:
    """End the connection."""
    assert request.transport is not None
    request.transport.abort()
    return web.Response()  # nobody is left to read it


def _trouble(status: int, code: str) -> web.Response:
    return web.Response(status=status, text=f"<Error><Code>{code}</Code></Error>", content_type="application/xml")
