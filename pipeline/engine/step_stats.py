"""Reports the load of the engine at every step. Importing this module imports vLLM."""

from collections.abc import Callable
from typing import Any

from vllm.v1.metrics.loggers import StatLoggerBase


class EngineLoad(StatLoggerBase):  # type: ignore[misc]
    """A vLLM statistics logger that counts engine steps and passes the request counts of each to a callback.

    Attributes:
        slots: maximum requests that the engine runs at once (``max_num_seqs``).
        steps: steps so far, including those without outputs, such as parts of a long prefill.
        on_step: callback after each step with three counts: requests that keep their slots, requests that wait for a
            slot, and requests that ended. The first and the last add up to the slots in use during the step. With
            asynchronous scheduling (not on a CPU) the first also includes requests that the next step admits.
    """

    def __init__(self, vllm_config: Any, *_: Any) -> None:
        self.slots = int(vllm_config.scheduler_config.max_num_seqs)
        self.steps = 0
        self.on_step: Callable[[int, int, int], None] | None = None

    def record(self, scheduler_stats: Any, iteration_stats: Any, *_: Any, **__: Any) -> None:
        """Count a step and pass its counts to ``on_step``; ``iteration_stats`` is None for a step without outputs."""
        self.steps += 1
        if scheduler_stats is not None and self.on_step is not None:
            ended = len(iteration_stats.finished_requests) if iteration_stats is not None else 0
            self.on_step(scheduler_stats.num_running_reqs, scheduler_stats.num_waiting_reqs, ended)

    def log_engine_initialized(self) -> None:
        """Log nothing; the base class requires this method."""
