from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipeline.retrieval.filters import RowSelection
from pipeline.retrieval.index_cache import DamagedIndexError
from pipeline.retrieval.lexical import LexicalShard, Postings, select_top

WORDS = ["Iron", "gold", "sea", "zinc", "été", "東"]


def make_postings() -> Postings:
    """Six words in three passages: word n is in passage n % 3 alone, with the score n + 1; gold is in all, with 0.5."""
    rows = [0, 0, 1, 2, 2, 0, 1, 2]
    scores = [1.0, 0.5, 0.5, 0.5, 3.0, 4.0, 5.0, 6.0]
    starts = np.array([0, 1, 4, 5, 6, 7, 8])
    words = pa.array(WORDS, pa.large_string())
    return Postings(words, starts, np.array(rows, np.int32), np.array(scores, np.float32), 3)


def test_written_postings_are_mapped_and_searched_alike(tmp_path: Path) -> None:
    made, queries = make_postings(), [["gold", "sea"], ["東", "zinc"], ["unknown"], []]
    made.write(tmp_path / "words.arrow")
    mapped = Postings.open(tmp_path / "words.arrow", 3)
    assert (mapped.words.to_pylist(), mapped.passages) == (WORDS, 3)
    assert not mapped.scores.flags.owndata
    for shard in (LexicalShard(made), LexicalShard(mapped)):
        scores, rows = shard.search_top(queries, 2)
        assert rows.tolist() == [[2, 0], [2, 0], [-1, -1], [-1, -1]]
        assert scores.tolist() == [[3.5, 0.5], [6.0, 4.0], [-np.inf, -np.inf], [-np.inf, -np.inf]]


def test_every_word_is_found_and_no_other() -> None:
    shard = LexicalShard(make_postings())
    others = ["", "A", "golden", "gol", "~", "鉄"]
    assert shard.find_words(WORDS + others) == {word: number for number, word in enumerate(WORDS)}
    assert shard.find_words(others) == shard.find_words([]) == {}


def test_repeated_words_of_a_query_count_each_time() -> None:
    scores, _ = LexicalShard(make_postings()).search_top([["sea", "sea"]], 1)
    assert scores.tolist() == [[6.0]]


@pytest.mark.parametrize(
    ("scores", "k", "rows"),
    [
        ([0.5, 2.0, 0.5, 0.5], 2, [1, 0]),
        ([0.5, 2.0, 0.5, 0.5], 9, [1, 0, 2, 3]),
        ([0.0, 0.0, 1.0], 2, [2]),
        ([0.0], 1, []),
        ([], 3, []),
    ],
)
def test_ties_go_to_the_lowest_rows_and_zeros_are_not_found(scores: list[float], k: int, rows: list[int]) -> None:
    assert select_top(np.array(scores, np.float32), k).tolist() == rows


def test_other_files_are_named(tmp_path: Path) -> None:
    file = tmp_path / "words.arrow"
    file.write_bytes(b"nothing")
    with pytest.raises(DamagedIndexError, match=r"words\.arrow: not an Arrow IPC file"):
        Postings.open(file, 3)
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, pa.schema([("a", pa.int32())])):
        pass
    with pytest.raises(DamagedIndexError, match=r"words\.arrow: not the lexical part of a shard"):
        Postings.open(file, 3)


@pytest.mark.parametrize(
    "change", [{"passages": 4}, {"starts": np.array([0, 1, 4, 5, 6, 7, 9])}, {"rows": np.zeros(3, np.int32)}]
)
def test_parts_that_do_not_fit_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    replace(make_postings(), **change).write(tmp_path / "words.arrow")
    with pytest.raises(DamagedIndexError, match=r"words\.arrow: its parts do not fit each other, or not the shard"):
        Postings.open(tmp_path / "words.arrow", 3)


def test_selected_passages_alone_are_found() -> None:
    shard = LexicalShard(make_postings())
    kept = RowSelection(np.array([False, True, True]))
    scores, rows = shard.search_top([["gold", "sea"], ["zinc"]], 3, kept)
    assert rows.tolist() == [[2, 1, -1], [-1, -1, -1]]
    assert scores[0].tolist() == [3.5, 0.5, -np.inf]
