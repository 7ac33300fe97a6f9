"""Runs whose query files are replaced before they end."""

import os
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.support.runs import ScriptedRun, write_queries


@pytest.fixture
def queries(tmp_path: Path, demo_model: Path) -> ScriptedRun:
    """A query set of two files."""
    write_queries(tmp_path / "queries" / "a.parquet", a="one", b="two", c="san")
    write_queries(tmp_path / "queries" / "b.parquet", d="for", e="fiv", f="six")
    return ScriptedRun(tmp_path / "queries", tmp_path / "out", demo_model)


@pytest.mark.parametrize("after", [0, 1, None])
@pytest.mark.parametrize("options", [[], ["--set", "skip_annotated=NONE"]], ids=["whole set", "selected rows"])
def test_a_replaced_file_ends_the_run_without_success(
    queries: ScriptedRun, tmp_path: Path, after: int | None, options: list[str]
):
    options = [option.replace("NONE", str(tmp_path / "earlier")) for option in options]
    source = queries.output / "_queries" / "part-00000.parquet" if options else queries.queries / "b.parquet"

    def replace() -> None:
        table = pq.read_table(source)
        write_queries(source, **dict.fromkeys(table["id"].to_pylist(), "new"))

    result = queries.annotate(*options, change=replace, after=after)
    assert result.exit_code == 1, result.output
    assert f"{source}: has changed since the run began" in result.output
    assert not (queries.output / "_SUCCESS").exists()
    assert "new" not in queries.read_answers().values()


def test_a_run_continues_after_a_file_was_rewritten_with_the_same_content(queries: ScriptedRun):
    def rewrite() -> None:
        file = queries.queries / "b.parquet"
        content = file.read_bytes()
        file.write_bytes(content)
        os.utime(file, (1e9, 1e9))

    result = queries.annotate(change=rewrite)
    assert result.exit_code == 1
    assert "b.parquet: has changed since the run began" in result.output
    assert "if its rows are the same, run the same command again" in result.output
    assert queries.annotate().exit_code == 0
    assert (queries.output / "_SUCCESS").exists()
    assert queries.read_answers() == {"a": "ONE", "b": "TWO", "c": "SAN", "d": "FOR", "e": "FIV", "f": "SIX"}


def test_a_run_whose_set_differs_now_is_refused(queries: ScriptedRun):
    assert (
        queries.annotate(
            change=lambda: write_queries(queries.queries / "b.parquet", d="FOR", e="FIV", f="SIX")
        ).exit_code
        == 1
    )
    result = queries.annotate()
    assert result.exit_code == 2
    assert "contains a run that differs in queries" in result.output


def test_a_resumed_run_notices_a_file_replaced_during_its_own_time(queries: ScriptedRun):
    def stop() -> None:
        raise RuntimeError("stopped")

    assert queries.annotate(change=stop, after=1).exit_code == 1
    result = queries.annotate(change=lambda: write_queries(queries.queries / "a.parquet", a="new", b="new", c="new"))
    assert result.exit_code == 1
    assert "a.parquet: has changed since the run began" in result.output
    assert not (queries.output / "_SUCCESS").exists()


def test_a_file_that_is_added_during_the_run_does_not_stop_it(queries: ScriptedRun):
    result = queries.annotate(change=lambda: write_queries(queries.queries / "c.parquet", g="new"))
    assert result.exit_code == 0
    assert len(queries.read_answers()) == 6
