import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.decoding.choose import choose, citation_numbers, cited_passages, cited_text, closed_answer, plain_text
from pipeline.decoding.types import Critique, Passage, Path, RetrievedPassage, Segment


def segment(text: str, score: float = 0.0, passage: str | None = None, rank: int = 1) -> Segment:
    evidence = RetrievedPassage(Passage(passage, "", f"text of {passage}"), None, rank) if passage else None
    return Segment(text, text, evidence, Critique(score, None, None, None, score))


def path(text: str, score: float, passage: str | None = None) -> Path:
    return Path((segment(text, score, passage),), None)


def test_best_path_is_the_answer_to_an_open_question() -> None:
    best, choice = choose([path("a", 1.0), path("b", 2.0), path("c", 1.5)])
    assert (plain_text(best.segments), choice) == ("b", None)


def test_of_equal_scores_the_lower_passage_id_wins_wherever_it_ranked() -> None:
    best, _ = choose([path("b", 1.0, "p2"), path("a", 1.0, "p1")])
    assert plain_text(best.segments) == "a"


def test_closed_set_sums_over_equal_answers() -> None:
    paths = [path("True", 1.5), path("false", 1.0), path("False.", 0.9)]
    assert choose(paths)[1] is None
    assert choose(paths, ["true", "false"])[1] == "false"


def test_closed_set_keeps_the_winners_best_evidence() -> None:
    best, choice = choose([path("B: x", 0.4), path("b", 0.6), path("A", 0.9)], ["A", "B"])
    assert (best.score, choice) == (0.6, "B")


def test_closed_set_without_any_choice_named_gives_the_best_as_it_is() -> None:
    best, choice = choose([path("maybe", 0.5), path("perhaps", 0.7)], ["A", "B"])
    assert (plain_text(best.segments), choice) == ("perhaps", None)


@given(
    st.lists(st.tuples(st.sampled_from("ABC"), st.floats(-0.5, 3.5)), min_size=1, max_size=6),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_order_of_the_passages_never_changes_the_winner(
    drawn: list[tuple[str, float]], closed: bool, rng: random.Random
) -> None:
    paths = [path(text, score, f"p{n}") for n, (text, score) in enumerate(drawn)]
    choices = list("ABC") if closed else []
    expected = choose(paths, choices)
    rng.shuffle(paths)
    assert choose(paths, choices) == expected


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("B", "B"),
        (" b. ", "B"),
        ("B: because", "B"),
        ("(B) because", "B"),
        ("Because", None),
        ("B cells", None),
        ("", None),
        ("SUPPORTS the claim", "SUPPORTS"),
        ("not", None),
        ("not enough info", "not enough info"),
        ("B\n\nBecause it is.", "B"),
        ("**B**", "B"),
    ],
)
def test_choice_is_named_whole(text: str, named: str | None) -> None:
    assert closed_answer(text, ["A", "B", "SUPPORTS", "not enough info", ""]) == named


@pytest.mark.parametrize(
    ("text", "choices", "named"),
    [
        ("1", ["-1", "1"], "1"),
        ("-1", ["-1", "1"], "-1"),
        ("C", ["C", "C++"], "C"),
        ("C++.", ["C", "C++"], "C++"),
    ],
)
def test_signs_belong_to_a_choice(text: str, choices: list[str], named: str) -> None:
    assert closed_answer(text, choices) == named


def test_citations_are_numbered_by_first_use() -> None:
    segments = [segment("One.", 0, "p9"), segment("Two."), segment("Three.", 0, "p4"), segment("Four.", 0, "p9")]
    assert citation_numbers(segments) == [1, None, 2, 1]
    assert [used.passage.id for used in cited_passages(segments)] == ["p9", "p4"]
    assert cited_text(segments) == "One. [1] Two. Three. [2] Four. [1]"
    assert plain_text(segments) == "One. Two. Three. Four."


def test_a_segment_without_text_takes_no_number() -> None:
    segments = [segment("", 0, "p1"), segment("Two.", 0, "p2")]
    assert citation_numbers(segments) == [None, 1]
    assert cited_text(segments) == "Two. [1]"


def test_the_passage_cited_is_the_one_of_its_first_use() -> None:
    segments = [segment("One.", 0, "p1", rank=3), segment("Two.", 0, "p1", rank=1)]
    assert cited_passages(segments)[0].rank == 3


@given(st.lists(st.tuples(st.sampled_from(["", "text"]), st.sampled_from([None, "a", "b", "c"])), max_size=7))
def test_every_citation_points_at_the_segments_own_passage(drawn: list[tuple[str, str | None]]) -> None:
    segments = [segment(text, 0, passage) for text, passage in drawn]
    passages = cited_passages(segments)
    for one, number in zip(segments, citation_numbers(segments), strict=True):
        assert (number is None) == (one.evidence is None or not one.text)
        assert number is None or passages[number - 1].passage == one.evidence.passage  # type: ignore[union-attr]
    numbers = [n for n in citation_numbers(segments) if n is not None]
    assert sorted(set(numbers)) == list(range(1, len(passages) + 1))
