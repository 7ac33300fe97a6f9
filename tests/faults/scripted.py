"""``jobs.annotate`` with a scripted engine: ``python -m tests.faults.scripted`` with the same options.

Everything else is real: Ray, its actors, the files, the checks. What a row comes to follows from its words:

- ``DIES`` kills its process whenever it is decoded;
- ``RAISES`` raises;
- ``HANGS`` takes longer than any patience;
- ``ENGINE`` and ``MEMORY`` end the engine, for no known reason and for want of memory.

A file ``dies_at_start`` in the model's folder holds how many more processes are killed while they start.
"""

import asyncio
import functools
import os
import random
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jobs.annotate
import pipeline.plan
from pipeline.actor import SelfRagActor
from pipeline.engine import EngineDeadError
from pipeline.postmortem import Death
from pipeline.profiles import Tasks
from pipeline.reader import ReflectionCritic
from pipeline.self_rag import SelfRag
from pipeline.types import Generation
from tests.fakes import DrawingGenerator, word_tokenizer


class ScriptedGenerator(DrawingGenerator):
    """Answers after some milliseconds; what it writes follows from the prompt alone."""

    async def generate(self, prompt: Sequence[int], max_tokens: int, stops: Sequence[int]) -> Generation:
        text = self.tokenizer.decode(list(prompt))
        if "DIES" in text:
            os.kill(os.getpid(), signal.SIGKILL)
        if "ENGINE" in text:
            raise EngineDeadError(Death("scripted", out_of_memory=False))
        if "MEMORY" in text:
            raise EngineDeadError(Death("CUDA out of memory", out_of_memory=True))
        if "RAISES" in text:
            raise KeyError("scripted")
        await asyncio.sleep(3600 if "HANGS" in text else self.rng.uniform(0, 0.02))
        return await super().generate(prompt, max_tokens, stops)

    async def warm(self) -> None:
        """Nothing to compile."""

    def shutdown(self) -> None:
        """Nothing to end."""

    def abandon(self) -> None:
        """Nothing to leave."""


class ScriptedActor(SelfRagActor):
    """Writes its process id into the folder ``FAULTS_PIDS``, so that it can be killed."""

    def _open(self, servers: Sequence[Any], index_digest: str | None) -> None:
        deaths = Path(self.config.model.name) / "dies_at_start"
        if deaths.exists() and (left := int(deaths.read_text())) > 0:
            deaths.write_text(str(left - 1))
            os.kill(os.getpid(), signal.SIGKILL)
        tokenizer = word_tokenizer()
        self.retriever = None
        generator = ScriptedGenerator(tokenizer, random.Random(os.getpid()))
        self.generator: Any = generator
        tasks = Tasks(self.config.decoding, self.config.profiles, self.config.task)
        self.system = SelfRag(generator, ReflectionCritic(tokenizer), tasks, None)
        if folder := os.environ.get("FAULTS_PIDS"):
            (Path(folder) / str(os.getpid())).touch()


def main() -> None:
    """Run the command."""
    jobs.annotate.execute = functools.partial(jobs.annotate.execute, actor=ScriptedActor)
    pipeline.plan.critic_of = lambda _config: None  # type: ignore[assignment]
    jobs.annotate.main()


if __name__ == "__main__":
    main()
