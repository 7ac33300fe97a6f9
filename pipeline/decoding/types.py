"""What travels between the steps: frozen, typed, free of Arrow and of the engine."""

from dataclasses import dataclass, fields
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from pipeline.decoding.reflection import IsRel, IsSup, IsUse, Retrieve


@dataclass(frozen=True)
class Passage:
    """A text that an answer may rest on."""

    id: str
    title: str
    text: str


@dataclass(frozen=True)
class RetrievedPassage:
    """A passage with its place in a retriever's list.

    Attributes:
        score: the index's similarity (its metric says of what kind), None for a passage given with the query.
        rank: from 1, best first.
    """

    passage: Passage
    score: float | None
    rank: int


@dataclass(frozen=True)
class Query:
    """One row of the query set.

    Attributes:
        input: what goes under ``### Input:``.
        task: name of the task.
        choices: closed set of answers; empty for open questions.
        passages: given passages, in their order; None where the index is asked instead.
        instruction: what the model is asked, where a task says it otherwise than the query; searches use the query.
    """

    id: str
    query: str
    input: str | None = None
    task: str | None = None
    choices: tuple[str, ...] = ()
    passages: tuple[Passage, ...] | None = None
    instruction: str | None = None

    def check(self) -> None:
        """Refuse what cannot be asked.

        Raises:
            ValueError: the query is empty.
        """
        if not self.query.strip():
            raise ValueError("the query is empty")


@dataclass(frozen=True)
class Generation:
    """What the engine wrote after a prompt.

    Attributes:
        token_ids: the T ids written, the stop token included.
        logprobs: float64 [T], natural-log probability of each of them.
        reflection_logprobs: float64 [T, 13], those of the reflection tokens at each position, in the order of
            ``reflection.REFLECTION_TOKENS``.
        prompt_tokens: tokens of the prompt.
        cached_tokens: those of them that the prefix cache had.
        queue_seconds, prefill_seconds, decode_seconds: that it waited for a slot, and that the engine took to its
            first token and from there to its last; steps are shared with other requests.
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
    """Scores of one segment; None where the segment holds no token of the group.

    Attributes:
        sequence_probability: exp of the mean log-probability of the text tokens, in [0, 1].
        is_rel: p(Relevant), in [0, 1].
        is_sup: p(Fully) + 0.5 p(Partially), in [0, 1].
        is_use: expectation of -1, -0.5, 0, 0.5, 1 over the utilities, in [-1, 1].
        score: the weighted sum f of the paper's equation 4.
        relevance, support, utility: the tokens themselves, as written.
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
    """A piece of an answer with its evidence and its critique.

    Attributes:
        text: without reflection tokens.
        raw: with them, the passage left out.
        evidence: the passage it was written from; None without retrieval.
        opening: what was decided at the boundary before it; ``[Retrieval]`` without evidence found nothing.
        token_ids: as written, without the token that ended it.
    """

    text: str
    raw: str
    evidence: RetrievedPassage | None
    critique: Critique
    opening: Retrieve = Retrieve.NO
    token_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Boundary:
    """What the model says about the next segment, where the last one (or the prompt) ends.

    Attributes:
        probability: p(Yes) / (p(Yes) + p(No)); None where it was not asked.
        keep: whether it wrote ``[Continue to Use Evidence]``.
    """

    probability: float | None = None
    keep: bool = False


class Finish(StrEnum):
    """Why an answer ends where it does."""

    STOP = "stop"  # the model ended it
    LENGTH = "length"  # its last segment has decoding.max_tokens
    SEGMENTS = "segments"  # it has decoding.segments, and the model would have gone on
    ROOM = "room"  # the model takes no longer prompt
    CONSTRAINT = "constraint"  # decoding.constraint left nothing to go on with
    PRUNED = "pruned"  # chosen again: the run had not gone on with it


@dataclass(frozen=True, eq=False)
class Path:
    """An answer under way. Paths are nodes of a tree: equal only if they are the same one.

    Attributes:
        boundary: where its next segment would begin; None once it is finished.
        finish: why it is finished; None while it is not.
    """

    segments: tuple[Segment, ...] = ()
    boundary: Boundary | None = Boundary()
    finish: Finish | None = None

    @property
    def finished(self) -> bool:
        """Whether nothing follows any more."""
        return self.boundary is None

    @property
    def score(self) -> float:
        """Mean of its segments' scores; 0 without any."""
        return sum(s.critique.score for s in self.segments) / len(self.segments) if self.segments else 0.0

    @property
    def evidence(self) -> RetrievedPassage | None:
        """The passage of its last segment."""
        return self.segments[-1].evidence if self.segments else None

    def ended(self, finish: Finish) -> "Path":
        """The same answer, with nothing to follow."""
        return Path(self.segments, None, finish)


@dataclass(frozen=True)
class Candidate:
    """A scored segment in the tree of everything that was written for a query.

    Attributes:
        parent: place of the segment before it in the list of candidates; None for a first one.
        boundary: of the path that it ends; None where nothing follows.
        finish: why nothing follows; None where something may.
    """

    segment: Segment
    parent: int | None
    boundary: Boundary | None
    finish: Finish | None = None


@dataclass(frozen=True)
class Usage:
    """The cost of a row; costs can be added up.

    Attributes:
        prompt_tokens, cached_tokens, generated_tokens: tokens, summed over the row's requests.
        retrievals: number of searches.
        engine_requests: number of generations.
        truncated_tokens: passage tokens cut because a prompt did not fit the model.
        seconds: wall-clock seconds from the first step of the row to its last, queueing included.
        decide_seconds, retrieve_seconds: the part of them until the first decision, and the part spent waiting for
            passages.
        critique_seconds: the part of them spent scoring and decoding segments after their log-probabilities were read.
        queue_seconds, prefill_seconds, decode_seconds: as in :class:`Generation`, summed over requests that run
            concurrently.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    retrievals: int = 0
    engine_requests: int = 0
    truncated_tokens: int = 0
    seconds: float = 0.0
    decide_seconds: float = 0.0
    retrieve_seconds: float = 0.0
    critique_seconds: float = 0.0
    queue_seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    @classmethod
    def of(cls, generation: Generation) -> "Usage":
        """The cost of one request."""
        shared = {name: getattr(generation, name) for name in ("prompt_tokens", "cached_tokens", *REQUEST_SECONDS)}
        return cls(generated_tokens=len(generation.token_ids), engine_requests=1, **shared)

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(**{name: value + getattr(other, name) for name, value in vars(self).items()})


# Fields of ``Usage``: counts, seconds of the row itself, and seconds summed over its requests.
REQUEST_SECONDS = ("queue_seconds", "prefill_seconds", "decode_seconds")
USAGE_COUNTS = tuple(field.name for field in fields(Usage) if field.type is int)
ROW_SECONDS = tuple(field.name for field in fields(Usage) if field.name not in (*USAGE_COUNTS, *REQUEST_SECONDS))


@dataclass(frozen=True)
class Answer:
    """The outcome for one query.

    Attributes:
        retrieve_probability: p(Yes) / (p(Yes) + p(No)) at the first decision; None where the mode decides.
        finish: why it ends where it does.
        segments: those of the answer, in order.
        candidates: every scored segment, parents before their children; empty unless asked for.
    """

    answer: str
    raw_output: str
    retrieved: bool
    retrieve_probability: float | None
    finish: Finish
    segments: tuple[Segment, ...]
    usage: Usage
    candidates: tuple[Candidate, ...] = ()
