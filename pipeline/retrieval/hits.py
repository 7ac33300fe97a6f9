"""The results of a search."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Hit:
    """A search result.

    Attributes:
        score: inner product with the query's vector, BM25 score, or sum of reciprocal ranks.
        shard: shard of the passage.
        row: its row there.
    """

    score: float
    shard: int
    row: int

    @property
    def order(self) -> tuple[float, int, int]:
        """Sort key: best first; ties are in the order of the passages, as in a single index over all of them."""
        return -self.score, self.shard, self.row

    @property
    def place(self) -> tuple[int, int]:
        """Shard and row, which identify the passage."""
        return self.shard, self.row
