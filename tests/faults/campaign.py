"""Many runs with faults, at random moments from a printed seed: ``python -m tests.faults.campaign --drivers 100``.

After each run the invariant is checked from its files alone. Ends with status 1 where it does not hold.
"""

import os
import random
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from tests.faults.harness import Job, broken, kill_actors, kill_drivers, write_queries

ROWS = 300


@contextmanager
def cluster(folder: Path, nodes: int = 0, cpus: int = 2) -> Iterator[object]:
    """A Ray cluster of its own on this machine: a head, and so many nodes beside it."""
    from ray.cluster_utils import Cluster

    (folder / "pids").mkdir()
    # Workers inherit what is set here, not what their driver has.
    os.environ["FAULTS_PIDS"] = str(folder / "pids")
    os.environ["AWS_REQUEST_CHECKSUM_CALCULATION"] = "when_required"
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": cpus, "include_dashboard": False})
    try:
        for _ in range(nodes):
            made.add_node(num_cpus=cpus)
        made.wait_for_nodes()
        yield made
    finally:
        made.shutdown()
        del os.environ["FAULTS_PIDS"]


def model_folder(folder: Path) -> Path:
    """What passes for a model where nothing reads it."""
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text("{}")
    return folder / "model"


def driver_kills(job: Job, queries: Path, rng: random.Random, kills: int, longest: float) -> tuple[int, list[str]]:
    """Kill the driver until so many kills have been made, over as many outputs as that takes."""
    killed, problems, number = 0, [], 0
    base = job.output
    while killed < kills:
        job.output = f"{base}-{number}"
        killed += kill_drivers(job, rng, kills - killed, longest)
        status, said = job.finish()
        if status != 0:
            problems.append(f"{job.output}: status {status}: {said[-2000:]}")
        problems += [f"{job.output}: {problem}" for problem in broken(job.output, queries)]
        number += 1
    return killed, problems


def actor_kills(job: Job, queries: Path, pids: Path, rng: random.Random, kills: int) -> tuple[int, list[str]]:
    """Kill actors under runs that must finish all the same."""
    killed, problems, number = 0, [], 0
    base = job.output
    while killed < kills:
        job.output = f"{base}-{number}"
        some, status, said = kill_actors(job, pids, rng, min(4, kills - killed), pause=3.0)
        killed += some
        if status != 0:
            problems.append(f"{job.output}: status {status}: {said[-2000:]}")
        problems += [f"{job.output}: {problem}" for problem in broken(job.output, queries)]
        number += 1
    return killed, problems


def campaign(
    drivers: Annotated[int, typer.Option(help="Driver kills.")] = 0,
    actors: Annotated[int, typer.Option(help="Actor kills.")] = 0,
    seed: Annotated[int | None, typer.Option(help="Of every random moment; drawn by default.")] = None,
) -> None:
    """Run with faults and say what did not hold."""
    seed = random.SystemRandom().randrange(10**6) if seed is None else seed
    rng, problems = random.Random(seed), []
    typer.echo(f"seed {seed}")
    with tempfile.TemporaryDirectory() as name, cluster(Path(name)) as made:
        folder = Path(name)
        write_queries(folder / "queries", ROWS)
        settings = [f"execution.ray_address={made.address}"]  # type: ignore[attr-defined]
        model = model_folder(folder)
        if drivers:
            job = Job(str(folder / "queries"), str(folder / "driver"), model, settings)
            killed, found = driver_kills(job, folder / "queries", rng, drivers, longest=9.0)
            typer.echo(f"{killed} driver kills, {len(found)} problems")
            problems += found
        if actors:
            job = Job(str(folder / "queries"), str(folder / "actor"), model, settings)
            killed, found = actor_kills(job, folder / "queries", folder / "pids", rng, actors)
            typer.echo(f"{killed} actor kills, {len(found)} problems")
            problems += found
    for problem in problems:
        typer.echo(problem)
    sys.exit(bool(problems))


if __name__ == "__main__":
    typer.run(campaign)
