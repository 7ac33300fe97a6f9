import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from pipeline.evaluation.metrics import (
    best_over_golds,
    contains,
    is_exact_match,
    is_same_choice,
    rouge_l,
    string_em,
    strip_citations,
    token_f1,
)


@pytest.mark.parametrize(
    ("answer", "gold", "expected"),
    [
        ("It was the Denver Broncos.", "Denver Broncos", True),
        ("In 1066, in Normandy", "1066", True),
        ("He scored 308 points", "30", False),  # a part of a word is no match
        ("Francesca", "France", False),
        ("Broncos of Denver", "Denver Broncos", False),  # words in another order
        ("Denver Carolina Broncos", "Denver Broncos", False),  # words with another between
        ("a man", "the", False),
        ("I saw The The live.", "The The", True),
        ("It is a dog", "A", False),
        ("B. It is a mammal", "A", False),
        ("A. It is a mammal", "A", True),
        ("首都はParis、London、Tokyoです", "London", True),
        ("3，4", "34", False),
        ("It is 3.5 km long.", "3.5", True),
        ("It is 35 km long.", "3.5", False),
        ("5 degrees", "-5", False),
        ("minus -5 degrees", "-5", True),
        ("written in C++.", "C++", True),
        ("written in C.", "C++", False),
        ("日本的首都是东京。", "东京", True),
        ("日本的首都是北京。", "东京", False),
        ("Это «Москва».", "Москва", True),
        ("In Москве", "Москва", False),
        ("He lives in “Paris”.", "Paris", True),
        ("un cafe\u0301 noir", "caf\u00e9", True),
        ("", "France", False),
    ],
)
def test_contains_compares_whole_words_in_order(answer: str, gold: str, expected: bool) -> None:
    assert contains(answer, gold) is expected


def test_exact_match_ignores_case_articles_and_punctuation() -> None:
    assert is_exact_match("The Norse.", "norse")
    assert not is_exact_match("the Norse leader", "norse")


@pytest.mark.parametrize(
    ("answer", "gold", "expected"),
    [
        ("Denver Broncos", "Denver Broncos", 1.0),
        ("the Denver Broncos team", "Denver Broncos", 0.8),  # precision 2/3, recall 1
        ("very very big", "very big dog", 2 / 3),  # a doubled word is shared once: precision 2/3, recall 2/3
        ("nothing", "Denver", 0.0),
        ("", "Denver", 0.0),
        ("the", "a", 0.0),
        ("", "A", 0.0),
        ("A.", "A", 1.0),
        ("-", "-", 1.0),
        ("5", "-5", 0.0),
        ("东京都", "东京", 0.8),  # precision 2/3, recall 1
    ],
)
def test_token_f1_matches_worked_examples(answer: str, gold: str, expected: float) -> None:
    assert token_f1(answer, gold) == pytest.approx(expected)


def test_best_matching_gold_answer_counts() -> None:
    assert best_over_golds(token_f1, "Denver Broncos", ["Broncos", "Denver Broncos", "x"]) == 1.0


@pytest.mark.parametrize(
    ("answer", "gold", "expected"),
    [
        ("A", "A", True),
        ("a.", "(A)", True),
        ("A", "B", False),
        ("Because", "B", False),
        ("", "A", False),
        ("REFUTES", "refutes", True),
        ("not enough info", "NOT ENOUGH INFO", True),
        ("SUPPORTS the claim", "SUPPORTS", False),
        ("-1", "1", False),
        ("C", "C++", False),
        ("**B**", "B", True),
    ],
)
def test_labels_match_only_as_a_whole(answer: str, gold: str, expected: bool) -> None:
    assert is_same_choice(answer, gold) is expected


def test_string_em_is_the_share_of_answer_sets_found_in_the_text() -> None:
    sets = [["1066", "in 1066"], ["Normandy"], ["Rollo", "Hrolf"]]
    assert string_em("The Normans, led by Rollo, came in 1066.", sets) == pytest.approx(2 / 3)


def test_rouge_l_matches_worked_examples() -> None:
    # Of 4 words in the answer and 3 in the gold, "the norman came" are in order in both: P = 3/4, R = 1.
    assert rouge_l("the Normans also came", "the Normans came") == pytest.approx(2 * 0.75 / 1.75)
    assert rouge_l("nothing", "the Normans came") == 0.0
    # By sentence the order of the sentences does not count, in one piece it does.
    assert rouge_l("It rained. The Normans came.", "The Normans came. It rained.") == pytest.approx(1.0)


@pytest.mark.parametrize(
    "answer",
    [
        "东京是日本的首都。大阪不是。",
        "Москва — столица России.",
        "القاهرة عاصمة مصر",
        "नई दिल्ली भारत की राजधानी है।",
        "กรุงเทพฯ",
        "ソウル",
        "서울은 수도이다.",
        "Αθήνα",
        "Երևան",
        "თბილისი",
        "ירושלים",
        "Đà Nẵng",
        "أديس أبابا",
        "កម្ពុជា",
        "မြန်မာ",
        "🇫🇷 Paris",
    ],
)
def test_rouge_l_of_equal_answers_is_one_in_any_script(answer: str) -> None:
    assert rouge_l(answer, answer) == pytest.approx(1.0)
    assert rouge_l("nothing", answer) == 0.0


@given(st.text(st.characters(codec="ascii")), st.text(st.characters(codec="ascii")))
def test_rouge_l_of_ascii_texts_is_that_of_the_package(answer: str, gold: str) -> None:
    scorer = RougeScorer(["rougeLsum"], use_stemmer=True)
    expected = scorer.score(re.sub(r"(?<=[.!?])\s+", "\n", gold), re.sub(r"(?<=[.!?])\s+", "\n", answer))
    assert rouge_l(answer, gold) == pytest.approx(expected["rougeLsum"].fmeasure)


def test_citations_are_stripped_from_answers() -> None:
    assert strip_citations("Paris [1]. It rains [2] [13].") == "Paris. It rains."
