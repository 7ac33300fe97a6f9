"""What travels between the steps: frozen, typed, free of Arrow and of the engine."""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from pipeline.reflection import IsRel, IsSup, IsUse


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
    """

    id: str
    query: str
    input: str | None = None
    task: str | None = None
    choices: tuple[str, ...] = ()
    passages: tuple[Passage, ...] | None = None


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
    """

    token_ids: tuple[int, ...]
    logprobs: npt.NDArray[np.float64]
    reflection_logprobs: npt.NDArray[np.float64]
    prompt_tokens: int = 0
    cached_tokens: int = 0


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
    """

    text: str
    raw: str
    evidence: RetrievedPassage | None
    critique: Critique


@dataclass(frozen=True)
class Usage:
    """What a row cost.

    Attributes:
        prompt_tokens, cached_tokens, generated_tokens: summed over its requests.
        retrievals: searches.
        engine_requests: generations asked for.
        truncated_tokens: passage tokens cut because a prompt did not fit the model.
        seconds: from the first step of the row to its last, queueing included.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    retrievals: int = 0
    engine_requests: int = 0
    truncated_tokens: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Answer:
    """The outcome for one query.

    Attributes:
        retrieve_probability: p(Yes) / (p(Yes) + p(No)) at the first decision; None where the mode decides.
        segments: those of the answer, in order.
        candidates: every scored segment, best first; empty unless asked for.
    """

    answer: str
    raw_output: str
    retrieved: bool
    retrieve_probability: float | None
    segments: tuple[Segment, ...]
    usage: Usage
    candidates: tuple[Segment, ...] = field(default=())

    @property
    def passages(self) -> tuple[RetrievedPassage, ...]:
        """The passages that the answer used, each once, in the order of first use."""
        used = {s.evidence.passage.id: s.evidence for s in self.segments if s.evidence is not None}
        return tuple(used.values())
