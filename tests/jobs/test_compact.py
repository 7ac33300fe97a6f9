"""Compacting through the command: a finished set in, few files out, which every command reads like the set before."""

import json
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer
from typer.testing import CliRunner, Result

from jobs.compact import compact
from jobs.report import report
from jobs.share import share
from jobs.verify import verify
from pipeline.config.sections import StorageConfig
from pipeline.output import compacting
from pipeline.output.compacted import locate_units, read_members, read_run_units
from pipeline.output.folder import OutputFolder, hash_identity
from pipeline.output.unit_log import read_units
from pipeline.report.units import find_units
from pipeline.run.earlier_set import EarlierSet
from pipeline.storage.exchange import exchange_folders
from pipeline.storage.location import Location, locate
from tests.support.runs import ScriptedRun, write_queries
from tests.support.s3 import S3Server

QUERIES = {"a": "one", "b": "two", "c": "bad", "d": "four", "e": "five", "f": "bad", "g": "seven", "h": "eight"}


def call(command: object, *options: str) -> Result:
    app = typer.Typer()
    app.command()(command)  # type: ignore[type-var]
    return CliRunner().invoke(app, list(options))


def compacted(run: ScriptedRun, *options: str) -> Result:
    result = call(compact, "--annotations", str(run.output), *options)
    assert result.exit_code == 0, result.output
    return result


def at(folder: Path | str) -> Location:
    return locate(str(folder), StorageConfig())


def read(folder: Path) -> pa.Table:
    """The rows as loaders read them: file after file, by name."""
    return pa.concat_tables(map(pq.read_table, sorted(folder.glob("*.parquet"))))


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.storage.lease.SETTLE_S", 0.01)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, demo_model: Path) -> ScriptedRun:
    """A finished set of eight rows in four units, of which two have a failed row."""
    folder = tmp_path_factory.mktemp("compact")
    write_queries(folder / "queries" / "a.parquet", **QUERIES)
    run = ScriptedRun(folder / "queries", folder / "out", demo_model)
    assert run.annotate().exit_code == 3
    return run


@pytest.fixture
def run(whole: ScriptedRun, tmp_path: Path) -> ScriptedRun:
    shutil.copytree(whole.output, tmp_path / "out")
    return ScriptedRun(whole.queries, tmp_path / "out", whole.model)


@pytest.fixture
def small_files(monkeypatch: pytest.MonkeyPatch, run: ScriptedRun) -> None:
    """Files of two units: --file-mb 1 is the size of two of this set's files."""
    sizes = [unit.data_bytes for unit in read_units(at(run.output)).values()]
    monkeypatch.setattr(compacting, "MEGABYTE", max(sizes) * 2)


def test_files_hold_the_rows_in_the_order_of_the_queries(run: ScriptedRun, small_files: None):
    before = {row["id"]: row for row in read(run.output / "data").to_pylist()}
    result = compacted(run, "--file-mb", "1", "--json")
    found = {"rows": 8, "errors": 2, "before": 4, "files": 2, "output": str(run.output)}
    assert json.loads(result.stdout) == found
    rows = read(run.output / "data").to_pylist()
    assert [row["id"] for row in rows] == ["a", "b", "d", "e", "g", "h"]
    assert {row["id"]: row for row in rows} == before
    assert read(run.output / "errors")["id"].to_pylist() == ["c", "f"]
    groups = pq.read_metadata(min((run.output / "data").iterdir())).num_row_groups
    assert (groups, len(list((run.output / "errors").iterdir()))) == (2, 2)


def test_the_manifest_is_renewed_and_the_rest_stays(run: ScriptedRun):
    before = json.loads((run.output / "_manifest.json").read_text())
    (run.output / "notes.txt").write_text("mine")
    compacted(run, "--file-mb", "64")
    after = json.loads((run.output / "_manifest.json").read_text())
    assert (after["compacted"]["files"], after["compacted"]["file_mb"]) == (1, 64)
    renewed = {"compacted": after["compacted"], "counts": {**before["counts"], "output": str(run.output)}}
    assert after == {**before, **renewed}
    assert (run.output / "notes.txt").read_text() == "mine"
    there = {"_SUCCESS", "_compacted.parquet", "_inspection.parquet", "_manifest.json", "_units.parquet"}
    assert {p.name for p in run.output.iterdir()} == there | {"data", "errors", "notes.txt", "report.html"}
    assert [p.name for p in run.output.parent.iterdir()] == ["out"]


def test_the_same_command_has_nothing_to_do(run: ScriptedRun):
    compacted(run)
    files = sorted((run.output / "data").iterdir())
    result = run.annotate()
    assert result.exit_code == 3
    assert f"{run.output} is already complete; nothing to do" in result.output
    assert sorted((run.output / "data").iterdir()) == files


def test_a_lost_file_is_named_and_not_annotated_again(run: ScriptedRun):
    compacted(run)
    next((run.output / "data").iterdir()).unlink()
    result = run.annotate()
    assert result.exit_code == 2
    assert "was compacted, and 0 of 8 rows are complete; restore its files from a copy" in result.output
    assert run.annotate("--overwrite").exit_code == 3
    assert not (run.output / "_compacted.parquet").exists()
    assert len(list((run.output / "data").iterdir())) == 4


def test_verify_compares_each_file_with_the_queries(run: ScriptedRun, small_files: None):
    compacted(run, "--file-mb", "1")
    result = call(verify, "--annotations", str(run.output))
    assert result.output.strip() == f"{run.output}: whole, 8 rows in 2 files, 2 in errors/, each query once"


def test_verify_asks_for_a_copy_of_a_damaged_file(run: ScriptedRun, small_files: None):
    compacted(run, "--file-mb", "1")
    file = min((run.output / "data").iterdir())
    table = pq.read_table(file)
    pq.write_table(table.set_column(0, "id", pa.array(["a", "b", "x"])), file)
    result = call(verify, "--annotations", str(run.output))
    assert result.exit_code == 1
    lines = result.output.strip().splitlines()
    assert lines[-2] == f"{file}: 1 rows are missing, such as id 'd'"
    assert lines[-1] == "to repair this compacted set, restore its files from a copy, or annotate its queries again"


def test_the_report_counts_the_units_of_the_run(run: ScriptedRun):
    before = [unit.summary for unit in find_units(OutputFolder(at(run.output)))]
    compacted(run)
    (file,) = find_units(OutputFolder(at(run.output)))
    assert sorted(file.members, key=lambda unit: unit.unit) == before
    assert (file.summary.rows, file.summary.errors, file.summary.actor) == (8, {"KeyError": 2}, "")
    assert call(report, "--annotations", str(run.output)).exit_code == 0


def test_the_report_compares_with_a_compacted_set(run: ScriptedRun, tmp_path: Path):
    shutil.copytree(run.output, tmp_path / "now")
    compacted(run)
    file = next(file for file in (tmp_path / "now" / "data").iterdir() if "g" in pq.read_table(file)["id"].to_pylist())
    table = pq.read_table(file)
    answers = pa.array(["changed", *table["answer"].to_pylist()[1:]])
    pq.write_table(table.set_column(table.schema.get_field_index("answer"), "answer", answers), file)
    assert call(report, "--annotations", str(tmp_path / "now"), "--baseline", str(run.output)).exit_code == 0
    page = (tmp_path / "now" / "report.html").read_text()
    assert "changed" in page
    assert "SEVEN" in page


def test_share_and_loaders_read_it(run: ScriptedRun):
    compacted(run)
    assert call(share, "--annotations", str(run.output), "--license", "mit").exit_code == 0
    loaded = datasets.load_dataset(str(run.output), split="train")
    assert loaded["id"] == ["a", "b", "d", "e", "g", "h"]


def test_skip_annotated_skips_its_rows(run: ScriptedRun, tmp_path: Path):
    compacted(run)
    write_queries(tmp_path / "queries" / "new.parquet", **QUERIES, i="nine")
    later = ScriptedRun(tmp_path / "queries", tmp_path / "later" / "out", run.model)
    assert later.annotate("--set", f"skip_annotated={run.output}").exit_code in (0, 3)
    assert set(later.read_answers()) & set(QUERIES) == set()
    assert later.read_answers()["i"] == "NINE"


def test_units_are_located_in_both_forms(run: ScriptedRun, small_files: None):
    before = {name: unit.read_answers() for name, unit in locate_units(OutputFolder(at(run.output))).items()}
    measured = read_run_units(at(run.output))
    compacted(run, "--file-mb", "1")
    after = locate_units(OutputFolder(at(run.output)))
    assert list(after) == list(before)
    assert all(after[name].read_answers().equals(rows) for name, rows in before.items())
    assert [unit.read_failures().num_rows for unit in after.values()] == [0, 1, 1, 0]
    assert read_run_units(at(run.output)) == measured
    assert read_units(at(run.output)).keys() == read_members(at(run.output)).keys()


def test_answers_are_carried_over_from_it(run: ScriptedRun, small_files: None):
    output = OutputFolder(at(run.output))
    wanted = {name: unit.read_answers()["id"].to_pylist() for name, unit in locate_units(output).items()}
    digest = hash_identity(output.read_manifest() or {})

    def read_outcomes() -> list[dict[int, dict[str, Any]]]:
        earlier = EarlierSet(output, digest, "id")
        return [earlier.read_outcomes(name, ids) for name, ids in wanted.items()]

    before = read_outcomes()
    compacted(run, "--file-mb", "1")
    assert read_outcomes() == before
    assert [len(outcomes) for outcomes in before] == [2, 1, 1, 2]


def test_a_compacted_set_is_compacted_again(run: ScriptedRun, small_files: None):
    compacted(run, "--file-mb", "4")
    assert len(list((run.output / "data").iterdir())) == 1
    before = read(run.output / "data")
    compacted(run, "--file-mb", "1")
    assert len(list((run.output / "data").iterdir())) == 2
    assert read(run.output / "data").equals(before)
    assert call(verify, "--annotations", str(run.output)).exit_code == 0


def test_an_output_of_its_own_is_written(run: ScriptedRun, tmp_path: Path):
    before = sorted((run.output / "data").iterdir())
    compacted(run, "--output", str(tmp_path / "small"))
    assert sorted((run.output / "data").iterdir()) == before
    assert json.loads((tmp_path / "small" / "_manifest.json").read_text())["counts"]["output"] == str(
        tmp_path / "small"
    )
    assert call(verify, "--annotations", str(tmp_path / "small")).exit_code == 0
    again = call(compact, "--annotations", str(run.output), "--output", str(tmp_path / "small"))
    assert again.exit_code == 2
    assert "already contains an annotated set" in again.output
    compacted(run, "--output", str(tmp_path / "small"), "--overwrite")


def test_an_interrupted_compaction_is_continued(
    run: ScriptedRun, tmp_path: Path, small_files: None, monkeypatch: pytest.MonkeyPatch
):
    target, written = tmp_path / "small", compacting._write_file

    def fail_at_the_second(*file: object) -> None:
        if list((target / "data").glob("*")):
            raise OSError("the disk is full")
        written(*file)  # type: ignore[arg-type]

    options = ["--annotations", str(run.output), "--output", str(target), "--file-mb", "1"]
    monkeypatch.setattr(compacting, "_write_file", fail_at_the_second)
    failed = call(compact, *options)
    assert (failed.exit_code, failed.output.strip().splitlines()[-1]) == (1, "error: the disk is full")
    (first,) = (target / "data").iterdir()
    stamp = first.stat().st_mtime_ns
    other = ScriptedRun(run.queries, target, run.model).annotate()
    assert other.exit_code == 2
    assert "was compacted, and 0 of 8 rows are complete" in other.output
    monkeypatch.setattr(compacting, "_write_file", written)
    assert call(compact, *options).exit_code == 0
    assert first.stat().st_mtime_ns == stamp
    assert call(verify, "--annotations", str(target)).exit_code == 0


def test_a_damaged_file_ends_it_and_leaves_the_set(run: ScriptedRun):
    file = min((run.output / "data").iterdir())
    file.write_bytes(file.read_bytes()[:-9])
    before = sorted(run.output.rglob("*"))
    result = call(compact, "--annotations", str(run.output))
    assert result.exit_code == 1
    assert result.output.strip().splitlines()[-1].startswith(f"error: {file}: not a readable Parquet file")
    assert sorted(run.output.rglob("*")) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda out: (out / "_SUCCESS").unlink(), "not a finished annotated set"),
        (lambda out: min((out / "data").iterdir()).unlink(), "1 units are in _units.parquet or in data/"),
        (lambda out: (out / "data" / "mine.parquet").write_bytes(b""), "mine.parquet: was not written by a run"),
    ],
)
def test_bad_sets_are_refused(run: ScriptedRun, change, message):
    change(run.output)
    result = call(compact, "--annotations", str(run.output))
    assert result.exit_code == 2
    assert message in result.output


def test_overwrite_needs_an_output(run: ScriptedRun):
    result = call(compact, "--annotations", str(run.output), "--overwrite")
    assert (result.exit_code, "--output, which is missing" in result.output) == (2, True)


def test_a_dry_run_writes_nothing(run: ScriptedRun):
    result = compacted(run, "--dry-run")
    assert result.output.strip() == "to do    4 data files into 1; nothing was written (--dry-run)"
    assert len(list((run.output / "data").iterdir())) == 4


@pytest.mark.slow
def test_on_an_object_store_an_output_is_needed(run: ScriptedRun, s3: S3Server, monkeypatch: pytest.MonkeyPatch):
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    place = at(f"s3://{s3.bucket}/compact")
    for file in run.output.rglob("*"):
        if file.is_file():
            (place / "set" / str(file.relative_to(run.output))).write(file.read_bytes())
    source, target = f"{place.uri}/set", f"{place.uri}/small"
    with pytest.raises(ValueError, match="name a folder for the compacted set with --output"):
        compacting.check_compaction(source, None, 1, StorageConfig(), overwrite=False)
    plan = compacting.check_compaction(source, target, 1, StorageConfig(), overwrite=False)
    assert compacting.compact_set(plan).files == 1
    assert OutputFolder(place / "small").is_finished()
    assert len((place / "small" / "data").list_files()) == 1


def test_readers_see_the_old_set_or_the_new_one(run: ScriptedRun, small_files: None):
    """A loader at work while the set is replaced again and again never mixes the two, and never finds none."""
    over, seen = threading.Event(), set[tuple[str, ...]]()

    def load() -> Iterator[str]:
        for file in sorted((run.output / "data").iterdir()):
            yield from pq.read_table(file, columns=["id"])["id"].to_pylist()

    def load_again_and_again() -> None:
        while not over.is_set():
            try:
                seen.add(tuple(sorted(load())))
            except FileNotFoundError:  # listed before the exchange, opened after it
                time.sleep(0)

    reader = threading.Thread(target=load_again_and_again)
    reader.start()
    for size in ("4", "1", "4", "1"):
        compacted(run, "--file-mb", size)
    over.set()
    reader.join()
    assert seen == {("a", "b", "d", "e", "g", "h")}


def test_folders_that_cannot_be_exchanged_are_named(tmp_path: Path):
    (tmp_path / "one").mkdir()
    with pytest.raises(OSError, match=r"cannot be replaced in one step \(No such file or directory\)"):
        exchange_folders(tmp_path / "one", tmp_path / "none")
