"""Reader and critic for models trained with reflection tokens.

Such a model writes a segment, its critique and the next decision in one generation: the segment ends at the next
Retrieve token, whose own distribution is the decision.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from pipeline.config.sections import DecodingConfig
from pipeline.decoding.critique import critique_segment, read_retrieve_probability
from pipeline.decoding.prompts import PromptTokenizer, drop_unread, format_evidence
from pipeline.decoding.protocols import Generator, Reader
from pipeline.decoding.reflection import Paragraph, Retrieve
from pipeline.decoding.types import Boundary, Finish, Generation, Passage, Path, Query, RetrievedPassage, Segment, Usage


@dataclass
class Requests:
    """The requests of one query to an engine, and their usage."""

    generator: Generator
    usage: Usage = field(default_factory=Usage)

    async def ask(self, prompt: Sequence[int], max_tokens: int, stops: Sequence[int]) -> Generation:
        """Generate (see :meth:`Generator.generate`) and add up the usage."""
        generation = await self.generator.generate(prompt, max_tokens, stops)
        self.usage += Usage.of(generation)
        return generation

    @contextmanager
    def critiquing(self) -> Iterator[None]:
        """Add the duration of the body to the seconds spent on scoring segments and decoding their text."""
        began = time.perf_counter()
        yield
        self.usage += Usage(critique_seconds=time.perf_counter() - began)


@dataclass(frozen=True)
class ReflectionCritic:
    """A model trained with reflection tokens."""

    tokenizer: PromptTokenizer

    @property
    def watched(self) -> tuple[int, ...]:
        """See :attr:`Critic.watched`."""
        return self.tokenizer.reflection.reflection

    def reader(self, generator: Generator, config: DecodingConfig, query: Query) -> Reader:
        """See :meth:`Critic.reader`."""
        return ReflectionReader(Requests(generator), self.tokenizer, config, query)

    def compare_pieces(self, query: Query, passage: Passage) -> str | None:
        """See :meth:`Critic.compare_pieces`."""
        return self.tokenizer.compare_pieces(query, passage)


@dataclass
class ReflectionReader:
    """A reader of one query for a model trained with reflection tokens.

    Attributes:
        lost: passage tokens cut so far, summed over all prompts.
        bodies: token ids of the texts read so far.
    """

    requests: Requests
    tokenizer: PromptTokenizer
    config: DecodingConfig
    query: Query
    lost: int = 0
    bodies: dict[str, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.stops = [*self.tokenizer.reflection.get_group(Retrieve), self.tokenizer.eos]
        self.prompt = self.tokenizer.encode_prompt(self.query.instruction or self.query.query, self.query.input)

    @property
    def usage(self) -> Usage:
        """See :attr:`Reader.usage`."""
        return replace(self.requests.usage, truncated_tokens=self.lost)

    async def decide(self) -> Boundary:
        """See :meth:`Reader.decide`: reads the distribution of the first token, in adaptive mode only."""
        room = self.room - len(Paragraph) - 1
        if len(self.prompt) > room:
            raise ValueError(
                f"the query has {len(self.prompt)} tokens, but the model accepts {room} before an answer of "
                f"{self.config.max_tokens}; shorten it, or raise model.engine.max_model_len"
            )
        if self.config.mode != "adaptive":
            return Boundary()
        return Boundary(read_retrieve_probability(await self.requests.ask(self.prompt, 1, self.stops)))

    @property
    def room(self) -> int:
        """Maximum number of tokens of a prompt."""
        return self.requests.generator.max_model_len - self.config.max_tokens

    def has_room(self, path: Path) -> bool:
        """See :meth:`Reader.has_room`: passages do not count, since they can be cut; their marks do."""
        segments = len(path.segments) + 1
        written = sum(len(segment.token_ids) for segment in path.segments)
        return len(self.prompt) + written + segments * (1 + len(Paragraph)) <= self.room

    async def write(self, path: Path, opening: Retrieve, evidence: RetrievedPassage | None) -> Path:
        """See :meth:`Reader.write`."""
        context, evidence = self._build_context(path, opening, evidence)
        generation = await self.requests.ask(context, self.config.max_tokens, self.stops)
        with self.requests.critiquing():
            ids, boundary, finish = self._split(generation)
            judged = critique_segment(generation, self.tokenizer.reflection, self.tokenizer.eos, self.config.weights)
            words = [token for token in ids if token not in self.tokenizer.reflection.control]
            raw = f"{choose_opening_token(opening, evidence)}{self.tokenizer.decode(ids)}"
            text = self.tokenizer.decode(words).strip()
        return Path((*path.segments, Segment(text, raw, evidence, judged, opening, tuple(ids))), boundary, finish)

    def _split(self, generation: Generation) -> tuple[list[int], Boundary | None, Finish | None]:
        """Return the ids of the segment, with its boundary if it ended at a Retrieve token, else its finish reason."""
        *ids, last = generation.token_ids
        reflection = self.tokenizer.reflection
        if last in reflection.get_group(Retrieve):
            keep = last == reflection[Retrieve.CONTINUE]
            return ids, Boundary(read_retrieve_probability(generation, len(ids)), keep), None
        if last == self.tokenizer.eos:
            return ids, None, Finish.STOP
        return [*ids, last], None, Finish.LENGTH

    def _build_context(
        self, path: Path, opening: Retrieve, evidence: RetrievedPassage | None
    ) -> tuple[list[int], RetrievedPassage | None]:
        """Build the ids before a new segment: the prompt, earlier segments with their evidence, and the new evidence.

        If they do not fit the model, evidence is cut at its end, the oldest first.

        Returns:
            The ids, and the new evidence without passages that were cut off whole.
        """
        steps = [(segment.opening, segment.evidence, segment.token_ids) for segment in path.segments]
        steps.append((opening, evidence, ()))
        bodies = [self._encode_body(opened, used) for opened, used, _ in steps]
        marks = len(Paragraph) * sum(body is not None for body in bodies)
        fixed = len(self.prompt) + sum(1 + len(ids) for _, _, ids in steps) + marks
        lengths = [len(body or ()) for body in bodies]
        kept = cut_oldest(lengths, self.room - fixed)
        self.lost += sum(lengths) - sum(kept)
        context = list(self.prompt)
        for (opened, used, ids), body, length in zip(steps, bodies, kept, strict=True):
            context += self.tokenizer.encode_control(choose_opening_token(opened, used))
            if body is not None:
                context += self.tokenizer.wrap_paragraph(body[:length])
            context += ids
        if evidence is not None and kept[-1] < lengths[-1]:
            evidence = drop_unread(evidence, kept[-1], self.tokenizer.encode_text)
        return context, evidence

    def _encode_body(self, opening: Retrieve, evidence: RetrievedPassage | None) -> list[int] | None:
        """Return the ids of the passages that are read before a segment; None if none is read there."""
        if evidence is None or opening is not Retrieve.YES:
            return None
        text = format_evidence(evidence)
        if text not in self.bodies:
            self.bodies[text] = self.tokenizer.encode_text(text)
        return self.bodies[text]


def choose_opening_token(opening: Retrieve, evidence: RetrievedPassage | None) -> Retrieve:
    """Return the token that opens a segment in the prompt: ``[No Retrieval]`` if the segment has no passage."""
    return opening if evidence is not None else Retrieve.NO


def cut_oldest(lengths: Sequence[int], room: int) -> list[int]:
    """Return the lengths after cutting them, the first ones first, until their sum is at most ``room``."""
    excess, kept = sum(lengths) - room, []
    for length in lengths:
        kept.append(length - min(length, max(0, excess)))
        excess -= length - kept[-1]
    return kept
