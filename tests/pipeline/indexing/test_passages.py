from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.indexing.build import read_ahead
from pipeline.indexing.form import PassageForm
from pipeline.indexing.passages import (
    PassageBatch,
    Sample,
    check_passages,
    find_passages,
    plan_shards,
    read_passages,
    spread_samples,
)
from pipeline.retrieval.passage_columns import PASSAGE_SCHEMA
from pipeline.storage.parquet import RowRange
from tests.support.indexes import numbered, place

GIVEN = PassageForm(embeddings="vector")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Ten and five passages in two files, in row groups of four."""
    for name, rows, start in (("a", 10, 0), ("b", 5, 10)):
        vectors = [[float(n)] for n in range(start, start + rows)]
        table = pa.table({**numbered(rows, start), "vector": vectors})
        pq.write_table(table, tmp_path / f"{name}.parquet", row_group_size=4)
    return tmp_path


def ids(batches: Any) -> list[str]:
    return [name for batch in batches for name in batch.passages["id"].to_pylist()]


def test_shards_span_files_and_row_groups_without_loss(source: Path) -> None:
    shards = plan_shards(find_passages(place(source)), 4)
    read = [ids(read_passages(shard.ranges)) for shard in shards]
    assert read == [["0", "1", "2"], ["3", "4", "5", "6"], ["7", "8", "9", "10"], ["11", "12", "13", "14"]]
    assert [shard.rows for shard in shards] == [3, 4, 4, 4]


@pytest.mark.parametrize("empty", [{"id": [], "title": [], "text": []}, {}])
def test_file_without_rows_may_have_any_columns(source: Path, empty: dict[str, list[Any]]) -> None:
    pd.DataFrame(empty).to_parquet(source / "c.parquet")
    assert [part.rows for part in find_passages(place(source))] == [10, 5]


def test_passages_are_read_as_plain_strings(tmp_path: Path) -> None:
    table = pa.table(
        {
            "text": pa.array(["x", "y"], pa.large_string()),
            "id": pa.array(["1", "2"]),
            "title": pa.array(["same", None]).dictionary_encode(),
            "more": [1.0, 2.0],
        }
    )
    pq.write_table(table, tmp_path / "p.parquet")
    (batch,) = read_passages(find_passages(place(tmp_path / "p.parquet")))
    assert batch.passages.to_pylist() == [
        {"id": "1", "title": "same", "text": "x"},
        {"id": "2", "title": "", "text": "y"},
    ]
    assert batch.embeddings is None


def test_vectors_are_read_with_their_passages_and_row_numbers(source: Path) -> None:
    shard = plan_shards(find_passages(place(source), GIVEN), 2)[1]
    read = list(read_passages(shard.ranges, GIVEN))
    for batch in read:
        names = [int(name) for name in batch.passages["id"].to_pylist()]
        assert batch.embeddings is not None
        assert batch.embeddings.to_pylist() == [[float(name)] for name in names]
        assert [batch.rows.tolist()] == [[name % 10 for name in names]]
    assert ids(read) == [str(n) for n in range(7, 15)]


def test_small_corpus_is_sampled_evenly(source: Path) -> None:
    files = find_passages(place(source), GIVEN)

    def sample(size: int) -> list[str]:
        return ids(batch for sample in spread_samples(files, size) for batch in sample.read())

    assert sample(3) == ["0", "5", "10"]
    assert sample(15) == sample(100) == [str(n) for n in range(15)]


def test_samples_are_read_with_their_vectors_and_row_numbers(source: Path) -> None:
    part = RowRange(place(source / "a.parquet"), 4, 10)
    (batch,) = Sample(part, np.array([1, 5])).read(GIVEN)
    assert batch.passages["id"].to_pylist() == ["5", "9"]
    assert batch.embeddings is not None
    assert batch.embeddings.to_pylist() == [[5.0], [9.0]]
    assert batch.rows.tolist() == [5, 9]


def test_large_corpus_is_sampled_by_row_groups(tmp_path: Path) -> None:
    pq.write_table(pa.table(numbered(40_000)), tmp_path / "p.parquet", row_group_size=20)
    samples = spread_samples(find_passages(place(tmp_path / "p.parquet")), 500)
    assert sum(len(sample.rows) for sample in samples) == 500
    assert sum(sample.part.rows for sample in samples) <= 2 * 8 * 500
    names = [int(name) for name in ids(batch for sample in samples for batch in sample.read())]
    assert names[0] == 0
    assert names[-1] > 39_000
    assert max(np.diff(names)) < 1000


@given(st.lists(st.integers(1, 60), min_size=1, max_size=8), st.integers(1, 60), st.integers(1, 700))
def test_sample_size_does_not_depend_on_row_groups(
    tmp_path_factory: pytest.TempPathFactory, groups: list[int], odd: int, size: int
) -> None:
    folder = tmp_path_factory.mktemp("p")
    for number, group in enumerate(groups):
        pq.write_table(pa.table(numbered(3 * group + odd)), folder / f"{number}.parquet", row_group_size=group)
    files = find_passages(place(folder))
    total = sum(part.rows for part in files)
    starts = dict(zip((part.file.path for part in files), np.cumsum([0, *(p.rows for p in files)]), strict=False))
    samples = spread_samples(files, size)
    rows = [starts[s.part.file.path] + s.part.start + row for s in samples for row in s.rows.tolist()]
    assert len(rows) == min(size, total)
    assert all(later > earlier for earlier, later in pairwise(rows))
    assert 0 <= rows[0] <= rows[-1] < total


@pytest.mark.parametrize("compared", [1, 4, 1000])
def test_duplicate_ids_are_found_with_any_batch_size(source: Path, compared: int) -> None:
    check_passages(find_passages(place(source)), compared=compared)
    pq.write_table(pa.table(numbered(1, 12)), source / "c.parquet")
    with pytest.raises(ValueError, match=r"c.parquet: row 0: column id: '12' is also in .*b.parquet: row 2; ids must"):
        check_passages(find_passages(place(source)), compared=compared)


@pytest.fixture
def long(tmp_path: Path) -> Path:
    """Sixty passages of one, two or three sentences, in row groups of seven."""
    texts = [" ".join(f"Sentence {part} of {n}." for part in range(1 + n % 3)) for n in range(60)]
    pq.write_table(pa.table({**numbered(60), "text": texts}), tmp_path / "p.parquet", row_group_size=7)
    return tmp_path


SHORT = PassageForm(max_words=4)


def test_split_passages_are_whole_in_their_shards(long: Path) -> None:
    shards = plan_shards(find_passages(place(long), SHORT), 4)
    assert [shard.rows for shard in shards] == [15, 15, 15, 15]
    batches = [batch for shard in shards for batch in read_passages(shard.ranges, SHORT)]
    rows = [row for batch in batches for row in batch.passages.to_pylist()]
    assert len(rows) == 60 + 20 + 2 * 20
    assert [row["id"] for row in rows[:6]] == ["0", "1#1", "1#2", "2#1", "2#2", "2#3"]
    assert [row["title"] for row in rows[:4]] == ["title 0", "title 1", "title 1", "title 2"]
    assert [row["text"] for row in rows[3:6]] == [f"Sentence {part} of 2." for part in range(3)]
    assert np.concatenate([batch.rows for batch in batches]).tolist() == [
        n for n in range(60) for _ in range(1 + n % 3)
    ]
    assert sum(batch.count_rows() for batch in batches) == 60


def test_samples_are_read_with_all_parts_of_their_passages(long: Path) -> None:
    samples = spread_samples(find_passages(place(long), SHORT), 6)
    read = [batch for sample in samples for batch in sample.read(SHORT)]
    assert ids(read) == ["0", "10#1", "10#2", "20#1", "20#2", "20#3", "30", "40#1", "40#2", "50#1", "50#2", "50#3"]
    assert [sample.parts for sample in samples] == [1] * len(samples)
    assert [sample.parts for sample in spread_samples(find_passages(place(long), SHORT), 150)] == [3] * 9


@pytest.mark.parametrize(
    ("rows", "most", "kept"),
    [
        ([0, 1, 2], 1, [0, 1, 2]),
        ([4, 4, 4], 1, [2]),
        ([4, 4, 4], 2, [1, 2]),
        ([4, 4, 4], 3, [0, 1, 2]),
        ([4, 4, 4], 9, [0, 1, 2]),
        ([0, 0, 1, 1, 2, 2], 1, [0, 3, 4]),
        ([0] * 6, 2, [0, 3]),
        ([0, 1, 1, 1, 1, 2], 2, [0, 2, 4, 5]),
        ([7] * 5 + [8], 2, [1, 3, 5]),
        ([], 1, []),
    ],
)
def test_parts_of_a_sample_are_thinned_evenly(rows: list[int], most: int, kept: list[int], tmp_path: Path) -> None:
    names = [str(n) for n in range(len(rows))]
    passages = pa.record_batch([names, names, names], schema=PASSAGE_SCHEMA)
    batch = PassageBatch(place(tmp_path), np.array(rows, np.int64), passages, None)
    assert batch.thin(most).passages["id"].to_pylist() == [str(n) for n in kept]


WHOLE, SPLIT = "One.", "One two. Three four."


@pytest.mark.parametrize(
    ("texts", "problem"),
    [
        ({"a": SPLIT, "a#1": WHOLE}, "row 1: column id: 'a#1' is also in .* row 0; ids .* those of parts"),
        ({"a#2": WHOLE, "a": SPLIT}, "row 1: column id: 'a#2' is also in .* row 0; ids must be unique, and so"),
        ({"a#1": SPLIT, "b": SPLIT, "a#1#2": WHOLE}, "row 2: column id: 'a#1#2' is also in .* row 0"),
        ({"#1": WHOLE, "": SPLIT}, "row 1: column id: '#1' is also in .* row 0"),
        ({"a": SPLIT, "a#3": WHOLE}, None),
        ({"a": WHOLE, "a#1": WHOLE}, None),
        ({"a": SPLIT, "a#1": SPLIT}, None),
        ({"a": SPLIT, "a#x": WHOLE}, None),
        ({"a": SPLIT, "A#1": WHOLE}, None),
        ({"a": SPLIT, "b#1": WHOLE}, None),
    ],
)
def test_ids_of_parts_must_differ_from_other_ids(tmp_path: Path, texts: dict[str, str], problem: str | None) -> None:
    names = list(texts)
    pq.write_table(pa.table({"id": names, "title": names, "text": list(texts.values())}), tmp_path / "p.parquet")
    files = find_passages(place(tmp_path))
    check_passages(files)
    with pytest.raises(ValueError, match=problem) if problem else nullcontext():
        check_passages(files, PassageForm(max_words=3))


def test_ids_with_equal_hashes_are_compared_directly(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.indexing.passages._hash_ids", lambda ids: np.zeros(len(ids), np.uint64))
    check_passages(find_passages(place(source)))


def test_read_ahead_keeps_the_order_and_raises_errors() -> None:
    assert list(read_ahead(iter(range(1, 8)))) == list(range(1, 8))
    assert list(read_ahead(iter(()))) == []

    def broken() -> Any:
        yield 1
        raise ValueError("no more")

    arriving = read_ahead(broken())
    assert next(arriving) == 1
    with pytest.raises(ValueError, match="no more"):
        next(arriving)
