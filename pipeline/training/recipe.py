"""Defines the hyperparameters of the training and their schedules.

Separate from the training itself, so that importing it is fast.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """The hyperparameters of a training run; the defaults are those of the demo adapter.

    Attributes:
        tokens: total number of training tokens; the learning rate decays over them.
        minutes: time limit; the learning rate decays over it if it is reached before ``tokens``.
        step_tokens: minimum tokens of an optimizer step, which ends with the tree that reaches them.
        full: whether all weights are trained, instead of an adapter and the control tokens' embeddings.
        rank: LoRA rank of the adapter; alpha is twice the rank.
        frozen_layers: number of lowest layers that stay as they are; gradients are not propagated into them. With a
            third of the layers frozen, a step is about a third cheaper.
        learning_rate: peak learning rate, reached after a warm-up over the first 3 % of the training.
        longest_words: longest passage window in words; the shortest has 40.
        seed: seed of all random numbers.
    """

    tokens: int = 12_740_000
    minutes: float = math.inf
    step_tokens: int = 18_000
    full: bool = False
    rank: int = 32
    frozen_layers: int = 0
    learning_rate: float = 8e-4
    longest_words: int = 220
    seed: int = 0

    def compute_rate(self, done: float) -> float:
        """Return the learning rate at the share ``done`` of the training: linear warm-up, cosine decay to a tenth."""
        if done < 0.03:
            return self.learning_rate * max(done, 1e-3) / 0.03
        return self.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, done))))

    def compute_done(self, tokens: int, seconds: float) -> float:
        """Return the share of the training that is done after so many tokens and seconds; 1 or more ends it."""
        return max(tokens / self.tokens, seconds / 60 / self.minutes)
