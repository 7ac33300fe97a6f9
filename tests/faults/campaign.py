"""Many runs with faults, at random moments from a printed seed: ``python -m tests.faults.campaign --drivers 100``.

After each run the invariant is checked from its files alone. Ends with status 1 where it does not hold.
"""

import random
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from tests.faults import series
from tests.faults.harness import Job, write_queries
from tests.support.s3 import serving_s3

ROWS, ROWS_ON_S3, ROWS_FOR_REAL = 300, 100, 60


def model_folder(folder: Path) -> Path:
    """What passes for a model where nothing reads it."""
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text("{}")
    return folder / "model"


def campaign(
    drivers: Annotated[int, typer.Option(help="Driver kills.")] = 0,
    actors: Annotated[int, typer.Option(help="Actor kills.")] = 0,
    nodes: Annotated[int, typer.Option(help="Kills of a worker node.")] = 0,
    hosts: Annotated[int, typer.Option(help="Kills of a worker's host, or cuts of its link.")] = 0,
    clusters: Annotated[int, typer.Option(help="Kills of everything at once.")] = 0,
    storage: Annotated[int, typer.Option(help="Runs from and to a store in trouble.")] = 0,
    hangs: Annotated[int, typer.Option(help="Engines that hang.")] = 0,
    stops: Annotated[int, typer.Option(help="Drivers that are stopped until another run has taken over.")] = 0,
    replacements: Annotated[int, typer.Option(help="Query files that are replaced during a run.")] = 0,
    real: Annotated[int, typer.Option(help="Driver kills of runs with vLLM and the embedded model.")] = 0,
    seed: Annotated[int | None, typer.Option(help="Of every random moment; drawn by default.")] = None,
) -> None:
    """Run with faults and say what did not hold."""
    seed = random.SystemRandom().randrange(10**6) if seed is None else seed
    typer.echo(f"seed {seed}")
    wanted: dict[str, tuple[int, Callable[..., series.Outcome]]] = {
        "driver kills": (drivers, _drivers),
        "actor kills": (actors, _actors),
        "node kills": (nodes, series.node_kills),
        "faults of hosts": (hosts, series.host_faults),
        "kills of the whole cluster": (clusters, series.cluster_kills),
        "runs with storage faults": (storage, _storage),
        "hung engines": (hangs, _hangs),
        "stopped drivers": (stops, series.stops),
        "replaced files": (replacements, _replacements),
        "driver kills with vLLM": (real, _real),
    }
    problems = []
    for what, (number, run) in wanted.items():
        if not number:
            continue
        with tempfile.TemporaryDirectory() as name:
            folder, began = Path(name), time.monotonic()
            rows = {_storage: ROWS_ON_S3, _real: ROWS_FOR_REAL}.get(run, ROWS)
            write_queries(folder / "queries", rows)
            job = Job(str(folder / "queries"), str(folder / "out"), model_folder(folder))
            faults, found = run(job, folder / "queries", random.Random(f"{seed} {what}"), number)
            typer.echo(f"{number} {what}: {faults} faults, {len(found)} problems, {time.monotonic() - began:.0f} s")
            problems += found
    for problem in problems:
        typer.echo(problem)
    sys.exit(bool(problems))


def _drivers(job: Job, queries: Path, rng: random.Random, kills: int) -> series.Outcome:
    with tempfile.TemporaryDirectory() as folder, series.cluster(Path(folder)) as made:
        return series.driver_kills(series.on(made, job), queries, rng, kills, longest=9.0)


def _actors(job: Job, queries: Path, rng: random.Random, kills: int) -> series.Outcome:
    with tempfile.TemporaryDirectory() as folder, series.cluster(Path(folder)) as made:
        return series.actor_kills(series.on(made, job), queries, Path(folder) / "pids", rng, kills)


def _storage(job: Job, queries: Path, rng: random.Random, runs: int) -> series.Outcome:
    with (
        tempfile.TemporaryDirectory() as folder,
        tempfile.TemporaryDirectory() as root,
        series.cluster(Path(folder)) as made,
        serving_s3(Path(root)) as s3,
    ):
        return series.storage_faults(series.on(made, job), queries, s3, rng, runs)


def _hangs(job: Job, queries: Path, rng: random.Random, stalls: int) -> series.Outcome:
    with tempfile.TemporaryDirectory() as folder, series.cluster(Path(folder)) as made:
        return series.hangs(series.on(made, job), queries, rng, stalls)


def _replacements(job: Job, queries: Path, rng: random.Random, count: int) -> series.Outcome:
    with tempfile.TemporaryDirectory() as folder, series.cluster(Path(folder)) as made:
        return series.replacements(series.on(made, job), queries, rng, count)


def _real(job: Job, queries: Path, rng: random.Random, kills: int) -> series.Outcome:
    from pipeline.demo_models import build_demo_model

    settings = ["execution.cpus_per_actor=2", "execution.unit_rows=4"]
    job = replace(job, module="jobs.annotate", model=build_demo_model(), settings=settings)
    return series.driver_kills(job, queries, rng, kills, longest=150.0)


if __name__ == "__main__":
    typer.run(campaign)
