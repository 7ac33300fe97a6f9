import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.decoding.choose import (
    choose,
    join_cited_text,
    join_text,
    list_cited_passages,
    match_choice,
    number_citations,
)
from pipeline.decoding.types import Critique, Passage, Path, RetrievedPassage, Segment


def segment(text: str, score: float = 0.0, passage: str | None = None, rank: int = 1) -> Segment:
    """A segment from one passage, or from several that were read together, as in ``p1 p2``."""
    read = [RetrievedPassage(Passage(name, "", f"text of {name}"), None, rank) for name in (passage or "").split()]
    evidence = replace(read[0], beside=tuple(read[1:])) if read else None
    return Segment(text, text, evidence, Critique(score, None, None, None, score))


def path(text: str, score: float, passage: str | None = None) -> Path:
    return Path((segment(text, score, passage),), None)


def test_best_path_is_the_answer_to_an_open_question() -> None:
    best, choice = choose([path("a", 1.0), path("b", 2.0), path("c", 1.5)])
    assert (join_text(best.segments), choice) == ("b", None)


def test_ties_go_to_the_lower_passage_id() -> None:
    best, _ = choose([path("b", 1.0, "p2"), path("a", 1.0, "p1")])
    assert join_text(best.segments) == "a"


def test_closed_set_sums_over_equal_answers() -> None:
    paths = [path("True", 1.5), path("false", 1.0), path("False.", 0.9)]
    assert choose(paths)[1] is None
    assert choose(paths, ["true", "false"])[1] == "false"


def test_closed_set_keeps_the_best_evidence_of_the_winner() -> None:
    best, choice = choose([path("B: x", 0.4), path("b", 0.6), path("A", 0.9)], ["A", "B"])
    assert (best.score, choice) == (0.6, "B")


def test_closed_set_without_a_matching_choice_gives_the_best_answer() -> None:
    best, choice = choose([path("maybe", 0.5), path("perhaps", 0.7)], ["A", "B"])
    assert (join_text(best.segments), choice) == ("perhaps", None)


@given(
    st.lists(st.tuples(st.sampled_from("ABC"), st.floats(-0.5, 3.5)), min_size=1, max_size=6),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_passage_order_does_not_change_the_winner(
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
def test_choices_match_only_as_whole_words(text: str, named: str | None) -> None:
    assert match_choice(text, ["A", "B", "SUPPORTS", "not enough info", ""]) == named


@pytest.mark.parametrize(
    ("text", "choices", "named"),
    [
        ("1", ["-1", "1"], "1"),
        ("-1", ["-1", "1"], "-1"),
        ("C", ["C", "C++"], "C"),
        ("C++.", ["C", "C++"], "C++"),
    ],
)
def test_signs_are_part_of_a_choice(text: str, choices: list[str], named: str) -> None:
    assert match_choice(text, choices) == named


def test_citations_are_numbered_by_first_use() -> None:
    segments = [segment("One.", 0, "p9"), segment("Two."), segment("Three.", 0, "p4"), segment("Four.", 0, "p9")]
    assert number_citations(segments) == [(1,), (), (2,), (1,)]
    assert [used.passage.id for used in list_cited_passages(segments)] == ["p9", "p4"]
    assert join_cited_text(segments) == "One. [1] Two. Three. [2] Four. [1]"
    assert join_text(segments) == "One. Two. Three. Four."


def test_segment_cites_all_passages_that_were_read_together() -> None:
    segments = [segment("One.", 0, "p9 p4"), segment("", 0, "p1 p2"), segment("Three.", 0, "p4 p7 p9")]
    assert number_citations(segments) == [(1, 2), (), (2, 3, 1)]
    assert [used.passage.id for used in list_cited_passages(segments)] == ["p9", "p4", "p7"]
    assert join_cited_text(segments) == "One. [1] [2] Three. [2] [3] [1]"


def test_segment_without_text_gets_no_citation_number() -> None:
    segments = [segment("", 0, "p1"), segment("Two.", 0, "p2")]
    assert number_citations(segments) == [(), (1,)]
    assert join_cited_text(segments) == "Two. [1]"


def test_cited_passage_is_that_of_its_first_use() -> None:
    segments = [segment("One.", 0, "p1", rank=3), segment("Two.", 0, "p1", rank=1)]
    assert list_cited_passages(segments)[0].rank == 3


@given(st.lists(st.tuples(st.sampled_from(["", "text"]), st.sampled_from(["", "a", "b", "c a", "b d c"])), max_size=7))
def test_every_citation_points_to_a_passage_of_its_segment(drawn: list[tuple[str, str]]) -> None:
    segments = [segment(text, 0, passages) for text, passages in drawn]
    cited, numbers = list_cited_passages(segments), number_citations(segments)
    named = [" ".join(cited[number - 1].passage.id for number in each) for each in numbers]
    assert named == [passages if text else "" for text, passages in drawn]
    assert {number for each in numbers for number in each} == set(range(1, len(cited) + 1))
