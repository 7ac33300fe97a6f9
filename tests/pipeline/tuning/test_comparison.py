from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config.sections import StorageConfig
from pipeline.output.folder import OutputFolder
from pipeline.storage.location import locate
from pipeline.tuning.comparison import ScoredAnswer, compare_scored_answers, read_scored_answers


def rows(**found: tuple[str, float | None]) -> dict[str, ScoredAnswer]:
    return {name: ScoredAnswer(answer, score) for name, (answer, score) in found.items()}


def test_other_answers_and_missing_ones_count_as_changed() -> None:
    before = rows(a=("x", 1.0), b=("y", 2.0), c=("z", 3.0), d=("w", 0.5))
    after = rows(a=("x", 1.5), b=("other", 9.0), d=("w", 0.25), e=("new", 1.0))
    assert compare_scored_answers(before, after) == (2 / 4, (0.5 + 0.25) / 2)


def test_answers_without_scores_have_no_shift() -> None:
    before = rows(a=("x", None), b=("y", 1.0), c=("z", 1.0))
    assert compare_scored_answers(before, rows(a=("x", 1.0), b=("y", None), c=("z", 1.0))) == (0.0, 0.0)
    with pytest.raises(ValueError, match="no answers to compare with"):
        compare_scored_answers({}, before)


def test_score_of_a_row_is_the_mean_of_its_segments(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    table = pa.table(
        {
            "name": ["a", "b", "c"],
            "answer": ["x", "y", "z"],
            "segments": [[{"score": 1.0}, {"score": 2.0}], [], [{"score": None}, {"score": 0.5}]],
        }
    )
    pq.write_table(table, tmp_path / "data" / f"part-{'0' * 20}.parquet")
    found = read_scored_answers(OutputFolder(locate(str(tmp_path), StorageConfig())), "name")
    assert found == {
        "a": ScoredAnswer("x", 1.5),
        "b": ScoredAnswer("y", None),
        "c": ScoredAnswer("z", 0.5),
    }
