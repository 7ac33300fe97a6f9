"""``jobs.annotate`` as the benchmark runs it: a process of its own, Parquet to Parquet, timed by its manifest."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml

from jobs.benchmark_report import CALL, FILES, STAGES
from jobs.benchmark_script import SCRIPT, Script
from jobs.benchmark_workloads import Row
from jobs.demo import demo_index
from pipeline.config import DecodingConfig, ModelConfig


@dataclass(frozen=True)
class Job:
    """A run of two units, one after the other: the first warms the engine, the second is measured.

    The second is all rows, as it is by default up to 256 of them; there is no third to write beside.

    Attributes:
        folder: empty, for the run's files.
        script: what is written, where the model does not say it.
    """

    folder: Path
    model: ModelConfig
    decoding: DecodingConfig
    warming: Sequence[Row]
    rows: Sequence[Row]
    script: Script | None = None

    def run(self) -> tuple[float, dict[str, float]]:
        """Run it.

        Returns:
            Queries/s from the beginning of the second unit to the finished manifest; mean seconds of one of its rows
            by stage, its share of the unit's files, and seconds of the whole call with start and first unit.

        Raises:
            RuntimeError: the run failed, a row of it did, or its units did not come one after the other.
        """
        done = self._call()
        output = self.folder / "out"
        manifest = json.loads((output / "_manifest.json").read_text())
        name, unit = measured_unit(manifest["units"], len(self.rows))
        data = output / "data" / f"part-{name}.parquet"
        usage = pq.read_table(data, columns=["usage"])["usage"].combine_chunks()
        seconds = {stage: float(pc.mean(pc.struct_field(usage, stage)).as_py()) for stage in STAGES}
        seconds[FILES] = (data.stat().st_mtime - unit["ended"]) / len(self.rows)
        seconds[CALL] = float(json.loads(done.stdout)["seconds"])
        finished = datetime.fromisoformat(manifest["finished"]).timestamp()
        return len(self.rows) / (finished - unit["began"]), seconds

    def _call(self) -> "subprocess.CompletedProcess[str]":
        queries, settings = self._inputs()
        options = ["--config", settings, "--queries", queries, "--index", demo_index(), "--output", self.folder / "out"]
        module = "jobs.annotate" if self.script is None else "jobs.benchmark_script"
        command = [sys.executable, "-m", module, *map(str, options), "--json"]
        script = {} if self.script is None else {SCRIPT: json.dumps(dataclasses.asdict(self.script))}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | script)  # noqa: S603  our own
        if done.returncode != 0:
            raise RuntimeError(f"{module} ended with status {done.returncode}: {done.stderr[-2000:]}")
        return done

    def _inputs(self) -> tuple[Path, Path]:
        """The query set, a file for each unit, and the settings."""
        queries, settings = self.folder / "queries", self.folder / "run.yaml"
        queries.mkdir()
        table, first = pa.Table.from_pylist([*self.warming, *self.rows]), len(self.warming)
        pq.write_table(table[:first], queries / "0.parquet")
        pq.write_table(table[first:], queries / "1.parquet")
        record = {
            "model": self.model.model_dump(exclude_none=True),
            "decoding": self.decoding.model_dump(mode="json"),
            "execution": {"unit_rows": max(first, len(self.rows)), "units_in_flight": 1},
        }
        settings.write_text(yaml.safe_dump(record))
        return queries, settings


def measured_unit(units: Mapping[str, Mapping[str, Any]], rows: int) -> tuple[str, Mapping[str, Any]]:
    """Name and summary of the second of two units.

    Args:
        units: a manifest's.
        rows: that it must have.

    Raises:
        RuntimeError: it is not what shall be measured.
    """
    ordered = sorted(units.items(), key=lambda item: float(item[1]["began"]))
    failed = sum(unit["errors"] for unit in units.values())
    if failed:
        raise RuntimeError(f"{failed} rows of the job failed; its rate would mean nothing")
    (_, first), (name, second) = ordered
    if second["rows"] != rows or second["began"] < first["ended"]:
        raise RuntimeError(f"the job's units did not come one after the other: {dict(ordered)}")
    return name, second
