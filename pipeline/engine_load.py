"""How full the engine is, step by step. Importing this imports vLLM."""

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from vllm.v1.metrics.loggers import StatLoggerBase


class EngineLoad(StatLoggerBase):  # type: ignore[misc]
    """Counts what vLLM's scheduler says of each step; one engine for each process.

    Attributes:
        slots: most requests that the engine runs at once (``max_num_seqs``).
        seconds: spent in steps, by requests that ran when they ended, and whether others waited. Not counted are idle
            ones, and the first step after them.
        watcher: is told of each step: requests in it, and requests that wait for a slot.
    """

    def __init__(self, vllm_config: Any, *_: Any) -> None:
        self.slots = int(vllm_config.scheduler_config.max_num_seqs)
        self.seconds: dict[tuple[int, bool], float] = defaultdict(float)
        self._busy_since: float | None = None
        self.watcher: Callable[[int, int], None] | None = None

    def record(self, scheduler_stats: Any, *_: Any, **__: Any) -> None:
        """Called by vLLM for each step that has outputs."""
        if scheduler_stats is not None:
            running, waiting = scheduler_stats.num_running_reqs, scheduler_stats.num_waiting_reqs
            now = time.monotonic()
            if self._busy_since is not None:  # the step has begun where the one before it ended
                self.seconds[running, waiting > 0] += now - self._busy_since
            self._busy_since = now if running or waiting else None
            if self.watcher is not None:
                self.watcher(running, waiting)

    def log_engine_initialized(self) -> None:
        """Nothing to say."""
