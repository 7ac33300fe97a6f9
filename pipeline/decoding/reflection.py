"""Reflection tokens, their ids in a model's vocabulary, and the probabilities of their groups.

Source: Asai et al. 2023 (arXiv 2310.11511), table 1 and appendix A.3. The texts of the tokens are those of the
released models, so that ``selfrag/selfrag_llama2_7b`` works unchanged.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Protocol


class Retrieve(StrEnum):
    """Decision whether to retrieve a passage before the next segment."""

    YES = "[Retrieval]"
    NO = "[No Retrieval]"
    CONTINUE = "[Continue to Use Evidence]"


class IsRel(StrEnum):
    """Critique of a passage: whether it is useful for the query."""

    RELEVANT = "[Relevant]"
    IRRELEVANT = "[Irrelevant]"


class IsSup(StrEnum):
    """Critique of a segment: how far its passage supports it."""

    FULLY = "[Fully supported]"
    PARTIALLY = "[Partially supported]"
    NONE = "[No support / Contradictory]"


class IsUse(StrEnum):
    """Critique of an answer: how useful it is, from 1 to 5."""

    ONE = "[Utility:1]"
    TWO = "[Utility:2]"
    THREE = "[Utility:3]"
    FOUR = "[Utility:4]"
    FIVE = "[Utility:5]"


class Paragraph(StrEnum):
    """The marks around a passage."""

    START = "<paragraph>"
    END = "</paragraph>"


GROUPS: tuple[type[StrEnum], ...] = (Retrieve, IsRel, IsSup, IsUse)
REFLECTION_TOKENS: tuple[str, ...] = tuple(str(token) for group in GROUPS for token in group)
CONTROL_TOKENS: tuple[str, ...] = REFLECTION_TOKENS + tuple(str(mark) for mark in Paragraph)


class Vocabulary(Protocol):
    """The part of a Hugging Face tokenizer that is used to look up the control tokens."""

    def get_vocab(self) -> dict[str, int]: ...


@dataclass(frozen=True)
class ReflectionIds:
    """Ids of the control tokens in one model's vocabulary."""

    ids: Mapping[str, int]

    @classmethod
    def of(cls, tokenizer: Vocabulary, model: str) -> "ReflectionIds":
        """Look up the control tokens in a tokenizer's vocabulary.

        Raises:
            ValueError: the vocabulary lacks some of them; the message names the model and the tokens.
        """
        vocabulary = tokenizer.get_vocab()
        missing = [token for token in CONTROL_TOKENS if token not in vocabulary]
        if missing:
            raise ValueError(
                f"model {model}: its tokenizer lacks {len(missing)} of {len(CONTROL_TOKENS)} reflection tokens "
                f"({', '.join(missing)}); use a model trained for Self-RAG, such as "
                "selfrag/selfrag_llama2_7b, or train one with python -m jobs.teach"
            )
        return cls({token: vocabulary[token] for token in CONTROL_TOKENS})

    def __getitem__(self, token: StrEnum) -> int:
        return self.ids[str(token)]

    def get_group(self, group: type[StrEnum]) -> tuple[int, ...]:
        """Return the ids of a group's tokens, in the order of the group's definition."""
        return self._groups[group]

    @cached_property
    def _groups(self) -> dict[type[StrEnum], tuple[int, ...]]:
        groups: tuple[type[StrEnum], ...] = (*GROUPS, Paragraph)
        ids = {}
        for group in groups:
            ids[group] = tuple(self[token] for token in group)
        return ids

    @cached_property
    def reflection(self) -> tuple[int, ...]:
        """Ids of the 13 reflection tokens: besides the generated ones, the only log-probabilities requested."""
        return tuple(self.ids[token] for token in REFLECTION_TOKENS)

    @cached_property
    def control(self) -> frozenset[int]:
        """Ids of all 15 control tokens, which the text of an answer never contains."""
        return frozenset(self.ids.values())


def normalize_group(logprobs: Sequence[float]) -> tuple[float, ...]:
    """Normalize one group's log-probabilities over the group (softmax).

    Args:
        logprobs: natural-log probabilities of the group's tokens at one position; some may be ``-inf``, not all.

    Raises:
        ValueError: no token of the group has a finite log-probability, so they cannot be normalized.
    """
    top = max(logprobs)
    if not math.isfinite(top):
        raise ValueError(f"no finite log-probability in the group: {list(logprobs)}")
    weights = [math.exp(logprob - top) for logprob in logprobs]
    total = sum(weights)
    return tuple(weight / total for weight in weights)
