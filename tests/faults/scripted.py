"""``jobs.annotate`` with a scripted engine: ``python -m tests.faults.scripted`` with the same options.

Everything else is real: Ray, its actors, the files, the checks. What a row comes to follows from its words:

- ``DIES`` kills its process whenever it is decoded;
- ``RAISES`` raises;
- ``HANGS`` takes longer than any patience;
- ``ENGINE`` and ``MEMORY`` end the engine, for no known reason and for want of memory;
- ``STALLS`` stops the engine, which makes no step from then on;
- ``NODE`` kills the machine: the raylet and all its processes;
- ``WAITS`` waits as long as there is a file ``waits`` beside the model's folder.

Files in the model's folder: ``dies_at_start`` holds how many more processes are killed while they start, ``actors`` how
many actors must have started before the first row is answered, ``stalls_at_start`` how many more engines hang in their
warm-up, ``slots`` how many requests an engine decodes at a time, ``stalls`` and ``nodes`` how many more times these
words have their effect; without the file they have it always. ``keep_s`` holds the seconds between sub-files.
"""

import asyncio
import contextlib
import functools
import json
import os
import random
import signal
import time
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar

import ray

import jobs.annotate
import pipeline.run.actor
import pipeline.run.plan
from pipeline.decoding.reflection_reader import ReflectionCritic
from pipeline.decoding.types import Generation
from pipeline.engine.heartbeat import EngineStalledError, Heartbeat
from pipeline.engine.postmortem import Death
from pipeline.engine.vllm import EngineDeadError
from pipeline.gpus import decide_gpu_use, get_assigned_gpus
from pipeline.run.actor import SelfRagActor
from tests.support.fakes import DrawingGenerator, word_tokenizer

Answer = TypeVar("Answer")

# An engine's start on a shared card takes time, in which another one could begin.
START_SECONDS = 1.0


def take(counter: Path) -> bool:
    """Whether a fault happens once more: counts down the file that limits it, if there is one."""
    if not counter.exists():
        return True
    left = int(counter.read_text())
    counter.write_text(str(max(left - 1, 0)))
    return left > 0


class ScriptedGenerator(DrawingGenerator):
    """Answers after some milliseconds, once all actors have started; what it writes follows from the prompt alone."""

    pids: Path | None = None
    actors = 0
    model = Path()
    heartbeat: Heartbeat
    steps = 0
    stalled = False
    slots: asyncio.Semaphore | None = None
    on_step: Callable[[int, int, int], None]

    async def generate(self, prompt: Sequence[int], max_tokens: int, stops: Sequence[int]) -> Generation:
        return await self.watch(self._generate(prompt, max_tokens, stops))

    async def watch(self, request: Coroutine[Any, Any, Answer]) -> Answer:
        """Answer as vLLM would: the engine steps as long as it is not stalled."""
        try:
            async with self.heartbeat.watching():
                return await request
        except EngineStalledError as error:
            raise EngineDeadError(Death(str(error), out_of_memory=False)) from error

    def count_steps(self) -> int:
        self.steps += not self.stalled
        return self.steps

    async def hang(self) -> None:
        self.stalled = True
        await asyncio.sleep(3600)

    async def _generate(self, prompt: Sequence[int], max_tokens: int, stops: Sequence[int]) -> Generation:
        while self.pids is not None and len(list(self.pids.iterdir())) < self.actors:  # noqa: ASYNC110  no event spans processes
            await asyncio.sleep(0.05)
        text = self.tokenizer.decode(list(prompt))
        if "DIES" in text:
            os.kill(os.getpid(), signal.SIGKILL)
        if "ENGINE" in text:
            raise EngineDeadError(Death("scripted", out_of_memory=False))
        if "MEMORY" in text:
            raise EngineDeadError(Death("CUDA out of memory", out_of_memory=True))
        if "RAISES" in text:
            raise KeyError("scripted")
        if "NODE" in text and take(self.model / "nodes"):
            kill_node()
        if self.stalled or ("STALLS" in text and take(self.model / "stalls")):
            await self.hang()
        while "WAITS" in text and self.model.with_name("waits").exists():  # noqa: ASYNC110  no event spans processes
            await asyncio.sleep(0.05)
        async with self.slots or contextlib.nullcontext():
            if self.slots is not None and self.slots.locked():
                self.on_step(1, 1, 0)
            await asyncio.sleep(3600 if "HANGS" in text else self.rng.uniform(0, 0.02))
        return await super().generate(prompt, max_tokens, stops)

    async def warm(self) -> None:
        """Compile nothing, or hang."""
        if self.stalled or ((counter := self.model / "stalls_at_start").exists() and take(counter)):
            await self.watch(self.hang())

    def shutdown(self) -> None:
        """Nothing to end."""

    def abandon(self) -> None:
        """Nothing to leave."""


class ScriptedActor(SelfRagActor):
    """Leaves a file named by its process id in ``FAULTS_PIDS``, so that it can be killed, with its GPUs in it."""

    def _load_critic(self) -> ReflectionCritic:
        deaths = Path(self.config.model.name) / "dies_at_start"
        if deaths.exists() and (left := int(deaths.read_text())) > 0:
            deaths.write_text(str(left - 1))
            os.kill(os.getpid(), signal.SIGKILL)
        return ReflectionCritic(word_tokenizer())

    def _start_engine(self, critic: Any) -> ScriptedGenerator:
        generator = ScriptedGenerator(critic.tokenizer, random.Random(os.getpid()))
        generator.heartbeat = Heartbeat(self.config.execution.engine_stall_s, generator.count_steps)
        generator.model = Path(self.config.model.name)
        generator.on_step = self.record_step
        if (slots := generator.model / "slots").exists():
            generator.slots = asyncio.Semaphore(int(slots.read_text()))
        if (seconds := generator.model / "keep_s").exists():
            vars(pipeline.run.actor)["KEEP_S"] = float(seconds.read_text())
        if folder := os.environ.get("FAULTS_PIDS"):
            began, record = time.time(), assigned()
            time.sleep(START_SECONDS if 0 < record["amount"] < 1 else 0)
            record["started"] = (began, time.time())
            (Path(folder) / str(os.getpid())).write_text(json.dumps(record))
            if (awaited := Path(self.config.model.name) / "actors").exists():
                generator.pids, generator.actors = Path(folder), int(awaited.read_text())
        return generator


def kill_node() -> None:
    """Kill the raylet of this process, as if the machine were gone, and this process with it."""
    os.kill(os.getppid(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def assigned() -> dict[str, Any]:
    """What Ray assigned to this actor, and the device that its searches would run on."""
    context, gpus = ray.get_runtime_context(), get_assigned_gpus()
    assert gpus is not None
    return {"node": context.get_node_id(), "gpus": gpus.ids, "amount": gpus.amount, "gpu": decide_gpu_use("auto")}


def main() -> None:
    """Run the command."""
    job: Any = jobs.annotate
    plan: Any = pipeline.run.plan
    job.run_plan = functools.partial(job.run_plan, actor=ScriptedActor)
    plan.load_critic = lambda _config: None
    job.main()


if __name__ == "__main__":
    main()
