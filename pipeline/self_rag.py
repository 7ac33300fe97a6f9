"""The algorithm for one query: decide, retrieve, generate, critique, choose.

Asai et al. 2023, algorithm 1, short form: one segment for each passage, all in parallel, and the best one is
the answer. Every query is a coroutine of its own; the engine batches whatever is under way.
"""

import asyncio
import re
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from pipeline.config import DecodingConfig
from pipeline.critique import critique, retrieve_probability
from pipeline.engine import Generator
from pipeline.prompts import PromptTokenizer, passage_text
from pipeline.reflection import Paragraph, Retrieve
from pipeline.retrieve import Retriever, given_passages
from pipeline.types import Answer, Generation, Query, RetrievedPassage, Segment, Usage


@dataclass(frozen=True)
class SelfRag:
    """Answers queries with one engine and one retriever.

    Attributes:
        retriever: None where every query brings its passages or nothing is ever retrieved.
    """

    generator: Generator
    tokenizer: PromptTokenizer
    config: DecodingConfig
    retriever: Retriever | None = None

    async def answer(self, query: Query) -> Answer:
        """Answer one query.

        Raises:
            ValueError: the query is empty, does not fit the model, or needs an index that is not there.
        """
        if not query.query.strip():
            raise ValueError("the query is empty")
        return await Decoding(self, query).run()


@dataclass
class Decoding:
    """One query on its way through the algorithm, and what it has cost so far."""

    system: SelfRag
    query: Query
    usage: Usage = field(default_factory=Usage)

    async def run(self) -> Answer:
        """The algorithm."""
        started = time.monotonic()
        prompt = self.prompt()
        probability = await self.decide(prompt)
        if self.wants_passages(probability):
            evidence = await self.retrieve()
            candidates = await self.generate_with(prompt, evidence)
        else:
            candidates = [await self.generate_without(prompt)]
        best = choose(candidates, self.query.choices)
        return Answer(
            answer=best.text,
            raw_output=best.raw,
            retrieved=best.evidence is not None,
            retrieve_probability=probability,
            segments=(best,),
            usage=replace(self.usage, seconds=time.monotonic() - started),
            candidates=ranked(candidates) if self.system.config.keep_candidates else (),
        )

    def prompt(self) -> list[int]:
        """Token ids of the question, which are never cut."""
        ids = self.system.tokenizer.prompt(self.query.query, self.query.input)
        room = self.system.generator.max_model_len - self.system.config.max_tokens - len(Paragraph) - 1
        if len(ids) > room:
            raise ValueError(
                f"the query has {len(ids)} tokens and the model takes {room} before an answer of "
                f"{self.system.config.max_tokens}; shorten it, or raise model.engine.max_model_len"
            )
        return ids

    async def decide(self, prompt: Sequence[int]) -> float | None:
        """p(retrieve) from the distribution of the first token; None where the mode decides."""
        if self.system.config.mode != "adaptive":
            return None
        return retrieve_probability(await self._request(prompt, max_tokens=1))

    def wants_passages(self, probability: float | None) -> bool:
        """Whether to retrieve: by the threshold δ, or by the mode."""
        if probability is None:
            return self.system.config.mode == "always"
        return probability > self.system.config.threshold

    async def retrieve(self) -> list[RetrievedPassage]:
        """The top k passages: given ones, or the index's."""
        self.usage = replace(self.usage, retrievals=self.usage.retrievals + 1)
        if self.query.passages is not None:
            return given_passages(self.query, self.system.config.passages)
        if self.system.retriever is None:
            raise ValueError("the query has no passages of its own and the run has no index (--index)")
        return await self.system.retriever.retrieve(self.query.query, self.system.config.passages)

    async def generate_with(self, prompt: Sequence[int], evidence: list[RetrievedPassage]) -> list[Segment]:
        """One segment for each passage, in parallel; siblings share the question's prefix."""
        if not evidence:
            return [await self.generate_without(prompt)]
        return list(await asyncio.gather(*(self._segment(prompt, Retrieve.YES, e) for e in evidence)))

    async def generate_without(self, prompt: Sequence[int]) -> Segment:
        """A segment from the model's own knowledge."""
        return await self._segment(prompt, Retrieve.NO, None)

    async def _segment(self, prompt: Sequence[int], boundary: Retrieve, evidence: RetrievedPassage | None) -> Segment:
        tokenizer, config = self.system.tokenizer, self.system.config
        start = [*prompt, *tokenizer.control(boundary)]
        if evidence is not None:
            start += self._passage(evidence, room=self._room(len(start)))
        generation = await self._request(start, config.max_tokens)
        judged = critique(generation, tokenizer.reflection, tokenizer.eos, config.weights)
        text, raw = self._read(generation)
        return Segment(text=text, raw=f"{boundary}{raw}", evidence=evidence, critique=judged)

    def _room(self, used: int) -> int:
        return self.system.generator.max_model_len - self.system.config.max_tokens - used

    def _passage(self, evidence: RetrievedPassage, room: int) -> list[int]:
        """Ids of a passage with its marks; its end is cut where the prompt would not fit."""
        passage, tokenizer = evidence.passage, self.system.tokenizer
        body = tokenizer.text(passage_text(passage.title, passage.text))
        kept = body[: max(0, room - len(Paragraph))]
        self.usage = replace(self.usage, truncated_tokens=self.usage.truncated_tokens + len(body) - len(kept))
        return [*tokenizer.control(Paragraph.START), *kept, *tokenizer.control(Paragraph.END)]

    async def _request(self, prompt: Sequence[int], max_tokens: int) -> Generation:
        generation = await self.system.generator.generate(prompt, max_tokens)
        self.usage = replace(
            self.usage,
            prompt_tokens=self.usage.prompt_tokens + generation.prompt_tokens,
            cached_tokens=self.usage.cached_tokens + generation.cached_tokens,
            generated_tokens=self.usage.generated_tokens + len(generation.token_ids),
            engine_requests=self.usage.engine_requests + 1,
        )
        return generation

    def _read(self, generation: Generation) -> tuple[str, str]:
        """Text without control tokens, and with them."""
        tokenizer = self.system.tokenizer
        ids = [token for token in generation.token_ids if token != tokenizer.eos]
        text = [token for token in ids if token not in tokenizer.reflection.control]
        return tokenizer.decode(text).strip(), tokenizer.decode(ids)


def ranked(candidates: Iterable[Segment]) -> tuple[Segment, ...]:
    """Candidates by score, best first; equal scores keep the retriever's order."""
    return tuple(sorted(candidates, key=lambda segment: -segment.critique.score))


def choose(candidates: Sequence[Segment], choices: Sequence[str] = ()) -> Segment:
    """The best candidate; for a closed set, the best one of the answer with the highest summed score."""
    if not choices:
        return ranked(candidates)[0]
    totals: dict[str | None, float] = defaultdict(float)
    for candidate in candidates:
        totals[closed_answer(candidate.text, choices)] += candidate.critique.score
    named = {answer: total for answer, total in totals.items() if answer is not None}
    winner = max(named, key=lambda answer: named[answer]) if named else None
    best = ranked(c for c in candidates if closed_answer(c.text, choices) == winner)[0]
    return best if winner is None else replace(best, text=winner)


def closed_answer(text: str, choices: Sequence[str]) -> str | None:
    """The choice that a text names: equal to it, or beginning with it; case and outer punctuation do not count.

    ``"b."`` and ``"B: because"`` name ``"B"``; ``"Because"`` does not, nor does ``"A dog"`` name ``"A"``: after
    a choice of one letter, words may follow only behind a punctuation mark. None where no choice is named; the
    longest where several are.
    """
    fitting = [choice for choice in choices if (core := re.sub(r"^\W+|\W+$", "", choice)) and _begins_with(text, core)]
    return max(fitting, key=len, default=None)


def _begins_with(text: str, choice: str) -> bool:
    mark = r"[^\w\s]" if len(choice) == 1 else r"\W"
    return re.match(rf"\W*{re.escape(choice)}\s*(?:$|(?<!\s){mark})", text, re.IGNORECASE) is not None
