"""Variants of our decoding for ``jobs.benchmark.savings``: each with one optimization removed."""

import asyncio
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

from jobs.benchmark.baselines import BareEngine, read_wide
from jobs.benchmark.compare import MAX_TOKENS
from pipeline.config.sections import DecodingConfig
from pipeline.decoding.protocols import Generator, Reader
from pipeline.decoding.reflection import Retrieve
from pipeline.decoding.reflection_reader import ReflectionCritic, ReflectionReader, Requests
from pipeline.decoding.types import Generation, Path, Query, RetrievedPassage


@dataclass(frozen=True)
class WholeDecisions:
    """A generator that, like the released scripts, writes a whole answer for a one-token request; returns its first."""

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
    """A generator that requests log-probabilities in vLLM's default form: a dictionary of objects per position."""

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
    """A generator that holds back the requests of all rows until the last one has arrived, and then submits them.

    Attributes:
        siblings: number of passages of a row.
        total: number of passages of all rows.
        apart: whether the first passages of all rows are submitted first, then the second ones, and so on; otherwise
            all are submitted in the order of arrival.
        waiting: events that release the held requests, in the order of arrival.
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
            await asyncio.sleep(0)  # the others go first: this request arrived last, and would not wait
        await turn.wait()
        return await self.generator.generate(prompt, max_tokens, stops)


@dataclass
class AskingReader(ReflectionReader):
    """A reader that requests each later decision, although the last token of the segment before it already holds it.

    Attributes:
        asked: requested decision of each path; all continuations of the path wait for it.
    """

    asked: dict[Path, asyncio.Task[Generation]] = field(default_factory=dict)

    async def write(self, path: Path, opening: Retrieve, evidence: RetrievedPassage | None) -> Path:
        """See :meth:`pipeline.decoding.protocols.Reader.write`."""
        if path.segments:
            if path not in self.asked:
                *before, last = path.segments
                context, _ = self._build_context(Path(tuple(before)), last.opening, last.evidence)
                question = self.requests.ask([*context, *last.token_ids], 1, self.stops)
                self.asked[path] = asyncio.ensure_future(question)
            await self.asked[path]
        return await super().write(path, opening, evidence)


class AskingCritic(ReflectionCritic):
    """The critic whose readers request each later decision."""

    def reader(self, generator: Generator, config: DecodingConfig, query: Query) -> Reader:
        """See :meth:`pipeline.decoding.protocols.Critic.reader`."""
        return AskingReader(Requests(generator), self.tokenizer, config, query)


class Forgetful(dict[str, list[int]]):
    """A cache of tokens that reports every text as missing, so that it is tokenized again."""

    def __contains__(self, key: object) -> bool:
        """Whether the cache holds a text: never."""
        return False


class ForgetfulCritic(ReflectionCritic):
    """The critic whose readers tokenize a passage each time that it is part of a prompt."""

    def reader(self, generator: Generator, config: DecodingConfig, query: Query) -> Reader:
        """See :meth:`pipeline.decoding.protocols.Critic.reader`."""
        return ReflectionReader(Requests(generator), self.tokenizer, config, query, bodies=Forgetful())
