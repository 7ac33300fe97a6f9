"""Joins the rankings of a dense and a lexical search."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from pipeline.config.sections import RetrievalConfig
from pipeline.decoding.types import Passage, RetrievedPassage
from pipeline.retrieval.encoder import Vectors
from pipeline.retrieval.filters import Conditions
from pipeline.retrieval.hits import Hit
from pipeline.retrieval.manifest import IndexManifest

# Places of each ranking that are fused, if no more passages are wanted: a passage below adds at most 1 / (60 + 100).
FUSED_PLACES = 100


class SearchableIndex(Protocol):
    """All shards of an index, in this process or in shard servers."""

    @property
    def manifest(self) -> IndexManifest:
        """Manifest of the index."""
        ...

    def rank(self, batch: "QueryBatch", depths: Sequence[int]) -> list[list[list[Hit]]]:
        """Return for each of the searches the best hits of each query, as many as its depth, best first; may block."""
        ...

    def read(self, hits: Sequence[Sequence[Hit]]) -> list[list[Passage]]:
        """Return the passages of hits; may block."""
        ...


@dataclass(frozen=True)
class QueryBatch:
    """Queries in the form in which an index searches for them.

    Attributes:
        vectors: float32 [n, dimension]; None without a dense search.
        words: words of each query, n lists; None without a lexical search.
        conditions: conditions on the passages of each query, n tuples; None if no query has any.
    """

    vectors: Vectors | None = None
    words: Sequence[Sequence[str]] | None = None
    conditions: Sequence[Conditions] | None = None

    def __len__(self) -> int:
        forms = [form for form in (self.vectors, self.words) if form is not None]
        return len(forms[0]) if forms else 0

    def select(self, retrieval: RetrievalConfig) -> "QueryBatch":
        """Return what a search needs of these queries."""
        return replace(
            self,
            vectors=self.vectors if retrieval.searches_vectors else None,
            words=self.words if retrieval.searches_words else None,
        )

    def take(self, places: Sequence[int]) -> "QueryBatch":
        """Return some of the queries, given by their places in this batch."""
        return QueryBatch(
            None if self.vectors is None else self.vectors[places],
            None if self.words is None else [self.words[place] for place in places],
            None if self.conditions is None else [self.conditions[place] for place in places],
        )

    def divide(self, size: int) -> Iterator["QueryBatch"]:
        """Yield parts of at most ``size`` queries."""
        for first in range(0, len(self), size):
            yield self.take(range(first, min(first + size, len(self))))

    def group(self, depths: Sequence[int], selective: bool) -> dict[tuple[Conditions, int], list[int]]:
        """Return the places of the queries by their conditions and the depth of their search.

        Searches of all passages can share the greatest depth: this adds hits and changes none.

        Args:
            depths: number of hits of each query.
            selective: whether searches without conditions leave out passages, too.
        """
        groups: dict[tuple[Conditions, int], list[int]] = {}
        for place, conditions in enumerate(self.conditions or [()] * len(self)):
            depth = depths[place] if conditions or selective else max(depths)
            groups.setdefault((conditions, depth), []).append(place)
        return groups


def retrieve_fused(
    index: SearchableIndex, batch: QueryBatch, wanted: Sequence[int], retrieval: RetrievalConfig
) -> list[list[RetrievedPassage]]:
    """Retrieve passages by the searches that a batch is prepared for, fused if they are two.

    Args:
        index: index to search.
        batch: the queries, n.
        wanted: number of passages of each query, n.
        retrieval: search settings.
    """
    least = FUSED_PLACES if retrieval.fusion == "rrf" else 0
    rankings = zip(*index.rank(batch, [max(k, least) for k in wanted]), strict=True)
    best = [fuse_rankings(of_query, retrieval.rrf_k)[:k] for of_query, k in zip(rankings, wanted, strict=True)]
    return [_number(hits, passages) for hits, passages in zip(best, index.read(best), strict=True)]


def _number(hits: Sequence[Hit], passages: Sequence[Passage]) -> list[RetrievedPassage]:
    """Give passages the scores of their hits, and ranks, which start at 1."""
    found = enumerate(zip(hits, passages, strict=True), start=1)
    return [RetrievedPassage(passage, hit.score, rank) for rank, (hit, passage) in found]


def fuse_rankings(rankings: Sequence[Sequence[Hit]], rrf_k: int) -> list[Hit]:
    """Fuse rankings by reciprocal ranks, unless there is only one.

    A passage scores the sum of 1 / (``rrf_k`` + its rank) over them. Equal scores are ordered by shard, then row.

    Cormack et al. 2009, https://dl.acm.org/doi/10.1145/1571941.1572114
    """
    if len(rankings) == 1:
        return list(rankings[0])
    scores: dict[tuple[int, int], float] = {}
    for ranking in rankings:
        for rank, hit in enumerate(ranking, start=1):
            scores[hit.place] = scores.get(hit.place, 0.0) + 1 / (rrf_k + rank)
    return sorted((Hit(score, *place) for place, score in scores.items()), key=lambda hit: hit.order)
