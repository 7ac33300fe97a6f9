"""Compacts the set of a scripted run, and reads it as loaders do."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import typer
from typer.testing import CliRunner, Result

from jobs.compact import compact
from pipeline.config.sections import StorageConfig
from pipeline.storage.location import Location, locate
from tests.support.runs import ScriptedRun

QUERIES = {"a": "one", "b": "two", "c": "bad", "d": "four", "e": "five", "f": "bad", "g": "seven", "h": "eight"}


def call(command: object, *options: str) -> Result:
    """Call a command with options."""
    app = typer.Typer()
    app.command()(command)  # type: ignore[type-var]
    return CliRunner().invoke(app, list(options))


def compacted(run: ScriptedRun, *options: str) -> Result:
    """Compact the set of a run, which must succeed."""
    result = call(compact, "--annotations", str(run.output), *options)
    assert result.exit_code == 0, result.output
    return result


def at(folder: Path | str) -> Location:
    """The location of a folder or URI."""
    return locate(str(folder), StorageConfig())


def read(folder: Path) -> pa.Table:
    """The rows as loaders read them: file after file, by name."""
    return pa.concat_tables(map(pq.read_table, sorted(folder.glob("*.parquet"))))


def upload(folder: Path, place: Location) -> None:
    """Copy a set to a store."""
    for file in folder.rglob("*"):
        if file.is_file():
            (place / str(file.relative_to(folder))).write(file.read_bytes())
