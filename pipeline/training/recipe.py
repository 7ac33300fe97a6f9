"""Defines the hyperparameters of the training and their schedules.

Separate from the training itself, so that importing it is fast.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """The hyperparameters of a training run.

    Attributes:
        tokens: total number of training tokens; the learning rate decays over them.
        minutes: time limit; the learning rate decays over it if it is reached before ``tokens``.
        tokens_per_step: minimum tokens of an optimizer step.
        rank: LoRA rank of the adapter; alpha is twice the rank.
        frozen_layers: number of lowest layers without adapter; gradients are not propagated into them. With a third of
            the layers frozen, a step is about a third cheaper.
        learning_rate: peak learning rate, reached after a warm-up over the first 3 % of the training.
        first_words: longest passage window at the start, in words.
        last_words: longest passage window from two thirds of the training on, in words.
        checkpoint_minutes: training minutes between checkpoints, each with an evaluation on held-out trees.
        seed: seed of all random numbers.
    """

    tokens: int = 1_000_000
    minutes: float = math.inf
    tokens_per_step: int = 1_400
    rank: int = 16
    frozen_layers: int = 10
    learning_rate: float = 5e-4
    first_words: int = 70
    last_words: int = 180
    checkpoint_minutes: float = 15.0
    seed: int = 0

    def compute_rate(self, done: float) -> float:
        """Return the learning rate at the share ``done`` of the training: linear warm-up, cosine decay to a tenth."""
        if done < 0.03:
            return self.learning_rate * max(done, 1e-3) / 0.03
        return self.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, done))))

    def compute_longest_window(self, done: float) -> int:
        """Return the longest passage window, in words; at the start, short windows teach more in the same time."""
        return round(self.first_words + (self.last_words - self.first_words) * min(1.0, 1.5 * done))
