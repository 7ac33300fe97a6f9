from collections.abc import Sequence

import numpy as np
import pytest

from pipeline.config.sections import RetrievalConfig
from pipeline.decoding.types import Passage
from pipeline.retrieval.fusion import QueryBatch, fuse_rankings, retrieve_fused
from pipeline.retrieval.hits import Hit


def rank(*names: str) -> list[Hit]:
    """Hits named by shard and row, such as ``01``, best first."""
    return [Hit(1.0, *map(int, name)) for name in names]


def name_passages(hits: Sequence[Hit]) -> list[str]:
    return [f"{hit.shard}{hit.row}" for hit in hits]


def test_reciprocal_ranks_by_hand() -> None:
    fused = fuse_rankings([rank("00", "01", "02"), rank("01", "10")], rrf_k=60)
    assert name_passages(fused) == ["01", "00", "10", "02"]
    assert [hit.score for hit in fused] == pytest.approx([1 / 62 + 1 / 61, 1 / 61, 1 / 62, 1 / 63])


def test_ties_are_in_the_order_of_the_passages() -> None:
    fused = fuse_rankings([rank("10", "02"), rank("01", "00")], rrf_k=60)
    assert name_passages(fused) == ["01", "10", "00", "02"]


def test_single_ranking_keeps_its_scores() -> None:
    found = rank("10", "02")
    assert fuse_rankings([found], rrf_k=60) == found


class Recording:
    def __init__(self) -> None:
        self.depths: list[list[int]] = []

    def read(self, hits: Sequence[Sequence[Hit]]) -> list[list[Passage]]:
        return [[Passage(name, "", "") for name in name_passages(of_query)] for of_query in hits]

    def rank(self, batch: QueryBatch, depths: Sequence[int]) -> list[list[list[Hit]]]:
        self.depths.append(list(depths))
        searches = [rank("00", "01"), rank("01", "02")]
        forms = [batch.vectors is not None, batch.words is not None]
        return [[found] * len(batch) for found, wanted in zip(searches, forms, strict=True) if wanted]


@pytest.mark.parametrize(
    ("fusion", "ids", "depth"), [("dense", ["00", "01"], 2), ("lexical", ["01", "02"], 2), ("rrf", ["01", "00"], 100)]
)
def test_each_query_gets_what_it_wants(fusion: str, ids: list[str], depth: int) -> None:
    retrieval = RetrievalConfig.model_validate({"fusion": fusion})
    batch = QueryBatch(np.zeros((2, 4), np.float32), [["a"], ["b"]]).select(retrieval)
    index = Recording()
    found = retrieve_fused(index, batch, [2, 1], retrieval)  # type: ignore[arg-type]
    assert [[one.passage.id for one in passages] for passages in found] == [ids, ids[:1]]
    assert [one.rank for one in found[0]] == [1, 2]
    assert index.depths == [[depth, depth if fusion == "rrf" else 1]]


def test_batches_are_divided() -> None:
    whole = QueryBatch(np.arange(6, dtype=np.float32).reshape(3, 2), [["a"], ["b"], ["c"]])
    parts = list(whole.divide(2))
    assert [len(part) for part in parts] == [2, 1]
    assert [part.words for part in parts] == [[["a"], ["b"]], [["c"]]]
    assert len(QueryBatch()) == 0
    assert len(QueryBatch(words=[["a"]])) == 1
