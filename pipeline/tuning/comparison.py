"""Compares the answers and scores of two annotated sets of the same few rows."""

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean

from pipeline.output.folder import OutputFolder
from pipeline.storage.parquet import read_columns


@dataclass(frozen=True)
class ScoredAnswer:
    """An answer, and the mean score of its segments; None without any."""

    answer: str
    score: float | None


def read_scored_answers(output: OutputFolder, id_column: str) -> dict[str, ScoredAnswer]:
    """Read the answered rows of a set by id; all are held in memory.

    Raises:
        StorageError: a file cannot be read.
    """
    found = dict[str, ScoredAnswer]()
    for file in output.list_unit_files("data").values():
        for row in read_columns(file, [id_column, "answer", "segments"]).to_pylist():
            scores = [segment["score"] for segment in row["segments"] or () if segment["score"] is not None]
            found[row[id_column]] = ScoredAnswer(row["answer"], fmean(scores) if scores else None)
    return found


def compare_scored_answers(
    before: Mapping[str, ScoredAnswer], after: Mapping[str, ScoredAnswer]
) -> tuple[float, float]:
    """Compare two sets of the same rows.

    Returns:
        The share of the rows answered before that have another answer or none, in [0, 1]; and the mean absolute
        difference of the scores of the rows with the same answer, 0 if there are none.

    Raises:
        ValueError: no row was answered before.
    """
    if not before:
        raise ValueError("there are no answers to compare with")
    same = [name for name, row in before.items() if name in after and after[name].answer == row.answer]
    pairs = [(before[name].score, after[name].score) for name in same]
    shifts = [abs(now - then) for then, now in pairs if then is not None and now is not None]
    return 1 - len(same) / len(before), fmean(shifts) if shifts else 0.0
