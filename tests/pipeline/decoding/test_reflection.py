import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.decoding.reflection import CONTROL_TOKENS, IsSup, Paragraph, ReflectionIds, Retrieve, group_probabilities
from tests.support.fakes import WordTokenizer

LOGPROBS = st.lists(st.floats(-80.0, 0.0), min_size=2, max_size=5)


def test_probabilities_are_ratios_of_probabilities_not_of_log_probabilities():
    yes, no = group_probabilities([math.log(0.06), math.log(0.02)])
    assert yes == pytest.approx(0.75)  # the ratio of the logarithms would be 0.42 and invert the decision
    assert no == pytest.approx(0.25)


def test_token_without_probability_counts_nothing():
    assert group_probabilities([-math.inf, math.log(0.5), math.log(0.5)]) == pytest.approx((0.0, 0.5, 0.5))


def test_group_without_any_probability_is_an_error():
    with pytest.raises(ValueError, match="no finite log-probability"):
        group_probabilities([-math.inf, -math.inf])


@given(LOGPROBS, st.floats(-500.0, 500.0))
def test_a_constant_added_to_all_changes_nothing(logprobs, constant):
    shifted = group_probabilities([p + constant for p in logprobs])
    assert shifted == pytest.approx(group_probabilities(logprobs), abs=1e-9)


@given(LOGPROBS)
def test_probabilities_are_a_distribution(logprobs):
    probabilities = group_probabilities(logprobs)
    assert sum(probabilities) == pytest.approx(1.0)
    assert all(0.0 <= p <= 1.0 for p in probabilities)


@given(LOGPROBS, st.data(), st.floats(0.01, 20.0))
def test_more_likely_token_gets_more(logprobs, data, gain):
    place = data.draw(st.integers(0, len(logprobs) - 1))
    raised = [p + gain * (n == place) for n, p in enumerate(logprobs)]
    assert group_probabilities(raised)[place] >= group_probabilities(logprobs)[place]


def test_ids_follow_the_vocabulary():
    ids = ReflectionIds.of(WordTokenizer(), "words")
    assert ids[Retrieve.YES] == 2
    assert ids.group(IsSup) == (7, 8, 9)
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
