import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config.sections import Weights
from pipeline.decoding.critique import critique_segment, read_retrieve_probability, segment_score
from pipeline.decoding.reflection import IsRel, IsSup, IsUse
from tests.support.fakes import EOS, generation, word_tokenizer

TOKENIZER = word_tokenizer()
IDS = TOKENIZER.reflection
SHARE = st.floats(0.0, 1.0)


def judge(written, reflection, weights=Weights()):
    return critique_segment(generation(TOKENIZER, written, reflection), IDS, EOS, weights)


def test_scores_match_a_worked_example():
    found = judge(
        ["[Relevant]", ("Paris", 0.5), ("France", 0.125), "[Fully supported]", "[Utility:5]", "</s>"],
        {
            0: {"[Relevant]": 0.6, "[Irrelevant]": 0.2},
            3: {"[Fully supported]": 0.4, "[Partially supported]": 0.2, "[No support / Contradictory]": 0.2},
            4: {"[Utility:1]": 0.1, "[Utility:2]": 0.1, "[Utility:3]": 0.2, "[Utility:4]": 0.2, "[Utility:5]": 0.4},
        },
    )
    assert found.is_rel == pytest.approx(0.75)  # 0.6 / 0.8
    assert found.is_sup == pytest.approx(0.625)  # (0.4 + 0.5 · 0.2) / 0.8
    assert found.is_use == pytest.approx(0.35)  # -0.1 - 0.05 + 0 + 0.1 + 0.4
    assert found.sequence_probability == pytest.approx(0.25)  # √(0.5 · 0.125): control tokens do not count
    assert found.score == pytest.approx(0.25 + 0.75 + 0.625 + 0.5 * 0.35)
    assert (found.relevance, found.support, found.utility) == (IsRel.RELEVANT, IsSup.FULLY, IsUse.FIVE)


def test_missing_group_is_null_and_adds_nothing():
    found = judge([("Paris", 0.5), "</s>"], {})
    assert (found.is_rel, found.is_sup, found.is_use) == (None, None, None)
    assert found.score == pytest.approx(0.5)


def test_score_of_zero_is_not_null():
    found = judge(["[Irrelevant]", "</s>"], {0: {"[Relevant]": 1e-300, "[Irrelevant]": 1.0}})
    assert found.is_rel == pytest.approx(0.0)
    assert found.is_rel is not None


def test_group_is_read_at_its_position():
    found = judge(
        ["Paris", "[Fully supported]"],
        {
            0: {"[Fully supported]": 0.01, "[No support / Contradictory]": 0.9},
            1: {"[Fully supported]": 0.9, "[Partially supported]": 1e-9, "[No support / Contradictory]": 0.1},
        },
    )
    assert found.is_sup == pytest.approx(0.9)


def test_first_token_of_a_group_counts():
    found = judge(
        ["[Relevant]", "[Irrelevant]"],
        {0: {"[Relevant]": 0.8, "[Irrelevant]": 0.2}, 1: {"[Relevant]": 0.1, "[Irrelevant]": 0.9}},
    )
    assert found.is_rel == pytest.approx(0.8)
    assert found.relevance == IsRel.RELEVANT


def test_segment_without_text_has_no_sequence_probability():
    assert judge(["[Relevant]", "</s>"], {0: {"[Relevant]": 0.5, "[Irrelevant]": 0.5}}).sequence_probability == 0.0


def test_retrieve_probability_excludes_continue():
    at_start = {0: {"[Retrieval]": 0.03, "[No Retrieval]": 0.09, "[Continue to Use Evidence]": 0.8}}
    assert read_retrieve_probability(generation(TOKENIZER, ["[No Retrieval]"], at_start)) == pytest.approx(0.25)


@given(SHARE, SHARE, SHARE, st.floats(-1.0, 1.0))
def test_score_lies_within_its_bounds(sequence, rel, sup, use):
    assert -0.5 <= segment_score(sequence, rel, sup, use, Weights()) <= 3.5


@given(st.lists(st.floats(-30.0, -0.001), min_size=10, max_size=10), st.floats(-20.0, 0.0))
def test_scores_are_bounded_and_ignore_a_constant(logprobs, constant):
    def reflection(shift):
        names = [*IsRel, *IsSup, *IsUse]
        return {n: {str(t): math.exp(p + shift) for t, p in zip(names, logprobs, strict=True)} for n in range(3)}

    written = ["[Relevant]", "[Fully supported]", "[Utility:4]"]
    found, shifted = judge(written, reflection(0.0)), judge(written, reflection(constant))
    assert 0.0 <= found.is_rel <= 1.0
    assert 0.0 <= found.is_sup <= 1.0
    assert -1.0 <= found.is_use <= 1.0
    assert shifted.score == pytest.approx(found.score, abs=1e-6)


@given(SHARE, SHARE, st.sampled_from(["sequence", "relevance", "support"]), st.floats(0.0, 5.0))
def test_score_grows_with_the_weight_of_a_positive_group(value, other, group, gain):
    low, high = Weights(), Weights(**{group: getattr(Weights(), group) + gain})
    values = {"sequence": other, "relevance": other, "support": other} | {group: value}
    scores = [segment_score(values["sequence"], values["relevance"], values["support"], 0.0, w) for w in (low, high)]
    assert scores[1] - scores[0] == pytest.approx(gain * value, abs=1e-9)


@given(st.floats(-1.0, 1.0), st.floats(0.0, 5.0))
def test_utility_weight_scales_the_utility_score(use, gain):
    low, high = Weights(), Weights(utility=0.5 + gain)
    rise = segment_score(0.5, 0.5, 0.5, use, high) - segment_score(0.5, 0.5, 0.5, use, low)
    assert rise == pytest.approx(gain * use, abs=1e-9)


@given(SHARE, SHARE, SHARE)
def test_score_is_monotone_in_each_group(one, other, rest):
    low, high = sorted((one, other))
    for place in range(3):
        values = [rest] * 3
        scores = []
        for value in (low, high):
            values[place] = value
            scores.append(segment_score(values[0], values[1], values[2], 0.0, Weights()))
        assert scores[0] <= scores[1]
