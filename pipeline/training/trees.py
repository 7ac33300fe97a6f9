"""Training examples as trees: one question, several passages, several answers to each.

Decoding reads a question once, then every passage as a continuation of it, then answers as continuations of
a passage. Training mirrors that: shared beginnings stand once in the sequence, and a mask lets each token see
its own ancestors only. On a CPU this makes critique of a wrong answer almost free, since its passage is read
for the right one already.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Branch:
    """Tokens that follow their parent's, and what may follow them.

    Attributes:
        ids: token ids.
        weights: loss weight of predicting each of them; 0 for what the model reads.
        children: alternative continuations.
    """

    ids: tuple[int, ...]
    weights: tuple[float, ...]
    children: tuple["Branch", ...] = ()

    def __post_init__(self) -> None:
        assert len(self.ids) == len(self.weights)

    def __add__(self, other: "Branch") -> "Branch":
        """This branch's tokens, then the other's, on one branch with the other's children."""
        assert not self.children
        return Branch(self.ids + other.ids, self.weights + other.weights, other.children)

    def then(self, *children: "Branch") -> "Branch":
        """This branch with continuations."""
        return Branch(self.ids, self.weights, children)

    def __len__(self) -> int:
        return len(self.ids) + sum(len(child) for child in self.children)


def taught(ids: list[int], weight: float) -> Branch:
    """Tokens that the model shall learn to write."""
    return Branch(tuple(ids), (weight,) * len(ids))


def given(ids: list[int]) -> Branch:
    """Tokens that the model only reads."""
    return taught(ids, 0.0)


def forest(trees: Iterable[Branch]) -> Branch:
    """Independent trees as one: each starts at position 0 and sees nothing of the others."""
    return Branch((), (), tuple(trees))


@dataclass(frozen=True)
class TokenTree:
    """A tree laid out as one sequence of L tokens with N weighted predictions.

    Attributes:
        ids: int64 [L].
        positions: int64 [L], each token's distance from the root.
        visible: bool [L, L]; row i marks the tokens that token i attends to: its ancestors and itself.
        sources: int64 [N], the position in the sequence whose output predicts the target.
        targets: int64 [N], the predicted ids.
        weights: float32 [N], their loss weights, all positive.
        branches: int64 [N], the number of the branch that a target belongs to.
    """

    ids: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]
    visible: npt.NDArray[np.bool_]
    sources: npt.NDArray[np.int64]
    targets: npt.NDArray[np.int64]
    weights: npt.NDArray[np.float32]
    branches: npt.NDArray[np.int64]


def walk(branch: Branch, past: tuple[int, ...] = (), start: int = 0) -> Iterator[tuple[Branch, tuple[int, ...], int]]:
    """Yield each branch with its ancestors' places in the sequence and its own first place, parents first."""
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


def packed(trees: Iterable[Branch], tokens: int) -> Iterator[TokenTree]:
    """Lay trees out together, about ``tokens`` at a time: fixed costs of a pass are shared."""
    waiting: list[Branch] = []
    for tree in trees:
        waiting.append(tree)
        if sum(len(branch) for branch in waiting) >= tokens:
            yield lay_out(forest(waiting))
            waiting = []
