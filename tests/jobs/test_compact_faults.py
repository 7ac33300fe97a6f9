"""Compactions that are refused, interrupted, or raced by others: no row is lost, doubled or taken from elsewhere."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.compact import compact
from jobs.verify import verify
from pipeline.config.sections import StorageConfig
from pipeline.output import compacting, compaction_plan
from pipeline.output.compaction_plan import plan_compaction
from pipeline.output.unit_files import split_failed
from pipeline.queries.units import read_unit
from pipeline.run.annotation import build_annotated_schema
from pipeline.storage.exchange import can_exchange, exchange_folders
from tests.support.compaction import QUERIES, call, compacted, read
from tests.support.runs import USAGE, ScriptedRun


def test_a_lost_file_is_named_and_not_annotated_again(copied_run: ScriptedRun):
    compacted(copied_run)
    next((copied_run.output / "data").iterdir()).unlink()
    result = copied_run.annotate()
    assert result.exit_code == 2
    assert "was compacted, and 0 of 8 rows are complete; repeat the compaction" in result.output
    assert copied_run.annotate("--overwrite").exit_code == 3
    assert not (copied_run.output / "_compacted.parquet").exists()
    assert len(list((copied_run.output / "data").iterdir())) == 4


def test_verify_asks_for_a_copy_of_a_damaged_file(copied_run: ScriptedRun, small_files: None):
    compacted(copied_run, "--file-mb", "1")
    file = min((copied_run.output / "data").iterdir())
    table = pq.read_table(file)
    pq.write_table(table.set_column(0, "id", pa.array(["a", "b", "x"])), file)
    result = call(verify, "--annotations", str(copied_run.output))
    assert result.exit_code == 1
    lines = result.output.strip().splitlines()
    assert lines[-2] == f"{file}: 1 rows are missing, such as id 'd'"
    assert lines[-1] == "to repair this compacted set, repeat the compaction or restore its files from a copy"


def test_an_interrupted_compaction_is_continued(
    copied_run: ScriptedRun, tmp_path: Path, small_files: None, monkeypatch: pytest.MonkeyPatch
):
    target, written = tmp_path / "small", compacting._write_file

    def fail_at_the_second(*file: object) -> None:
        if list((target / "data").glob("*")):
            raise OSError("the disk is full")
        written(*file)  # type: ignore[arg-type]

    options = ["--annotations", str(copied_run.output), "--output", str(target), "--file-mb", "1"]
    monkeypatch.setattr(compacting, "_write_file", fail_at_the_second)
    failed = call(compact, *options)
    assert (failed.exit_code, failed.output.strip().splitlines()[-1]) == (1, "error: the disk is full")
    (first,) = (target / "data").iterdir()
    stamp = first.stat().st_mtime_ns
    other = ScriptedRun(copied_run.queries, target, copied_run.model).annotate()
    assert other.exit_code == 2
    assert "was compacted, and its compaction has not ended; repeat the compaction" in other.output
    found = call(verify, "--annotations", str(target)).output.strip().splitlines()
    assert found[-2:] == [
        f"{target}: its compaction has not ended",
        "to repair this compacted set, repeat the compaction or restore its files from a copy",
    ]
    monkeypatch.setattr(compacting, "_write_file", written)
    assert call(compact, *options).exit_code == 0
    assert first.stat().st_mtime_ns == stamp
    assert call(verify, "--annotations", str(target)).exit_code == 0


def test_a_damaged_file_ends_it_and_leaves_the_set(copied_run: ScriptedRun):
    file = find_whole(copied_run.output)
    file.write_bytes(file.read_bytes()[:-9])
    before = sorted(copied_run.output.rglob("*"))
    result = call(compact, "--annotations", str(copied_run.output))
    assert result.exit_code == 1
    last = result.output.strip().splitlines()[-1]
    assert last.startswith(f"error: {file}: ")
    assert "not a readable Parquet file" in last
    assert sorted(copied_run.output.rglob("*")) == before


def find_whole(out: Path) -> Path:
    """The first data file of a unit of which no row has failed."""
    return min(path for path in (out / "data").iterdir() if pq.read_metadata(path).num_rows == 2)


def swap(out: Path) -> None:
    """Give one unit the file of another of as many rows."""
    shutil.copy(find_whole(out), max(path for path in (out / "data").iterdir() if pq.read_metadata(path).num_rows == 2))


def rewrite(out: Path) -> None:
    """Write a file anew, without its summary."""
    file = find_whole(out)
    pq.write_table(pq.read_table(file).replace_schema_metadata(None), file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (swap, "is not the file that _units.parquet lists; selfrag verify names the way to repair the set"),
        (rewrite, "another run wrote its data file; selfrag verify names the way to repair the set"),
    ],
)
def test_foreign_rows_are_not_taken_over(copied_run: ScriptedRun, change: Callable[[Path], None], message: str):
    change(copied_run.output)
    before = sorted(copied_run.output.rglob("*"))
    result = call(compact, "--annotations", str(copied_run.output))
    assert (result.exit_code, message in result.output) == (1, True)
    assert sorted(copied_run.output.rglob("*")) == before


def link(folder: Path) -> None:
    folder.rename(folder.parent.parent / "elsewhere")
    folder.symlink_to(folder.parent.parent / "elsewhere")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda out: (out / "_SUCCESS").unlink(), "not a finished annotated set"),
        (lambda out: min((out / "data").iterdir()).unlink(), "1 units are in _units.parquet or in data/"),
        (lambda out: (out / "data" / "mine.parquet").write_bytes(b""), "mine.parquet: is not a file of the set"),
        (lambda out: (out / "data" / "_notes.txt").write_text("mine"), "_notes.txt: is not a file of the set"),
        (lambda out: shutil.copy(find_whole(out), out / "errors"), "parquet: is not a file of the set"),
        (lambda out: link(out / "data"), "data: is a link; compact the set into another folder with --output"),
    ],
)
def test_bad_sets_are_refused(copied_run: ScriptedRun, change, message):
    change(copied_run.output)
    result = call(compact, "--annotations", str(copied_run.output))
    assert result.exit_code == 2
    assert message in result.output


def answer_anew(plan: Any) -> Iterator[Any]:
    """In the engine's place: other answers than those of ``ScriptedRun``, without failures."""
    for unit in plan.todo:
        table = read_unit(unit, plan.queries.schema, StorageConfig())
        rows = [{**row, "answer": f"new {row['query']}", "usage": USAGE} for row in table.to_pylist()]
        annotated = pa.Table.from_pylist(rows, build_annotated_schema(plan.queries.schema, keep_candidates=False))
        files = split_failed(annotated, plan.queries.schema, keep_candidates=False)
        yield plan.output.write_unit(unit.id, *files, plan.digest)


def test_leftovers_never_replace_newer_answers(copied_run: ScriptedRun, monkeypatch: pytest.MonkeyPatch):
    """A compaction is killed before the exchange, the set is annotated anew, and compacted again."""

    def end(*_: object) -> None:
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(compacting, "_replace_set", end)
        assert call(compact, "--annotations", str(copied_run.output)).exit_code == 1
    with monkeypatch.context() as patch:
        patch.setattr("tests.support.runs.answer_units", answer_anew)
        assert copied_run.annotate("--overwrite").exit_code == 0
    compacted(copied_run)
    rows = read(copied_run.output / "data").to_pylist()
    assert [row["answer"] for row in rows] == [f"new {query}" for query in QUERIES.values()]
    assert [path.name for path in copied_run.output.parent.iterdir()] == ["out"]


def test_a_set_that_changes_meanwhile_is_left_alone(copied_run: ScriptedRun):
    plan = plan_compaction(str(copied_run.output), None, 128, StorageConfig(), overwrite=False)
    manifest = json.loads((copied_run.output / "_manifest.json").read_text())
    (copied_run.output / "_manifest.json").write_text(json.dumps({**manifest, "finished": "later"}))
    with pytest.raises(ValueError, match="has changed meanwhile; run the same command again"):
        compacting.compact_set(plan)
    assert len(list((copied_run.output / "data").iterdir())) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (Path.unlink, "_compacted.parquet does not list its files"),
        (lambda file: file.write_bytes(file.read_bytes()[:-9]), "_compacted.parquet: not a readable Parquet file"),
    ],
)
def test_verify_and_runs_notice_a_broken_record(
    copied_run: ScriptedRun, change: Callable[[Path], object], message: str
):
    compacted(copied_run)
    change(copied_run.output / "_compacted.parquet")
    result = call(verify, "--annotations", str(copied_run.output), "--json")
    found = json.loads(result.stdout)
    assert (result.exit_code, found["delete"]) == (1, [])
    assert message in found["problems"][-1]["text"]
    again = copied_run.annotate()
    assert (again.exit_code, message in again.output) == (2, True)


def test_a_folder_that_cannot_be_exchanged_is_refused_at_once(copied_run: ScriptedRun, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compaction_plan, "can_exchange", lambda _: False)
    result = call(compact, "--annotations", str(copied_run.output), "--dry-run")
    assert result.exit_code == 2
    assert "this folder cannot be replaced in one step" in result.output


def test_overwrite_needs_an_output(copied_run: ScriptedRun):
    result = call(compact, "--annotations", str(copied_run.output), "--overwrite")
    assert (result.exit_code, "--output, which is missing" in result.output) == (2, True)


def test_folders_that_cannot_be_exchanged_are_named(tmp_path: Path):
    (tmp_path / "one").mkdir()
    with pytest.raises(FileNotFoundError, match="one"):
        exchange_folders(tmp_path / "one", tmp_path / "none")
    assert can_exchange(tmp_path / "one")
    assert not can_exchange(Path("/proc"))
    assert [path.name for path in tmp_path.iterdir()] == ["one"]
