import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.decoding.reflection import CONTROL_TOKENS, IsSup, Paragraph, ReflectionIds, Retrieve, normalize_group
from tests.support.fakes import WordTokenizer

LOGPROBS = st.lists(st.floats(-80.0, 0.0), min_size=2, max_size=5)


def test_groups_are_normalized_over_probabilities_not_log_probabilities():
    yes, no = normalize_group([math.log(0.06), math.log(0.02)])
    assert yes == pytest.approx(0.75)  # the ratio of the logarithms would be 0.42 and invert the decision
    assert no == pytest.approx(0.25)


def test_token_with_zero_probability_gets_zero():
    assert normalize_group([-math.inf, math.log(0.5), math.log(0.5)]) == pytest.approx((0.0, 0.5, 0.5))


def test_group_without_any_probability_is_an_error():
    with pytest.raises(ValueError, match="no finite log-probability"):
        normalize_group([-math.inf, -math.inf])


@given(LOGPROBS, st.floats(-500.0, 500.0))
def test_normalization_ignores_a_constant_offset(logprobs, constant):
    shifted = normalize_group([p + constant for p in logprobs])
    assert shifted == pytest.approx(normalize_group(logprobs), abs=1e-9)


@given(LOGPROBS)
def test_probabilities_are_a_distribution(logprobs):
    probabilities = normalize_group(logprobs)
    assert sum(probabilities) == pytest.approx(1.0)
    assert all(0.0 <= p <= 1.0 for p in probabilities)


@given(LOGPROBS, st.data(), st.floats(0.01, 20.0))
def test_raising_a_token_does_not_lower_its_probability(logprobs, data, gain):
    place = data.draw(st.integers(0, len(logprobs) - 1))
    raised = [p + gain * (n == place) for n, p in enumerate(logprobs)]
    assert normalize_group(raised)[place] >= normalize_group(logprobs)[place]


def test_ids_come_from_the_vocabulary():
    ids = ReflectionIds.of(WordTokenizer(), "words")
    assert ids[Retrieve.YES] == 2
    assert ids.get_group(IsSup) == (7, 8, 9)
    assert len(ids.reflection) == 13
    assert ids[Paragraph.START] not in ids.reflection
    assert ids.control == frozenset(range(2, 2 + len(CONTROL_TOKENS)))


def test_missing_tokens_are_named():
    tokenizer = WordTokenizer()
    del tokenizer.vocabulary["[Utility:3]"]
    with pytest.raises(
        ValueError, match=r"model gpt2: its tokenizer lacks 1 of 15 reflection tokens \(\[Utility:3\]\)"
    ):
        ReflectionIds.of(tokenizer, "gpt2")
