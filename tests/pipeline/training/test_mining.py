from typing import Any

import numpy as np
import pytest

from pipeline.training import mining
from pipeline.training.data import Pair, ReadingTriple, TeachingData
from pipeline.training.mining import find_nearest, mine_negatives

VECTORS = {"east": (1.0, 0.0), "north": (0.0, 1.0), "north-east": (0.6, 0.8), "west": (-1.0, 0.0)}


def encode(texts: Any) -> Any:
    return np.array([VECTORS[text.strip()] for text in texts], np.float32)


@pytest.mark.parametrize("block", [1, 2, 1_024])
def test_nearest_texts_are_ranked_by_inner_product(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mining, "BLOCK", block)
    texts = ["west", "north", "north-east", "east"]
    assert find_nearest(encode, ["north", "east"], texts, k=2).tolist() == [[1, 2], [3, 2]]
    assert find_nearest(encode, ["east"], texts, k=9).tolist() == [[3, 2, 1, 0]]


def test_negatives_are_the_nearest_passages_and_sentences() -> None:
    readings = tuple(ReadingTriple("north", "", passage, passage) for passage in ("east", "north", "north-east"))
    data = TeachingData(readings, pairs=(Pair("west", "west"), Pair("east", "north")))
    negatives = mine_negatives(encode, data, data, k=2)
    assert negatives.everywhere == [("", "east"), ("", "north"), ("", "north-east")]
    assert negatives.by_question == {
        "north": [("", "north"), ("", "north-east")],
        "west": [("", "west"), ("", "north")],
        "east": [("", "north"), ("", "west")],
    }
