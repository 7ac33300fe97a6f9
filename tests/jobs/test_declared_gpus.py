"""Every path that asks Ray for GPUs, on a machine without one: Ray takes those that are declared.

Each run asserts what Ray was asked for, and that every row came out once.
"""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.dataset as ds
import pytest

from tests.faults.campaign import model_folder
from tests.faults.harness import Job, broken, redone, write_queries, written
from tests.faults.series import cluster, on
from tests.support.clusters import asked_during, gpus_held, workers

ROWS = 40
# The harness sets both for runs on CPUs.
BY_DEFAULT = ["execution.cpus_per_actor=null", "execution.gpus_per_actor=null"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cluster's folder."""
    return tmp_path_factory.mktemp("gpus")


@pytest.fixture(scope="module")
def made(home: Path) -> Iterator[Any]:
    """A machine of four GPUs, as Ray sees it."""
    with cluster(home, cpus=4, gpus=4) as cluster_:
        yield cluster_


@pytest.fixture
def pids(made: Any, home: Path) -> Path:
    """The folder in which this test's actors leave what Ray assigned to them."""
    folder = home / "pids"
    for file in folder.iterdir():
        file.unlink()
    return folder


@pytest.fixture
def job(made: Any, tmp_path: Path) -> Job:
    write_queries(tmp_path / "queries", ROWS)
    return on(made, Job(str(tmp_path / "queries"), str(tmp_path / "out"), model_folder(tmp_path), list(BY_DEFAULT)))


def assigned(pids: Path) -> list[dict[str, Any]]:
    return sorted((json.loads(file.read_text()) for file in pids.iterdir()), key=str)


@pytest.mark.parametrize(
    ("settings", "each", "cards"),
    [
        ([], {"CPU": 4.0, "GPU": 1.0}, [1]),
        pytest.param(["execution.actors=2"], {"CPU": 2.0, "GPU": 1.0}, [1, 1], marks=pytest.mark.slow),
        (["execution.actors=2", "model.engine.tensor_parallel_size=2"], {"CPU": 2.0, "GPU": 2.0}, [2, 2]),
        (["execution.gpus_per_actor=0"], {"CPU": 4.0}, [0]),
    ],
    ids=["one", "two actors", "tensor parallel", "none"],
)
def test_actors_get_their_own_gpus(
    settings: list[str], each: dict[str, float], cards: list[int], job: Job, made: Any, pids: Path, tmp_path: Path
) -> None:
    job.settings += settings
    (job.model / "actors").write_text(str(len(cards)))
    with asked_during(made.address) as asked:
        status, said = job.finish()
    assert job.problems(tmp_path / "queries", status, said) == []
    assert workers(asked, "ScriptedActor") == [each] * len(cards)
    there = assigned(pids)
    assert [len(one["gpus"]) for one in there] == cards
    ids = [card for one in there for card in one["gpus"]]
    assert len(set(ids)) == len(ids)
    assert [one["gpu"] for one in there] == [count > 0 for count in cards]


@pytest.mark.slow
def test_actors_sharing_a_gpu_start_one_at_a_time(job: Job, made: Any, pids: Path, tmp_path: Path) -> None:
    (job.model / "actors").write_text("2")
    job.settings += ["execution.actors=2", "execution.gpus_per_actor=0.5", "model.engine.gpu_memory_utilization=0.45"]
    with asked_during(made.address) as asked:
        status, said = job.finish()
    assert job.problems(tmp_path / "queries", status, said) == []
    assert workers(asked, "ScriptedActor") == [{"CPU": 2.0, "GPU": 0.5}] * 2
    first, second = sorted(assigned(pids), key=lambda one: one["started"])
    assert (first["gpus"], first["amount"]) == (second["gpus"], 0.5)
    assert first["started"][1] <= second["started"][0]


def test_run_started_on_cpus_resumes_on_a_gpu(job: Job, made: Any, tmp_path: Path) -> None:
    job.settings += ["execution.gpus_per_actor=0", "execution.units_in_flight=1"]
    running = job.start()
    while not (before := written(job.output)):
        assert running.process.poll() is None
        time.sleep(0.02)
    running.kill()
    job.settings[-2] = "execution.gpus_per_actor=1"
    with asked_during(made.address) as asked:
        status, said = job.finish()
    assert job.problems(tmp_path / "queries", status, said) == []
    assert redone(before, job.output) == []
    assert workers(asked, "ScriptedActor") == [{"CPU": 4.0, "GPU": 1.0}]


def test_rescoring_needs_no_gpu(job: Job, made: Any, tmp_path: Path) -> None:
    job.settings += ["execution.gpus_per_actor=1", "decoding.keep_candidates=true"]
    assert job.finish()[0] == 0
    command = [sys.executable, "-m", "jobs.rescore", "--annotations", job.output, "--output", str(tmp_path / "again")]
    with gpus_held(made.address, 4):
        subprocess.run(
            [*command, "--set", "decoding.weights.relevance=2"],
            env=os.environ | {"RAY_ADDRESS": made.address},
            timeout=120,
            check=True,
        )
    assert broken(str(tmp_path / "again"), tmp_path / "queries") == []


@pytest.mark.slow
def test_shard_servers_and_actors_share_gpus(
    job: Job, made: Any, pids: Path, small_index: Path, tmp_path: Path
) -> None:
    write_queries(tmp_path / "asking", ROWS, given=False)
    job.queries, job.options = str(tmp_path / "asking"), ["--index", str(small_index)]
    job.settings += ["decoding.mode=always", "retrieval.topology=partitioned", "execution.shard_servers=2"]
    job.settings += ["execution.gpus_per_server=0.25", "execution.cpus_per_server=0.5"]
    job.settings += ["execution.actors=2", "execution.gpus_per_actor=0.5", "model.engine.gpu_memory_utilization=0.4"]
    with asked_during(made.address) as asked:
        status, said = job.finish()
    assert job.problems(tmp_path / "asking", status, said) == []
    assert workers(asked, "ShardServer") == [{"CPU": 0.5, "GPU": 0.25}] * 2
    assert workers(asked, "ScriptedActor") == [{"CPU": 1.0, "GPU": 0.5}] * 2
    rows = ds.dataset(f"{job.output}/data").to_table(columns=["retrieved", "passages"]).to_pylist()
    assert all(row["retrieved"] and row["passages"] for row in rows)


def build(passages: Path, output: Path, address: str, *options: str) -> str:
    """Build an index on a cluster; what the command says."""
    command = [sys.executable, "-m", "jobs.build_index", "--passages", str(passages), "--output", str(output)]
    done = subprocess.run(
        [*command, "--embeddings", "vector", *options],
        env=os.environ | {"RAY_ADDRESS": address},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.parametrize(
    ("shards", "actors", "gpus"), [(4, (), 1.0), pytest.param(8, ("--actors", "8"), 0.5, marks=pytest.mark.slow)]
)
def test_index_is_built_on_four_gpus(
    shards: int, actors: tuple[str, ...], gpus: float, made: Any, with_vectors: tuple[Path, np.ndarray], tmp_path: Path
) -> None:
    with asked_during(made.address) as asked:
        build(with_vectors[0], tmp_path / "index", made.address, "--shards", str(shards), *actors)
    assert workers(asked, "ShardBuilder") == [{"CPU": 1.0, "GPU": gpus}] * shards
    manifest = json.loads((tmp_path / "index" / "index.json").read_text())
    assert (manifest["passages"], len(manifest["shards"])) == (300, shards)


@pytest.mark.slow
def test_nodes_can_join_after_the_run_has_started(
    with_vectors: tuple[Path, np.ndarray], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    write_queries(tmp_path / "queries", ROWS)
    with cluster(tmp_path_factory.mktemp("later"), cpus=1) as made:
        job = on(made, Job(str(tmp_path / "queries"), str(tmp_path / "out"), model_folder(tmp_path)))
        job.settings += ["execution.cpus_per_actor=1", "execution.gpus_per_actor=1"]
        with asked_during(made.address) as asked:
            running = job.start()
            while not (tmp_path / "out" / "_manifest.json").exists():
                assert running.process.poll() is None, running.ended()
                time.sleep(0.1)
            made.add_node(num_cpus=2, num_gpus=1)
            status, said = running.ended()
        assert job.problems(tmp_path / "queries", status, said) == []
        assert workers(asked, "ScriptedActor") == [{"CPU": 1.0, "GPU": 1.0}]
        with asked_during(made.address) as asked:
            said = build(with_vectors[0], tmp_path / "index", made.address)
        assert workers(asked, "ShardBuilder") == [{"CPU": 2.0, "GPU": 1.0}]
        assert json.loads((tmp_path / "index" / "index.json").read_text())["passages"] == 300
        assert re.search(r"starting 1 actor\(s\), each with 2 CPUs and 1 GPUs", said)
