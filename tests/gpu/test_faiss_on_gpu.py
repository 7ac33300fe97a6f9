"""FAISS on the card finds what it finds on the CPU, in the same order, but for scores that rounding makes equal."""

import functools
from collections.abc import Callable
from pathlib import Path

import faiss
import numpy as np
import pytest

from pipeline.config.sections import RetrievalConfig, StorageConfig
from pipeline.retrieval.encoder import Vectors
from pipeline.retrieval.hits import Hit
from pipeline.retrieval.index import PassageIndex
from pipeline.storage.location import Location, locate
from tests.gpu.conftest import REHEARSAL
from tests.support.indexes import CPU, retrieve, save, unit_vectors

pytestmark = pytest.mark.gpu

ROWS, DIMENSION, QUERIES, K = 10_000, 64, 200, 10
# Scores that differ by less are equal: sums in another order, and half precision's 11 bits.
SINGLE, HALF = 1e-5, 2e-3


def corpus() -> Vectors:
    return unit_vectors(ROWS, seed=1, dimension=DIMENSION)


def saved(folder: Path, factory: str, shards: int, vectors: Vectors) -> Location:
    place = locate(str(folder), StorageConfig())
    save(place, np.array_split(vectors, shards), factory)
    return place


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Location]:
    """Build each index once; training product quantizers takes long."""
    folder = tmp_path_factory.mktemp("indexes")

    @functools.cache
    def build(factory: str, shards: int) -> Location:
        return saved(folder / f"{factory}-{shards}", factory, shards, corpus())

    return build


def searched(index: PassageIndex, queries: Vectors) -> list[list[Hit]]:
    return index.search(queries, K)


def assert_same_ranking(found: list[list[Hit]], expected: list[list[Hit]], tolerance: float) -> None:
    """Compare rankings; two passages may swap places where their scores are equal within the tolerance."""
    for ours, theirs in zip(found, expected, strict=True):
        assert len(ours) == len(theirs)
        np.testing.assert_allclose([hit.score for hit in ours], [hit.score for hit in theirs], atol=tolerance)
        scores = {(hit.shard, hit.row): hit.score for hit in theirs}
        last = theirs[-1].score
        for our, their in zip(ours, theirs, strict=True):
            if (our.shard, our.row) != (their.shard, their.row):
                assert abs(scores.get((our.shard, our.row), last) - their.score) <= 2 * tolerance


@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("float16", [False, True])
@pytest.mark.parametrize("factory", ["Flat", "IVF64,Flat", "IVF64,SQ8", "IVF64,PQ16"])
def test_gpu_search_ranks_like_cpu_search(
    factory: str, float16: bool, shards: int, on_gpu: RetrievalConfig, built: Callable[[str, int], Location]
) -> None:
    search = {"search": "nprobe=16"} if factory.startswith("IVF") else {}
    place = built(factory, shards)
    queries = unit_vectors(QUERIES, seed=2, dimension=DIMENSION)
    index = PassageIndex.open(place, on_gpu.model_copy(update={**search, "float16": float16}))
    expected = searched(PassageIndex.open(place, CPU.model_copy(update=search)), queries)
    assert_same_ranking(searched(index, queries), expected, HALF if float16 else SINGLE)
    if not REHEARSAL:
        kinds = {type(faiss.downcast_index(shard.index)).__name__ for shard in index.shards.values()}
        assert all(kind.startswith("Gpu") for kind in kinds), kinds


@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("factory", ["Flat", "IVF8,Flat"])
def test_ties_are_in_passage_order(factory: str, shards: int, on_gpu: RetrievalConfig, tmp_path: Path) -> None:
    """Every vector is there three times: each score is contested, at the last place too."""
    vectors = np.tile(unit_vectors(300, seed=3, dimension=DIMENSION), (3, 1))
    search = {"search": "nprobe=8"} if factory.startswith("IVF") else {}
    place = saved(tmp_path, factory, shards, vectors)
    queries = vectors[:50]
    found = retrieve(PassageIndex.open(place, on_gpu.model_copy(update=search)), queries, K)
    expected = retrieve(PassageIndex.open(place, CPU.model_copy(update=search)), queries, K)
    assert [[hit.passage.id for hit in hits] for hits in found] == [[hit.passage.id for hit in h] for h in expected]


@pytest.mark.usefixtures("real_card")
def test_index_that_does_not_fit_beside_the_engine_is_searched_on_the_cpu(
    on_gpu: RetrievalConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = saved(tmp_path, "Flat", 1, corpus())
    with pytest.raises(ValueError, match=r"the index needs 0.5 GB on the GPU, but 0.0 GB are left: .* takes 0.999"):
        PassageIndex.open(place, on_gpu, engine_share=0.999)
    index = PassageIndex.open(place, RetrievalConfig(), engine_share=0.999)
    assert type(faiss.downcast_index(index.shards[0].index)) is faiss.IndexFlatIP
    assert "the index is searched on the CPU" in caplog.text
