"""Measure recall@k, latency and throughput of an index for each search parameter."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np

from pipeline.decoding.types import Passage
from pipeline.retrieval.encoder import Vectors
from pipeline.retrieval.hits import Hit
from pipeline.retrieval.index import PassageIndex
from pipeline.retrieval.shard_files import extract_faiss_message

# Candidates per result that are reranked with exact vectors if the index stores codes.
CANDIDATES = 10
# Stored vectors that are reconstructed and compared at a time.
BLOCK = 1 << 16
# Queries searched one by one for the latency, and batch size for the throughput.
SINGLE_QUERIES, BATCH = 50, 64


@dataclass(frozen=True)
class Speed:
    """The measurement of a search parameter.

    Attributes:
        search: search parameters in the form of ``retrieval.search``; empty if the index has none.
        recall: recall@k, the share of the exact top k that is found.
        median_ms: median latency of queries searched one by one, in milliseconds.
        p95_ms: 95th percentile of the latency of queries searched one by one, in milliseconds.
        queries_per_s: throughput in batches of 64 queries.
    """

    search: str
    recall: float
    median_ms: float
    p95_ms: float
    queries_per_s: float


def sample_vectors(index: PassageIndex, size: int) -> tuple[Vectors, list[Hit]]:
    """Reconstruct evenly spaced vectors of an index, without removed ones.

    Returns:
        Vectors, float32 [size or fewer, dimension], and the shard and row of each, as hits with score 0.
    """
    kept = [(number, index.shards[number].list_rows()) for number in sorted(index.shards)]
    ends = np.cumsum([len(rows) for _, rows in kept])
    chosen = np.unique(np.linspace(0, ends[-1] - 1, min(size, int(ends[-1]))).astype(np.int64))
    vectors, places = [], []
    for place in chosen.tolist():
        position = int(np.searchsorted(ends, place, side="right"))
        number, rows = kept[position]
        row = int(rows[place - (int(ends[position]) - len(rows))])
        vectors.append(index.shards[number].index.reconstruct_n(row, 1))
        places.append(Hit(0.0, number, row))
    return np.concatenate(vectors), places


def list_parameters(index: PassageIndex) -> list[str]:
    """List the search parameters to measure, fastest first.

    Inverted lists get ``nprobe`` in powers of two up to all lists, at most 1,024; HNSW graphs get ``efSearch`` in
    powers of two from 16 to 1,024; other indexes get an empty string.
    """
    kind = _unwrap(next(iter(index.shards.values())).index)
    if isinstance(kind, faiss.IndexIVF):
        lists = int(kind.nlist)
        steps = {2**n for n in range(11) if 2**n < lists}
        steps.add(min(lists, 1024))
        return [f"nprobe={step}" for step in sorted(steps)]
    if isinstance(kind, faiss.IndexHNSW):
        return [f"efSearch={2**n}" for n in range(4, 11)]
    return [""]


def _unwrap(index: Any) -> Any:
    """Unwrap transformations and refinements down to the index that has the inverted lists or graph links."""
    kind = faiss.downcast_index(index)
    if isinstance(kind, faiss.IndexPreTransform):
        return _unwrap(kind.index)
    if isinstance(kind, faiss.IndexRefine):
        return _unwrap(kind.base_index)
    return kind


def is_lossy(index: PassageIndex) -> bool:
    """Whether the index stores codes instead of vectors: any quantizer, and any index behind a transformation."""
    kind = faiss.downcast_index(next(iter(index.shards.values())).index)
    return not isinstance(kind, faiss.IndexFlat | faiss.IndexIVFFlat | faiss.IndexHNSWFlat | faiss.IndexRefineFlat)


def search_exhaustively(index: PassageIndex, queries: Vectors, k: int) -> list[list[Hit]]:
    """Return the exact top k of each query over all vectors as stored, whatever the search parameters.

    Raises:
        ValueError: FAISS cannot reconstruct the vectors of this kind of index.
    """
    faiss.omp_set_num_threads(index.threads)
    found: list[list[Hit]] = [[] for _ in queries]
    for number, shard in index.shards.items():
        for first in range(0, len(shard.passages), BLOCK):
            size = min(BLOCK, len(shard.passages) - first)
            try:
                block = shard.index.reconstruct_n(first, size)
            except RuntimeError as error:
                raise ValueError(
                    f"the index's vectors cannot be reconstructed: {extract_faiss_message(error)}"
                ) from None
            kept = shard.list_rows(first, first + size)
            scores, places = faiss.knn(
                queries, block[kept - first], min(k, len(kept)), metric=faiss.METRIC_INNER_PRODUCT
            )
            for n in range(len(queries)):
                hits = [Hit(float(s), number, int(kept[p])) for s, p in zip(scores[n], places[n], strict=True)]
                found[n] = sorted([*found[n], *hits], key=lambda hit: hit.order)[:k]
    return found


def rerank(
    candidates: Sequence[list[Hit]],
    queries: Vectors,
    k: int,
    passages: Callable[[Hit], Passage],
    encode: Callable[[list[Passage]], Vectors],
) -> list[list[Hit]]:
    """Return the top k of each query's candidates by the exact vectors of their passages."""
    best = []
    for query, hits in zip(queries, candidates, strict=True):
        scores = encode([passages(hit) for hit in hits]) @ query
        order = np.argsort(-scores, kind="stable")[:k]
        best.append([hits[n] for n in order])
    return best


def compute_recall(found: Sequence[list[Hit]], exact: Sequence[list[Hit]]) -> float:
    """Return the share of the exact hits that were found, over all queries."""
    hits = wanted = 0
    for returned, best in zip(found, exact, strict=True):
        places = {hit.place for hit in best}
        hits += len(places & {hit.place for hit in returned})
        wanted += len(places)
    return hits / wanted


def drop_own_passages(found: Sequence[list[Hit]], own: Sequence[Hit | None], k: int) -> list[list[Hit]]:
    """Return the first k hits of each query, leaving out the query's own passage."""
    kept = []
    for hits, passage in zip(found, own, strict=True):
        others = [hit for hit in hits if passage is None or hit.place != passage.place]
        kept.append(others[:k])
    return kept


def measure_search(
    index: PassageIndex, queries: Vectors, own: Sequence[Hit | None], exact: Sequence[list[Hit]], search: str
) -> Speed:
    """Measure recall, latency and throughput with a search parameter.

    Args:
        index: index to search; keeps the search parameter.
        queries: query vectors, float32 [n, dimension].
        own: passage from which each query was made, which is left out of the results; None for other queries.
        exact: reference hits, k for each query.
        search: search parameters in the form of ``retrieval.search``; empty keeps the current ones.
    """
    if search:
        for shard in index.shards.values():
            shard.tune(search)
    k = max(map(len, exact))
    asked = k + any(passage is not None for passage in own)
    index.search(queries[:1], asked)  # warm-up: the first search starts the OpenMP threads
    single = []
    for query in queries[:SINGLE_QUERIES]:
        begun = time.perf_counter()
        index.search(query[None], asked)
        single.append(1000 * (time.perf_counter() - begun))
    found: list[list[Hit]] = []
    begun = time.perf_counter()
    for first in range(0, len(queries), BATCH):
        found += index.search(queries[first : first + BATCH], asked)
    rate = len(queries) / (time.perf_counter() - begun)
    median, p95 = np.percentile(single, [50, 95])
    return Speed(search, compute_recall(drop_own_passages(found, own, k), exact), float(median), float(p95), rate)
