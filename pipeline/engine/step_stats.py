"""How full the engine is, step by step. Importing this imports vLLM."""

from collections.abc import Callable
from typing import Any

from vllm.v1.metrics.loggers import StatLoggerBase


class EngineLoad(StatLoggerBase):  # type: ignore[misc]
    """Receives the scheduler's statistics of each engine step; one engine for each process.

    Attributes:
        slots: most requests that the engine runs at once (``max_num_seqs``).
        on_step: callback after each step, with the number of requests that keep their slots, of requests that wait
            for one, and of requests that ended. The first and the last add up to the slots in use, unless vLLM
            schedules asynchronously (not on a CPU): then the first includes what the next step admits.
    """

    def __init__(self, vllm_config: Any, *_: Any) -> None:
        self.slots = int(vllm_config.scheduler_config.max_num_seqs)
        self.on_step: Callable[[int, int, int], None] | None = None

    def record(self, scheduler_stats: Any, iteration_stats: Any, *_: Any, **__: Any) -> None:
        """Called by vLLM for each step; one without outputs has no ``iteration_stats``."""
        if scheduler_stats is not None and self.on_step is not None:
            ended = len(iteration_stats.finished_requests) if iteration_stats is not None else 0
            self.on_step(scheduler_stats.num_running_reqs, scheduler_stats.num_waiting_reqs, ended)

    def log_engine_initialized(self) -> None:
        """Nothing to say."""
