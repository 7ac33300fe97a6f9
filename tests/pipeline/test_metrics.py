import pytest

from pipeline.metrics import Outcome, Tally, auc, best, contains, exact, mean, normalise, token_f1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Eiffel Tower!", "eiffel tower"),
        ("an apple, a day", "apple day"),
        ("Theatre of the Absurd", "theatre of absurd"),
        ("$1.2 million", "12 million"),
        ("10th–11th", "10th–11th"),  # as in SQuAD: ASCII punctuation only
        ("the", ""),
        ("", ""),
    ],
)
def test_normalise(text: str, expected: str) -> None:
    assert normalise(text) == expected


@pytest.mark.parametrize(
    ("answer", "gold", "expected"),
    [
        ("It was the Denver Broncos.", "Denver Broncos", True),
        ("In 1066, in Normandy", "1066", True),
        ("He scored 308 points", "30", False),  # a part of a word is no match
        ("Francesca", "France", False),
        ("Broncos of Denver", "Denver Broncos", False),  # words in another order
        ("Denver Carolina Broncos", "Denver Broncos", False),  # words with another between
        ("a man", "the", False),  # nothing is left of the gold answer
        ("", "France", False),
    ],
)
def test_contains_compares_whole_words_in_order(answer: str, gold: str, expected: bool) -> None:
    assert contains(answer, gold) is expected


def test_exact_ignores_case_articles_and_punctuation() -> None:
    assert exact("The Norse.", "norse")
    assert not exact("the Norse leader", "norse")


@pytest.mark.parametrize(
    ("answer", "gold", "expected"),
    [
        ("Denver Broncos", "Denver Broncos", 1.0),
        ("the Denver Broncos team", "Denver Broncos", 0.8),  # precision 2/3, recall 1
        ("very very big", "very big dog", 2 / 3),  # a doubled word is shared once: precision 2/3, recall 2/3
        ("nothing", "Denver", 0.0),
        ("", "Denver", 0.0),
        ("the", "a", 1.0),
    ],
)
def test_token_f1(answer: str, gold: str, expected: float) -> None:
    assert token_f1(answer, gold) == pytest.approx(expected)


def test_best_takes_the_gold_answer_that_fits_best() -> None:
    assert best(token_f1, "Denver Broncos", ["Broncos", "Denver Broncos", "x"]) == 1.0


def test_auc_counts_pairs_in_the_right_order() -> None:
    judged = [(True, 0.9), (True, 0.4), (False, 0.5), (False, 0.1)]
    assert auc(judged) == pytest.approx(3 / 4)
    assert auc([(True, 0.5), (False, 0.5)]) == pytest.approx(1 / 2)
    assert auc([(True, 0.9)]) is None
    assert auc([]) is None


def test_mean_of_nothing_is_none() -> None:
    assert mean([]) is None
    assert mean([True, False, False, False]) == 0.25


def test_tally_grades_only_rows_with_gold_answers() -> None:
    tally = Tally(errors=2)
    tally.add(Outcome("It is Rollo", True, ("Rollo", "Hrolf"), ((True, 0.8), (False, 0.3))))
    tally.add(Outcome("Normandy", True, ("France",), ((False, 0.9),)))
    tally.add(Outcome("def count_x", False))
    scores = tally.scores()
    assert (scores.rows, scores.errors, scores.graded) == (3, 2, 2)
    assert scores.retrieval_rate == pytest.approx(2 / 3)
    assert scores.match == 0.5
    assert scores.exact_match == 0.0
    assert scores.f1 == pytest.approx((0.5 + 0.0) / 2)  # "it is rollo": precision 1/3, recall 1
    assert scores.isrel_auc == 0.5


def test_tally_of_nothing_has_no_figures() -> None:
    scores = Tally().scores()
    assert scores.rows == scores.graded == 0
    assert scores.match is scores.retrieval_rate is scores.isrel_auc is None
