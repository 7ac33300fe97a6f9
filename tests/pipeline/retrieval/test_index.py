from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config.sections import RetrievalConfig
from pipeline.decoding.types import Passage
from pipeline.retrieval.index import PassageIndex, Shard
from pipeline.retrieval.manifest import check_index_manifest, read_manifest, write_manifest
from pipeline.retrieval.shard_files import build_shard, create_empty_index, extract_faiss_message, train_index
from pipeline.storage.location import Location
from tests.support.indexes import CPU, passages, retrieve, save, unit_vectors

small = st.integers(-1, 1)


@settings(max_examples=100)
@given(
    rows=st.lists(st.tuples(small, small), min_size=1, max_size=40),
    queries=st.lists(st.tuples(small, small), min_size=1, max_size=3),
    cuts=st.sets(st.integers(1, 39), max_size=4),
    k=st.integers(1, 45),
)
def test_shards_rank_like_one_index_with_ties_by_shard_then_row(
    rows: list[tuple[int, int]], queries: list[tuple[int, int]], cuts: set[int], k: int
) -> None:
    vectors, asked = np.array(rows, np.float32), np.array(queries, np.float32)
    parts = [part for part in np.split(vectors, sorted(cut for cut in cuts if cut < len(vectors))) if len(part)]
    shards = []
    for part in parts:
        index = create_empty_index("Flat", 2)
        index.add(part)
        shards.append(Shard(index, None))  # type: ignore[arg-type]
    found = PassageIndex(None, dict(enumerate(shards))).search(asked, k)  # type: ignore[arg-type]

    starts = np.cumsum([0, *(len(part) for part in parts)])
    scores = asked @ vectors.T
    for hits, expected in zip(found, scores, strict=True):
        best = sorted(range(len(vectors)), key=lambda row: (-expected[row], row))[:k]
        assert [starts[hit.shard] + hit.row for hit in hits] == best
        assert [hit.score for hit in hits] == [expected[row] for row in best]


@pytest.mark.parametrize("factory", ["Flat", "IVF4,Flat", "IVF4,SQ8", "PCA8,Flat"])
def test_saved_shards_rank_like_one_index(folder: Location, factory: str) -> None:
    vectors, queries = unit_vectors(60), unit_vectors(5, seed=1)
    save(folder, [vectors[:25], vectors[25:30], vectors[30:]], factory)
    one = create_empty_index(factory, 16)
    if not one.is_trained:
        one.train(vectors)
    one.add(vectors)
    scores, rows = one.search(queries, 8)
    found = retrieve(PassageIndex.open(folder, CPU), queries, 8)
    assert [[hit.passage.id for hit in hits] for hits in found] == [[str(r) for r in row if r >= 0] for row in rows]
    for hits, expected in zip(found, scores, strict=True):
        np.testing.assert_allclose(np.asarray([hit.score for hit in hits], float), expected[: len(hits)], atol=1e-6)
        assert [hit.rank for hit in hits] == list(range(1, len(hits) + 1))


def test_passages_are_read_from_every_batch_of_the_file(saved: Location) -> None:
    vectors = unit_vectors(60)
    found = retrieve(PassageIndex.open(saved, CPU), vectors, 1)
    assert [hits[0].passage for hits in found] == [Passage(str(n), f"title {n}", f"text {n}") for n in range(60)]


def test_search_for_more_than_all_passages_returns_all(saved: Location) -> None:
    (hits,) = PassageIndex.open(saved, CPU).search(unit_vectors(1, seed=3), 1000)
    assert len({(hit.shard, hit.row) for hit in hits}) == 60


def test_rows_that_faiss_does_not_find_are_omitted(folder: Location) -> None:
    # One of eight lists is probed, so FAISS fills most of the 60 places with row -1.
    manifest = save(folder, [unit_vectors(60)], "IVF8,Flat")
    query = unit_vectors(1, seed=2)
    _, rows = faiss.read_index((folder / manifest.shards[0].file).path).search(query, 60)
    (hits,) = PassageIndex.open(folder, CPU).search(query, 60)
    assert [hit.row for hit in hits] == [row for row in rows[0] if row >= 0]
    assert 0 < len(hits) < 60


def test_search_parameters_reach_faiss(folder: Location) -> None:
    vectors, queries = unit_vectors(60), unit_vectors(4, seed=5)
    save(folder, [vectors[:30], vectors[30:]], "IVF8,Flat")
    exact = faiss.IndexFlatIP(16)
    exact.add(vectors)
    wanted = [[str(row) for row in rows] for rows in exact.search(queries, 10)[1]]

    def ids(search: str) -> list[list[str]]:
        index = PassageIndex.open(folder, RetrievalConfig(device="cpu", search=search))
        return [[hit.passage.id for hit in hits] for hits in retrieve(index, queries, 10)]

    assert ids("nprobe=8") == wanted
    assert ids("") != wanted


def test_search_parameter_that_does_not_apply_is_named(saved: Location) -> None:
    with pytest.raises(ValueError, match=r"IndexFlatIP has no parameter efSearch"):
        PassageIndex.open(saved, RetrievalConfig(device="cpu", search="efSearch=64"))


def change(path: str, edit: Callable[[bytes], bytes]) -> None:
    file = Path(path)
    file.write_bytes(edit(file.read_bytes()))


@pytest.mark.parametrize("name", ["shard-00001.faiss", "shard-00002.passages.arrow"])
def test_changed_truncated_and_missing_files_are_named(saved: Location, name: str) -> None:
    path = (saved / name).path
    change(path, lambda content: content[:-1] + bytes([content[-1] ^ 1]))
    check_index_manifest(saved, CPU)
    with pytest.raises(ValueError, match=rf"{name}: its SHA-256 differs from index.json"):
        PassageIndex.open(saved, CPU)
    change(path, lambda content: content[:-10])
    for opened in (check_index_manifest, PassageIndex.open):
        with pytest.raises(ValueError, match=rf"{name}: has \d+ bytes, but index.json records"):
            opened(saved, CPU)
    Path(path).unlink()
    for opened in (check_index_manifest, PassageIndex.open):
        with pytest.raises(ValueError, match=rf"{name}: missing"):
            opened(saved, CPU)


def test_digests_are_not_checked_if_verify_is_off(saved: Location) -> None:
    change((saved / "shard-00000.faiss").path, lambda content: content[:-1] + bytes([content[-1] ^ 1]))
    unverified = RetrievalConfig(device="cpu", verify=False)
    assert len(PassageIndex.open(saved, unverified).search(unit_vectors(1), 3)[0]) == 3


def test_files_of_another_index_are_refused(saved: Location) -> None:
    manifest = read_manifest(saved)
    first, second, third = manifest.shards
    swapped = second.model_copy(update={"file": first.file, "bytes": first.bytes, "sha256": first.sha256})
    changes = {"shards": (swapped, third), "passages": second.rows + third.rows}
    write_manifest(saved, manifest.model_copy(update=changes))
    with pytest.raises(
        ValueError, match=r"25 vectors of 16 dimensions and 5 passages, but index.json records 5 and 16"
    ):
        PassageIndex.open(saved, CPU)


def test_shard_is_written_completely_to_other_file_systems(remote: Location, saved: Location, tmp_path: Path) -> None:
    entry = build_shard(remote, 9, create_empty_index("Flat", 16), [(passages(0, 4), unit_vectors(4))])
    assert (tmp_path / "index" / entry.file).stat().st_size == entry.bytes
    assert (tmp_path / "index" / entry.passages_file).stat().st_size == entry.passages_bytes


def test_failed_shard_leaves_no_files(folder: Location) -> None:
    def batches() -> Any:
        yield passages(0, 4), unit_vectors(4)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        build_shard(folder, 0, create_empty_index("Flat", 16), batches())
    assert list(Path(folder.path).iterdir()) == []


@pytest.mark.parametrize("factory", ["Flatt", "PQ7", "LSH", "IDMap,Flat"])
def test_factory_that_cannot_be_built_is_named(factory: str) -> None:
    with pytest.raises(ValueError, match=f"^factory {factory}: "):
        create_empty_index(factory, 16)


def test_faiss_messages_omit_source_lines() -> None:
    assert extract_faiss_message(RuntimeError("Error in x at /a/b.cpp:66: Error: 'n >= k' failed: Too few points")) == (
        "Too few points"
    )
    assert (
        extract_faiss_message(RuntimeError("Error in x at /a/b.cpp:1228: could not parse Flatt"))
        == "could not parse Flatt"
    )


def test_too_few_training_vectors_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot be trained on 5 passages: Number of training points"):
        train_index(create_empty_index("IVF8,Flat", 16), unit_vectors(5))


def test_gpu_device_requires_a_gpu(saved: Location) -> None:
    if hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus():
        pytest.skip("there is one")
    with pytest.raises(ValueError, match=r"retrieval.device gpu"):
        PassageIndex.open(saved, RetrievalConfig(device="gpu"))
