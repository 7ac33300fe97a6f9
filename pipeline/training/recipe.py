"""How a model is taught: sizes, rates and lengths. Apart from the training itself, so that reading it is quick."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """How to train.

    Attributes:
        tokens: tokens to read in all; the learning rate decays over them.
        minutes: time limit; the learning rate decays over it where it is nearer than the end of the tokens.
        tokens_per_step: tokens between optimiser steps.
        rank: of the adapter; alpha is twice that.
        frozen_layers: lowest layers left as they are; nothing is propagated back into them, which makes
            a step about a third cheaper when a third is frozen.
        learning_rate: peak, after a warm-up over the first 3 % of the tokens.
        first_words, last_words: longest passage window at the start and from two thirds of the training on.
        checkpoint_minutes: between two saves and held-out measurements.
        seed: of everything random.
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

    def rate(self, done: float) -> float:
        """Learning rate when the share ``done`` of the training is over: linear warm-up, cosine decay to a tenth."""
        if done < 0.03:
            return self.learning_rate * max(done, 1e-3) / 0.03
        return self.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, done))))

    def longest_window(self, done: float) -> int:
        """Longest passage window, in words: short ones first teach more for the same time."""
        return round(self.first_words + (self.last_words - self.first_words) * min(1.0, 1.5 * done))
