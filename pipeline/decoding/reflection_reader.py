"""Reader and critic for models trained with reflection tokens.

Such a model writes a segment, its critique and the next decision in one generation: the segment ends at the next
Retrieve token, whose own distribution is the decision.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from pipeline.config.sections import DecodingConfig
from pipeline.decoding.critique import critique, retrieve_probability
from pipeline.decoding.prompts import PromptTokenizer, passage_text
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


@dataclass
class ReflectionReader:
    """A reader of one query for a model trained with reflection tokens.

    Attributes:
        lost: passage tokens cut so far, summed over all prompts.
        bodies: token ids of the passages read so far.
    """

    requests: Requests
    tokenizer: PromptTokenizer
    config: DecodingConfig
    query: Query
    lost: int = 0
    bodies: dict[Passage, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.stops = [*self.tokenizer.reflection.group(Retrieve), self.tokenizer.eos]
        self.prompt = self.tokenizer.prompt(self.query.instruction or self.query.query, self.query.input)

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
        return Boundary(retrieve_probability(await self.requests.ask(self.prompt, 1, self.stops)))

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
        generation = await self.requests.ask(self._context(path, opening, evidence), self.config.max_tokens, self.stops)
        with self.requests.critiquing():
            ids, boundary, finish = self._split(generation)
            judged = critique(generation, self.tokenizer.reflection, self.tokenizer.eos, self.config.weights)
            words = [token for token in ids if token not in self.tokenizer.reflection.control]
            raw = f"{put(opening, evidence)}{self.tokenizer.decode(ids)}"
            text = self.tokenizer.decode(words).strip()
        return Path((*path.segments, Segment(text, raw, evidence, judged, opening, tuple(ids))), boundary, finish)

    def _split(self, generation: Generation) -> tuple[list[int], Boundary | None, Finish | None]:
        """Return the ids of the segment, with its boundary if it ended at a Retrieve token, else its finish reason."""
        *ids, last = generation.token_ids
        reflection = self.tokenizer.reflection
        if last in reflection.group(Retrieve):
            keep = last == reflection[Retrieve.CONTINUE]
            return ids, Boundary(retrieve_probability(generation, len(ids)), keep), None
        return (ids, None, Finish.STOP) if last == self.tokenizer.eos else ([*ids, last], None, Finish.LENGTH)

    def _context(self, path: Path, opening: Retrieve, evidence: RetrievedPassage | None) -> list[int]:
        """Build the ids before a new segment: the prompt, earlier segments with their passages, and the new passage.

        If they do not fit the model, passages are cut at their ends, the oldest first.
        """
        steps = [(s.opening, s.evidence, s.token_ids) for s in path.segments] + [(opening, evidence, ())]
        bodies = [self._body(e.passage) if e is not None and o is Retrieve.YES else [] for o, e, _ in steps]
        read = sum(o is Retrieve.YES and e is not None for o, e, _ in steps)
        fixed = len(self.prompt) + sum(1 + len(ids) for _, _, ids in steps) + len(Paragraph) * read
        kept = cut_oldest([len(body) for body in bodies], self.room - fixed)
        self.lost += sum(len(body) for body in bodies) - sum(kept)
        context = list(self.prompt)
        for (opened, used, ids), body, length in zip(steps, bodies, kept, strict=True):
            context += self.tokenizer.control(put(opened, used))
            if used is not None and opened is Retrieve.YES:
                context += self.tokenizer.paragraph(body[:length])
            context += ids
        return context

    def _body(self, passage: Passage) -> list[int]:
        if passage not in self.bodies:
            self.bodies[passage] = self.tokenizer.text(passage_text(passage.title, passage.text))
        return self.bodies[passage]


def put(opening: Retrieve, evidence: RetrievedPassage | None) -> Retrieve:
    """Return the token that opens a segment in the prompt: ``[No Retrieval]`` if the segment has no passage."""
    return opening if evidence is not None else Retrieve.NO


def cut_oldest(lengths: Sequence[int], room: int) -> list[int]:
    """Return the lengths after cutting them, the first ones first, until their sum is at most ``room``."""
    excess, kept = sum(lengths) - room, []
    for length in lengths:
        kept.append(length - min(length, max(0, excess)))
        excess -= length - kept[-1]
    return kept
