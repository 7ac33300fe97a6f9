import faiss
import numpy as np
import pytest

from pipeline.shards import empty_index
from pipeline.sizing import index_size, size_plan, usual_lists

VECTORS = np.random.default_rng(0).normal(size=(3000, 64)).astype(np.float32)


@pytest.mark.parametrize(
    "factory",
    ["Flat", "SQ8", "SQfp16", "PQ16x4", "IVF16,Flat", "IVF16,SQ8", "IVF16,PQ16x4", "OPQ16,IVF16,PQ16x4", "HNSW32"],
)
def test_sizes_are_those_of_real_indexes(factory: str) -> None:
    index = empty_index(factory, 64)
    index.train(VECTORS)
    index.add(VECTORS)
    real = len(faiss.serialize_index(index))
    assert index_size(factory, 64).total(len(VECTORS)) == pytest.approx(real, rel=0.02)


def test_bytes_per_vector_by_hand() -> None:
    assert index_size("Flat", 768).per_vector == 768 * 4
    assert index_size("IVF4096,PQ64", 768).per_vector == 64 + 8
    assert index_size("IVF4096,PQ64", 768).fixed == 4096 * 768 * 4 + 256 * 768 * 4
    # Level 0 has 64 links; one vector in 32 has 32 more on level 1, and so on: 64 + 32 / 31.
    assert index_size("HNSW32", 768).per_vector == pytest.approx(768 * 4 + 4 * (64 + 32 / 31) + 12, rel=1e-3)


def test_plan_counts_centroids_once_for_each_shard() -> None:
    (line,) = size_plan(1_000_000, 384, 4, ["IVF{lists},SQ8"])
    assert line.factory == "IVF2048,SQ8"  # 4 √250,000 = 2,000
    assert line.index == 1_000_000 * (384 + 8) + 4 * 2048 * 384 * 4
    assert line.largest_shard == 250_000 * (384 + 8) + 2048 * 384 * 4


@pytest.mark.parametrize(("passages", "lists"), [(1, 16), (1_000_000, 4096), (21_000_000, 16384)])
def test_usual_lists_are_a_power_of_two(passages: int, lists: int) -> None:
    assert usual_lists(passages) == lists


def test_unknown_kinds_are_refused() -> None:
    with pytest.raises(ValueError, match="the size of a IndexNSG"):
        index_size("NSG32", 64)


def test_usual_factories_that_do_not_fit_the_dimension_are_left_out() -> None:
    assert [line.factory for line in size_plan(1000, 100, 1)][-1] == "IVF128,SQ8"  # 100 is no multiple of 64
    with pytest.raises(ValueError, match="factory PQ64"):
        size_plan(1000, 100, 1, ["PQ64"])
