"""Answers concurrent requests in batches, in a thread of its own."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

Asked = TypeVar("Asked")
Answered = TypeVar("Answered")


@dataclass(frozen=True)
class _Request(Generic[Asked, Answered]):
    asked: Asked
    answer: asyncio.Future[Answered]


class Batcher(Generic[Asked, Answered]):
    """Collects concurrent requests and answers them in batches.

    The first request of a batch waits for others. While a batch is being answered, new requests are collected for the
    next one.

    Args:
        name: name of the thread.
        work: answers a batch, in the thread.
        size: maximum number of requests of a batch.
        wait_s: seconds that the first request of a batch waits for others.
        shared: exceptions that concern the whole batch. After any other, its requests are tried one by one, so that
            only faulty ones fail.
    """

    def __init__(
        self,
        name: str,
        work: Callable[[list[Asked]], list[Answered]],
        size: int,
        wait_s: float,
        shared: tuple[type[Exception], ...] = (),
    ) -> None:
        self._work = work
        self._size = size
        self._wait_s = wait_s
        self._shared = shared
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)
        self._waiting: list[_Request[Asked, Answered]] = []
        self._timer: asyncio.TimerHandle | None = None
        self._working = False

    async def ask(self, asked: Asked) -> Answered:
        """Return the answer to a request.

        Raises:
            Exception: ``work`` raised it for this request alone, or it is one of ``shared``.
        """
        loop = asyncio.get_running_loop()
        request = _Request[Asked, Answered](asked, loop.create_future())
        self._waiting.append(request)
        if len(self._waiting) >= self._size:
            self._start()
        elif self._timer is None:
            self._timer = loop.call_later(self._wait_s, self._start)
        return await request.answer

    def close(self) -> None:
        """End the thread after the current batch."""
        self._thread.shutdown()

    def _start(self) -> None:
        """Start the next batch, unless one is being answered; its end then starts the next."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        # Drop requests that were canceled while they waited.
        self._waiting = [request for request in self._waiting if not request.answer.done()]
        if self._working or not self._waiting:
            return
        batch, self._waiting = self._waiting[: self._size], self._waiting[self._size :]
        self._working = True
        outcomes = asyncio.get_running_loop().run_in_executor(self._thread, self._answer, [r.asked for r in batch])
        outcomes.add_done_callback(lambda done: self._deliver(batch, done.result()))

    def _answer(self, batch: list[Asked]) -> list[Answered | Exception]:
        try:
            return [*self._work(batch)]
        except self._shared as error:
            return [error] * len(batch)
        except Exception as error:  # noqa: BLE001  raised again in ask
            if len(batch) == 1:
                return [error]
            return [self._answer([asked])[0] for asked in batch]

    def _deliver(self, batch: list[_Request[Asked, Answered]], outcomes: list[Answered | Exception]) -> None:
        self._working = False
        for request, outcome in zip(batch, outcomes, strict=True):
            if request.answer.done():
                continue
            if isinstance(outcome, Exception):
                request.answer.set_exception(outcome)
            else:
                request.answer.set_result(outcome)
        self._start()
