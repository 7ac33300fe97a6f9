import logging
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config.sections import StorageConfig
from pipeline.output.folder import OutputFolder
from pipeline.output.partial import FOLDER, Outcome, PartialUnit, clear_partial, list_partial_units
from pipeline.output.schema import ANSWER_FIELDS, CANDIDATE_FIELDS, ERROR_FIELDS
from pipeline.storage.location import Location, locate

UNIT, OTHER = "0" * 20, "1" * 20
SEGMENT = {"text": "é [1]", "passage_id": "p", "citation": 1, "is_rel": 0.1 + 0.2, "score": float("inf")}
ANSWER: Outcome = {
    "answer": "one",
    "raw_output": "[Relevant]one",
    "retrieved": True,
    "retrieve_probability": None,
    "finish_reason": "stop",
    "segments": [SEGMENT],
    "passages": [],
    "usage": {"prompt_tokens": 2**40, "seconds": 1e-9},
    "candidates": [{"text": "one", "parent": None}],
    "evidence": [],
}
ERROR: Outcome = {"error_type": "ValueError", "error_message": "the query\nis empty", "attempts": 1}


@pytest.fixture
def output(tmp_path: Path) -> Location:
    return locate(str(tmp_path / "out"), StorageConfig())


def open_unit(output: Location, unit: str = UNIT, identity: str = "same", keep: bool = True) -> PartialUnit:
    return PartialUnit(output, unit, identity, keep)


def list_names(output: Location) -> list[str]:
    return sorted(file.name for file in Path(output.path).rglob("*") if file.is_file())


def convert(outcomes: dict[int, Outcome]) -> dict[int, dict[str, Any]]:
    """The values of the output columns, as a unit's own files would have them."""
    fields = [*ANSWER_FIELDS, *CANDIDATE_FIELDS, *ERROR_FIELDS]
    return {
        number: {field.name: pa.array([outcome.get(field.name)], field.type)[0].as_py() for field in fields}
        for number, outcome in outcomes.items()
    }


@pytest.mark.parametrize(
    "rows",
    [
        {},
        {0: ANSWER},
        {0: ERROR},
        {7: ANSWER, 3: ERROR, 0: {}},
        dict.fromkeys(range(9), ANSWER),
        {2: {**ANSWER, "answer": ""}, 1: {**ANSWER, "answer": None}},
        {5: {**ANSWER, "segments": [SEGMENT] * 7}},
        {6: {**ERROR, "error_type": "ProcessDiedError", "attempts": 2}},
        {8: {**ANSWER, "usage": None}},
        {4: {**ANSWER, "answer": "\x00 🙂 \u2028"}},
    ],
)
def test_rows_are_read_as_they_would_have_been_written(output: Location, rows: dict[int, Outcome]) -> None:
    open_unit(output).write(rows)
    found = open_unit(output).read(9)
    assert convert(found) == convert(rows)


def test_columns_of_candidates_are_kept_only_on_request(output: Location) -> None:
    open_unit(output, keep=False).write({0: ANSWER})
    (found,) = open_unit(output, keep=False).read(1).values()
    assert found["answer"] == "one"
    assert "candidates" not in found


def test_rows_of_all_attempts_are_joined_and_each_is_there_once(output: Location) -> None:
    first, second = open_unit(output), open_unit(output)
    first.write({0: ANSWER, 1: ERROR})
    second.write({1: ERROR, 2: ANSWER})
    first.write({3: ANSWER})
    assert list_names(output) == sorted(
        f"{UNIT}-{name}.parquet" for name in (f"{first.attempt}-0", f"{first.attempt}-1", f"{second.attempt}-0")
    )
    found = open_unit(output).read(4)
    assert {number: outcome["answer"] for number, outcome in found.items()} == {0: "one", 1: None, 2: "one", 3: "one"}


def test_rows_of_another_unit_are_not_read_or_deleted(output: Location) -> None:
    open_unit(output, OTHER).write({0: ANSWER})
    assert open_unit(output).read(1) == {}
    open_unit(output).write({0: ERROR})
    open_unit(output).delete()
    assert list_partial_units(output) == {OTHER}


def test_unit_without_sub_files_has_no_folder(output: Location) -> None:
    assert open_unit(output).read(3) == {}
    open_unit(output).delete()
    clear_partial(output)
    assert list_partial_units(output) == frozenset()
    assert not Path(output.path).exists()


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-20])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def write_text(file: Path) -> None:
    file.write_bytes(b"PAR1 is how it begins")


def flip(place: float) -> Callable[[Path], None]:
    def flip_bits(file: Path) -> None:
        content = bytearray(file.read_bytes())
        content[int(place * len(content))] ^= 0xFF
        file.write_bytes(bytes(content))

    return flip_bits


def flip_page(file: Path) -> None:
    """Change the last byte of the first column's first page."""
    column = pq.read_metadata(file).row_group(0).column(0)
    flip((column.data_page_offset + column.total_compressed_size - 1) / file.stat().st_size)(file)


def replace_table(change: Callable[[pa.Table], pa.Table]) -> Callable[[Path], None]:
    return lambda file: pq.write_table(change(pq.read_table(file)), file)


DAMAGE: dict[str, Callable[[Path], None]] = {
    "cut off": cut,
    "empty": empty,
    "not Parquet": write_text,
    "first page damaged": flip_page,
    "footer damaged": flip(0.95),
    "end damaged": flip(0.9999),
    "column missing": replace_table(lambda table: table.drop_columns(["answer"])),
    "column of another type": replace_table(
        lambda table: table.set_column(1, "answer", pa.array([1] * table.num_rows, pa.int64()))
    ),
    "column too many": replace_table(lambda table: table.append_column("more", pa.array([1] * table.num_rows))),
    "without identity": replace_table(lambda table: table.replace_schema_metadata(None)),
    "of another run": replace_table(lambda table: table.replace_schema_metadata({"selfrag.identity": "another"})),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_and_foreign_sub_files_are_ignored_with_a_warning(
    output: Location, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    damaged, whole = open_unit(output), open_unit(output)
    damaged.write({0: ANSWER, 1: ANSWER})
    whole.write({2: ANSWER})
    (file,) = Path(output.path).rglob(f"*{damaged.attempt}*")
    DAMAGE[name](file)
    with caplog.at_level(logging.WARNING):
        assert list(open_unit(output).read(3)) == [2]
    (message,) = (record.getMessage() for record in caplog.records)
    assert message.startswith(f"{file} is ignored: ")
    assert "\n" not in message


def test_rows_of_a_run_with_other_settings_are_ignored(output: Location) -> None:
    open_unit(output, identity="before").write({0: ANSWER})
    assert open_unit(output, identity="after").read(1) == {}


@pytest.mark.parametrize("number", [-1, 3, 2**31 - 1])
def test_numbers_outside_of_the_unit_are_ignored(output: Location, number: int) -> None:
    open_unit(output).write({number: ANSWER, 2: ANSWER})
    assert list(open_unit(output).read(3)) == [2]


def test_sub_file_deleted_by_another_attempt_is_ignored(output: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    unit = open_unit(output)
    unit.write({0: ANSWER})
    found = unit._list_files()
    monkeypatch.setattr(PartialUnit, "_list_files", lambda _: found)
    open_unit(output).delete()
    assert unit.read(1) == {}


@pytest.mark.parametrize("end", [OutputFolder.clear, lambda folder: folder.finish({}, [])])
def test_end_and_overwrite_delete_leftovers(output: Location, end: Callable[[OutputFolder], None]) -> None:
    open_unit(output).write({0: ANSWER})
    open_unit(output, OTHER).write({0: ANSWER})
    folder = OutputFolder(output)
    end(folder)
    assert not (Path(output.path) / FOLDER).exists()


def test_files_that_are_no_sub_files_are_kept(output: Location) -> None:
    open_unit(output).write({0: ANSWER})
    foreign = [f"{UNIT}.parquet", f"part-{UNIT}.parquet", f"{UNIT}-{uuid.uuid4().hex}-x.parquet", "notes.txt"]
    for name in foreign:
        (output / FOLDER / name).write(b"")
    clear_partial(output)
    assert list_names(output) == sorted(foreign)


def test_readers_of_the_set_do_not_see_sub_files(output: Location) -> None:
    open_unit(output).write({0: ANSWER})
    assert output.list_files() == []
    assert OutputFolder(output).find_foreign_file() is None
    assert OutputFolder(output).list_unit_files("data") == {}


def test_sub_files_on_an_object_store_are_read_and_deleted(s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    keys = {"endpoint_url": s3.endpoint, "access_key": s3.access_key, "secret_key": s3.secret_key}
    output = locate(f"s3://{s3.bucket}/partial/out", StorageConfig.model_validate({**keys, "region": "us-east-1"}))
    open_unit(output).write({0: ANSWER})
    open_unit(output).write({1: ERROR})
    assert sorted(open_unit(output).read(2)) == [0, 1]
    open_unit(output).delete()
    assert list_partial_units(output) == frozenset()
