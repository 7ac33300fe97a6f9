"""Finds hard negatives: passages that a retriever ranks high for a question."""

import logging
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from pipeline.training.data import TeachingData
from pipeline.training.rows import Negatives

log = logging.getLogger(__name__)

Encode = Callable[[Sequence[str]], npt.NDArray[np.float32]]

# Questions compared at a time, which bounds the memory: 4 bytes for each of them and each passage.
BLOCK = 1_024


def mine_negatives(encode: Encode, data: TeachingData, pool: TeachingData, k: int = 10) -> Negatives:
    """Mine hard negatives: the k passages of the pool, or sentences of the pairs, that rank highest for a question."""
    passages = sorted({(row.title, row.passage) for row in pool.readings})
    questions = sorted({row.question for row in data.readings})
    log.info("mining hard negatives for %d questions among %d passages", len(questions), len(passages))
    ranked = find_nearest(encode, questions, [f"{title}\n{text}" for title, text in passages], k)
    by_question = {}
    for question, row in zip(questions, ranked, strict=True):
        by_question[question] = [passages[i] for i in row]
    if data.pairs:
        sentences = sorted({row.sentence for row in data.pairs})
        asked = sorted({row.question for row in data.pairs})
        for question, row in zip(asked, find_nearest(encode, asked, sentences, k), strict=True):
            by_question.setdefault(question, []).extend(("", sentences[i]) for i in row)
    return Negatives(by_question, passages)


def find_nearest(encode: Encode, questions: Sequence[str], texts: Sequence[str], k: int) -> npt.NDArray[np.int64]:
    """Return the indices of the k texts most similar to each question: int64 [questions, k], best first.

    With fewer than k texts, all are returned.

    Args:
        encode: encoder of texts; similarity is the inner product of the vectors.
        questions: questions to search with.
        texts: texts to search in.
        k: number of texts for each question.
    """
    vectors = encode(texts).T
    asked = encode(questions)
    k = min(k, len(texts))
    nearest = []
    for start in range(0, len(questions), BLOCK):
        similarity = asked[start : start + BLOCK] @ vectors
        top = np.argpartition(-similarity, k - 1, axis=1)[:, :k]
        order = np.argsort(-np.take_along_axis(similarity, top, axis=1), axis=1)
        nearest.append(np.take_along_axis(top, order, axis=1))
    return np.concatenate(nearest).astype(np.int64)
