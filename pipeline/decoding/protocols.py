"""What the algorithm needs of a model process, of an index, and of a kind of model."""

from collections.abc import Sequence
from typing import Protocol

from pipeline.config.sections import DecodingConfig
from pipeline.decoding.reflection import Retrieve
from pipeline.decoding.types import Boundary, Generation, Path, Query, RetrievedPassage, Usage


class Generator(Protocol):
    """Writes what follows a prompt."""

    @property
    def max_model_len(self) -> int:
        """Most tokens of a prompt and its continuation together."""
        ...

    async def generate(self, prompt: Sequence[int], max_tokens: int, stops: Sequence[int]) -> Generation:
        """Continue a prompt greedily until one of the stop tokens, or the length limit.

        Args:
            prompt: token ids.
            max_tokens: most tokens to write.
            stops: ids that end the continuation; the one that did is its last.

        Raises:
            ValueError: the prompt does not fit the model.
            EngineDeadError: the engine is gone.
        """
        ...


class Retriever(Protocol):
    """Finds passages for a text."""

    async def retrieve(self, query: str, k: int) -> list[RetrievedPassage]:
        """The k best passages, best first; fewer where there are no more."""
        ...


class Reader(Protocol):
    """Decides and writes for one query."""

    @property
    def usage(self) -> Usage:
        """What the row has cost so far; retrievals and seconds are counted elsewhere."""
        ...

    async def decide(self) -> Boundary:
        """Where the prompt ends: shall a passage be retrieved?

        Raises:
            ValueError: the query does not fit the model.
        """
        ...

    def has_room(self, path: Path) -> bool:
        """Whether the path's text leaves room for another segment."""
        ...

    async def write(self, path: Path, opening: Retrieve, evidence: RetrievedPassage | None) -> Path:
        """The path with one more segment.

        Args:
            opening: the decision before it.
            evidence: the passage to write from: a new one for ``[Retrieval]``, or None where the search found
                nothing; the path's own for ``[Continue to Use Evidence]``; None for ``[No Retrieval]``.
        """
        ...


class Critic(Protocol):
    """Knows one kind of model: how to ask it, and what to read in its answers."""

    @property
    def watched(self) -> tuple[int, ...]:
        """Ids that the engine must give log-probabilities of, in the places of the 13 reflection tokens."""
        ...

    def reader(self, generator: Generator, config: DecodingConfig, query: Query) -> Reader:
        """A reader for one query."""
        ...
