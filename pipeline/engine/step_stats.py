"""How full the engine is, step by step. Importing this imports vLLM."""

from collections.abc import Callable
from typing import Any

from vllm.v1.metrics.loggers import StatLoggerBase


class EngineLoad(StatLoggerBase):  # type: ignore[misc]
    """Hears what vLLM's scheduler says of each step; one engine for each process.

    Attributes:
        slots: most requests that the engine runs at once (``max_num_seqs``).
        watcher: is told of each step: requests that keep their slots after it, requests that wait for a slot, and
            requests that ended with it. Their sum with the first are the slots taken, where vLLM's scheduling is not
            asynchronous (as on a CPU); where it is, the first already has what the next step admits.
    """

    def __init__(self, vllm_config: Any, *_: Any) -> None:
        self.slots = int(vllm_config.scheduler_config.max_num_seqs)
        self.watcher: Callable[[int, int, int], None] | None = None

    def record(self, scheduler_stats: Any, iteration_stats: Any, *_: Any, **__: Any) -> None:
        """Called by vLLM for each step; one without outputs has no ``iteration_stats``."""
        if scheduler_stats is not None and self.watcher is not None:
            ended = len(iteration_stats.finished_requests) if iteration_stats is not None else 0
            self.watcher(scheduler_stats.num_running_reqs, scheduler_stats.num_waiting_reqs, ended)

    def log_engine_initialized(self) -> None:
        """Nothing to say."""
