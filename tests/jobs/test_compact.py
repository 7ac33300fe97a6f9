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

from jobs.compact import compact
from jobs.report import report
from jobs.share import SHARED, share
from jobs.verify import verify
from pipeline.config.sections import StorageConfig
from pipeline.output import compacting
from pipeline.output.compacted import locate_units, read_members, read_run_units
from pipeline.output.compaction_plan import plan_compaction
from pipeline.output.folder import OutputFolder, hash_identity
from pipeline.output.unit_log import read_units
from pipeline.report.units import find_units
from pipeline.run.earlier_set import EarlierSet
from tests.support.compaction import QUERIES, at, call, compacted, read, upload
from tests.support.runs import ScriptedRun, write_queries
from tests.support.s3 import S3Server


def test_files_hold_the_rows_in_the_order_of_the_queries(copied_run: ScriptedRun, small_files: None):
    before = {row["id"]: row for row in read(copied_run.output / "data").to_pylist()}
    result = compacted(copied_run, "--file-mb", "1", "--json")
    found = {"rows": 8, "errors": 2, "before": 4, "files": 2, "output": str(copied_run.output)}
    assert json.loads(result.stdout) == found
    rows = read(copied_run.output / "data").to_pylist()
    assert [row["id"] for row in rows] == ["a", "b", "d", "e", "g", "h"]
    assert {row["id"]: row for row in rows} == before
    assert read(copied_run.output / "errors")["id"].to_pylist() == ["c", "f"]
    groups = pq.read_metadata(min((copied_run.output / "data").iterdir())).num_row_groups
    assert (groups, len(list((copied_run.output / "errors").iterdir()))) == (2, 2)


def test_the_manifest_is_renewed_and_the_rest_stays(copied_run: ScriptedRun):
    before = json.loads((copied_run.output / "_manifest.json").read_text())
    (copied_run.output / "notes.txt").write_text("mine")
    compacted(copied_run, "--file-mb", "64")
    after = json.loads((copied_run.output / "_manifest.json").read_text())
    assert (after["compacted"]["files"], after["compacted"]["file_mb"]) == (1, 64)
    assert after == {**before, "compacted": after["compacted"]}
    assert (copied_run.output / "notes.txt").read_text() == "mine"
    there = {"_SUCCESS", "_compacted.parquet", "_inspection.parquet", "_manifest.json", "_units.parquet"}
    assert {p.name for p in copied_run.output.iterdir()} == there | {"data", "errors", "notes.txt", "report.html"}
    assert [p.name for p in copied_run.output.parent.iterdir()] == ["out"]


def test_the_same_command_has_nothing_to_do(copied_run: ScriptedRun):
    compacted(copied_run)
    files = sorted((copied_run.output / "data").iterdir())
    result = copied_run.annotate()
    assert result.exit_code == 3
    assert f"{copied_run.output} is already complete; nothing to do" in result.output
    assert sorted((copied_run.output / "data").iterdir()) == files


def test_verify_compares_each_file_with_the_queries(copied_run: ScriptedRun, small_files: None):
    compacted(copied_run, "--file-mb", "1")
    result = call(verify, "--annotations", str(copied_run.output))
    assert result.output.strip() == f"{copied_run.output}: whole, 8 rows in 2 files, 2 in errors/, each query once"


def test_the_report_counts_the_units_of_the_run(copied_run: ScriptedRun):
    before = [unit.summary for unit in find_units(OutputFolder(at(copied_run.output)))]
    compacted(copied_run)
    (file,) = find_units(OutputFolder(at(copied_run.output)))
    assert sorted(file.members, key=lambda unit: unit.unit) == before
    assert (file.summary.rows, file.summary.errors, file.summary.actor) == (8, {"KeyError": 2}, "")
    assert call(report, "--annotations", str(copied_run.output)).exit_code == 0


def test_the_report_compares_with_a_compacted_set(copied_run: ScriptedRun, tmp_path: Path):
    shutil.copytree(copied_run.output, tmp_path / "now")
    compacted(copied_run)
    file = next(file for file in (tmp_path / "now" / "data").iterdir() if "g" in pq.read_table(file)["id"].to_pylist())
    table = pq.read_table(file)
    answers = pa.array(["changed", *table["answer"].to_pylist()[1:]])
    pq.write_table(table.set_column(table.schema.get_field_index("answer"), "answer", answers), file)
    assert call(report, "--annotations", str(tmp_path / "now"), "--baseline", str(copied_run.output)).exit_code == 0
    page = (tmp_path / "now" / "report.html").read_text()
    assert "changed" in page
    assert "SEVEN" in page


def test_share_and_loaders_read_it(copied_run: ScriptedRun):
    compacted(copied_run)
    assert call(share, "--annotations", str(copied_run.output), "--license", "mit").exit_code == 0
    assert "_compacted.parquet" in SHARED
    loaded = datasets.load_dataset(str(copied_run.output), split="train")
    assert loaded["id"] == ["a", "b", "d", "e", "g", "h"]


def test_skip_annotated_skips_its_rows(copied_run: ScriptedRun, tmp_path: Path):
    compacted(copied_run)
    write_queries(tmp_path / "queries" / "new.parquet", **QUERIES, i="nine")
    later = ScriptedRun(tmp_path / "queries", tmp_path / "later" / "out", copied_run.model)
    assert later.annotate("--set", f"skip_annotated={copied_run.output}").exit_code in (0, 3)
    assert set(later.read_answers()) & set(QUERIES) == set()
    assert later.read_answers()["i"] == "NINE"


def test_units_are_located_in_both_forms(copied_run: ScriptedRun, small_files: None):
    before = {name: unit.read_answers() for name, unit in locate_units(OutputFolder(at(copied_run.output))).items()}
    measured = read_run_units(at(copied_run.output))
    compacted(copied_run, "--file-mb", "1")
    after = locate_units(OutputFolder(at(copied_run.output)))
    assert list(after) == list(before)
    assert all(after[name].read_answers().equals(rows) for name, rows in before.items())
    assert [unit.read_failures().num_rows for unit in after.values()] == [0, 1, 1, 0]
    assert read_run_units(at(copied_run.output)) == measured
    assert read_units(at(copied_run.output)).keys() == read_members(at(copied_run.output)).keys()


def test_answers_are_carried_over_from_it(copied_run: ScriptedRun, small_files: None):
    output = OutputFolder(at(copied_run.output))
    wanted = {name: unit.read_answers()["id"].to_pylist() for name, unit in locate_units(output).items()}
    digest = hash_identity(output.read_manifest() or {})

    def read_outcomes() -> list[dict[int, dict[str, Any]]]:
        earlier = EarlierSet(output, digest, "id")
        return [earlier.read_outcomes(name, ids) for name, ids in wanted.items()]

    before = read_outcomes()
    compacted(copied_run, "--file-mb", "1")
    assert read_outcomes() == before
    assert [len(outcomes) for outcomes in before] == [2, 1, 1, 2]


def test_a_compacted_set_is_compacted_again(copied_run: ScriptedRun, small_files: None):
    compacted(copied_run, "--file-mb", "4")
    assert len(list((copied_run.output / "data").iterdir())) == 1
    before = read(copied_run.output / "data")
    compacted(copied_run, "--file-mb", "1")
    assert len(list((copied_run.output / "data").iterdir())) == 2
    assert read(copied_run.output / "data").equals(before)
    assert call(verify, "--annotations", str(copied_run.output)).exit_code == 0


def test_an_output_of_its_own_is_written(copied_run: ScriptedRun, tmp_path: Path):
    before = sorted((copied_run.output / "data").iterdir())
    compacted(copied_run, "--output", str(tmp_path / "small"))
    assert sorted((copied_run.output / "data").iterdir()) == before
    assert json.loads((tmp_path / "small" / "_manifest.json").read_text())["counts"]["output"] == str(
        tmp_path / "small"
    )
    assert call(verify, "--annotations", str(tmp_path / "small")).exit_code == 0
    again = compacted(copied_run, "--output", str(tmp_path / "small"))
    assert "is compacted already; nothing to do" in again.output
    other = call(compact, "--annotations", str(tmp_path / "small"), "--output", str(copied_run.output))
    assert other.exit_code == 2
    assert "already contains an annotated set" in other.output
    compacted(copied_run, "--output", str(tmp_path / "small"), "--overwrite")
    assert call(verify, "--annotations", str(tmp_path / "small")).exit_code == 0


def test_compacting_twice_does_nothing_more(copied_run: ScriptedRun):
    compacted(copied_run)
    stamp = (copied_run.output / "_manifest.json").stat().st_mtime_ns
    result = compacted(copied_run, "--json")
    assert f"{copied_run.output} is compacted already; nothing to do" in result.output
    assert (copied_run.output / "_manifest.json").stat().st_mtime_ns == stamp


def test_links_and_folders_of_the_user_stay(copied_run: ScriptedRun, tmp_path: Path):
    (tmp_path / "far").mkdir()
    (copied_run.output / "near").symlink_to(tmp_path / "far")
    (copied_run.output / "gone").symlink_to(tmp_path / "missing")
    (copied_run.output / "mine").mkdir()
    (copied_run.output / "mine" / ".hidden").write_text("kept")
    compacted(copied_run)
    assert (copied_run.output / "near").readlink() == tmp_path / "far"
    assert (copied_run.output / "gone").is_symlink()
    assert (copied_run.output / "mine" / ".hidden").read_text() == "kept"


def test_a_dry_run_writes_nothing(copied_run: ScriptedRun):
    result = compacted(copied_run, "--dry-run")
    assert result.output.strip() == "to do    4 data files into 1; nothing was written (--dry-run)"
    assert len(list((copied_run.output / "data").iterdir())) == 4


@pytest.mark.slow
def test_on_an_object_store_an_output_is_needed(copied_run: ScriptedRun, s3: S3Server, monkeypatch: pytest.MonkeyPatch):
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    place = at(f"s3://{s3.bucket}/compact")
    upload(copied_run.output, place / "set")
    source, target = f"{place.uri}/set", f"{place.uri}/small"
    with pytest.raises(ValueError, match="name a folder for the compacted set with --output"):
        plan_compaction(source, None, 1, StorageConfig(), overwrite=False)
    plan = plan_compaction(source, target, 1, StorageConfig(), overwrite=False)
    assert compacting.compact_set(plan).files == 1
    assert OutputFolder(place / "small").is_finished()
    assert len((place / "small" / "data").list_files()) == 1


def test_readers_see_the_old_set_or_the_new_one(copied_run: ScriptedRun, small_files: None):
    """A loader at work while the set is replaced again and again never mixes the two, and never finds none."""
    over, seen = threading.Event(), set[tuple[str, ...]]()

    def load() -> Iterator[str]:
        for file in sorted((copied_run.output / "data").iterdir()):
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
        compacted(copied_run, "--file-mb", size)
    over.set()
    reader.join()
    assert seen == {("a", "b", "d", "e", "g", "h")}
