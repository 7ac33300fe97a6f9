"""The data types passed between the steps: frozen, and independent of Arrow and the engine."""

from dataclasses import dataclass, fields, replace
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from pipeline.decoding.reflection import IsRel, IsSup, IsUse, Retrieve


@dataclass(frozen=True)
class Passage:
    """A text that an answer may rest on.

    Attributes:
        id: unique id.
        title: title; may be empty.
        text: the text itself.
        metadata: further columns of the passage as a JSON object; None if the index keeps none.
    """

    id: str
    title: str
    text: str
    metadata: str | None = None


@dataclass(frozen=True)
class RetrievedPassage:
    """A passage with its rank in the list of passages retrieved for or given with a query.

    Attributes:
        passage: the passage itself.
        score: similarity to the query in the metric of the index; None for a passage given with the query.
        rank: position in that list, from 1; after reranking, if there is any.
        rerank_score: logit of the cross-encoder for the query and the passage; None without reranking.
        beside: passages that are read in the same prompt, behind this one (``decoding.reading: together``).
    """

    passage: Passage
    score: float | None
    rank: int
    rerank_score: float | None = None
    beside: tuple["RetrievedPassage", ...] = ()

    @property
    def read(self) -> tuple["RetrievedPassage", ...]:
        """All passages that are read in the same prompt, in order: this one and those beside it."""
        return (self, *self.beside)

    def keep_first(self, passages: int) -> "RetrievedPassage":
        """Return this passage with so few beside it that ``passages`` are read, at least one."""
        return replace(self, beside=self.beside[: max(passages, 1) - 1])


@dataclass(frozen=True)
class Retrieved:
    """The result of a search.

    Attributes:
        passages: the passages found, best first.
        rerank_seconds: seconds of the search that were spent waiting for the cross-encoder.
    """

    passages: list[RetrievedPassage]
    rerank_seconds: float = 0.0


@dataclass(frozen=True)
class SearchRecord:
    """A search of the index.

    Attributes:
        text: text that was searched for.
        digest: digest of the passages found, by which a later search can be compared.
    """

    text: str
    digest: str


@dataclass(frozen=True)
class Query:
    """One row of the query set.

    Attributes:
        id: unique id of the row.
        query: text of the query, for the prompt and for searches.
        input: text under ``### Input:`` in the prompt.
        task: name of the task.
        choices: closed set of answers; empty for open questions.
        passages: given passages in their order; None if the index is searched instead.
        instruction: instruction of the task, which replaces the query in the prompt but not in searches.
        filter: condition that passages found in the index must meet; None if any will do.
    """

    id: str
    query: str
    input: str | None = None
    task: str | None = None
    choices: tuple[str, ...] = ()
    passages: tuple[Passage, ...] | None = None
    instruction: str | None = None
    filter: str | None = None

    def check(self) -> None:
        """Check that the query can be answered.

        Raises:
            ValueError: the query is empty.
        """
        if not self.query.strip():
            raise ValueError("the query is empty")


@dataclass(frozen=True)
class Generation:
    """The engine's continuation of a prompt.

    Attributes:
        token_ids: the T generated ids, including the stop token.
        logprobs: float64 [T], natural-log probability of each generated token.
        reflection_logprobs: float64 [T, 13], natural-log probabilities of the reflection tokens at each position, in
            the order of ``reflection.REFLECTION_TOKENS``.
        prompt_tokens: number of prompt tokens.
        cached_tokens: number of prompt tokens found in the prefix cache.
        queue_seconds: seconds until the engine scheduled the request.
        prefill_seconds: seconds from scheduling to the first token; engine steps are shared with other requests.
        decode_seconds: seconds from the first token to the last; engine steps are shared with other requests.
    """

    token_ids: tuple[int, ...]
    logprobs: npt.NDArray[np.float64]
    reflection_logprobs: npt.NDArray[np.float64]
    prompt_tokens: int = 0
    cached_tokens: int = 0
    queue_seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0


@dataclass(frozen=True)
class Critique:
    """Scores of one segment; those of a group that the model did not judge are None.

    Attributes:
        sequence_probability: exp of the mean log-probability of the text tokens, in [0, 1].
        is_rel: p(Relevant), in [0, 1].
        is_sup: p(Fully) + 0.5 p(Partially), in [0, 1].
        is_use: expected value of -1, -0.5, 0, 0.5, 1 over the utilities 1 to 5, in [-1, 1].
        score: weighted sum f (paper, equation 4).
        relevance, support, utility: token of each group: the one written, or the most likely one if the model was
            prompted.
    """

    sequence_probability: float
    is_rel: float | None
    is_sup: float | None
    is_use: float | None
    score: float
    relevance: IsRel | None = None
    support: IsSup | None = None
    utility: IsUse | None = None


@dataclass(frozen=True)
class Segment:
    """A part of an answer with its evidence and critique.

    Attributes:
        text: text without reflection tokens.
        raw: text with reflection tokens, without the passage.
        evidence: passage that the segment was written from, with those read beside it; None without retrieval.
        critique: scores of the segment.
        opening: decision at the boundary before the segment; with ``[Retrieval]`` and no evidence, the search found
            nothing.
        token_ids: ids as written, without the Retrieve token or the end of the answer that follows them.
    """

    text: str
    raw: str
    evidence: RetrievedPassage | None
    critique: Critique
    opening: Retrieve = Retrieve.NO
    token_ids: tuple[int, ...] = ()

    @property
    def passage_id(self) -> str | None:
        """Id of the (first) passage that the segment was written from; None without retrieval."""
        return self.evidence.passage.id if self.evidence else None


@dataclass(frozen=True)
class Boundary:
    """The end of a prompt or segment, with the model's decision whether to retrieve for the next segment.

    Attributes:
        probability: p(Yes) / (p(Yes) + p(No)); None if the model was not queried, because the mode decides or no
            segment may follow.
        keep: whether the model wrote ``[Continue to Use Evidence]``.
    """

    probability: float | None = None
    keep: bool = False


class Finish(StrEnum):
    """The reason why an answer ends."""

    STOP = "stop"  # the model ended the answer
    LENGTH = "length"  # the last segment reached decoding.max_tokens
    SEGMENTS = "segments"  # the answer reached decoding.segments before the model ended it
    ROOM = "room"  # a longer prompt would not fit the model
    CONSTRAINT = "constraint"  # decoding.constraint dropped all continuations
    PRUNED = "pruned"  # rescoring only: the run wrote no continuation of this path on the decided branch


@dataclass(frozen=True, eq=False)
class Path:
    """A partial or finished answer: a node in the tree of the search. Paths are compared by identity.

    Attributes:
        segments: segments so far, in order.
        boundary: boundary at which the next segment would begin; None if the path is finished.
        finish: finish reason; None if the path is live.
    """

    segments: tuple[Segment, ...] = ()
    boundary: Boundary | None = Boundary()
    finish: Finish | None = None

    @property
    def finished(self) -> bool:
        """Whether the answer is complete, so that the path is not expanded any more."""
        return self.boundary is None

    @property
    def score(self) -> float:
        """Mean score of the segments; 0 without segments."""
        return sum(s.critique.score for s in self.segments) / len(self.segments) if self.segments else 0.0

    @property
    def evidence(self) -> RetrievedPassage | None:
        """The evidence of the last segment; None if there is none."""
        return self.segments[-1].evidence if self.segments else None

    def end(self, finish: Finish) -> "Path":
        """Return the same answer as a finished path."""
        return Path(self.segments, None, finish)


@dataclass(frozen=True)
class Candidate:
    """A scored segment, as a node in the tree of all segments written for a query.

    Attributes:
        segment: the segment itself.
        parent: index of the preceding segment in the list of candidates; None for a first segment.
        boundary: boundary after the segment; None if the path that it ends is finished.
        finish: finish reason of the path that the segment ends; None if the path is live.
    """

    segment: Segment
    parent: int | None
    boundary: Boundary | None
    finish: Finish | None = None


@dataclass(frozen=True)
class Usage:
    """Resources used by a row or a request; instances can be added.

    Attributes:
        prompt_tokens, cached_tokens, generated_tokens: tokens, summed over requests.
        retrievals: number of searches.
        empty_searches: number of searches that found no passage.
        engine_requests: number of generations.
        truncated_tokens: passage tokens cut because a prompt did not fit the model, summed over requests.
        seconds: wall-clock seconds from the first step of the row to the last, including queueing.
        decide_seconds: wall-clock seconds until the first decision.
        retrieve_seconds: seconds spent waiting for the search, summed over searches that may run concurrently.
        rerank_seconds: seconds spent waiting for the passages to be reranked, summed likewise.
        critique_seconds: seconds spent scoring segments and decoding their text, after generation.
        queue_seconds, prefill_seconds, decode_seconds: as in :class:`Generation`, summed over requests that may run
            concurrently.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    retrievals: int = 0
    empty_searches: int = 0
    engine_requests: int = 0
    truncated_tokens: int = 0
    seconds: float = 0.0
    decide_seconds: float = 0.0
    retrieve_seconds: float = 0.0
    rerank_seconds: float = 0.0
    critique_seconds: float = 0.0
    queue_seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    @classmethod
    def of(cls, generation: Generation) -> "Usage":
        """Return the usage of one request."""
        shared = {name: getattr(generation, name) for name in ("prompt_tokens", "cached_tokens", *REQUEST_SECONDS)}
        return cls(generated_tokens=len(generation.token_ids), engine_requests=1, **shared)

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(**{name: value + getattr(other, name) for name, value in vars(self).items()})


# Fields of ``Usage`` by kind: seconds summed over requests, counts, and seconds of the row itself.
REQUEST_SECONDS = ("queue_seconds", "prefill_seconds", "decode_seconds")
USAGE_COUNTS = tuple(field.name for field in fields(Usage) if field.type is int)
ROW_SECONDS = tuple(field.name for field in fields(Usage) if field.name not in (*USAGE_COUNTS, *REQUEST_SECONDS))


@dataclass(frozen=True)
class Answer:
    """The answer to one query, with its segments and usage.

    Attributes:
        answer: text of the answer, or the chosen one of a closed set.
        raw_output: text of the answer with reflection tokens, without passages.
        retrieved: whether any text of the answer has a passage.
        retrieve_probability: p(Yes) / (p(Yes) + p(No)) at the first decision; None if the mode decided.
        finish: finish reason.
        segments: segments of the answer, in order.
        usage: resources used by the query.
        candidates: every scored segment, parents before their children; empty unless ``keep_candidates`` is set.
        searches: searches of the index, by text.
    """

    answer: str
    raw_output: str
    retrieved: bool
    retrieve_probability: float | None
    finish: Finish
    segments: tuple[Segment, ...]
    usage: Usage
    candidates: tuple[Candidate, ...] = ()
    searches: tuple[SearchRecord, ...] = ()
