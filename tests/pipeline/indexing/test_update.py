from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config.sections import StorageConfig
from pipeline.indexing.compaction import prune_index
from pipeline.indexing.update import Updated, UpdateRequest, find_removal, run_update
from pipeline.retrieval.encoder import Vectors
from pipeline.retrieval.index import PassageIndex
from pipeline.retrieval.index_cache import DamagedIndexError
from pipeline.retrieval.manifest import (
    IndexManifest,
    has_earlier_version,
    publish_version,
    read_manifest,
    write_manifest,
)
from pipeline.retrieval.passage_columns import PASSAGE_SCHEMA
from pipeline.retrieval.shard_files import build_shard, create_empty_index
from pipeline.storage.lease import Lease, LeaseLostError, OutputInUseError
from pipeline.storage.location import Location
from tests.support.indexes import CPU, ENCODER, retrieve, save, unit_vectors

VECTORS = unit_vectors(60, seed=1)
QUERIES = unit_vectors(6, seed=2)
GONE = (0, 7, 21, 22, 59)


def list_ids(folder: Path, ids: Sequence[object]) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"id": pa.array([str(one) for one in ids], pa.string())}), folder / "ids.parquet")
    return str(folder)


def remove(index: Location, ids: str, strict: bool = False) -> Updated:
    return run_update(UpdateRequest(index.uri, remove=ids, strict=strict))


def find(folder: Location, k: int = 8, digest: str | None = None) -> list[list[tuple[str, float]]]:
    found = retrieve(PassageIndex.open(folder, CPU, digest=digest), QUERIES, k)
    return [[(one.passage.id, round(one.score or 0, 5)) for one in of_query] for of_query in found]


def rank_left(gone: Sequence[int], k: int = 8) -> list[list[str]]:
    """Ids of the nearest vectors, without some."""
    scores = QUERIES @ VECTORS.T
    scores[:, list(gone)] = -2
    return [[str(row) for row in rows[:k]] for rows in np.argsort(-scores, axis=1, kind="stable")]


def split(parts: int, vectors: Vectors = VECTORS) -> list[Vectors]:
    return np.array_split(vectors, parts)


@pytest.mark.parametrize("factory", ["Flat", "IVF1,Flat"])
def test_removed_passages_are_not_found(folder: Location, tmp_path: Path, factory: str) -> None:
    before = save(folder, split(3), factory)
    all_hits = find(folder)
    updated = remove(folder, list_ids(tmp_path / "ids", [*GONE, "nowhere"]))
    assert (updated.added, updated.removed, updated.replaced, updated.unknown) == (0, 5, 0, 1)
    now = read_manifest(folder)
    assert now == updated.manifest
    assert (now.passages, now.updates, now.added) == (55, 1, 0)
    assert [shard.kept for shard in now.shards] == [18, 18, 19]
    assert [[name for name, _ in hits] for hits in find(folder)] == rank_left(GONE)
    assert find(folder, digest=before.compute_digest()) == all_hits  # a run that began with the earlier version


def test_more_hits_than_are_left_are_those_that_are_left(folder: Location, tmp_path: Path) -> None:
    save(folder, split(3))
    remove(folder, list_ids(tmp_path / "ids", range(55)))
    assert read_manifest(folder).shards[0].kept == 0
    assert [sorted(name for name, _ in hits) for hits in find(folder)] == [["55", "56", "57", "58", "59"]] * 6


def test_updates_add_up(folder: Location, tmp_path: Path) -> None:
    versions = [save(folder, split(2))]
    for number, ids in enumerate([(0, 1), (1, 30), (2,)]):
        versions.append(remove(folder, list_ids(tmp_path / str(number), ids)).manifest)
    assert [version.passages for version in versions] == [60, 58, 57, 56]
    assert [[name for name, _ in hits] for hits in find(folder)] == rank_left((0, 1, 2, 30))
    for version, gone in zip(versions, [(), (0, 1), (0, 1, 30)], strict=False):
        found = find(folder, digest=version.compute_digest())
        assert [[name for name, _ in hits] for hits in found] == rank_left(gone)


def test_nothing_to_do_makes_no_version(folder: Location, tmp_path: Path) -> None:
    before = save(folder, split(2))
    updated = remove(folder, list_ids(tmp_path / "ids", ["x", "y"]))
    assert (updated.manifest, updated.removed, updated.unknown) == (before, 0, 2)
    assert not has_earlier_version(folder, before.compute_digest())


@pytest.mark.parametrize(
    ("ids", "strict", "message"),
    [
        (range(60), False, "no passage would be left in the index; delete it instead"),
        ((3, "x", "y"), True, r"--remove .*: 'x' is not in the index, ids like this: 2"),
    ],
)
def test_refused_removal_changes_nothing(
    folder: Location, tmp_path: Path, ids: Sequence[object], strict: bool, message: str
) -> None:
    before = save(folder, split(2))
    with pytest.raises(ValueError, match=message):
        remove(folder, list_ids(tmp_path / "ids", ids), strict)
    assert read_manifest(folder) == before


def test_index_that_cannot_leave_passages_out_is_refused(folder: Location, tmp_path: Path) -> None:
    save(folder, [unit_vectors(300)], "PQ4x4")
    with pytest.raises(ValueError, match="FAISS cannot leave out passages of an index of PQ4x4; build it anew"):
        remove(folder, list_ids(tmp_path / "ids", [1]))


def test_two_updates_at_once_are_refused(folder: Location, tmp_path: Path) -> None:
    save(folder, split(2))
    with Lease(folder), pytest.raises(OutputInUseError):
        remove(folder, list_ids(tmp_path / "ids", [1]))


def test_update_that_another_one_has_overtaken_publishes_nothing(
    folder: Location, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = save(folder, split(2))

    def lose(_: Lease) -> None:
        raise LeaseLostError("gone")

    with monkeypatch.context() as context:
        context.setattr(Lease, "renew", lose)
        with pytest.raises(LeaseLostError):
            remove(folder, list_ids(tmp_path / "ids", [1]))
    assert read_manifest(folder) == before
    remove(folder, list_ids(tmp_path / "ids", [1]))
    with pytest.raises(DamagedIndexError, match="the index was replaced during the update; run the command again"):
        publish_version(folder, before, before)


def test_interrupted_update_leaves_the_index_and_may_be_followed_by_another(
    folder: Location, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = save(folder, split(2))
    with monkeypatch.context() as context:
        context.setattr("pipeline.indexing.update.publish_version", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            remove(folder, list_ids(tmp_path / "one", [1, 50]))
    assert read_manifest(folder) == before
    assert [[name for name, _ in hits] for hits in find(folder)] == rank_left(())
    remove(folder, list_ids(tmp_path / "two", [2]))
    assert [[name for name, _ in hits] for hits in find(folder)] == rank_left((2,))


def test_files_of_kept_versions_are_never_written_again(folder: Location, tmp_path: Path) -> None:
    """The first version is restored, and updated otherwise, while the second one is in use."""
    first = save(folder, split(2))
    second = remove(folder, list_ids(tmp_path / "one", [1])).manifest
    third = remove(folder, list_ids(tmp_path / "two", [2])).manifest
    write_manifest(folder, first)
    other = remove(folder, list_ids(tmp_path / "three", [3])).manifest
    assert (second.updates, third.updates, other.updates) == (1, 2, 2)
    for version, gone in ((first, ()), (second, (1,)), (other, (3,))):
        found = find(folder, digest=version.compute_digest())
        assert [[name for name, _ in hits] for hits in found] == rank_left(gone)


def test_parts_go_with_their_passage(folder: Location) -> None:
    names = ["a", "b#1", "b#2", "c", "d#1", "d#2", "e#x", "bb"]
    batch = pa.record_batch([names, names, names], schema=PASSAGE_SCHEMA)
    entry = build_shard(folder, 0, create_empty_index("Flat", 16), [(batch, VECTORS[:8])])
    manifest = IndexManifest(encoder=ENCODER, dimension=16, factory="Flat", passages=8, shards=(entry,), max_words=50)
    removal = find_removal(folder, manifest, frozenset({"b", "c", "d#2", "e", "z"}))
    assert [rows.tolist() for rows in removal.rows.values()] == [[1, 2, 3, 5]]
    assert (removal.removed, removal.found) == (4, {"b", "c", "d#2"})
    whole = manifest.model_copy(update={"max_words": None})
    assert find_removal(folder, whole, frozenset({"b", "c"})).found == {"c"}


def test_pruned_index_has_the_files_of_its_last_version(folder: Location, tmp_path: Path) -> None:
    first = save(folder, split(2))
    for number in (1, 2):
        last = remove(folder, list_ids(tmp_path / str(number), [number])).manifest
    for name in ("notes.txt", "update-00003/shard-00000.faiss"):  # not the index's, or of an update that has begun
        (folder / name).write(b"kept")
    hits = find(folder)
    files, size = prune_index(folder.uri, StorageConfig())
    assert files == 3  # two earlier manifests, and the removed rows of the first update
    assert size > 0
    assert find(folder) == hits
    left = {file.path.removeprefix(f"{folder.path}/") for file in folder.list_files()}
    assert left == {
        "index.json",
        "notes.txt",
        "update-00003/shard-00000.faiss",
        *(name for shard in last.shards for name, _, _ in shard.list_files()),
    }
    with pytest.raises(DamagedIndexError, match="the index was replaced during the run"):
        read_manifest(folder, first.compute_digest())
