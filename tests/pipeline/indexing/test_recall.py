import faiss
import numpy as np
import pytest

from pipeline.decoding.types import Passage
from pipeline.indexing.recall import (
    compute_recall,
    drop_own_passages,
    is_lossy,
    list_parameters,
    measure_search,
    rerank,
    sample_vectors,
    search_exhaustively,
)
from pipeline.retrieval.hits import Hit
from pipeline.retrieval.index import PassageIndex
from pipeline.storage.location import Location
from tests.support.indexes import CPU, save, unit_vectors

VECTORS = unit_vectors(600, seed=3)
QUERIES = unit_vectors(40, seed=4)


def opened(folder: Location, factory: str) -> PassageIndex:
    save(folder, [VECTORS[:200], VECTORS[200:230], VECTORS[230:]], factory)
    return PassageIndex.open(folder, CPU)


def exact(k: int) -> list[list[int]]:
    return np.argsort(-(QUERIES @ VECTORS.T), axis=1)[:, :k].tolist()


def rows(hits: list[list[Hit]]) -> list[list[int]]:
    starts = [0, 200, 230]
    return [[starts[hit.shard] + hit.row for hit in found] for found in hits]


EXACT = ["Flat", "IVF16,Flat", "IVF16_HNSW8,Flat", "HNSW8", "IVF16,SQ4,RFlat", "HNSW8,RFlat"]


@pytest.mark.parametrize("factory", EXACT)
def test_exhaustive_search_sees_every_vector(folder: Location, factory: str) -> None:
    index = opened(folder, factory)
    before = index.search(QUERIES, 5)
    assert rows(search_exhaustively(index, QUERIES, 5)) == exact(5)
    assert index.search(QUERIES, 5) == before


@pytest.mark.parametrize("factory", ["PCA12,HNSW8", "OPQ4,IVF16,PQ4x4", "IVF16,SQ8"])
def test_exhaustive_search_scores_the_decoded_vectors(folder: Location, factory: str) -> None:
    index = opened(folder, factory)
    stored = np.concatenate([shard.index.reconstruct_n(0, len(shard.passages)) for shard in index.shards.values()])
    wanted = np.argsort(-(QUERIES @ stored.T), axis=1)[:, :5]
    scores = [[hit.score for hit in hits] for hits in search_exhaustively(index, QUERIES, 5)]
    np.testing.assert_allclose(scores, np.take_along_axis(QUERIES @ stored.T, wanted, 1), atol=1e-5)


def test_exhaustive_search_reads_vectors_in_blocks(folder: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.indexing.recall.BLOCK", 70)
    assert rows(search_exhaustively(opened(folder, "Flat"), QUERIES, 5)) == exact(5)


@pytest.mark.parametrize(
    ("factory", "expected"),
    [
        ("Flat", False),
        ("IVF16,Flat", False),
        ("HNSW8", False),
        ("IVF16,SQ8,RFlat", False),
        ("SQ8", True),
        ("IVF16,SQ8", True),
        ("PCA8,Flat", True),
        ("PQ4x4", True),
    ],
)
def test_lossy_indexes_are_detected(folder: Location, factory: str, expected: bool) -> None:
    assert is_lossy(opened(folder, factory)) is expected


@pytest.mark.parametrize(
    ("factory", "expected"),
    [
        ("Flat", [""]),
        ("IVF16,SQ8", ["nprobe=1", "nprobe=2", "nprobe=4", "nprobe=8", "nprobe=16"]),
        ("PCA8,IVF10,Flat", ["nprobe=1", "nprobe=2", "nprobe=4", "nprobe=8", "nprobe=10"]),
        ("IVF3,SQ8,RFlat", ["nprobe=1", "nprobe=2", "nprobe=3"]),
        ("HNSW8,RFlat", [f"efSearch={width}" for width in (16, 32, 64, 128, 256, 512, 1024)]),
        ("HNSW8", [f"efSearch={width}" for width in (16, 32, 64, 128, 256, 512, 1024)]),
    ],
)
def test_swept_parameters_depend_on_the_index_type(folder: Location, factory: str, expected: list[str]) -> None:
    assert list_parameters(opened(folder, factory)) == expected


@pytest.mark.parametrize("factory", ["Flat", "IVF16,Flat", "HNSW8"])
def test_sampled_vectors_match_their_rows(folder: Location, factory: str) -> None:
    vectors, places = sample_vectors(opened(folder, factory), 7)
    (numbers,) = rows([places])
    assert (numbers[0], numbers[-1], len(set(numbers))) == (0, 599, 7)
    np.testing.assert_allclose(vectors, VECTORS[numbers], atol=1e-6)


def hits(*places: tuple[int, int]) -> list[Hit]:
    return [Hit(0.0, shard, row) for shard, row in places]


def test_recall_is_the_share_of_exact_hits_found() -> None:
    wanted = [hits((0, 1), (0, 2)), hits((1, 1), (1, 2))]
    assert compute_recall(wanted, wanted) == 1.0
    assert compute_recall([hits((0, 2), (1, 1)), hits((1, 2), (1, 1))], wanted) == 0.75
    assert compute_recall([[], []], wanted) == 0.0


def test_passages_are_excluded_from_their_own_hits() -> None:
    found = [hits((0, 1), (0, 2), (0, 3)), hits((0, 1), (0, 2), (0, 3))]
    assert drop_own_passages(found, [Hit(9.0, 0, 2), None], 2) == [hits((0, 1), (0, 3)), hits((0, 1), (0, 2))]


def test_candidates_are_reranked_by_exact_vectors() -> None:
    def encode(passages: list[Passage]) -> np.ndarray:
        return np.array([[float(passage.id), 0.0] for passage in passages], np.float32)

    candidates = [hits((0, 3), (1, 8), (0, 5))]
    query = np.array([[1.0, 0.0]], np.float32)
    best = rerank(candidates, query, 2, lambda hit: Passage(str(hit.row), "", ""), encode)
    assert best == [hits((1, 8), (0, 5))]


@pytest.fixture
def probes(folder: Location) -> PassageIndex:
    return opened(folder, "IVF16,Flat")


def test_recall_grows_to_one_with_the_number_of_probed_lists(probes: PassageIndex) -> None:
    wanted = search_exhaustively(probes, QUERIES, 5)
    none: list[None] = [None] * len(QUERIES)
    recalls = [measure_search(probes, QUERIES, none, wanted, search) for search in list_parameters(probes)]
    found = [speed.recall for speed in recalls]
    assert found == sorted(found)
    assert 0.05 < found[0] < 0.9
    assert found[-1] == 1.0
    assert all(speed.queries_per_s > 0 and 0 < speed.median_ms <= speed.p95_ms for speed in recalls)
    one = faiss.IndexFlatIP(16)
    one.add(VECTORS)
    assert rows(wanted) == one.search(QUERIES, 5)[1].tolist()
