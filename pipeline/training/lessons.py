"""Draws training trees from the training data, each from a random stream of its own.

So a tree depends on the seed and its number alone: any number of processes builds the same trees, and an interrupted
training goes on with the tree after its last.
"""

import itertools
import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

from torch.utils.data import DataLoader, Dataset

from pipeline.training.data import Instruction, ReadingTriple, TeachingData
from pipeline.training.rows import TreeBuilder
from pipeline.training.trees import LONGEST_TREE, Branch, TokenTree, lay_out

# Shares of the kinds of trees. Reading has the largest, since answer spans are the hardest to learn.
READING, PAIR, INSTRUCTION, TWO_SEGMENTS, CLAIM = 0.62, 0.06, 0.16, 0.08, 0.08
# Shortest passage window, in words.
SHORTEST_WORDS = 40
# Trees drawn in a row that may be too long.
MAX_DRAWS = 100
# Trees that a process builds at a time; each is sent at little cost.
TREES_PER_BLOCK = 16


@dataclass(frozen=True)
class Lessons:
    """The training trees by number, without end.

    Passages of readings are cut to windows of a random length; the evidence of claims is not cut. Kinds without data
    are left out, and so are trees that are too long or too deep.

    Attributes:
        builder: builder of the trees.
        data: rows to build trees from.
        longest_words: longest passage window, in words.
        seed: seed of all trees.
        max_positions: maximum ancestors of a token and itself, for which the model has positions.
    """

    builder: TreeBuilder
    data: TeachingData
    longest_words: int
    seed: int
    max_positions: int = LONGEST_TREE

    def __getitem__(self, number: int) -> TokenTree:
        rng = random.Random(f"{self.seed} {number}")
        for _ in range(MAX_DRAWS):
            root = self.build_tree(rng)
            if len(root) <= LONGEST_TREE and (tree := lay_out(root)).positions.max() < self.max_positions:
                return tree
        raise ValueError(
            f"{MAX_DRAWS} training trees in a row are longer than {LONGEST_TREE} tokens or the model's "
            f"{self.max_positions} positions; shorten questions and evidence, or lower --longest-words"
        )

    def build_tree(self, rng: random.Random) -> Branch:
        """Build a random tree."""
        words = rng.randint(SHORTEST_WORDS, self.longest_words)
        data, builder = self.data, self.builder
        kind = rng.choices(range(5), self._shares)[0]
        if kind == 0:
            return builder.build_reading(rng.choice(data.readings), words, rng)
        if kind == 1:
            return builder.build_pair(rng.choice(data.pairs), rng)
        if kind == 2:
            return builder.build_instruction(rng.choice(rng.choice(self._instructions_by_source)))
        if kind == 3:
            row = rng.choice(data.readings)
            return builder.build_two_segments(row, self._draw_second(row, rng), words, rng)
        return builder.build_claim(rng.choice(data.claims), rng.choice(data.claims), rng)

    @cached_property
    def _shares(self) -> tuple[float, ...]:
        data = self.data
        pair, instruction = PAIR * bool(data.pairs), INSTRUCTION * bool(data.instructions)
        return (READING, pair, instruction, TWO_SEGMENTS, CLAIM * bool(data.claims))

    @cached_property
    def _instructions_by_source(self) -> list[list[Instruction]]:
        by_source = defaultdict(list)
        for row in self.data.instructions:
            by_source[row.source].append(row)
        return list(by_source.values())

    @cached_property
    def _readings_by_passage(self) -> dict[str, list[ReadingTriple]]:
        by_passage = defaultdict(list)
        for row in self.data.readings:
            by_passage[row.passage].append(row)
        return by_passage

    def _draw_second(self, first: ReadingTriple, rng: random.Random) -> ReadingTriple:
        """Draw another question: half of the time one about the same passage, if there is one."""
        twins = [row for row in self._readings_by_passage[first.passage] if row.question != first.question]
        return rng.choice(twins) if twins and rng.random() < 0.5 else rng.choice(self.data.readings)


def stream_lessons(lessons: Lessons, start: int = 0, workers: int = 0) -> Iterator[TokenTree]:
    """Yield the trees from the number ``start`` on, without end and in order.

    Args:
        lessons: the trees.
        start: number of the first tree.
        workers: processes that build them; with 0, this process does.

    Raises:
        RuntimeError: a process died.
    """
    parallel: dict[str, Any] = {"multiprocessing_context": "spawn", "prefetch_factor": 4} if workers else {}
    blocks: Iterator[list[TokenTree]] = iter(
        DataLoader(
            cast("Dataset[TokenTree]", lessons),  # no more of it is used than __getitem__
            batch_size=TREES_PER_BLOCK,
            sampler=itertools.count(start),
            collate_fn=list,
            num_workers=workers,
            **parallel,
        )
    )
    yield from itertools.chain.from_iterable(blocks)
