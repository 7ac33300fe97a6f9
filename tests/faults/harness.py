"""Runs with faults, and what must hold afterwards, from the files alone."""

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

GIVEN = pa.list_(pa.struct([("id", pa.string()), ("title", pa.string()), ("text", pa.string())]))
PASSAGES = [{"id": f"p{n}", "title": "", "text": f"text{n}"} for n in range(3)]


def write_queries(folder: Path, rows: int, words: dict[int, str] | None = None) -> None:
    """A query set in two files; some rows have words that the engine's script knows."""
    folder.mkdir(parents=True)
    table = pa.table(
        {
            "id": [f"q{n}" for n in range(rows)],
            "query": [f"question {n} {(words or {}).get(n, '')}".strip() for n in range(rows)],
            "passages": pa.array([PASSAGES] * rows, GIVEN),
        }
    )
    pq.write_table(table.slice(0, rows // 3), folder / "a.parquet", row_group_size=50)
    pq.write_table(table.slice(rows // 3), folder / "b.parquet", row_group_size=50)


@dataclass
class Job:
    """A command on one output, to be started again until it ends by itself."""

    queries: str
    output: str
    model: Path
    settings: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)

    def start(self) -> subprocess.Popen[str]:
        """Start the command in a session of its own."""
        settings = ["execution.unit_rows=10", "execution.cpus_per_actor=0.5", "execution.gpus_per_actor=0"]
        options = ["--queries", self.queries, "--output", self.output, "--model", str(self.model)]
        options += [word for setting in [*settings, *self.settings] for word in ("--set", setting)]
        return subprocess.Popen(
            [sys.executable, "-m", "tests.faults.scripted", *options],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**os.environ, **self.environment},
        )

    def finish(self, timeout: float = 240) -> tuple[int, str]:
        """Run the command to its end: exit status and what it said."""
        process = self.start()
        _, said = process.communicate(timeout=timeout)
        return process.returncode, said


def kill(process: subprocess.Popen[str]) -> None:
    """End a process and whatever it has started, without a word."""
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def kill_drivers(job: Job, rng: random.Random, most: int, longest: float) -> int:
    """Kill the driver at random moments until a run ends by itself or ``most`` were killed; how many were."""
    for killed in range(most):
        process = job.start()
        try:
            process.communicate(timeout=rng.uniform(0.2, longest))
        except subprocess.TimeoutExpired:
            kill(process)
        else:
            return killed
    return most


def broken(output: str, queries: Path, filesystem: object | None = None, errors: int = 0) -> list[str]:
    """What does not hold of a finished output: each id once in ``data/`` or ``errors/``, and so many errors."""
    wanted = Counter(ds.dataset(queries).to_table(columns=["id"])["id"].to_pylist())
    found = {}
    for name in ("data", "errors"):
        try:
            found[name] = ds.dataset(f"{output}/{name}", filesystem=filesystem, format="parquet").to_table(
                columns=["id"]
            )
        except FileNotFoundError:
            found[name] = pa.table({"id": pa.array([], pa.string())})
    counts = Counter(found["data"]["id"].to_pylist()) + Counter(found["errors"]["id"].to_pylist())
    problems = [f"{name}: {counts[name]} times" for name in wanted | counts if counts[name] != wanted[name]]
    if found["errors"].num_rows != errors:
        problems.append(f"{found['errors'].num_rows} errors instead of {errors}")
    return problems


def processes(folder: Path) -> list[int]:
    """Actors that are alive, by the files that they have left."""
    return [int(file.name) for file in folder.iterdir() if Path(f"/proc/{file.name}").exists()]


def kill_actors(job: Job, pids: Path, rng: random.Random, kills: int, pause: float) -> tuple[int, int, str]:
    """Run the job and kill its actors meanwhile; how many, the exit status, and what was said."""
    process, killed = job.start(), 0
    while process.poll() is None and killed < kills:
        time.sleep(rng.uniform(0.1, pause))
        for pid in rng.sample(alive := processes(pids), min(1, len(alive))):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
            (pids / str(pid)).unlink()
            killed += 1
    _, said = process.communicate(timeout=240)
    return killed, process.returncode, said
