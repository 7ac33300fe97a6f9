"""The interfaces between the algorithm and the engine, the index and the kind of model."""

from collections.abc import Sequence
from typing import Protocol

from pipeline.config.sections import DecodingConfig
from pipeline.decoding.reflection import Retrieve
from pipeline.decoding.types import Boundary, Generation, Passage, Path, Query, Retrieved, RetrievedPassage, Usage


class Generator(Protocol):
    """An engine that continues prompts."""

    @property
    def max_model_len(self) -> int:
        """Maximum number of tokens of a prompt and its continuation together."""
        ...

    async def generate(self, prompt: Sequence[int], max_tokens: int, stops: Sequence[int]) -> Generation:
        """Continue a prompt greedily up to a stop token or the length limit.

        Args:
            prompt: token ids of the prompt.
            max_tokens: maximum number of tokens to generate.
            stops: ids that end the generation, which includes the stop token.

        Raises:
            ValueError: the prompt is too long for the model.
            EngineDeadError: the engine has died.
        """
        ...


class Retriever(Protocol):
    """An index that finds passages for a text."""

    async def retrieve(self, query: str, k: int, condition: str | None = None) -> Retrieved:
        """Return the top k passages that meet the condition; fewer if the index has fewer."""
        ...


class Reader(Protocol):
    """The steps of the algorithm that need the model, for one query: decide, generate and critique."""

    @property
    def usage(self) -> Usage:
        """Usage of the query so far; the caller adds the number of retrievals and its own timings."""
        ...

    async def decide(self) -> Boundary:
        """Return the boundary at the end of the prompt: the decision whether to retrieve for the first segment.

        Raises:
            ValueError: the query is too long for the model.
        """
        ...

    def has_room(self, path: Path) -> bool:
        """Whether the text of the path leaves room in the prompt for another segment."""
        ...

    async def write(self, path: Path, opening: Retrieve, evidence: RetrievedPassage | None) -> Path:
        """Extend the path by one generated and scored segment.

        Args:
            path: path to extend.
            opening: decision at the boundary before the segment.
            evidence: passages to write from. ``[Retrieval]`` has new ones, or None if the search found nothing;
                ``[Continue to Use Evidence]`` has those of the path's last segment; ``[No Retrieval]`` has None.
        """
        ...


class Critic(Protocol):
    """A kind of model: its prompts, and the source of its reflection probabilities."""

    @property
    def watched(self) -> tuple[int, ...]:
        """Ids whose log-probabilities the engine must return, one for each of the 13 reflection tokens in order."""
        ...

    def reader(self, generator: Generator, config: DecodingConfig, query: Query) -> Reader:
        """Create the reader for one query."""
        ...

    def compare_pieces(self, query: Query, passage: Passage) -> str | None:
        """Compare a prompt, whose parts are encoded one by one, with the same prompt tokenized as one string.

        Returns:
            Description of the first difference; None if there is none, or if the query or passage contains a control
            token, which the tokenizer would find in the string.
        """
        ...
