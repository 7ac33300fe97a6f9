"""Measure how often a search finds the gold passages of queries, without and with the reranker."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.config.sections import RetrievalConfig
from pipeline.decoding.passage_ids import is_passage_or_part
from pipeline.decoding.types import RetrievedPassage
from pipeline.indexing.recall import BATCH
from pipeline.retrieval.fusion import QueryBatch, retrieve_fused
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


@dataclass(frozen=True)
class GoldQueries:
    """Queries with gold passages.

    Attributes:
        texts: the queries, n.
        golds: ids of their gold passages, n.
        batch: the queries as they are searched for: by vectors, and by words if the index has a lexical part.
    """

    texts: Sequence[str]
    golds: Sequence[str]
    batch: QueryBatch

    def list_ways(self) -> list[str]:
        """List the ways to search for them, as in ``retrieval.fusion``."""
        return ["dense"] if self.batch.words is None else ["dense", "lexical", "rrf"]


def measure_gold_recall(
    index: PassageIndex, queries: GoldQueries, k: int, retrieval: RetrievalConfig, reranker: Reranker | None
) -> tuple[GoldRecall, ...]:
    """Search for queries in each way that the index allows, and rerank what the configured way finds.

    Args:
        index: index to search, with its search parameters set.
        queries: queries with gold passages.
        k: passages retrieved for each query.
        retrieval: search settings.
        reranker: reranker, whose candidates are searched if they are more than k; None if there is none.
    """
    cutoffs = sorted({*(cutoff for cutoff in CUTOFFS if cutoff < k), k})
    figures = []
    for way in queries.list_ways():
        began = time.perf_counter()
        found = _search(index, queries.batch, k, retrieval.model_copy(update={"fusion": way}))
        figures.append(_build_figures(way, found, queries.golds, cutoffs, time.perf_counter() - began))
    if reranker is None:
        return tuple(figures)
    wanted = max(k, reranker.candidates)
    began = time.perf_counter()
    found = _search(index, queries.batch, wanted, retrieval)
    ordered: list[list[RetrievedPassage]] = []
    for first in range(0, len(found), reranker.queries_per_call):
        part = slice(first, first + reranker.queries_per_call)
        ordered += reranker.rerank(list(zip(queries.texts[part], found[part], strict=True)))
    way = f"{retrieval.fusion}, the best {wanted} reranked ({reranker.device})"
    return *figures, _build_figures(way, ordered, queries.golds, cutoffs, time.perf_counter() - began)


def _search(
    index: PassageIndex, queries: QueryBatch, k: int, retrieval: RetrievalConfig
) -> list[list[RetrievedPassage]]:
    found: list[list[RetrievedPassage]] = []
    for batch in queries.divide(BATCH):
        found += retrieve_fused(index, batch.select(retrieval), [k] * len(batch), retrieval)
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
