"""Represents training examples as trees: one question, several passages, and several answers to each passage.

Decoding reads a question once, then each passage as a continuation of the question, then answers as continuations of a
passage. Training mirrors this: a shared prefix is in the sequence only once, and with the attention mask each token
attends only to its ancestors and itself. On a CPU this makes the critique of a wrong answer almost free, since its
passage is already read for the right answer.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Branch:
    """A node of a tree: a run of tokens and its alternative continuations.

    Attributes:
        ids: token ids.
        weights: loss weight of each token; 0 for tokens that the model only reads.
        children: alternative continuations of the tokens.
    """

    ids: tuple[int, ...]
    weights: tuple[float, ...]
    children: tuple["Branch", ...] = ()

    def __post_init__(self) -> None:
        assert len(self.ids) == len(self.weights)

    def __add__(self, other: "Branch") -> "Branch":
        """Concatenate the tokens of two branches; the result has the children of the second."""
        assert not self.children
        return Branch(self.ids + other.ids, self.weights + other.weights, other.children)

    def with_children(self, *children: "Branch") -> "Branch":
        """Return this branch with other children."""
        return Branch(self.ids, self.weights, children)

    def __len__(self) -> int:
        return len(self.ids) + sum(len(child) for child in self.children)


def make_taught(ids: list[int], weight: float) -> Branch:
    """Make a branch of tokens that the model learns to write."""
    return Branch(tuple(ids), (weight,) * len(ids))


def make_given(ids: list[int]) -> Branch:
    """Make a branch of tokens that the model only reads."""
    return make_taught(ids, 0.0)


def join_trees(trees: Iterable[Branch]) -> Branch:
    """Join independent trees in one: each starts at position 0, and its tokens do not attend to other trees."""
    return Branch((), (), tuple(trees))


@dataclass(frozen=True)
class TokenTree:
    """A tree laid out as one sequence of L tokens with N weighted predictions.

    Attributes:
        ids: int64 [L], the token ids.
        positions: int64 [L], the number of ancestors of each token.
        visible: bool [L, L]; row i marks the tokens that token i attends to: its ancestors and itself.
        sources: int64 [N], the index in the sequence of the token whose output predicts each target.
        targets: int64 [N], the token ids to predict.
        weights: float32 [N], the loss weights of the targets, all positive.
        branches: int64 [N], the number of the branch that each target belongs to.
    """

    ids: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]
    visible: npt.NDArray[np.bool_]
    sources: npt.NDArray[np.int64]
    targets: npt.NDArray[np.int64]
    weights: npt.NDArray[np.float32]
    branches: npt.NDArray[np.int64]


def walk(branch: Branch, past: tuple[int, ...] = (), start: int = 0) -> Iterator[tuple[Branch, tuple[int, ...], int]]:
    """Yield each branch with its ancestors' indices in the sequence and its own first index, parents first."""
    yield branch, past, start
    own = past + tuple(range(start, start + len(branch.ids)))
    start += len(branch.ids)
    for child in branch.children:
        yield from walk(child, own, start)
        start += len(child)


def lay_out(root: Branch) -> TokenTree:
    """Lay a tree out as one sequence."""
    length = len(root)
    ids = np.zeros(length, np.int64)
    positions = np.zeros(length, np.int64)
    visible = np.zeros((length, length), np.bool_)
    predictions: list[tuple[int, int, float, int]] = []
    for number, (branch, past, start) in enumerate(walk(root)):
        chain = list(past)
        for place, (token, weight) in enumerate(zip(branch.ids, branch.weights, strict=True), start):
            if weight > 0 and chain:
                predictions.append((chain[-1], token, weight, number))
            chain.append(place)
            ids[place], positions[place] = token, len(chain) - 1
            visible[place, chain] = True
    sources, targets, weights, branches = zip(*predictions, strict=True)
    return TokenTree(
        ids,
        positions,
        visible,
        np.array(sources, np.int64),
        np.array(targets, np.int64),
        np.array(weights, np.float32),
        np.array(branches, np.int64),
    )


def pack_trees(trees: Iterable[Branch], tokens: int) -> Iterator[TokenTree]:
    """Lay out trees in packs of at least ``tokens`` tokens, which share the fixed costs of a pass.

    Trees that do not fill the last pack are dropped.
    """
    waiting: list[Branch] = []
    for tree in trees:
        waiting.append(tree)
        if sum(len(branch) for branch in waiting) >= tokens:
            yield lay_out(join_trees(waiting))
            waiting = []
