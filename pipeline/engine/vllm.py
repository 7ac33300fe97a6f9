"""Implements the Generator protocol with vLLM.

Every request fetches the log-probabilities of the same few tokens: the 13 reflection tokens, or the labels that stand
for them. Decisions and critiques read nothing else. All requests must name the same tokens: vLLM's V1 runner silently
returns -inf if such requests share a batch with top-k ones (vllm-project/vllm#51789).
"""

import asyncio
import dataclasses
import itertools
import logging
import os
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.config.sections import ExecutionConfig, ModelConfig
from pipeline.decoding.types import Generation
from pipeline.engine.arguments import build_engine_arguments, check_assigned_gpus
from pipeline.engine.heartbeat import EngineStalledError, Heartbeat
from pipeline.engine.postmortem import Death, ErrorLog, configure_error_log, diagnose_death
from pipeline.engine.watchdog import start_guard

log = logging.getLogger(__name__)

# Settings that vLLM reads only from the environment; variables that are already set take precedence.
ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",  # stdout is for results
    "VLLM_CPU_KVCACHE_SPACE": "2",  # GiB
    # By default vLLM leaves one core idle and binds all engines to the same remaining cores. Unbound, an engine uses as
    # many threads as its actor has CPUs (Ray sets OMP_NUM_THREADS).
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


class EngineDeadError(RuntimeError):
    """Error of an engine that can serve no more requests; the process that started it must be replaced."""

    def __init__(self, death: Death) -> None:
        super().__init__(death.reason)
        self.death = death


def prepare_environment() -> None:
    """Set the environment variables that vLLM reads on import, and its error log; call this before the import."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    configure_error_log()


@dataclass
class VllmGenerator:
    """A vLLM replica: the front end in this process, the engine core in a process of its own.

    Create one with :meth:`start` and end it with :meth:`shutdown`.

    Attributes:
        engine: the ``AsyncLLM`` front end.
        load: the ``step_stats.EngineLoad`` that receives the statistics of each step.
        sampling: ``SamplingParams`` arguments that all requests share.
        watched: token ids whose log-probabilities every request fetches.
        max_model_len: maximum tokens of a prompt and its continuation together.
        errors: log of the engine's errors.
        guard: process that ends the engine core when this process ends.
        heartbeat: watches the engine's steps.
        lora: ``LoRARequest`` of the adapter; None without one.
        numbers: source of request ids.
        stall: cause of death of an engine that hung; None for any other.
    """

    engine: Any
    load: Any
    sampling: dict[str, Any]
    watched: tuple[int, ...]
    max_model_len: int
    errors: ErrorLog
    guard: subprocess.Popen[bytes]
    heartbeat: Heartbeat
    lora: Any = None
    numbers: Iterator[int] = dataclasses.field(default_factory=itertools.count)
    stall: Death | None = None

    @classmethod
    def start(
        cls, model: ModelConfig, watched: tuple[int, ...], stall_s: float = ExecutionConfig().engine_stall_s
    ) -> "VllmGenerator":
        """Load the model and start the engine.

        Args:
            watched: ids whose log-probabilities every generation includes, in the order of the 13 reflection tokens.
            stall_s: seconds without a step, while requests are in flight, after which the engine counts as hung.

        Raises:
            ValueError: this is a Ray actor without a GPU, and vLLM needs one.
            RuntimeError: the engine does not start; the message gives the reason.
        """
        prepare_environment()
        check_assigned_gpus()
        errors = ErrorLog.from_now()
        from vllm import AsyncEngineArgs
        from vllm.lora.request import LoRARequest
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.async_llm import AsyncLLM

        from pipeline.engine.step_stats import EngineLoad

        loads: list[EngineLoad] = []

        def watch(config: Any, number: int) -> EngineLoad:
            loads.append(EngineLoad(config, number))
            return loads[-1]

        # A statistics logger makes vLLM add timings to its outputs. The default step size (``max_num_batched_tokens``)
        # depends on the usage context: largest for the offline class, smaller for servers, smallest without a context.
        arguments = AsyncEngineArgs(**build_engine_arguments(model))
        try:
            engine = AsyncLLM.from_engine_args(arguments, usage_context=UsageContext.LLM_CLASS, stat_loggers=[watch])
        except RuntimeError as error:  # vLLM's message only refers to the log above it
            logged = errors.read()
            reason = diagnose_death([], logged).reason if logged else str(error)
            raise RuntimeError(f"the engine of {model.name} failed to start: {reason}") from error
        watcher = start_guard([process.pid for process in list_core_processes(engine)])
        sampling = {
            "temperature": 0.0,
            "logprob_token_ids": list(dict.fromkeys(watched)),
            "flat_logprobs": True,
            "detokenize": False,
            "skip_special_tokens": False,
        }
        lora = LoRARequest("adapter", 1, model.lora) if model.lora else None
        heartbeat = Heartbeat(stall_s, lambda: sum(load.steps for load in loads))  # a load per data-parallel core
        length = int(engine.model_config.max_model_len)
        return cls(engine, loads[0], sampling, watched, length, errors, watcher, heartbeat, lora)

    async def generate(self, prompt: Sequence[int], max_tokens: int, stops: Sequence[int]) -> Generation:
        """Continue a prompt greedily; see :meth:`Generator.generate`.

        Raises:
            EngineDeadError: the engine is gone.
            ArithmeticError: log-probabilities are missing or not finite.
        """
        return self._convert_output(await self._ask(prompt, max_tokens, stops))

    async def warm(self) -> None:
        """Send a warm-up request, so that vLLM compiles its log-probability kernel, once for all batch sizes.

        Takes about two seconds (``batched_count_greater_than`` in ``vllm/v1/sample/ops/logprobs.py``).

        Raises:
            EngineDeadError: the engine is gone.
        """
        await self._ask(self.watched[:1], 1, ())

    async def _ask(self, prompt: Sequence[int], max_tokens: int, stops: Sequence[int]) -> Any:
        from vllm import SamplingParams, TokensPrompt
        from vllm.sampling_params import RequestOutputKind
        from vllm.v1.engine.exceptions import EngineDeadError as VllmEngineDeadError

        sampling = SamplingParams(
            max_tokens=max_tokens,
            stop_token_ids=list(stops),
            output_kind=RequestOutputKind.FINAL_ONLY,
            **self.sampling,
        )
        stream = self.engine.generate(
            TokensPrompt(prompt_token_ids=list(prompt)), sampling, str(next(self.numbers)), lora_request=self.lora
        )
        try:
            async with self.heartbeat.watching():
                outputs = [output async for output in stream]
        except EngineStalledError as error:
            self._kill_core(str(error))
            raise EngineDeadError(await self._diagnose_death()) from error
        except VllmEngineDeadError as error:
            raise EngineDeadError(await self._diagnose_death()) from error
        return outputs[-1]

    def _kill_core(self, reason: str) -> None:
        """Have the guard process kill an engine core that hangs, with its workers."""
        self.stall = Death(reason, out_of_memory=False)
        if self.guard.stdin is not None:
            self.guard.stdin.close()

    async def _diagnose_death(self) -> Death:
        """Return the cause of death; waits up to 5 s for exit codes, since an engine reports death before it exits."""
        if self.stall is not None:
            return self.stall
        processes = list_core_processes(self.engine)
        for _ in range(50):
            if all(process.exitcode is not None for process in processes):
                break
            await asyncio.sleep(0.1)
        codes = [process.exitcode for process in processes if process.exitcode is not None]
        return diagnose_death(codes, self.errors.read())

    def _convert_output(self, final: Any) -> Generation:
        output = final.outputs[0]
        chosen, reflection = convert_logprobs(output.logprobs, output.token_ids, self.watched)
        times = final.metrics
        return Generation(
            token_ids=tuple(output.token_ids),
            logprobs=chosen,
            reflection_logprobs=reflection,
            prompt_tokens=len(final.prompt_token_ids),
            cached_tokens=final.num_cached_tokens or 0,
            queue_seconds=times.scheduled_ts - times.queued_ts,
            prefill_seconds=times.first_token_ts - times.scheduled_ts,
            decode_seconds=times.last_token_ts - times.first_token_ts,
        )

    def shutdown(self) -> None:
        """End the engine core; otherwise the log fills with engine-dead errors at exit."""
        handler = self.engine.output_handler
        if handler is not None:
            # The handler would report the engine's end as a failure.
            handler.get_loop().call_soon_threadsafe(handler.cancel)
        self.engine.shutdown()
        self.guard.communicate()
        self.abandon()

    def abandon(self) -> None:
        """Leave the engine core to its guard process, which ends it when this process ends.

        Disables the engine's own shutdown, since its destructor may call it after vLLM's modules have been unloaded.
        """
        self.engine.shutdown = lambda: None


def list_core_processes(engine: Any) -> Sequence[Any]:
    """Return the processes of an engine core; empty if Ray manages them."""
    return tuple(getattr(engine.engine_core.resources.engine_manager, "processes", ()))


def convert_logprobs(
    flat: Any, token_ids: Sequence[int], wanted: tuple[int, ...]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Convert vLLM's flat log-probabilities to arrays.

    Args:
        flat: ``vllm.logprobs.FlatLogprobs`` over T positions; each holds the sampled token and the wanted ones.
        token_ids: the T sampled ids.
        wanted: requested ids, one for each column of the second result; an id may occur more than once.

    Returns:
        Log-probabilities of the sampled tokens, float64 [T], and of the wanted ones, float64 [T, len(wanted)].

    Raises:
        ArithmeticError: a log-probability is missing or not finite, for example because the model's activations
            overflow; the generation cannot be scored.
    """
    if len(flat.end_indices) != len(token_ids):  # vLLM's speculative decoding drops ``logprob_token_ids``
        raise ArithmeticError("the engine returned no log-probabilities for some tokens, as with speculative decoding")
    ids, logprobs = np.array(flat.token_ids, np.int64), np.array(flat.logprobs, np.float64)
    positions = np.repeat(np.arange(len(token_ids)), np.subtract(flat.end_indices, flat.start_indices))
    chosen = np.full(len(token_ids), -np.inf)
    sampled = ids == np.array(token_ids, np.int64)[positions]
    chosen[positions[sampled]] = logprobs[sampled]
    known, columns = np.unique(wanted, return_inverse=True)
    places = np.minimum(np.searchsorted(known, ids), len(known) - 1)
    hits = known[places] == ids
    table = np.full((len(token_ids), len(known)), -np.inf)
    table[positions[hits], places[hits]] = logprobs[hits]
    if not (np.isfinite(chosen).all() and np.isfinite(table).all()):
        raise ArithmeticError("the engine returned missing or non-finite log-probabilities of the reflection tokens")
    return chosen, table[:, columns]
