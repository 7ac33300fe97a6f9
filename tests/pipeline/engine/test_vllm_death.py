"""Real engines that die."""

import asyncio
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
from pipeline.decoding.types import Generation
from pipeline.engine.models import load_tokenizer
from pipeline.engine.postmortem import Death
from pipeline.engine.vllm import EngineDeadError, VllmGenerator
from tests.pipeline.engine.test_watchdog import gone


def without_memory(worker: Any) -> None:
    """From now on every step of a worker fails as on a card without memory."""

    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    worker.execute_model = fail


async def starve(engine: Any) -> None:
    await engine.collective_rpc(without_memory)


def send(engine: Any, number: int) -> int:
    """Send a signal to the engine core; returns its process id."""
    (process,) = engine.engine_core.resources.engine_manager.processes
    os.kill(process.pid, number)
    return int(process.pid)


async def kill(engine: Any) -> None:
    send(engine, signal.SIGKILL)


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


async def wait_until(happened: Callable[[], bool], seconds: float = 20) -> None:
    async with asyncio.timeout(seconds):
        while not happened():  # noqa: ASYNC110  no event spans processes
            await asyncio.sleep(0.05)


@pytest.mark.slow
async def test_engine_that_hangs_is_killed_and_its_requests_fail_with_the_cause(demo_model: Path) -> None:
    model = ModelConfig(name=str(demo_model), engine={"max_model_len": 2048})
    ids = ReflectionIds.of(load_tokenizer(model), model.name)
    generator = VllmGenerator.start(model, ids.reflection, stall_s=20)
    try:
        await generator.generate([1, 2, 3], 4, [])
        steps = generator.load.steps
        flying = [asyncio.create_task(generator.generate([n, 2, 3], 1500, [])) for n in range(1, 30)]
        await wait_until(lambda: generator.load.steps > steps + 5)
        pid = send(generator.engine, signal.SIGSTOP)
        found = await asyncio.wait_for(asyncio.gather(*flying, return_exceptions=True), 60)
        deaths = [error.death for error in found if isinstance(error, EngineDeadError)]
        assert len(deaths) + sum(isinstance(answer, Generation) for answer in found) == len(flying)
        assert set(deaths) == {Death(f"no step for 20 s with {len(deaths)} request(s) in flight", out_of_memory=False)}
        with pytest.raises(EngineDeadError) as caught:
            await asyncio.wait_for(generator.generate([1], 1, []), 60)
        assert caught.value.death == deaths[0]
        await wait_until(lambda: gone(pid))
    finally:
        generator.shutdown()


@pytest.mark.slow
async def test_engine_that_hangs_in_its_warm_up_is_reported(demo_model: Path) -> None:
    model = ModelConfig(name=str(demo_model), engine={"max_model_len": 512})
    ids = ReflectionIds.of(load_tokenizer(model), model.name)
    generator = VllmGenerator.start(model, ids.reflection, stall_s=3)
    try:
        send(generator.engine, signal.SIGSTOP)
        with pytest.raises(EngineDeadError, match=r"^no step for 3 s with 1 request\(s\) in flight$"):
            await asyncio.wait_for(generator.warm(), 60)
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
