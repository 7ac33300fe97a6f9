"""Runs with faults, and what must hold afterwards, from the files alone."""

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from pyarrow import fs

GIVEN = pa.list_(pa.struct([("id", pa.string()), ("title", pa.string()), ("text", pa.string())]))
PASSAGES = [{"id": f"p{n}", "title": "", "text": f"text{n}"} for n in range(3)]


def write_queries(folder: Path, rows: int, words: dict[int, str] | None = None, given: bool = True) -> None:
    """Write a query set in two files; some rows have words that the engine's script knows.

    Args:
        given: whether rows bring passages; without them an index is searched.
    """
    folder.mkdir(parents=True)
    table = pa.table(
        {
            "id": [f"q{n}" for n in range(rows)],
            "query": [f"question {n} {(words or {}).get(n, '')}".strip() for n in range(rows)],
            "passages": pa.array([PASSAGES] * rows, GIVEN),
        }
    )
    table = table if given else table.drop_columns("passages")
    pq.write_table(table.slice(0, rows // 3), folder / "a.parquet", row_group_size=50)
    pq.write_table(table.slice(rows // 3), folder / "b.parquet", row_group_size=50)


@dataclass
class Job:
    """A command on one output, to be started again until it ends by itself.

    Attributes:
        module: with the scripted engine, or ``jobs.annotate`` for the real one.
        filesystem: where ``output`` is read when the run is over; None for the local one.
    """

    queries: str
    output: str
    model: Path
    settings: list[str] = field(default_factory=list)
    options: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    module: str = "tests.faults.scripted"
    filesystem: Any = None

    def list_words(self) -> list[str]:
        """Return the words of the command."""
        settings = ["execution.unit_rows=10", "execution.cpus_per_actor=0.5", "execution.gpus_per_actor=0"]
        options = ["--queries", self.queries, "--output", self.output, "--model", str(self.model), *self.options]
        options += [word for setting in [*settings, *self.settings] for word in ("--set", setting)]
        return [sys.executable, "-m", self.module, *options]

    def start(self) -> "Running":
        """Start the command in a session of its own."""
        # A pipe that nobody reads fills, and the command waits.
        log = tempfile.TemporaryFile("w+")  # noqa: SIM115  closed with the object that holds it
        process = subprocess.Popen(
            self.list_words(),
            stdout=subprocess.DEVNULL,
            stderr=log,
            start_new_session=True,
            env={**os.environ, **self.environment},
        )
        return Running(process, log)

    def finish(self, timeout: float = 240) -> tuple[int, str]:
        """Run the command to its end: exit status and what it said."""
        return self.start().ended(timeout)

    def problems(self, queries: Path, status: int, said: str) -> list[str]:
        """What does not hold of a run that ended."""
        failed = [f"status {status}: {said[-2000:]}"] if status != 0 else []
        output = self.output.removeprefix("s3://")
        marker = (self.filesystem or fs.LocalFileSystem()).get_file_info(f"{output}/_SUCCESS")
        unmarked = ["no _SUCCESS"] if marker.type != fs.FileType.File else []
        found = [*failed, *unmarked, *broken(output, queries, self.filesystem)]
        return [f"{self.output}: {problem}" for problem in found]


@dataclass
class Running:
    """A command at work."""

    process: subprocess.Popen[bytes]
    log: IO[str]

    def ended(self, timeout: float = 240) -> tuple[int, str]:
        """Wait for its end: exit status and what it said."""
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            return -1, f"did not end within {timeout} s: {self._said()}"
        return self.process.returncode, self._said()

    def kill(self) -> None:
        """End it and whatever it has started, without a word."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def _said(self) -> str:
        self.log.seek(0)
        return self.log.read()


def wait_for(reached: Callable[[], object], seconds: float = 120) -> None:
    """Wait until a condition holds.

    Raises:
        AssertionError: it does not within so many seconds.
    """
    until = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < until
        time.sleep(0.05)


def kill_drivers(job: Job, rng: random.Random, most: int, longest: float) -> int:
    """Kill the driver at random moments until a run ends by itself or ``most`` were killed; how many were.

    Raises:
        AssertionError: a run has written a unit again that was finished before it.
    """
    for killed in range(most):
        before = written(job.output)
        running = job.start()
        try:
            running.process.wait(rng.uniform(0.2, longest))
        except subprocess.TimeoutExpired:
            running.kill()
        else:
            return killed
        finally:
            assert not redone(before, job.output)
    return most


def kill_actors(running: Running, pids: Path, rng: random.Random, kills: int, pause: float) -> int:
    """Kill actors of a running job at random moments; how many were."""
    killed = 0
    while running.process.poll() is None and killed < kills:
        time.sleep(rng.uniform(0.1, pause))
        for pid in rng.sample(alive := processes(pids), min(1, len(alive))):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
            (pids / str(pid)).unlink()
            killed += 1
    return killed


def processes(folder: Path) -> list[int]:
    """Actors that are alive, by the files that they have left."""
    return [int(file.name) for file in folder.iterdir() if Path(f"/proc/{file.name}").exists()]


def written(output: str) -> dict[str, int]:
    """Finished units of an output on this disk, and when each was written, in nanoseconds."""
    return {file.name: file.stat().st_mtime_ns for file in Path(output).glob("data/part-*.parquet")}


def redone(before: dict[str, int], output: str) -> list[str]:
    """Units that were finished ``before`` and have been written again."""
    now = written(output)
    return [f"{output}: {name} was finished and is written again" for name in before if now.get(name) != before[name]]


def broken(output: str, queries: Path, filesystem: Any = None, errors: int = 0) -> list[str]:
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
    wrong = [f"{name} is there {counts[name]} times" for name in wanted | counts if counts[name] != wanted[name]]
    problems = [f"{len(wrong)} rows: {', '.join(wrong[:5])}"] if wrong else []
    if found["errors"].num_rows != errors:
        problems.append(f"{found['errors'].num_rows} errors instead of {errors}")
    return problems
