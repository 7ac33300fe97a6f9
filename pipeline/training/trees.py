"""Represents training examples as trees: one question, several passages, and several answers to each passage.

Decoding reads a question once, then each passage as a continuation of the question, then answers as continuations of a
passage. Training mirrors this: a shared prefix is in the sequence only once, and with the attention mask each token
attends only to its ancestors and itself. On a CPU this makes the critique of a wrong answer almost free, since its
passage is already read for the right answer.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import numpy.typing as npt

# Maximum tokens of a tree in training: its attention mask takes the square of it.
LONGEST_TREE = 4_096


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


@dataclass(frozen=True)
class TokenTree:
    """A tree, or several independent ones, laid out as one sequence of L tokens with N weighted predictions.

    Tokens are in depth-first order, so the descendants of a token follow it without a gap.

    Attributes:
        ids: int64 [L], the token ids.
        positions: int64 [L], the number of ancestors of each token.
        ends: int64 [L], the index after the last descendant of each token; token i attends to token j if
            j <= i < ends[j], that is, to its ancestors and itself.
        sources: int64 [N], the index in the sequence of the token whose output predicts each target.
        targets: int64 [N], the token ids to predict.
        weights: float32 [N], the loss weights of the targets, all positive.
        branches: int64 [N], the number of the branch that each target belongs to.
    """

    ids: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]
    ends: npt.NDArray[np.int64]
    sources: npt.NDArray[np.int64]
    targets: npt.NDArray[np.int64]
    weights: npt.NDArray[np.float32]
    branches: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.ids)


def walk(branch: Branch, last: int = -1, depth: int = 0, start: int = 0) -> Iterator[tuple[Branch, int, int, int]]:
    """Yield each branch, parents first, with its place in the sequence.

    The place is the index of the token before the branch (-1 if there is none), the number of its ancestors, and the
    index of its first token.
    """
    yield branch, last, depth, start
    depth += len(branch.ids)
    child_start = start + len(branch.ids)
    last = child_start - 1 if branch.ids else last
    for child in branch.children:
        yield from walk(child, last, depth, child_start)
        child_start += len(child)


def lay_out(root: Branch) -> TokenTree:
    """Lay a tree out as one sequence."""
    ids: list[int] = []
    positions: list[int] = []
    ends: list[int] = []
    predictions: list[tuple[int, int, float, int]] = []
    for number, (branch, last, depth, start) in enumerate(walk(root)):
        ids += branch.ids
        positions += range(depth, depth + len(branch.ids))
        ends += [start + len(branch)] * len(branch.ids)
        predictors = [last, *range(start, start + len(branch.ids) - 1)]
        for before, token, weight in zip(predictors, branch.ids, branch.weights, strict=False):
            if weight > 0 and before >= 0:
                predictions.append((before, token, weight, number))
    sources, targets, weights, branches = zip(*predictions, strict=True)
    return TokenTree(
        np.array(ids, np.int64),
        np.array(positions, np.int64),
        np.array(ends, np.int64),
        np.array(sources, np.int64),
        np.array(targets, np.int64),
        np.array(weights, np.float32),
        np.array(branches, np.int64),
    )


def join_trees(trees: Sequence[TokenTree]) -> TokenTree:
    """Join independent trees in one sequence: each keeps its positions, and no token attends to another tree."""
    placed = []
    start, branch = 0, 0
    for tree in trees:
        numbers = tree.branches + branch
        placed.append(replace(tree, ends=tree.ends + start, sources=tree.sources + start, branches=numbers))
        start += len(tree)
        branch += int(tree.branches.max()) + 1
    return TokenTree(*(np.concatenate([getattr(tree, field.name) for tree in placed]) for field in fields(TokenTree)))


def pack_trees(trees: Iterable[TokenTree], tokens: int) -> list[TokenTree]:
    """Join trees into few sequences of at most ``tokens`` tokens; a longer tree is a sequence of its own.

    The longest come first, each into the first sequence that has room, so that little of a batch is padding.
    """
    packs: list[list[TokenTree]] = []
    rooms: list[int] = []
    for tree in sorted(trees, key=len, reverse=True):
        place = next((n for n, room in enumerate(rooms) if len(tree) <= room), len(packs))
        if place == len(packs):
            packs.append([])
            rooms.append(tokens)
        packs[place].append(tree)
        rooms[place] -= len(tree)
    return [join_trees(pack) for pack in packs]
