from typing import Any

import numpy as np
import pytest
import torch

from pipeline.config.sections import RerankConfig
from pipeline.indexing.gold_recall import GoldQueries, find_gold_rank, measure_gold_recall
from pipeline.retrieval.fusion import QueryBatch
from pipeline.retrieval.index import PassageIndex
from pipeline.retrieval.reranker import Reranker, RerankerEntry
from pipeline.storage.location import Location
from tests.support.indexes import CPU, save, unit_vectors
from tests.support.rerankers import find


def test_rank_of_the_gold_passage_is_that_of_its_best_part() -> None:
    found = [find("a", "", 1), find("b#2", "", 2), find("b#1", "", 3), find("c", "", 4)]
    assert [find_gold_rank(found, gold) for gold in ("a", "b", "c", "d", "b#1")] == [1, 2, 4, None, 3]


class ByNumber:
    """Scores the passage highest whose number the query is."""

    device = torch.device("cpu")

    def predict(self, pairs: list[tuple[str, str]], **_: Any) -> list[float]:
        return [float(text.endswith(f" {query}")) for query, text in pairs]


def test_recall_is_measured_before_and_after_reranking(folder: Location) -> None:
    vectors = unit_vectors(40)
    save(folder, [vectors[:25], vectors[25:]])
    index = PassageIndex.open(folder, CPU)
    # The vector of query n is that of passage n for the first half; for the others the gold passage is the runner-up.
    runners_up = [hits[1].row + 25 * hits[1].shard for hits in index.search(vectors[:20], 2)]
    golds = [str(n) for n in range(10)] + [str(n) for n in runners_up[10:]]
    config = RerankConfig(candidates=4, batch_size=3)
    reranker = Reranker(ByNumber(), RerankerEntry("by number", None, "d" * 64), config)
    queries = GoldQueries(golds, golds, QueryBatch(vectors[:20]))
    searched, reranked = measure_gold_recall(index, queries, 2, CPU, reranker)
    assert (searched.way, searched.recall) == ("dense", {1: 0.5, 2: 1.0})
    assert (reranked.way, reranked.recall) == ("dense, the best 4 reranked (cpu)", {1: 1.0, 2: 1.0})
    assert min(searched.query_ms, reranked.query_ms) > 0
    (alone,) = measure_gold_recall(index, queries, 12, CPU, None)
    assert list(alone.recall) == [1, 3, 5, 10, 12]
    assert np.mean(list(alone.recall.values())) == pytest.approx((0.5 + 4) / 5)
