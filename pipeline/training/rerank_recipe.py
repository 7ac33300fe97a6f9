"""Defines the hyperparameters of a reranker's training; apart from it, so that importing them is fast."""

from dataclasses import dataclass


@dataclass(frozen=True)
class RerankRecipe:
    """The hyperparameters; the defaults are those of the embedded reranker.

    Attributes:
        questions: number of questions to train on.
        passages: passages of each question, one of which answers it.
        batch_questions: questions of an optimizer step.
        words: words that a passage is cut to; short passages cost less, and whole ones can be ranked all the same.
        rank: LoRA rank of the adapter; alpha is twice the rank.
        learning_rate: peak learning rate, after a warm-up over 5 % of the steps and before a cosine decay.
        seed: seed of all random numbers.
    """

    questions: int = 3_000
    passages: int = 4
    batch_questions: int = 8
    words: int = 70
    rank: int = 32
    learning_rate: float = 1e-3
    seed: int = 0
