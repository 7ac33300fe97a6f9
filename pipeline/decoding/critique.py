"""Score one segment by its reflection tokens: Generation → Critique.

Asai et al. 2023, section 3.3 (equations 3 and 4) and appendix A.3. The score of a segment is

    f = w_seq · exp(mean log p(text)) + w_rel · s(IsRel) + w_sup · s(IsSup) + w_use · s(IsUse)

The score s of a group is the expected value of its tokens. Their probabilities are read at the position of the
group's first token in the segment, and normalized over the group. A group without a token in the segment contributes 0.
"""

import math
from enum import StrEnum
from typing import TypeVar

from pipeline.config.sections import Weights
from pipeline.decoding.reflection import (
    REFLECTION_TOKENS,
    IsRel,
    IsSup,
    IsUse,
    ReflectionIds,
    Retrieve,
    normalize_group,
)
from pipeline.decoding.types import Critique, Generation

# Value of each token of a group, in the order of the group's definition.
IS_REL_VALUES = (1.0, 0.0)
IS_SUP_VALUES = (1.0, 0.5, 0.0)
IS_USE_VALUES = (-1.0, -0.5, 0.0, 0.5, 1.0)

Group = TypeVar("Group", bound=StrEnum)


def expected_value(probabilities: tuple[float, ...], values: tuple[float, ...]) -> float:
    """Return the expected value Σ p_i v_i."""
    return sum(p * v for p, v in zip(probabilities, values, strict=True))


def read_probabilities(generation: Generation, position: int, group: type[StrEnum]) -> tuple[float, ...]:
    """Return the probabilities of a group's tokens at one position, in the order of the group's definition."""
    first = REFLECTION_TOKENS.index(next(iter(group)))
    return normalize_group(generation.reflection_logprobs[position, first : first + len(group)].tolist())


def read_retrieve_probability(generation: Generation, position: int = 0) -> float:
    """Return p(Yes) / (p(Yes) + p(No)) at a boundary, which is compared with the threshold δ (section 3.3)."""
    first = REFLECTION_TOKENS.index(Retrieve.YES)
    pair = generation.reflection_logprobs[position, first : first + 2]
    return normalize_group(pair.tolist())[0]


def find_group_token(generation: Generation, group: type[Group], ids: ReflectionIds) -> tuple[int, Group] | None:
    """Find the first token of a group in the generation: its position and the token, or None."""
    tokens = dict(zip(ids.get_group(group), group, strict=True))
    for position, token_id in enumerate(generation.token_ids):
        if token_id in tokens:
            return position, tokens[token_id]
    return None


def sequence_probability(generation: Generation, non_text_ids: frozenset[int]) -> float:
    """Return exp(mean log p) over the text tokens; 0 for a segment without text.

    Args:
        non_text_ids: ids that are not text, such as control tokens and the end of sequence.
    """
    text = [float(p) for i, p in zip(generation.token_ids, generation.logprobs, strict=True) if i not in non_text_ids]
    return math.exp(sum(text) / len(text)) if text else 0.0


def segment_score(
    sequence: float, is_rel: float | None, is_sup: float | None, is_use: float | None, weights: Weights
) -> float:
    """Return the weighted sum f (equation 4); a group without a score contributes 0."""
    return (
        weights.sequence * sequence
        + weights.relevance * (is_rel or 0.0)
        + weights.support * (is_sup or 0.0)
        + weights.utility * (is_use or 0.0)
    )


def critique_segment(generation: Generation, ids: ReflectionIds, eos: int, weights: Weights) -> Critique:
    """Score a segment by the reflection tokens in it."""
    is_rel, relevance = _score_group(generation, IsRel, IS_REL_VALUES, ids)
    is_sup, support = _score_group(generation, IsSup, IS_SUP_VALUES, ids)
    is_use, utility = _score_group(generation, IsUse, IS_USE_VALUES, ids)
    sequence = sequence_probability(generation, ids.control | {eos})
    return Critique(
        sequence_probability=sequence,
        is_rel=is_rel,
        is_sup=is_sup,
        is_use=is_use,
        score=segment_score(sequence, is_rel, is_sup, is_use, weights),
        relevance=relevance,
        support=support,
        utility=utility,
    )


def _score_group(
    generation: Generation, group: type[Group], values: tuple[float, ...], ids: ReflectionIds
) -> tuple[float | None, Group | None]:
    """Return the score and the token of a group; None for both if the segment has no token of the group."""
    found = find_group_token(generation, group, ids)
    if found is None:
        return None, None
    position, token = found
    return expected_value(read_probabilities(generation, position, group), values), token
