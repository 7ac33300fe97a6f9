"""Series of runs with one kind of fault each, over as many outputs as that takes.

Each returns how many faults there were and what did not hold; the invariant is checked from the files of each run.
"""

import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from tests.faults.harness import Job, Running, kill_actors, kill_drivers, redone, write_queries, written
from tests.faults.hosts import Hosts, two_hosts
from tests.faults.proxy import FaultProxy, Faults
from tests.support.s3 import S3Server

Outcome = tuple[int, list[str]]


@contextmanager
def cluster(folder: Path, cpus: int = 2, nodes: int = 0, gpus: int = 0) -> Iterator[Any]:
    """Start a Ray cluster of its own on this machine: a head, and nodes of one CPU beside it.

    Args:
        cpus, gpus: declared for the head, whatever the machine has.
    """
    from ray.cluster_utils import Cluster

    (folder / "pids").mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patched:
        # Workers inherit what is set here, not what their driver has.
        patched.setenv("FAULTS_PIDS", str(folder / "pids"))
        patched.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
        made = Cluster(
            initialize_head=True, head_node_args={"num_cpus": cpus, "num_gpus": gpus, "include_dashboard": False}
        )
        try:
            for _ in range(nodes):
                made.add_node(num_cpus=1)
            made.wait_for_nodes()
            yield made
        finally:
            made.shutdown()


def on(made: Any, job: Job) -> Job:
    """The job on a cluster."""
    return replace(job, settings=[*job.settings, f"execution.ray_address={made.address}"])


def outputs(job: Job) -> Iterator[Job]:
    """The job on one new output after another."""
    number = 0
    while True:
        yield replace(job, output=f"{job.output}-{number}")
        number += 1


def driver_kills(job: Job, queries: Path, rng: random.Random, kills: int, longest: float) -> Outcome:
    """Kill the driver, again and again on the same output, then let it finish."""
    killed, problems = 0, []
    for run in outputs(job):
        if killed >= kills:
            break
        killed += kill_drivers(run, rng, min(8, kills - killed), longest)
        before = written(run.output)
        problems += run.problems(queries, *run.finish()) + redone(before, run.output)
    return killed, problems


def actor_kills(job: Job, queries: Path, pids: Path, rng: random.Random, kills: int) -> Outcome:
    """Kill actors under runs that must finish all the same."""
    killed, problems = 0, []
    for run in outputs(job):
        if killed >= kills:
            break
        running = run.start()
        killed += kill_actors(running, pids, rng, min(4, kills - killed), pause=3.0)
        problems += run.problems(queries, *running.ended())
    return killed, problems


def node_kills(job: Job, queries: Path, rng: random.Random, kills: int) -> Outcome:
    """Kill a worker node under each run, and bring another; the run must finish all the same."""
    killed, problems = 0, []
    job = replace(job, settings=[*job.settings, "execution.actors=2"])
    with tempfile.TemporaryDirectory() as folder, cluster(Path(folder), cpus=0, nodes=2) as made:
        for run in outputs(on(made, job)):
            if killed >= kills:
                break
            running = run.start()
            time.sleep(rng.uniform(4, 12))
            if running.process.poll() is None:
                made.remove_node(rng.choice(sorted(made.worker_nodes, key=lambda node: node.unique_id)), False)
                killed += 1
                time.sleep(rng.uniform(0, 3))
                made.add_node(num_cpus=1)
            problems += run.problems(queries, *running.ended())
    return killed, problems


def cluster_kills(job: Job, queries: Path, rng: random.Random, kills: int) -> Outcome:
    """Kill all of Ray and the driver at once, as a power cut does; the same command on a new cluster finishes."""
    killed, problems = 0, []
    for run in outputs(job):
        if killed >= kills:
            break
        with tempfile.TemporaryDirectory() as folder, cluster(Path(folder)) as made:
            running = on(made, run).start()
            time.sleep(rng.uniform(4, 12))
            made.head_node.kill_all_processes(check_alive=False, allow_graceful=False)
            if running.process.poll() is None:
                running.kill()
                killed += 1
        before = written(run.output)
        with tempfile.TemporaryDirectory() as folder, cluster(Path(folder)) as made:
            problems += run.problems(queries, *on(made, run).finish()) + redone(before, run.output)
    return killed, problems


def hangs(job: Job, queries: Path, rng: random.Random, stalls: int) -> Outcome:
    """Hang engines, some in their warm-up, under runs that must answer all rows; how many hung."""
    hung, problems = 0, []
    job = replace(job, settings=[*job.settings, "execution.engine_stall_s=1"])
    words = dict.fromkeys(rng.sample(range(ds.dataset(queries).count_rows()), 3), "STALLS")
    stalling = queries.with_name("stalling")
    write_queries(stalling, ds.dataset(queries).count_rows(), words)
    for run in outputs(replace(job, queries=str(stalling))):
        if hung >= stalls:
            break
        planned = {"stalls": rng.randrange(1, 3), "stalls_at_start": rng.randrange(2)}
        for name, number in planned.items():
            (job.model / name).write_text(str(number))
        problems += run.problems(stalling, *run.finish())
        hung += sum(number - int((job.model / name).read_text()) for name, number in planned.items())
    return hung, problems


@contextmanager
def hosted(job: Job, queries: Path) -> Iterator[tuple[Hosts, Job]]:
    """Boot two hosts, and move a job and its queries to their store."""
    with two_hosts() as hosts:
        shutil.copytree(queries, hosts.bucket / "queries")
        place, environment = "s3://bucket", hosts.s3.environment
        yield hosts, replace(job, queries=f"{place}/queries", output=f"{place}/out", environment=environment)


def see_on_disk(run: Job, hosts: Hosts) -> Job:
    """Return a run whose output is read from the disk of the store."""
    return replace(run, output=str(hosts.bucket / run.output.removeprefix("s3://bucket/")))


def stops(job: Job, queries: Path, rng: random.Random, count: int) -> Outcome:
    """Stop drivers until a run on another host has taken over; when they go on, they must change nothing.

    On their own host they are seen to live, and another run would be refused.
    """
    stopped, problems = 0, []
    with hosted(job, queries) as (hosts, job):
        for run in outputs(job):
            if stopped >= count:
                break
            seen = see_on_disk(run, hosts)
            first = hosts.start(run)
            await_manifest(seen, first)
            time.sleep(rng.uniform(0, 2))
            os.killpg(first.process.pid, signal.SIGSTOP)
            problems += seen.problems(queries, *hosts.await_end(hosts.start(run, hosts.worker)))
            before = read_all(seen.output)
            os.killpg(first.process.pid, signal.SIGCONT)
            status, said = first.ended()
            if status != 0:
                stopped += 1
                problems += [] if "another run has taken over" in said else [f"{run.output}: {said[-2000:]}"]
            problems += [] if read_all(seen.output) == before else [f"{run.output}: was changed by a replaced run"]
    return stopped, problems


def replacements(job: Job, queries: Path, rng: random.Random, count: int) -> Outcome:
    """Replace a query file by one of the same size under runs: none may succeed, until the file is back."""
    replaced, problems = 0, []
    file = queries / "a.parquet"
    ours = encode_plain(table := pq.read_table(file))
    theirs = encode_plain(table.set_column(1, "query", pc.replace_substring(table["query"], "question", "QUESTION")))
    assert len(ours) == len(theirs)
    put(file, ours)
    for run in outputs(job):
        if replaced >= count:
            break
        running = run.start()
        await_manifest(run, running)
        time.sleep(rng.uniform(0, 3))
        finished = (Path(run.output) / "_SUCCESS").exists()
        put(file, theirs)
        status, said = running.ended()
        if not finished:
            replaced += 1
            refused = status == 1 and f"{file}: has changed since the run began" in said
            problems += [] if refused else [f"{run.output}: status {status} after a replacement: {said[-2000:]}"]
        put(file, ours)
        problems += run.problems(queries, *run.finish())
    return replaced, problems


def await_manifest(run: Job, running: Running) -> None:
    """Wait until a run has begun to annotate."""
    while not (Path(run.output) / "_manifest.json").exists():
        assert running.process.poll() is None, running.ended()
        time.sleep(0.1)


def read_all(output: str) -> dict[Path, bytes]:
    """Read the files of an output."""
    return {file: file.read_bytes() for file in Path(output).rglob("*") if file.is_file()}


def encode_plain(table: pa.Table) -> bytes:
    """Encode a table so that texts of the same lengths give files of the same size."""
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer, compression="none", use_dictionary=False, row_group_size=50)
    return bytes(buffer.getvalue())


def put(file: Path, content: bytes) -> None:
    """Replace a file at once."""
    beside = file.with_suffix(".new")
    beside.write_bytes(content)
    beside.replace(file)


def host_faults(job: Job, queries: Path, rng: random.Random, faults: int) -> Outcome:
    """Kill the host of the worker, or cut its link for a while, under runs that must finish all the same."""
    suffered, problems = 0, []
    with hosted(job, queries) as (hosts, job):
        for run in outputs(job):
            if suffered >= faults:
                break
            running = hosts.start(run)
            time.sleep(rng.uniform(5, 12))
            if running.process.poll() is None:
                rng.choice([hosts.replace_worker, lambda: hosts.cut_link(rng.uniform(1, 30))])()
                suffered += 1
            ended = hosts.await_end(running)
            seen = see_on_disk(run, hosts)
            problems += seen.problems(queries, *ended)
    return suffered, problems


def storage_faults(job: Job, queries: Path, s3: S3Server, rng: random.Random, runs: int) -> Outcome:
    """Run from and to a store that refuses, delays, loses and cuts off requests; how many requests were hurt."""
    hurt, problems = 0, []
    store = s3.filesystem()
    for file in queries.iterdir():
        with store.open_output_stream(f"{s3.bucket}/faults/queries/{file.name}") as stream:
            stream.write(file.read_bytes())
    base = f"s3://{s3.bucket}/faults"
    job = replace(job, queries=f"{base}/queries", output=f"{base}/out", filesystem=store)
    for _, run in zip(range(runs), outputs(job), strict=False):
        shares: dict[str, Any] = {kind: rng.uniform(0, 0.1) for kind in ("refused", "failed", "cut", "lost", "slow")}
        faults = Faults(**shares)
        with FaultProxy(s3.endpoint, faults, rng.randrange(10**6)) as proxy:
            at = {"endpoint_url": proxy.url, "access_key": s3.access_key, "secret_key": s3.secret_key}
            storage = [f"storage.{name}={value}" for name, value in {**at, "region": "us-east-1"}.items()]
            status, said = replace(run, settings=[*run.settings, *storage]).finish()
        hurt += faults.hurt
        problems += [f"{problem} ({shares})" for problem in run.problems(queries, status, said)]
    return hurt, problems
