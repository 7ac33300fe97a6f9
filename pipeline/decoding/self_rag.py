"""The algorithm for one query: decide, retrieve, generate, critique, choose.

Asai et al. 2023, algorithm 1. Every query and every segment of it is a coroutine; the engine batches their requests,
across queries and depths.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from pipeline.config.sections import DecodingConfig, Reading
from pipeline.decoding.beam import decide_opening, gather_all, search
from pipeline.decoding.choose import choose, join_cited_text, join_text, list_cited_passages
from pipeline.decoding.profiles import Tasks
from pipeline.decoding.protocols import Critic, Generator, Reader, Retriever
from pipeline.decoding.reflection import Retrieve
from pipeline.decoding.searches import record_searches
from pipeline.decoding.types import Answer, Candidate, Finish, Path, Query, RetrievedPassage, Usage


@dataclass(frozen=True)
class SelfRag:
    """Answers queries with one engine and one retriever.

    Attributes:
        tasks: decoding settings by task.
        retriever: None if every query has its own passages or retrieval is off.
    """

    generator: Generator
    critic: Critic
    tasks: Tasks
    retriever: Retriever | None = None

    async def answer(self, query: Query) -> Answer:
        """Answer one query.

        Raises:
            ValueError: the query is empty, does not fit the model, or needs an index and there is none.
        """
        query.check()
        query, config = self.tasks.apply(query)
        reader = self.critic.reader(self.generator, config, query)
        return await Decoding(query, reader, self.retriever, config).run()


@dataclass
class Decoding:
    """The state of one query while it is decoded.

    Attributes:
        searches: retrieved passages by search text.
        searching: seconds spent waiting for the search.
        reranking: seconds spent waiting for the passages to be reranked.
        children: expansions of each path.
    """

    query: Query
    reader: Reader
    retriever: Retriever | None
    config: DecodingConfig
    searches: dict[str, list[RetrievedPassage]] = field(default_factory=dict)
    searching: float = 0.0
    reranking: float = 0.0
    children: dict[Path, Sequence[Path]] = field(default_factory=dict)

    async def run(self) -> Answer:
        """Run the algorithm and return the answer."""
        started = time.monotonic()
        root = Path((), await self.reader.decide())
        decided = time.monotonic()
        paths = await search(root, self.expand, self.config)
        usage = replace(
            self.reader.usage,
            retrievals=len(self.searches),
            empty_searches=sum(not found for found in self.searches.values()),
            seconds=time.monotonic() - started,
            decide_seconds=decided - started,
            retrieve_seconds=self.searching,
            rerank_seconds=self.reranking,
        )
        candidates = list_candidates(root, self.children) if self.config.keep_candidates else ()
        answer = conclude(root, paths, self.query.choices, self.config, usage, candidates)
        return replace(answer, searches=record_searches(self.searches))

    async def expand(self, path: Path) -> Sequence[Path]:
        """Write all one-segment continuations of a path at once; siblings share their prefix in the engine's cache."""
        if not self.reader.has_room(path):
            return []
        opening = decide_opening(path, self.config)
        openings = {opening}
        if self.config.explore and not path.segments:
            openings |= {Retrieve.YES, Retrieve.NO}
        expansions: list[tuple[Retrieve, RetrievedPassage | None]] = []
        for one in Retrieve:
            if one in openings:
                expansions += await self.list_expansions(path, one)
        steps = [self.reader.write(path, one, evidence) for one, evidence in expansions]
        self.children[path] = await gather_all(*steps)
        return self.children[path]

    async def list_expansions(self, path: Path, opening: Retrieve) -> list[tuple[Retrieve, RetrievedPassage | None]]:
        """List the expansions of a decision: one for each group of retrieved passages, or one without new passages."""
        if opening is Retrieve.CONTINUE:
            return [(opening, path.evidence)]
        found = await self.retrieve(path) if opening is Retrieve.YES else []
        if not found:
            return [(opening, None)]
        return [(opening, evidence) for evidence in group_passages(found, self.config.reading)]

    async def retrieve(self, path: Path) -> list[RetrievedPassage]:
        """Return the top k passages: the given ones, or the index's for the query and, later, the last segment."""
        if self.query.passages is not None:
            return take_given_passages(self.query, self.config.passages)
        if self.retriever is None:
            raise ValueError("the query has no passages of its own and the run has no index (--index)")
        last = path.segments[-1].text if path.segments and self.config.search == "dynamic" else ""
        asked = f"{self.query.query} {last}".rstrip()
        if asked not in self.searches:
            began = time.monotonic()
            found = await self.retriever.retrieve(asked, self.config.passages, self.query.filter)
            self.searches[asked] = found.passages
            self.searching += time.monotonic() - began - found.rerank_seconds
            self.reranking += found.rerank_seconds
        return self.searches[asked]


def group_passages(found: Sequence[RetrievedPassage], reading: Reading) -> list[RetrievedPassage]:
    """Group passages for reading: each by itself, as in the paper, or all in one group, the others beside the first."""
    if reading == "each":
        return list(found)
    first, *others = found
    return [replace(first, beside=tuple(others))]


def conclude(
    root: Path,
    paths: Sequence[Path],
    choices: Sequence[str],
    config: DecodingConfig,
    usage: Usage,
    candidates: tuple[Candidate, ...],
) -> Answer:
    """Choose among the paths that compete, and build the answer."""
    best, answer = choose(paths, choices)
    if answer is None:
        answer = join_cited_text(best.segments) if config.citations else join_text(best.segments)
    raw_output = "".join(segment.raw for segment in best.segments)
    retrieved = bool(list_cited_passages(best.segments))
    return Answer(
        answer=answer,
        raw_output=raw_output,
        retrieved=retrieved,
        retrieve_probability=root.boundary.probability if root.boundary else None,
        finish=best.finish or Finish.SEGMENTS,
        segments=best.segments,
        usage=usage,
        candidates=candidates,
    )


def list_candidates(root: Path, children: dict[Path, Sequence[Path]]) -> tuple[Candidate, ...]:
    """List every written segment, parents before their children; the order does not depend on timing."""
    candidates: list[Candidate] = []
    waiting: list[tuple[Path, int | None]] = [(root, None)]
    for path, place in waiting:
        for child in children.get(path, ()):
            waiting.append((child, len(candidates)))
            candidates.append(Candidate(child.segments[-1], place, child.boundary, child.finish))
    return tuple(candidates)


def take_given_passages(query: Query, k: int) -> list[RetrievedPassage]:
    """Return the first k passages that a query brought along, in their order, without scores."""
    return [RetrievedPassage(passage, None, rank) for rank, passage in enumerate((query.passages or ())[:k], start=1)]
