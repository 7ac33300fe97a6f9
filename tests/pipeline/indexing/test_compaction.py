from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest

from pipeline.config.sections import StorageConfig
from pipeline.indexing.compaction import copy_vectors, plan_kept_shards, run_compaction, supports_copying
from pipeline.retrieval.manifest import RemovedEntry
from pipeline.retrieval.shard_files import create_empty_index, read_faiss, train_index
from pipeline.storage.location import Location
from tests.support.indexes import save, unit_vectors

VECTORS = unit_vectors(400, seed=1)
QUERIES = unit_vectors(9, seed=2)


def map_into_memory(index: Any, file: Path) -> Any:
    """The index as shards are opened."""
    faiss.write_index(index, str(file))
    return read_faiss(file)


@pytest.mark.parametrize(
    "factory",
    ["Flat", "SQ8", "SQfp16", "PQ4x4", "PCA8,Flat", "IVF8,Flat", "IVF8,SQ8", "IVF8,PQ4x4", "PCA8,IVF8,SQ8"],
)
def test_copied_vectors_are_found_like_added_ones(factory: str, tmp_path: Path) -> None:
    """The rows of two indexes, in their order, without every third."""
    assert supports_copying(create_empty_index(factory, 16))
    template = create_empty_index(factory, 16)
    if not template.is_trained:
        train_index(template, VECTORS)
    first, second, copied, added = (faiss.clone_index(template) for _ in range(4))
    first.add(VECTORS[:150])
    second.add(VECTORS[150:])
    kept = np.flatnonzero(np.arange(400) % 3)
    copy_vectors(map_into_memory(first, tmp_path / "first"), copied, kept[kept < 150])
    copy_vectors(map_into_memory(second, tmp_path / "second"), copied, kept[kept >= 150] - 150)
    added.add(VECTORS[kept])
    assert copied.ntotal == added.ntotal == len(kept)
    scores, rows = copied.search(QUERIES, 10)
    wanted_scores, wanted = added.search(QUERIES, 10)
    assert rows.tolist() == wanted.tolist()
    np.testing.assert_allclose(scores, wanted_scores, atol=1e-6)


@pytest.mark.parametrize("factory", ["HNSW8", "HNSW8,SQ8"])
def test_graph_is_built_anew_over_the_same_vectors(factory: str, tmp_path: Path) -> None:
    assert supports_copying(create_empty_index(factory, 16))
    source, copied = create_empty_index(factory, 16), create_empty_index(factory, 16)
    for index in (source, copied):
        index.train(VECTORS)
    source.add(VECTORS)
    kept = np.flatnonzero(np.arange(400) % 7)
    copy_vectors(map_into_memory(source, tmp_path / "source"), copied, kept)
    np.testing.assert_array_equal(copied.reconstruct_n(0, len(kept)), source.reconstruct_n(0, 400)[kept])
    nearest = copied.search(source.reconstruct_n(0, 400)[kept], 1)[1][:, 0]
    assert (nearest == np.arange(len(kept))).mean() > 0.9


def test_no_vectors_are_copied_from_an_empty_selection() -> None:
    source, target = create_empty_index("Flat", 16), create_empty_index("Flat", 16)
    source.add(VECTORS)
    copy_vectors(source, target, np.empty(0, np.int64))
    assert target.ntotal == 0


@pytest.mark.parametrize(
    "factory", ["IVF8,PQ4x4fs", "IVF8,FlatPanorama4", "IVF8,FlatDedup", "RaBitQ", "IVF8,RaBitQ", "HNSW8,PQ4x4", "RQ2x4"]
)
def test_other_kinds_are_not_copied(factory: str) -> None:
    assert not supports_copying(create_empty_index(factory, 16))


def test_index_that_cannot_be_copied_is_refused(folder: Location) -> None:
    save(folder, [VECTORS], "IVF8,PQ4x4fs")
    with pytest.raises(ValueError, match="the vectors of an index of IVF8,PQ4x4fs cannot be copied; build it anew"):
        run_compaction(folder.uri, None, None, StorageConfig())


def test_kept_passages_are_divided_evenly(folder: Location) -> None:
    entries = list(save(folder, [VECTORS[:10], VECTORS[10:13], VECTORS[13:20]]).shards)
    name = "update-00001/shard-00000.removed.arrow"
    entries[0] = entries[0].model_copy(update={"removed": RemovedEntry(file=name, bytes=1, sha256="0" * 64, rows=6)})
    plans = plan_kept_shards(folder, entries, 3)
    ranges = [[(Path(part.file.path).name, part.start, part.stop) for part in plan.ranges] for plan in plans]
    assert ranges == [
        [("shard-00000.passages.arrow", 0, 4)],
        [("shard-00001.passages.arrow", 0, 3), ("shard-00002.passages.arrow", 0, 2)],
        [("shard-00002.passages.arrow", 2, 7)],
    ]
    with pytest.raises(ValueError, match="--shards 15: there are only 14 passages; use fewer shards"):
        plan_kept_shards(folder, entries, 15)
