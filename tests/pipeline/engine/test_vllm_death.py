"""Real engines that die."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config.sections import ModelConfig
from pipeline.decoding.reflection import ReflectionIds
from pipeline.engine.models import load_tokenizer
from pipeline.engine.vllm import EngineDeadError, VllmGenerator
from tests.pipeline.engine.test_watchdog import gone


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
    ("end", "reason", "memory"),
    [(starve, "CUDA out of memory. Tried to allocate", True), (kill, "^killed by signal 9", False)],
)
async def test_engine_death_is_reported_with_its_cause(
    demo_model: Path, end: Callable[[Any], Awaitable[None]], reason: str, memory: bool, monkeypatch: pytest.MonkeyPatch
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
        assert caught.value.death.out_of_memory == memory
    finally:
        generator.shutdown()


OWNER = """
import asyncio, sys, time
from pipeline.config.run import ModelConfig
from pipeline.engine.vllm import VllmGenerator, list_core_processes

if __name__ == "__main__":
    generator = VllmGenerator.start(ModelConfig(name=sys.argv[1], engine={"max_model_len": 512}), (1, 2))
    print("core", list_core_processes(generator.engine)[0].pid, flush=True)
    time.sleep(600)
"""


@pytest.mark.slow
def test_engine_ends_with_its_owner_process(demo_model: Path, tmp_path: Path):
    (tmp_path / "owner.py").write_text(OWNER)
    command = [sys.executable, str(tmp_path / "owner.py"), str(demo_model)]
    owner = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": "."})
    assert owner.stdout is not None
    pid = next(int(line.split()[1]) for line in owner.stdout if line.startswith("core"))
    owner.kill()
    owner.wait()
    until = time.monotonic() + 20
    while not gone(pid) and time.monotonic() < until:
        time.sleep(0.1)
    assert gone(pid)


@pytest.mark.slow
def test_failed_engine_start_is_reported_with_its_cause(demo_model: Path):
    engine = {"max_model_len": 2048, "num_gpu_blocks_override": 2}  # a cache for 64 tokens
    with pytest.raises(RuntimeError, match="failed to start: ValueError: .*KV cache"):
        VllmGenerator.start(ModelConfig(name=str(demo_model), engine=engine), (1, 2))
