import random
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config.sections import StorageConfig
from pipeline.output.folder import OutputFolder
from pipeline.output.inventory import complete_output, take_inventory
from pipeline.output.unit_files import UnitSummary, split_failed
from pipeline.output.unit_log import read_units
from pipeline.run.annotation import build_annotated_schema
from pipeline.storage.location import Location, locate

RUN, OTHER_RUN = "0123456789ab", "ba9876543210"
UNITS = [f"{n:020x}" for n in range(3)]
INPUTS = pa.schema([("id", pa.string())])
USAGE = {"prompt_tokens": 10, "generated_tokens": 3}
IDS = ("q0", "q1", "q2", "q3")


@pytest.fixture
def folder(tmp_path: Path) -> OutputFolder:
    output = OutputFolder(locate(str(tmp_path / "out"), StorageConfig()))
    output.begin({})
    output.finish({}, [write(output, unit, {"q1"}) for unit in UNITS])
    return output


def annotate(failing: set[str], ids: tuple[str, ...] = IDS) -> tuple[pa.Table, pa.Table]:
    rows = [
        {"id": i, "error_type": "ValueError", "error_message": "bad", "attempts": 1}
        if i in failing
        else {"id": i, "answer": i.upper(), "retrieved": False, "usage": USAGE}
        for i in ids
    ]
    table = pa.Table.from_pylist(rows, schema=build_annotated_schema(INPUTS, keep_candidates=False))
    return split_failed(table, INPUTS, keep_candidates=False)


def write(output: OutputFolder, unit: str, failing: set[str], run: str = RUN) -> UnitSummary:
    return output.write_unit(unit, *annotate(failing), run)


def path(output: OutputFolder, folder: str, unit: str) -> Path:
    return Path(output.locate_unit_file(folder, unit).path)


def complete(output: OutputFolder) -> list[UnitSummary]:
    return list(complete_output(output, dict.fromkeys(UNITS, len(IDS)), RUN, read_units(output.location)))


def read_ids(output: OutputFolder) -> list[str]:
    files = [file for name in ("data", "errors") for file in (Path(output.location.path) / name).glob("*.parquet")]
    return sorted(i for file in files for i in pq.read_table(file)["id"].to_pylist())


def test_whole_output_is_complete(folder: OutputFolder) -> None:
    units = complete(folder)
    assert [(unit.unit, unit.rows, unit.errors, unit.run) for unit in units] == [
        (unit, 4, {"ValueError": 1}, RUN) for unit in UNITS
    ]
    assert folder.is_finished()


def lose_errors(output: OutputFolder) -> None:
    path(output, "errors", UNITS[1]).unlink()


def lose_answers(output: OutputFolder) -> None:
    path(output, "data", UNITS[1]).unlink()


def keep_errors_of_another_attempt(output: OutputFolder) -> None:
    kept = path(output, "errors", UNITS[1]).read_bytes()
    output.withdraw(UNITS[1])
    write(output, UNITS[1], {"q2"})  # as many rows as before, one lost and one doubled
    path(output, "errors", UNITS[1]).write_bytes(kept)


def keep_errors_of_an_attempt_that_failed(output: OutputFolder) -> None:
    kept = path(output, "errors", UNITS[1]).read_bytes()
    output.withdraw(UNITS[1])
    write(output, UNITS[1], set())
    path(output, "errors", UNITS[1]).write_bytes(kept)


def write_late_with_other_settings(output: OutputFolder) -> None:
    output.withdraw(UNITS[1])
    write(output, UNITS[1], {"q1"}, OTHER_RUN)


def cut_answers(output: OutputFolder) -> None:
    file = path(output, "data", UNITS[1])
    file.write_bytes(file.read_bytes()[:-9])


def drop_a_row(output: OutputFolder) -> None:
    file = path(output, "data", UNITS[1])
    pq.write_table(pq.read_table(file).slice(1), file)


def forget_who_wrote_it(output: OutputFolder) -> None:
    file = path(output, "data", UNITS[1])
    pq.write_table(pq.read_table(file).replace_schema_metadata(None), file)


def read_fewer_rows(output: OutputFolder) -> None:
    output.withdraw(UNITS[1])
    output.write_unit(UNITS[1], *annotate({"q1"}, IDS[:3]), RUN)


@pytest.mark.parametrize(
    "break_unit",
    [
        lose_errors,
        lose_answers,
        keep_errors_of_another_attempt,
        keep_errors_of_an_attempt_that_failed,
        write_late_with_other_settings,
        cut_answers,
        drop_a_row,
        forget_who_wrote_it,
        read_fewer_rows,
    ],
)
def test_broken_unit_is_deleted(break_unit, folder: OutputFolder) -> None:
    break_unit(folder)
    with pytest.raises(RuntimeError, match="8 of 12 rows are complete, in 2 of 3 units; rerun the same command"):
        complete(folder)
    assert sorted(folder.list_unit_files("data")) == sorted(folder.list_unit_files("errors")) == [UNITS[0], UNITS[2]]
    write(folder, UNITS[1], {"q3"})
    assert [unit.rows for unit in complete(folder)] == [4, 4, 4]


def test_only_units_with_errors_are_opened_if_they_are_logged(
    folder: OutputFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.withdraw(UNITS[1])
    logged = {**read_units(folder.location), UNITS[1]: write(folder, UNITS[1], set())}
    opened, read = [], OutputFolder.read_unit

    def note(output: OutputFolder, unit: str, run: str) -> UnitSummary | None:
        opened.append(unit)
        return read(output, unit, run)

    monkeypatch.setattr(OutputFolder, "read_unit", note)
    rows = dict.fromkeys(UNITS, len(IDS))
    assert take_inventory(folder, rows, RUN, logged).complete
    assert sorted(opened) == [UNITS[0], UNITS[2]]
    path(folder, "data", UNITS[1]).write_bytes(b"PAR1")
    assert take_inventory(folder, rows, RUN, logged).broken == {UNITS[1]}
    assert take_inventory(folder, rows, OTHER_RUN, logged).broken == set(UNITS)


def test_unit_of_a_run_with_other_units_is_deleted(folder: OutputFolder) -> None:
    write(folder, "f" * 20, {"q1"}, OTHER_RUN)
    assert [unit.unit for unit in complete(folder)] == UNITS
    assert not path(folder, "data", "f" * 20).exists()
    assert read_ids(folder) == sorted(IDS * 3)


def test_files_of_other_names_are_left_alone(folder: OutputFolder) -> None:
    data = Path(folder.location.path) / "data"
    others = [data / "notes.parquet", data / f"part-{'f' * 19}.parquet", data / "mine" / f"part-{'f' * 20}.parquet"]
    for file in others:
        file.parent.mkdir(exist_ok=True)
        shutil.copy(path(folder, "data", UNITS[0]), file)
    assert len(complete(folder)) == 3
    assert all(file.exists() for file in others)


def test_unit_that_is_not_listed_yet_counts(folder: OutputFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Location, "list_files", lambda *_: [])
    assert take_inventory(folder, dict.fromkeys(UNITS, len(IDS)), RUN, {}, look_up=True).complete


def test_two_writers_of_a_unit_never_leave_a_mixture_that_counts(tmp_path: Path) -> None:
    """Every order of the writes of two attempts, in which other rows fail, either counts and is whole, or is open."""
    rng, whole = random.Random(7), 0
    for number in range(60):
        output = OutputFolder(locate(str(tmp_path / str(number)), StorageConfig()))
        attempts = [rng.choice([{"q0"}, {"q1"}, {"q2", "q3"}, set()]) for _ in range(2)]
        interleave(output, attempts, rng)
        if take_inventory(output, {UNITS[0]: len(IDS)}, RUN, {}).complete:
            whole += 1
            assert read_ids(output) == list(IDS)
    assert 0 < whole < 60


def interleave(output: OutputFolder, attempts: list[set[str]], rng: random.Random) -> None:
    """Carry out the writes of attempts that do not see each other, in a random order; some die after the first."""
    writes: list[list[tuple[str, bytes]]] = []
    for failing in attempts:
        written = write(output, UNITS[0], failing)
        files = [path(output, name, UNITS[0]) for name in ("errors", "data")]
        writes.append([(str(file), file.read_bytes()) for file in files if file.exists()])
        assert written.errors == ({"ValueError": len(failing)} if failing else {})
        output.withdraw(UNITS[0])
    if rng.random() < 0.3:
        writes[1].pop()
    while left := [attempt for attempt in writes if attempt]:
        file, content = rng.choice(left).pop(0)
        Path(file).write_bytes(content)
