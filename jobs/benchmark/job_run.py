"""``jobs.annotate`` as the benchmark runs it: a process of its own, Parquet to Parquet, timed by its manifest."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml

from jobs.benchmark.results import CALL, FILES, STAGES
from jobs.benchmark.scripted_model import SCRIPT, Script
from jobs.benchmark.workloads import Row
from jobs.demo import demo_index
from pipeline.config.sections import DecodingConfig, ModelConfig


@dataclass(frozen=True)
class Job:
    """A run of units that come one after the other: the first warms the engine, each of the others is measured.

    A measured unit is all rows of a repeat, as it is by default up to 256 of them. Its queries come nowhere else in the
    run, since the job's caches cannot be emptied and the second time would cost less than the first. Ray Data keeps no
    order: the unit that comes first may be a repeat's, and then the warming one is measured in its place.

    Attributes:
        folder: an empty folder, for the run's files.
        repeats: the rows of each repeat, as many in one as in another.
        script: says what is written, where the model does not.
    """

    folder: Path
    model: ModelConfig
    decoding: DecodingConfig
    warming: Sequence[Row]
    repeats: Sequence[Sequence[Row]]
    script: Script | None = None

    def run(self) -> tuple[list[float], dict[str, float]]:
        """Run it.

        Returns:
            Queries/s of each repeat; mean seconds of a measured row by stage, its share of its unit's files, and
            seconds of the whole call with start and first unit.

        Raises:
            RuntimeError: the run failed, a row of it did, or its units did not come one after the other.
        """
        done = self._call()
        output = self.folder / "out"
        manifest = json.loads((output / "_manifest.json").read_text())
        finished = datetime.fromisoformat(manifest["finished"]).timestamp()
        units = manifest["units"]
        taken = measured_seconds(units, finished)
        rates = [units[name]["rows"] / seconds for name, seconds in taken.items()]
        seconds = stage_seconds(output / "data", {name: units[name] for name in taken})
        return rates, {**seconds, CALL: float(json.loads(done.stdout)["seconds"])}

    def _call(self) -> "subprocess.CompletedProcess[str]":
        queries, settings = self._inputs()
        options = ["--config", settings, "--queries", queries, "--index", demo_index(), "--output", self.folder / "out"]
        module = "jobs.annotate" if self.script is None else "jobs.benchmark.scripted_model"
        command = [sys.executable, "-m", module, *map(str, options), "--json"]
        script = {} if self.script is None else {SCRIPT: json.dumps(dataclasses.asdict(self.script))}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | script)  # noqa: S603  our own
        if done.returncode != 0:
            raise RuntimeError(f"{module} ended with status {done.returncode}: {done.stderr[-2000:]}")
        return done

    def _inputs(self) -> tuple[Path, Path]:
        """Write the query set, a file for each unit, and the settings."""
        queries, settings = self.folder / "queries", self.folder / "run.yaml"
        queries.mkdir()
        units = [self.warming, *self.repeats]
        table, begin = pa.Table.from_pylist([row for rows in units for row in rows]), 0
        for number, rows in enumerate(units):
            pq.write_table(table.slice(begin, len(rows)), queries / f"{number:05d}.parquet")
            begin += len(rows)
        record = {
            "model": self.model.model_dump(exclude_none=True),
            "decoding": self.decoding.model_dump(mode="json"),
            "execution": {"unit_rows": max(map(len, units)), "units_in_flight": 1},
        }
        settings.write_text(yaml.safe_dump(record))
        return queries, settings


def measured_seconds(units: Mapping[str, Mapping[str, Any]], finished: float) -> dict[str, float]:
    """Return how long each unit but the first took: until the next one began, the last until the run was finished.

    Args:
        units: a manifest's.
        finished: when the manifest was written, in seconds since the epoch.

    Returns:
        Seconds by the unit's name, in the order in which the units came.

    Raises:
        RuntimeError: they are not what shall be measured.
    """
    failed = sum(unit["errors"] for unit in units.values())
    if failed:
        raise RuntimeError(f"{failed} rows of the job failed; its rate would mean nothing")
    names = sorted(units, key=lambda name: float(units[name]["began"]))
    if any(units[after]["began"] < units[before]["ended"] for before, after in pairwise(names)):
        raise RuntimeError(f"the job's units did not come one after the other: {dict(units)}")
    begins = [*(units[name]["began"] for name in names), finished]
    return {name: end - begin for name, (begin, end) in zip(names[1:], pairwise(begins[1:]), strict=True)}


def stage_seconds(folder: Path, units: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Return the mean seconds of a row by stage, and its share of what writing its unit's files took.

    Args:
        folder: holds the units' data files.
        units: by name, with the time at which each was annotated.
    """
    files = {name: folder / f"part-{name}.parquet" for name in units}
    usage = pa.concat_tables([pq.read_table(file, columns=["usage"]) for file in files.values()])["usage"]
    seconds = {stage: float(pc.mean(pc.struct_field(usage.combine_chunks(), stage)).as_py()) for stage in STAGES}
    writing = sum(file.stat().st_mtime - units[name]["ended"] for name, file in files.items())
    return {**seconds, FILES: writing / len(usage)}
