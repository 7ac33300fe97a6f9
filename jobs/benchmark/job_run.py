"""Run ``jobs.annotate`` for the benchmark: in its own process, Parquet to Parquet, timed by its manifest."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import chain, pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml

from jobs.benchmark.results import CALL, FILES, STAGES
from jobs.benchmark.scripted_model import SCRIPT, Script
from jobs.benchmark.workloads import Row
from jobs.demo import get_demo_index
from pipeline.config.sections import DecodingConfig, ModelConfig, StorageConfig
from pipeline.output.unit_files import UnitSummary
from pipeline.output.unit_log import read_units
from pipeline.storage.location import locate


@dataclass(frozen=True)
class Job:
    """A run whose units follow one another: the first one warms up the engine, each of the others is measured.

    A measured unit holds all rows of a repeat; up to 256 rows, the default unit size gives the same units. Its queries
    occur nowhere else in the run: the job's caches cannot be emptied, and a repeated query would cost less. Ray Data
    keeps no order: if the unit of a repeat runs first, the warm-up unit is measured in its place.

    Attributes:
        folder: empty folder for the files of the run.
        warming: rows of the warm-up unit.
        repeats: rows of each repeat, the same number in each.
        script: script of the output; None if the model's own output is used.
    """

    folder: Path
    model: ModelConfig
    decoding: DecodingConfig
    warming: Sequence[Row]
    repeats: Sequence[Sequence[Row]]
    script: Script | None = None

    def run(self) -> tuple[list[float], dict[str, float]]:
        """Run the job and return its figures.

        Returns:
            Queries/s of each repeat; and mean seconds of a measured row by stage, with its share of the seconds for
            writing its unit's files, and the seconds of the whole call, including the start and the first unit.

        Raises:
            RuntimeError: the run or one of its rows failed, or its units overlapped.
        """
        done = self._call()
        output = self.folder / "out"
        manifest = json.loads((output / "_manifest.json").read_text())
        finished = datetime.fromisoformat(manifest["finished"]).timestamp()
        units = read_units(locate(str(output), StorageConfig()))
        taken = compute_unit_seconds(units, finished)
        rates = [units[name].rows / seconds for name, seconds in taken.items()]
        seconds = compute_stage_seconds(output / "data", {name: units[name] for name in taken})
        return rates, {**seconds, CALL: float(json.loads(done.stdout)["seconds"])}

    def _call(self) -> "subprocess.CompletedProcess[str]":
        queries, settings = self._write_inputs()
        files = {"config": settings, "queries": queries, "index": get_demo_index(), "output": self.folder / "out"}
        options = [f"--{name}={file}" for name, file in files.items()]
        module = "jobs.annotate" if self.script is None else "jobs.benchmark.scripted_model"
        command = [sys.executable, "-m", module, *options, "--json"]
        script = {} if self.script is None else {SCRIPT: json.dumps(dataclasses.asdict(self.script))}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | script)  # noqa: S603  our own
        if done.returncode != 0:
            raise RuntimeError(f"{module} exited with status {done.returncode}: {done.stderr[-2000:]}")
        return done

    def _write_inputs(self) -> tuple[Path, Path]:
        """Write the query set, with one file for each unit, and the settings; return their paths."""
        queries, settings = self.folder / "queries", self.folder / "run.yaml"
        queries.mkdir()
        units = [self.warming, *self.repeats]
        table, begin = pa.Table.from_pylist(list(chain.from_iterable(units))), 0
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


def compute_unit_seconds(units: Mapping[str, UnitSummary], finished: float) -> dict[str, float]:
    """Return the seconds of each unit but the first: up to the start of the next one, or to the end of the run.

    Args:
        units: summaries of the units, by name.
        finished: time at which the manifest was written, in seconds since the epoch.

    Returns:
        Seconds by unit name, in the order in which the units ran.

    Raises:
        RuntimeError: a row failed, or units overlapped.
    """
    failed = sum(unit.failed for unit in units.values())
    if failed:
        raise RuntimeError(f"{failed} rows of the job failed, so its rate would be meaningless")
    names = sorted(units, key=lambda name: units[name].began or 0.0)
    begins, ends = [units[name].began or 0.0 for name in names], [units[name].ended or 0.0 for name in names]
    if any(begin < end for begin, end in zip(begins[1:], ends, strict=False)):
        raise RuntimeError(f"the job's units overlapped: {dict(units)}")
    edges = pairwise([*begins[1:], finished])
    return {name: end - begin for name, (begin, end) in zip(names[1:], edges, strict=True)}


def compute_stage_seconds(folder: Path, units: Mapping[str, UnitSummary]) -> dict[str, float]:
    """Return the mean seconds of a row by stage, with its share of the seconds for writing its unit's files.

    Args:
        folder: folder of the units' data files.
        units: summaries of the units, by name.
    """
    files = {name: folder / f"part-{name}.parquet" for name in units}
    usage = pa.concat_tables([pq.read_table(file, columns=["usage"]) for file in files.values()])["usage"]
    seconds = {stage: float(pc.mean(pc.struct_field(usage.combine_chunks(), stage)).as_py()) for stage in STAGES}
    writing = sum(file.stat().st_mtime - (units[name].ended or 0.0) for name, file in files.items())
    return {**seconds, FILES: writing / len(usage)}
