"""The job on the card, Parquet to Parquet: engine, encoder and index."""

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import ray

from pipeline.cluster import CONTEXTS, check_sharing
from pipeline.config.run import RunConfig
from pipeline.config.sections import ModelConfig, RetrievalConfig, StorageConfig
from pipeline.engine.vllm import VllmGenerator, prepare_environment
from pipeline.gpus import decide_gpu_use, lock_gpus
from pipeline.retrieval.encoder import Encoder
from pipeline.retrieval.index import PassageIndex
from pipeline.storage.location import locate
from tests.gpu.conftest import FEW_ROWS, REHEARSAL, Run, Runs, used_memory
from tests.gpu.cpu_answers import FILE
from tests.support.indexes import retrieve

pytestmark = pytest.mark.gpu

Record = Callable[[str, object], None]
# Bytes of the card that come and go with its driver.
NOISE = 200 << 20
# Two runs differ where scores are close (other batches, kernels, precision); a broken path differs everywhere.
MOSTLY = 0.6


def test_demo_answers_on_gpu_match_the_cpu_answers(whole: Run, record_property: Record) -> None:
    """The card computes in bfloat16, the CPU in float32: close scores may turn."""
    cpu = json.loads(FILE.read_text())["answers"]
    found = whole.answers()
    assert len(found) == (FEW_ROWS if REHEARSAL else len(cpu))
    decisions = np.mean([retrieved == cpu[name][0] for name, (retrieved, _) in found.items()])
    answers = np.mean([[retrieved, answer] == cpu[name] for name, (retrieved, answer) in found.items()])
    record_property("rows", len(found))
    record_property("equal decisions", decisions)
    record_property("equal answers", answers)
    assert decisions >= 0.9
    assert answers >= MOSTLY


def share_of_equal(found: dict[str, tuple[bool, str]], whole: Run) -> float:
    """Share of answers that are those of the first run."""
    expected = whole.answers()
    return float(np.mean([expected[name] == answer for name, answer in found.items()]))


def test_memory_budget_that_does_not_fit_is_refused_before_the_engine_starts(run: Runs, real_card: None) -> None:
    refused = run("model.engine.gpu_memory_utilization=0.999")
    with refused.start() as process:
        engines = set[str]()
        while process.poll() is None:
            engines |= {name for name in names_below(process.pid) if ENGINE in name}
            time.sleep(0.2)
    assert process.returncode == 1, refused.log()
    (line,) = (line for line in refused.log().splitlines() if line.startswith("error: "))
    assert "the index needs 0.5 GB on the GPU, but 0.0 GB are left" in line
    assert "vLLM takes 0.999" in line
    assert engines == set()


def test_shard_servers_share_the_gpu_with_the_engine(run: Runs, whole: Run, record_property: Record) -> None:
    servers = ["retrieval.topology=partitioned", "execution.shard_servers=2", "execution.cpus_per_server=0.5"]
    shares = ["execution.gpus_per_server=0.25", "execution.gpus_per_actor=0.5", "execution.cpus_per_actor=1"]
    found = run(*servers, *shares).finish().answers()
    record_property("equal answers with shard servers", share_of_equal(found, whole))
    assert len(found) == FEW_ROWS
    assert share_of_equal(found, whole) >= MOSTLY


def test_killed_actor_frees_its_gpu_memory_and_its_rows_are_answered(run: Runs, record_property: Record) -> None:
    before = used_memory()
    job = run("execution.unit_rows=2", "execution.units_in_flight=1", rows=40)
    with job.start() as process:
        wait_for(lambda: list(job.output.glob("data/*.parquet")), process)
        assert any(ENGINE in name for name in names_below(process.pid))
        actor, *others = actors_below(process.pid)
        assert others == []
        actor.send_signal(signal.SIGKILL)
        assert process.wait(240) == 0, job.log()
    assert len(job.answers()) == 40
    left = lowest_use(before + NOISE) - before
    record_property("bytes left on the card", left)
    assert left <= NOISE


def wait_for(condition: Callable[[], Any], process: "subprocess.Popen[str]", seconds: float = 200) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the job ended too soon"
        assert time.monotonic() < end
        time.sleep(0.05)


# How vLLM calls the process of an engine.
ENGINE = "EngineCore"


def names_below(pid: int) -> list[str]:
    """Titles of all processes that a process has started."""
    names = []
    for one in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            names.append(" ".join(one.cmdline()))
    return names


def actors_below(pid: int) -> list[psutil.Process]:
    """Find the job's actors that hold an engine, by the title that Ray gives them."""
    below = psutil.Process(pid).children(recursive=True)
    return [one for one in below if any("SelfRagActor" in word for word in one.cmdline())]


def lowest_use(enough: int, seconds: float = 20) -> int:
    """Least memory in use until there is little enough: a process's memory is free a moment after its end."""
    end = time.monotonic() + seconds
    lowest = used_memory()
    while lowest > enough and time.monotonic() < end:
        time.sleep(0.5)
        lowest = min(lowest, used_memory())
    return lowest


def test_zero_lora_adapter_gives_the_same_answers(
    run: Runs, whole: Run, demo_model: Path, tmp_path: Path, record_property: Record
) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    # A new adapter's second factor is zero.
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(demo_model), LoraConfig(r=8, target_modules=["q_proj", "v_proj"])
    )
    adapted.save_pretrained(tmp_path / "adapter")
    found = run(f"model.lora={tmp_path / 'adapter'}").finish().answers()
    record_property("equal answers with LoRA", share_of_equal(found, whole))
    assert share_of_equal(found, whole) >= MOSTLY


def test_fp8_weights_answer_every_row(run: Runs, whole: Run, real_card: None, record_property: Record) -> None:
    found = run("model.engine.quantization=fp8").finish().answers()
    record_property("equal answers in fp8", share_of_equal(found, whole))
    assert len(found) == FEW_ROWS


class Engine:
    """Starts an engine of the embedded model as an actor of a run does, and keeps it."""

    def __init__(self, share: float) -> None:
        model = ModelConfig(name="demo", engine={"gpu_memory_utilization": share, "enforce_eager": True})
        prepare_environment()
        with lock_gpus():
            self.generator = VllmGenerator.start(model, (1, 2))

    async def ask(self) -> int:
        return len((await self.generator.generate([1, 2, 3], 4, ())).token_ids)


def test_two_engines_fit_on_one_gpu_as_planned() -> None:
    """Half a card each, less what the plan keeps for their processes."""
    run = RunConfig.model_validate(
        {"queries": "q", "output": "o", "model": {"name": "m", "engine": {"gpu_memory_utilization": 0.5 - CONTEXTS}}}
    )
    check_sharing(run, 0.5)
    ray.init(address="local", num_cpus=2, num_gpus=1, include_dashboard=False, logging_level="ERROR")
    try:
        engines = [ray.remote(num_cpus=1, num_gpus=0.5)(Engine).remote(0.5 - CONTEXTS) for _ in range(2)]
        assert ray.get([engine.ask.remote() for engine in engines], timeout=200) == [4, 4]
    finally:
        ray.shutdown()


class Loader:
    """Loads the encoder where Ray put this actor, and says on which device."""

    def device(self) -> tuple[bool, str]:
        return decide_gpu_use("auto"), Encoder.load("demo").device


def test_encoder_uses_a_gpu_only_if_ray_assigned_one() -> None:
    ray.init(address="local", num_cpus=2, num_gpus=1, include_dashboard=False, logging_level="ERROR")
    try:
        loaders = [ray.remote(num_cpus=0.5, num_gpus=gpus)(Loader).remote() for gpus in (1, 0)]
        with_gpu, without = ray.get([loader.device.remote() for loader in loaders])
    finally:
        ray.shutdown()
    assert with_gpu == (True, "cpu" if REHEARSAL else "cuda")
    assert without == (False, "cpu")


def test_index_is_built_on_the_gpu(small_corpus: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "jobs.build_index", "--passages", small_corpus, "--output", tmp_path / "index"]
    done = subprocess.run(
        list(map(str, [*command, "--shards", "2"])), capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    assert ("and 1 GPUs" in done.stderr) is not REHEARSAL
    rows = pq.read_table(small_corpus).to_pylist()
    texts = [f"{row['title']}\n{row['text']}" for row in rows]
    queries = Encoder.load("demo", "cpu").encode(texts)
    index = PassageIndex.open(locate(str(tmp_path / "index"), StorageConfig()), RetrievalConfig(device="cpu"))
    found = retrieve(index, queries, 1)
    assert [hits[0].passage.id for hits in found] == [row["id"] for row in rows]
    np.testing.assert_allclose(np.asarray([hits[0].score for hits in found], float), 1.0, atol=1e-3)
