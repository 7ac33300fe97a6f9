"""Real engines that die."""

import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config import ModelConfig
from pipeline.engine import EngineDeadError, VllmGenerator, load_tokenizer
from pipeline.reflection import ReflectionIds


def without_memory(worker: Any) -> None:
    """From now on every step of a worker fails as on a card without memory."""

    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    worker.execute_model = fail


async def starve(engine: Any) -> None:
    await engine.collective_rpc(without_memory)


async def kill(engine: Any) -> None:
    (process,) = engine.engine_core.resources.engine_manager.processes
    os.kill(process.pid, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("end", "reason"),
    [(starve, "CUDA out of memory. Tried to allocate"), (kill, "^killed by signal 9")],
)
async def test_an_engine_that_runs_out_of_memory_says_so(
    demo_model: Path, end: Callable[[Any], Awaitable[None]], reason: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # for a function of this file
    model = ModelConfig(name=str(demo_model), engine={"max_model_len": 2048})
    ids = ReflectionIds.of(load_tokenizer(model), model.name)
    generator = VllmGenerator.start(model, ids.reflection)
    try:
        await generator.generate([1, 2, 3], 4, [])
        await end(generator.engine)
        with pytest.raises(EngineDeadError, match=reason) as caught:
            await generator.generate([1, 2, 3, 4], 8, [])
        assert caught.value.death.out_of_memory
    finally:
        generator.shutdown()
