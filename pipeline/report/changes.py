"""Counts the answers that differ between an annotated set and an earlier one, in bounded memory, and reads some.

Equal ids may lie in different units of the two sets, so the ids and answers of all units are read, however large the
sets are. A sample is drawn by id.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.config.sections import Columns
from pipeline.output.compacted import PlacedUnit, locate_members
from pipeline.output.folder import OutputFolder
from pipeline.output.unit_files import UnitSummary
from pipeline.report.units import FinishedUnit, check_columns, find_units, map_units
from pipeline.storage.hashes import hash_texts
from pipeline.storage.parquet import read_columns

# Rows compared in each set, at 16 bytes per row. If a set is larger, only a sample of the ids is compared.
MOST_COMPARED = 4_000_000
# Changed answers that are shown, and units that are searched for them.
MOST_SHOWN = 10
MOST_SEARCHED = 200


@dataclass(frozen=True, eq=False)
class Answers:
    """Hashes of the ids and answers of N rows.

    Equal texts have equal hashes. Among four million different texts, the probability of any collision is below one in
    a million.

    Attributes:
        ids: uint64 [N], hashes of the ids.
        answers: uint64 [N], hashes of the answers.
    """

    ids: npt.NDArray[np.uint64]
    answers: npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Changes:
    """The result of comparing the answers of two sets.

    Attributes:
        shared: number of compared ids that both sets have answered.
        changed: number of these ids whose answers differ.
        sample: sampling interval; one id in ``sample`` was compared.
    """

    shared: int
    changed: int
    sample: int


@dataclass(frozen=True)
class ChangedAnswer:
    """A row whose answer has changed: its id and query, and the answer before and after."""

    id: str
    query: str
    before: str
    after: str


def choose_sampling_interval(*manifests: Mapping[str, Any]) -> int:
    """Return the sampling interval for sets with these manifests; 1 if none has more than ``MOST_COMPARED`` rows."""
    rows: int = max(manifest.get("queries", {}).get("rows", 0) for manifest in manifests)
    return max(1, -(-rows // MOST_COMPARED))


def read_answers(output: OutputFolder, id_column: str, sample: int) -> list[Answers]:
    """Hash the ids and answers in the sample, by unit; reads these two columns of all units.

    Raises:
        ValueError: a column of the output is missing.
        StorageError: a file cannot be read.
    """

    def hash_unit(unit: FinishedUnit) -> Answers:
        rows = read_columns(unit.data, [id_column, "answer"])
        check_columns(unit.data, rows, (id_column, "answer"))
        return hash_answers(rows[id_column], rows["answer"], sample)

    return list(map_units(hash_unit, find_units(output)))


def read_changed_answers(ours: OutputFolder, theirs: OutputFolder, columns: Columns) -> list[ChangedAnswer]:
    """Read the first answers that changed in units that both sets have; none if they have no unit in common.

    Args:
        ours: the annotated set.
        theirs: the earlier set.
        columns: names of the query set's columns in both sets.

    Raises:
        ValueError: a column is missing.
        StorageError: a file cannot be read.
    """
    names, found = [columns.id, columns.query, "answer"], list[ChangedAnswer]()
    units, data = _locate_units(ours), _locate_units(theirs)
    both = [name for name, unit in units.items() if name in data and has_own_answers(unit.summary)]
    for unit in both[:MOST_SEARCHED]:
        before = data[unit].read_answers([columns.id, "answer"])
        check_columns(data[unit].answers.file, before, (columns.id, "answer"))
        earlier = dict(zip(before[columns.id].to_pylist(), before["answer"].to_pylist(), strict=True))
        for row in units[unit].read_answers(names).to_pylist():
            name, answer = row[columns.id], row["answer"]
            if earlier.get(name, answer) != answer:
                found.append(ChangedAnswer(name, row[columns.query], earlier[name], answer))
        if len(found) >= MOST_SHOWN:
            break
    return found[:MOST_SHOWN]


def _locate_units(output: OutputFolder) -> dict[str, PlacedUnit]:
    """Locate the rows of the finished units of the run, by unit."""
    files = find_units(output)
    found = (unit for file in files for unit in locate_members(output, file.summary.unit, file.members))
    return {unit.summary.unit: unit for unit in found}


def has_own_answers(unit: UnitSummary) -> bool:
    """Whether a unit has answers that were not carried over."""
    return unit.carried < unit.rows - unit.failed


def hash_answers(ids: pa.ChunkedArray, answers: pa.ChunkedArray, sample: int) -> Answers:
    """Hash the ids and answers of the rows in the sample; the id alone decides whether a row is in it."""
    names = hash_texts(ids)
    chosen = names % np.uint64(sample) == 0
    return Answers(names[chosen], hash_texts(answers.filter(pa.array(chosen))))


def compare_answers(ours: Sequence[Answers], theirs: Sequence[Answers], sample: int) -> Changes:
    """Compare the answers of two sets by id, given the hashes of all their units."""
    now, before = _concatenate(ours), _concatenate(theirs)
    _, mine, other = np.intersect1d(now.ids, before.ids, assume_unique=True, return_indices=True)
    return Changes(len(mine), int((now.answers[mine] != before.answers[other]).sum()), sample)


def _concatenate(parts: Sequence[Answers]) -> Answers:
    nothing = np.array([], np.uint64)
    ids = np.concatenate([nothing, *(part.ids for part in parts)])
    answers = np.concatenate([nothing, *(part.answers for part in parts)])
    return Answers(ids, answers)
