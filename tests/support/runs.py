"""Runs of jobs.annotate in this process, whose rows are answered without an engine."""

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer
from typer.testing import CliRunner, Result

from jobs.annotate import annotate
from pipeline.cluster import Resources
from pipeline.config.sections import StorageConfig
from pipeline.output.unit_files import Work, split_failed
from pipeline.queries.units import read_unit
from pipeline.run.annotation import build_annotated_schema

APP = typer.Typer()
APP.command()(annotate)
USAGE = {"prompt_tokens": 10, "generated_tokens": 3}


def write_queries(file: Path, **texts: str) -> None:
    """A query file of these texts by id; the row of ``bad`` fails."""
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"id": list(texts), "query": list(texts.values())}), file)


def answer_units(plan: Any) -> Iterator[Any]:
    """In the engine's place: the query in capitals as the answer of each row."""
    schema = build_annotated_schema(plan.queries.schema, keep_candidates=False)
    for unit in plan.todo:
        rows = [
            {**row, "error_type": "KeyError", "error_message": "no", "attempts": 1}
            if row["query"] == "bad"
            else {**row, "answer": row["query"].upper(), "retrieved": False, "usage": USAGE}
            for row in read_unit(unit, plan.queries.schema, StorageConfig()).to_pylist()
        ]
        table = pa.Table.from_pylist(rows, schema)
        files = split_failed(table, plan.queries.schema, keep_candidates=False)
        yield plan.output.write_unit(unit.id, *files, plan.digest, Work(100.0, 104.0, 103.0, "a"))


class ScriptedRun:
    """A query set and the runs over it, in units of two rows."""

    def __init__(self, queries: Path, output: Path, model: Path) -> None:
        self.queries, self.output, self.model = queries, output, model

    def annotate(
        self,
        *options: str,
        change: Callable[[], None] | None = None,
        after: int | None = None,
        units: int | None = None,
    ) -> Result:
        """Annotate; call ``change`` before the unit of number ``after`` is counted, or after all units.

        Args:
            units: number of units after which the others are refused.
        """

        def annotate_units(plan: Any, *_: Any) -> Iterator[Any]:
            for number, unit in enumerate(islice(answer_units(plan), units)):
                if change and number == after:
                    change()
                yield unit
            if change and after is None:
                change()

        settings = ["decoding.mode=never", "execution.unit_rows=2", "execution.max_error_rate=1"]
        fixed = ["--model", str(self.model), *(word for setting in settings for word in ("--set", setting))]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("jobs.annotate.allot_resources", lambda _plan: Resources(1, 0))
            patch.setattr("pipeline.storage.lease.SETTLE_S", 0.05)
            patch.setattr("pipeline.run.driver.annotate_units", annotate_units)
            return CliRunner().invoke(
                APP, ["--queries", str(self.queries), "--output", str(self.output), *fixed, *options]
            )

    def read_answers(self) -> dict[str, str]:
        """Read the answers by id."""
        return {row["id"]: row["answer"] for row in pq.read_table(self.output / "data").to_pylist()}
