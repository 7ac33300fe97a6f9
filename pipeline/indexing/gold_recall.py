"""Measure how often a search finds the gold passages of queries, without and with the reranker."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.decoding.passage_ids import is_passage_or_part
from pipeline.decoding.types import RetrievedPassage
from pipeline.indexing.recall import BATCH
from pipeline.retrieval.encoder import Vectors
from pipeline.retrieval.index import PassageIndex
from pipeline.retrieval.reranker import Reranker

# Cut-offs k of recall@k, besides the number of passages that is retrieved.
CUTOFFS = (1, 3, 5, 10)


@dataclass(frozen=True)
class GoldRecall:
    """The gold passages that a way to search finds.

    Attributes:
        way: name of the way to search.
        recall: recall@k by k: the share of the queries whose gold passage is among the first k.
        query_ms: milliseconds for a query, in batches, without encoding it.
    """

    way: str
    recall: dict[int, float]
    query_ms: float


def measure_gold_recall(
    index: PassageIndex,
    vectors: Vectors,
    texts: Sequence[str],
    golds: Sequence[str],
    k: int,
    reranker: Reranker | None,
) -> tuple[GoldRecall, ...]:
    """Search for queries with gold passages, and rerank what is found if there is a reranker.

    Args:
        index: index to search, with its search parameters set.
        vectors: query vectors, float32 [n, dimension].
        texts: the queries, n.
        golds: ids of their gold passages, n.
        k: passages retrieved for each query.
        reranker: reranker, whose candidates are searched if they are more than k.
    """
    cutoffs = sorted({*(cutoff for cutoff in CUTOFFS if cutoff < k), k})
    began = time.perf_counter()
    found = _search(index, vectors, k)
    searched = _build_figures("search", found, golds, cutoffs, time.perf_counter() - began)
    if reranker is None:
        return (searched,)
    wanted = max(k, reranker.candidates)
    began = time.perf_counter()
    found = _search(index, vectors, wanted)
    ordered: list[list[RetrievedPassage]] = []
    for first in range(0, len(texts), reranker.queries_per_call):
        part = slice(first, first + reranker.queries_per_call)
        ordered += reranker.rerank(list(zip(texts[part], found[part], strict=True)))
    way = f"the best {wanted}, reranked ({reranker.device})"
    return searched, _build_figures(way, ordered, golds, cutoffs, time.perf_counter() - began)


def _search(index: PassageIndex, vectors: Vectors, k: int) -> list[list[RetrievedPassage]]:
    found: list[list[RetrievedPassage]] = []
    for first in range(0, len(vectors), BATCH):
        found += index.retrieve(vectors[first : first + BATCH], k)
    return found


def _build_figures(
    way: str, found: Sequence[Sequence[RetrievedPassage]], golds: Sequence[str], cutoffs: Sequence[int], seconds: float
) -> GoldRecall:
    ranks = [find_gold_rank(passages, gold) for passages, gold in zip(found, golds, strict=True)]
    recall = {cutoff: float(np.mean([rank is not None and rank <= cutoff for rank in ranks])) for cutoff in cutoffs}
    return GoldRecall(way, recall, 1000 * seconds / len(found))


def find_gold_rank(passages: Sequence[RetrievedPassage], gold: str) -> int | None:
    """Return the rank of the gold passage or of the first of its parts; None if it was not found."""
    ranks = (found.rank for found in passages if is_passage_or_part(found.passage.id, gold))
    return next(ranks, None)
