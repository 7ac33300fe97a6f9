"""The command: an annotated set in, its faults out; what it says to delete repairs the set."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer
from typer.testing import CliRunner, Result

from jobs.verify import verify
from pipeline.config.sections import StorageConfig
from pipeline.output.folder import OutputFolder
from pipeline.output.unit_files import SUMMARY
from pipeline.output.unit_log import read_units, write_units
from pipeline.output.verification import verify_set
from pipeline.queries.planned_ids import read_planned_ids
from pipeline.storage.location import locate
from tests.support.names import EVIL_NAMES
from tests.support.runs import ScriptedRun, write_queries

APP = typer.Typer()
APP.command()(verify)


def check(folder: Path, *options: str) -> Result:
    return CliRunner().invoke(APP, ["--annotations", str(folder), *options])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, demo_model: Path) -> ScriptedRun:
    """A finished set of seven rows in four units, of which two have a failed row."""
    folder = tmp_path_factory.mktemp("verify")
    write_queries(folder / "queries" / "a.parquet", a="one", b="two", c="bad", d="four")
    write_queries(folder / "queries" / "b.parquet", e="five", f="bad", g="seven")
    run = ScriptedRun(folder / "queries", folder / "out", demo_model)
    assert run.annotate().exit_code == 3
    return run


@pytest.fixture
def run(whole: ScriptedRun, tmp_path: Path) -> ScriptedRun:
    """A copy of the set and its queries."""
    shutil.copytree(whole.output, tmp_path / "out")
    shutil.copytree(whole.queries, tmp_path / "queries")
    manifest = json.loads((tmp_path / "out" / "_manifest.json").read_text())
    manifest["configuration"]["queries"] = str(tmp_path / "queries")
    (tmp_path / "out" / "_manifest.json").write_text(json.dumps(manifest))
    return ScriptedRun(tmp_path / "queries", tmp_path / "out", whole.model)


def find(folder: Path, letter: str) -> Path:
    """The file with the row of an id."""
    files = [*folder.glob("data/*.parquet"), *folder.glob("errors/*.parquet")]
    return next(file for file in files if letter in pq.read_table(file)["id"].to_pylist())


def replace_ids(file: Path, *ids: str) -> None:
    table = pq.read_table(file)
    rows = table.take(list(range(len(table))) + [0] * (len(ids) - len(table))).slice(0, len(ids))
    pq.write_table(rows.set_column(0, "id", pa.array(ids, pa.string())), file)


def flip_bit(file: Path) -> None:
    """Change a bit of the first page."""
    content = bytearray(file.read_bytes())
    start = pq.read_metadata(file).row_group(0).column(0)
    content[(start.dictionary_page_offset or start.data_page_offset) + 30] ^= 1
    file.write_bytes(content)


def flip_later_bit(file: Path) -> None:
    """Change a bit of the last page with values."""
    content = bytearray(file.read_bytes())
    column = pq.read_metadata(file).row_group(0).column(pq.read_metadata(file).num_columns - 1)
    content[(column.dictionary_page_offset or column.data_page_offset) + column.total_compressed_size - 2] ^= 1
    file.write_bytes(content)


def test_a_whole_set_is_called_whole(run: ScriptedRun):
    result = check(run.output)
    assert result.exit_code == 0, result.output
    assert result.output.strip() == (f"{run.output}: whole, 7 rows in 4 units, 2 in errors/, each query once")


def test_the_outcome_is_printed_as_json(run: ScriptedRun):
    found = json.loads(check(run.output, "--json").output)
    assert (found["rows"], found["errors"], found["units"], found["compared"]) == (7, 2, 4, True)
    assert found["problems"] == found["delete"] == []
    flip_bit(find(run.output, "a"))
    result = check(run.output, "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["delete"] == [str(find_unreadable(run.output))]


def find_unreadable(folder: Path) -> Path:
    """The only file of ``data`` with a damaged page."""

    def is_damaged(file: Path) -> bool:
        try:
            pq.ParquetFile(file, page_checksum_verification=True).read()
        except OSError:
            return True
        return False

    (file,) = filter(is_damaged, folder.glob("data/*.parquet"))
    return file


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "changed bit of an answer": (lambda out: flip_bit(find(out, "a")), "not a readable Parquet file"),
    "changed bit at the end of an answer": (lambda out: flip_later_bit(find(out, "e")), "not a readable Parquet file"),
    "changed bit of a failed row": (lambda out: flip_bit(find(out, "c")), "not a readable Parquet file"),
    "truncated": (lambda out: cut(find(out, "a"), 9), "not a readable Parquet file"),
    "empty": (lambda out: find(out, "a").write_bytes(b""), "not a readable Parquet file"),
    "text": (lambda out: find(out, "a").write_text("lost"), "not a readable Parquet file"),
    "data file lost": (lambda out: find(out, "a").unlink(), "has no data file"),
    "data file lost beside failed rows": (lambda out: find(out, "e").unlink(), "has no data file"),
    "errors file lost": (lambda out: find(out, "c").unlink(), "has 0 rows, but _units.parquet records 1"),
    "one row lost": (lambda out: replace_ids(find(out, "a"), "a"), "has 1 rows, but _units.parquet records 2"),
    "one row too many": (lambda out: replace_ids(find(out, "a"), *"aba"), "has 3 rows, but _units.parquet records 2"),
    "another row": (lambda out: replace_ids(find(out, "a"), *"ax"), "1 rows are missing, such as id 'b'"),
    "a row twice": (lambda out: replace_ids(find(out, "a"), *"aa"), "1 rows are missing, such as id 'b'"),
    "another failed row": (lambda out: replace_ids(find(out, "c"), "d"), "1 rows are missing, such as id 'c'"),
    "another unit's rows": (lambda out: shutil.copy(find(out, "a"), find(out, "g")), "has 2 rows, but"),
    "no ids": (lambda out: drop_ids(find(out, "a")), "has no column 'id' (columns.id)"),
    "copy": (lambda out: copy(find(out, "a"), "copy of part.parquet"), "was not written by this run"),
    "unit of another set": (lambda out: copy(find(out, "a"), f"part-{1:020x}.parquet"), "was not written by this run"),
    "file in a subfolder": (lambda out: copy(find(out, "a"), f"x/data/part-{1:020x}.parquet"), "was not written"),
    "failed rows of no unit": (lambda out: copy(find(out, "c"), f"part-{1:020x}.parquet"), "was not written"),
    "text among the rows": (lambda out: (out / "data" / "notes.txt").write_text("x"), "was not written by this run"),
    "no success marker": (lambda out: (out / "_SUCCESS").unlink(), "_SUCCESS: is missing"),
    "no list of units": (lambda out: (out / "_units.parquet").unlink(), "_units.parquet: is missing"),
    "files of two attempts": (lambda out: mark(find(out, "c"), b"x"), "its two files are from different attempts"),
    "files of another run": (lambda out: mark(find(out, "a"), b"x"), "another run wrote its data file"),
    "unfinished": (lambda out: edit_manifest(out, status="running"), "_manifest.json: the run has not finished"),
}


def cut(file: Path, size: int) -> None:
    file.write_bytes(file.read_bytes()[:-size])


def drop_ids(file: Path) -> None:
    pq.write_table(pq.read_table(file).drop_columns("id"), file)


def copy(file: Path, name: str) -> None:
    (file.parent / name).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(file, file.parent / name)


def mark(file: Path, text: bytes) -> None:
    """Replace the summary in the metadata of a unit file by another."""
    pq.write_table(pq.read_table(file).replace_schema_metadata({SUMMARY: text}), file)


def edit_manifest(folder: Path, **values: object) -> None:
    manifest = json.loads((folder / "_manifest.json").read_text())
    (folder / "_manifest.json").write_text(json.dumps({**manifest, **values}))


@pytest.mark.parametrize(("damage", "said"), FAULTS.values(), ids=FAULTS.keys())
def test_a_fault_is_named_and_the_advice_repairs_it(run: ScriptedRun, damage: Callable[[Path], object], said: str):
    damage(run.output)
    result = check(run.output)
    assert result.exit_code == 1, result.output
    first, *_ = result.output.splitlines()
    assert first.startswith(str(run.output))
    assert said in result.output
    assert "to repair the set, " in result.output
    for file in json.loads(check(run.output, "--json").stdout)["delete"]:
        Path(file).unlink()
    run.annotate()
    assert "whole, 7 rows" in check(run.output).output


def test_every_fault_has_its_line(run: ScriptedRun):
    flip_bit(find(run.output, "a"))
    (run.output / "data" / "notes.txt").touch()
    (run.output / "_SUCCESS").unlink()
    assert len(check(run.output).output.splitlines()) == 3 + 1 + 2


def lose_queries(run: ScriptedRun) -> None:
    shutil.rmtree(run.queries)


def change_queries(run: ScriptedRun) -> None:
    write_queries(run.queries / "a.parquet", a="1", b="2", c="3", d="4")


def extend_queries(run: ScriptedRun) -> None:
    write_queries(run.queries / "c.parquet", h="8")


def damage_queries(run: ScriptedRun) -> None:
    (run.queries / "a.parquet").write_bytes(b"x")


@pytest.mark.parametrize("change", [lose_queries, change_queries, extend_queries, damage_queries])
def test_ids_are_checked_without_the_query_set(
    run: ScriptedRun, change: Callable[[ScriptedRun], None], caplog: pytest.LogCaptureFixture
):
    change(run)
    result = check(run.output)
    assert result.exit_code == 0
    assert "whole, 7 rows in 4 units, 2 in errors/, not compared with the query set" in result.output
    assert "the rows are not compared with the query set" in caplog.text
    replace_ids(find(run.output, "a"), *"ag")
    result = check(run.output)
    assert result.exit_code == 1
    assert "id 'g' is also in" in result.output


@pytest.mark.parametrize("change", [lose_queries, change_queries, damage_queries])
def test_queries_that_change_while_a_set_is_verified_are_no_fault_of_its_rows(
    run: ScriptedRun, change: Callable[[ScriptedRun], None], caplog: pytest.LogCaptureFixture
):
    folder = OutputFolder(locate(str(run.output), StorageConfig()))
    planned = read_planned_ids(folder, StorageConfig())
    change(run)
    found = verify_set(folder, planned)
    assert (found.problems, found.compared, found.rows) == ((), False, 7)
    assert "are not compared with the query set" in caplog.text
    replace_ids(find(run.output, "a"), *"ag")
    (problem,) = verify_set(folder, planned).problems
    assert "id 'g' is also in" in problem.text


def test_a_set_of_an_earlier_version_without_checksums_is_whole(run: ScriptedRun):
    for file in run.output.glob("*/*.parquet"):
        pq.write_table(pq.read_table(file), file)
    assert check(run.output).exit_code == 0


def test_selected_rows_are_compared_with_the_selection(run: ScriptedRun, tmp_path: Path):
    write_queries(run.queries / "c.parquet", h="eight", i="nine")
    new = ScriptedRun(run.queries, tmp_path / "sets" / "new", run.model)
    shutil.copytree(run.output, tmp_path / "sets" / "old")
    assert new.annotate("--set", f"skip_annotated={tmp_path / 'sets'}").exit_code == 3
    shutil.rmtree(run.queries)
    assert "whole, 4 rows in 2 units, 2 in errors/, each query once" in check(new.output).output


@pytest.mark.parametrize("name", EVIL_NAMES.values(), ids=EVIL_NAMES.keys())
def test_a_list_with_names_of_no_units_is_named(run: ScriptedRun, name: str):
    folder = locate(str(run.output), StorageConfig())
    first, *others = read_units(folder).values()
    write_units(folder, [dataclasses.replace(first, unit=name), *others])
    result = check(run.output)
    assert result.exit_code == 2
    assert f"{run.output}/_units.parquet: {name!r} is not the id of a unit" in result.output


@pytest.mark.parametrize("content", [None, "{", "[]", '{"format_version": 99}'])
def test_a_folder_without_an_annotated_set_is_refused(tmp_path: Path, content: str | None):
    if content is not None:
        (tmp_path / "_manifest.json").write_text(content)
    result = check(tmp_path)
    assert result.exit_code == 2
    assert f"error: {tmp_path}" in result.output
