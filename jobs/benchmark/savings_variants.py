"""Our decoding without one of its savings, or with one that it does not have, for ``jobs.benchmark.savings``."""

import asyncio
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

from jobs.benchmark.baselines import BareEngine, read_wide
from jobs.benchmark.compare import MAX_TOKENS
from pipeline.config.sections import DecodingConfig
from pipeline.decoding.protocols import Generator, Reader, Retriever
from pipeline.decoding.reflection import Retrieve
from pipeline.decoding.reflection_reader import ReflectionCritic, ReflectionReader, Requests
from pipeline.decoding.types import Generation, Passage, Path, Query, RetrievedPassage


@dataclass(frozen=True)
class WholeDecisions:
    """Writes a whole answer where one token is asked for, as the released scripts do, and gives its first."""

    generator: Generator

    @property
    def max_model_len(self) -> int:
        """See :attr:`pipeline.decoding.protocols.Generator.max_model_len`."""
        return self.generator.max_model_len

    async def generate(self, prompt: Sequence[int], max_tokens: int, stops: Sequence[int]) -> Generation:
        """See :meth:`pipeline.decoding.protocols.Generator.generate`."""
        if max_tokens > 1:
            return await self.generator.generate(prompt, max_tokens, stops)
        whole = await self.generator.generate(prompt, MAX_TOKENS, stops[-1:])
        return dataclasses.replace(
            whole,
            token_ids=whole.token_ids[:1],
            logprobs=whole.logprobs[:1],
            reflection_logprobs=whole.reflection_logprobs[:1],
        )


@dataclass(frozen=True)
class DictLogprobs:
    """Takes log-probabilities as vLLM gives them by default: at each position a dictionary of objects."""

    engine: BareEngine

    @property
    def max_model_len(self) -> int:
        """See :attr:`pipeline.decoding.protocols.Generator.max_model_len`."""
        return self.engine.generator.max_model_len

    async def generate(self, prompt: Sequence[int], max_tokens: int, stops: Sequence[int]) -> Generation:
        """See :meth:`pipeline.decoding.protocols.Generator.generate`."""
        own = ("temperature", "flat_logprobs")
        sampling = {name: value for name, value in self.engine.generator.sampling.items() if name not in own}
        output = await self.engine.ask(prompt, max_tokens=max_tokens, stop_token_ids=list(stops), **sampling)
        return read_wide(output, self.engine.generator.watched)


@dataclass
class Gathered:
    """Holds back the passages of all rows until they are there, and then submits them.

    Attributes:
        siblings: passages of a row.
        total: of all rows.
        apart: first the first passages of all rows, then the second ones, and so on; as they came otherwise.
    """

    generator: Generator
    siblings: int
    total: int
    apart: bool
    waiting: list[asyncio.Event] = field(default_factory=list)

    @property
    def max_model_len(self) -> int:
        """See :attr:`pipeline.decoding.protocols.Generator.max_model_len`."""
        return self.generator.max_model_len

    async def generate(self, prompt: Sequence[int], max_tokens: int, stops: Sequence[int]) -> Generation:
        """See :meth:`pipeline.decoding.protocols.Generator.generate`."""
        turn = asyncio.Event()
        self.waiting.append(turn)
        if len(self.waiting) == self.total:
            for first in range(self.siblings if self.apart else 1):
                for event in self.waiting[first :: self.siblings if self.apart else 1]:
                    event.set()
            await asyncio.sleep(0)  # this one is the last, and has not waited yet
        await turn.wait()
        return await self.generator.generate(prompt, max_tokens, stops)


@dataclass
class AskingReader(ReflectionReader):
    """Asks for the decision before a path goes on, though the last token of its segment told it.

    Attributes:
        asked: by path; its continuations wait for it together.
    """

    asked: dict[Path, asyncio.Task[Generation]] = field(default_factory=dict)

    async def write(self, path: Path, opening: Retrieve, evidence: RetrievedPassage | None) -> Path:
        """See :meth:`pipeline.decoding.protocols.Reader.write`."""
        if path.segments:
            if path not in self.asked:
                *before, last = path.segments
                context = self._context(Path(tuple(before)), last.opening, last.evidence)
                question = self.requests.ask([*context, *last.token_ids], 1, self.stops)
                self.asked[path] = asyncio.ensure_future(question)
            await self.asked[path]
        return await super().write(path, opening, evidence)


class AskingCritic(ReflectionCritic):
    """Reads so."""

    def reader(self, generator: Generator, config: DecodingConfig, query: Query) -> Reader:
        """See :meth:`pipeline.decoding.protocols.Critic.reader`."""
        return AskingReader(Requests(generator), self.tokenizer, config, query)


@dataclass
class Prefetching:
    """Begins all searches at once, while the decisions are under way."""

    retriever: Retriever
    begun: dict[str, asyncio.Task[list[RetrievedPassage]]] = field(default_factory=dict)

    def begin(self, queries: Sequence[Query], k: int) -> None:
        """Search for all of them."""
        self.begun = {q.query: asyncio.ensure_future(self.retriever.retrieve(q.query, k)) for q in queries}

    async def retrieve(self, query: str, k: int) -> list[RetrievedPassage]:
        """See :meth:`pipeline.decoding.protocols.Retriever.retrieve`."""
        return await self.begun[query] if query in self.begun else await self.retriever.retrieve(query, k)


class Forgetful(dict[Passage, list[int]]):
    """Has nothing that it was given, but for once."""

    def __contains__(self, key: object) -> bool:
        """Never."""
        return False


class ForgetfulCritic(ReflectionCritic):
    """Tokenises a passage each time that it stands in a prompt."""

    def reader(self, generator: Generator, config: DecodingConfig, query: Query) -> Reader:
        """See :meth:`pipeline.decoding.protocols.Critic.reader`."""
        return ReflectionReader(Requests(generator), self.tokenizer, config, query, bodies=Forgetful())
