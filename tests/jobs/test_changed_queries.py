"""Runs whose query files are replaced before they end."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import typer
from typer.testing import CliRunner, Result

from jobs.annotate import annotate
from pipeline.cluster import Resources
from tests.jobs.test_nightly import answers, ask

APP = typer.Typer()
APP.command()(annotate)


class Set:
    """A query set of two files and the runs over it."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
        self.folder, self.output, self.model = folder, folder.parent / "out", model
        self._monkeypatch = monkeypatch

    def run(self, change: Any = None, after: int = 99, *options: str) -> Result:
        """Annotate; call ``change`` after so many units, or at the end."""

        def annotate_units(plan: Any, *_: Any) -> Iterator[Any]:
            for number, unit in enumerate(answers(plan)):
                if number == after and change:
                    change()
                yield unit
            if after == 99 and change:
                change()

        self._monkeypatch.setattr("pipeline.run.driver.annotate_units", annotate_units)
        fixed = ["--model", str(self.model), "--set", "decoding.mode=never", "--set", "execution.unit_rows=2"]
        return CliRunner().invoke(APP, ["--queries", str(self.folder), "--output", str(self.output), *fixed, *options])

    def read_answers(self) -> dict[str, str]:
        rows = pq.read_table(self.output / "data").to_pylist()
        return {row["id"]: row["answer"] for row in rows}


@pytest.fixture
def queries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, demo_model: Path) -> Set:
    monkeypatch.setattr("jobs.annotate.allot_resources", lambda _plan: Resources(1, 0))
    monkeypatch.setattr("pipeline.storage.lease.SETTLE_S", 0.05)
    folder = tmp_path / "queries"
    folder.mkdir()
    ask(folder / "a.parquet", a="one", b="two", c="san")
    ask(folder / "b.parquet", d="for", e="fiv", f="six")
    return Set(folder, monkeypatch, demo_model)


@pytest.mark.parametrize("after", [0, 1, 99])
@pytest.mark.parametrize("options", [[], ["--set", "skip_annotated=NONE"]], ids=["whole set", "selected rows"])
def test_a_replaced_file_ends_the_run_without_success(queries: Set, tmp_path: Path, after: int, options: list[str]):
    options = [option.replace("NONE", str(tmp_path / "earlier")) for option in options]
    source = queries.output / "_queries" / "part-00000.parquet" if options else queries.folder / "b.parquet"

    def replace() -> None:
        table = pq.read_table(source)
        ask(source, **dict.fromkeys(table["id"].to_pylist(), "new"))

    result = queries.run(replace, after, *options)
    assert result.exit_code == 1, result.output
    assert f"{source}: has changed since the run began" in result.output
    assert not (queries.output / "_SUCCESS").exists()
    assert "new" not in queries.read_answers().values()


def test_a_run_continues_after_a_file_was_rewritten_with_the_same_content(queries: Set):
    def rewrite() -> None:
        file = queries.folder / "b.parquet"
        content = file.read_bytes()
        file.write_bytes(content)
        os.utime(file, (1e9, 1e9))

    result = queries.run(rewrite)
    assert result.exit_code == 1
    assert "b.parquet: has changed since the run began" in result.output
    assert "if its rows are the same, run the same command again" in result.output
    assert queries.run().exit_code == 0
    assert (queries.output / "_SUCCESS").exists()
    assert queries.read_answers() == {"a": "ONE", "b": "TWO", "c": "SAN", "d": "FOR", "e": "FIV", "f": "SIX"}


def test_a_run_whose_set_differs_now_is_refused(queries: Set):
    assert queries.run(lambda: ask(queries.folder / "b.parquet", d="FOR", e="FIV", f="SIX")).exit_code == 1
    result = queries.run()
    assert result.exit_code == 2
    assert "contains a run that differs in queries" in result.output


def test_a_resumed_run_notices_a_file_replaced_during_its_own_time(queries: Set):
    def stop() -> None:
        raise RuntimeError("stopped")

    assert queries.run(stop, 1).exit_code == 1
    result = queries.run(lambda: ask(queries.folder / "a.parquet", a="new", b="new", c="new"))
    assert result.exit_code == 1
    assert "a.parquet: has changed since the run began" in result.output
    assert not (queries.output / "_SUCCESS").exists()


def test_a_file_that_is_added_during_the_run_does_not_stop_it(queries: Set):
    result = queries.run(lambda: ask(queries.folder / "c.parquet", g="new"))
    assert result.exit_code == 0
    assert len(queries.read_answers()) == 6
