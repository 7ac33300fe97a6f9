import pytest

from pipeline.config.sections import Columns
from pipeline.output.folder import OutputFolder
from pipeline.report.examples import (
    EXAMPLES,
    LONGEST_PASSAGE,
    LONGEST_TEXT,
    MOST_TASKS,
    ExampleRow,
    mark_words,
    read_examples,
)
from pipeline.report.figures import ReadOptions, read_set
from pipeline.storage.parquet import BATCH_ROWS
from tests.support.reports import answered, segment, unread, write_set


def of(output: OutputFolder) -> list[ExampleRow]:
    found = read_set(output, ReadOptions.of(output.read_manifest() or {}))
    return read_examples(found.picks, {task: group.rows for task, group in found.groups.items()}, Columns())


def ids(found: list[ExampleRow], kind: str, task: str = "(none)") -> list[str]:
    return [example.id for example in found if (example.kind, example.task) == (kind, task)]


def marked(text: str, answer: str) -> list[str]:
    return [piece.text for piece in mark_words(text, answer) if piece.marked]


def test_best_and_worst_examples_are_chosen_by_score_over_all_units(tmp_path):
    rows = [answered(f"q{n}", score=n) for n in range(60)]
    found = of(write_set(tmp_path, rows[0::3], rows[1::3], rows[2::3]))
    assert ids(found, "best") == [f"q{n}" for n in range(59, 59 - EXAMPLES, -1)]
    assert ids(found, "worst") == [f"q{n}" for n in range(EXAMPLES)]
    random = ids(found, "random")
    assert 1 <= len(random) <= EXAMPLES
    assert not set(random) & {*ids(found, "best"), *ids(found, "worst")}
    assert [example.id for example in of(OutputFolder(write_set(tmp_path).location))] == [e.id for e in found]


def test_rows_with_evidence_are_preferred(tmp_path):
    rows = [unread("u1", 3.0), unread("u2", 0.1), answered("a1", 2.0), answered("a2", 1.0)]
    found = of(write_set(tmp_path, rows, [unread(f"v{n}", 5.0) for n in range(3)]))
    assert ids(found, "best")[:2] == ["a1", "a2"]
    assert ids(found, "best")[2] == "v0"
    assert ids(found, "worst")[0] == "u2"  # a1 and a2 are among the best


def test_without_retrieval_examples_are_chosen_by_score(tmp_path):
    found = of(write_set(tmp_path, [unread(f"q{n}", n) for n in range(3)]))
    assert (ids(found, "best"), ids(found, "worst")) == (["q2"], ["q0"])


def test_small_set_has_examples_of_each_kind_without_repeats(tmp_path):
    found = of(write_set(tmp_path, [answered(f"q{n}", n) for n in range(3)]))
    assert len({example.id for example in found}) == len(found) <= 3
    assert (ids(found, "best"), ids(found, "worst")) == (["q2"], ["q0"])


def test_examples_are_divided_among_the_largest_tasks(tmp_path):
    rows = [answered(f"{t}-{n}", n, task=f"t{t}") for t in range(MOST_TASKS + 2) for n in range(30 - t)]
    found = of(write_set(tmp_path, rows))
    assert {example.task for example in found} == {f"t{t}" for t in range(MOST_TASKS)}
    assert ids(found, "best", "t3") == ["3-26"]
    two = of(write_set(tmp_path / "two", [answered(f"{t}{n}", n, task=t) for t in "ab" for n in range(30)]))
    assert len(ids(two, "best", "a")) == len(ids(two, "worst", "b")) == EXAMPLES // 2


def test_example_holds_its_segments_and_numbered_passages(tmp_path):
    passages = [{"id": f"p{n}", "title": None, "text": f"text {n}", "retrieval_score": None, "rank": n} for n in (4, 1)]
    segments = [segment(2.0, "one"), {**segment(1.0, "two", is_sup=None), "citation": 2, "further_citations": [1]}]
    (example,) = of(write_set(tmp_path, [answered("a", answer="text", segments=segments, passages=passages)]))
    assert [(s.text, s.citation, s.is_sup) for s in example.segments] == [("one", 1, 0.8), ("two", 2, None)]
    assert [s.further_citations for s in example.segments] == [None, [1]]
    assert [(s.number, s.id, s.title, s.rank) for s in example.sources] == [(1, "p4", "", 4), (2, "p1", "", 1)]
    assert (example.score, example.retrieve_probability, example.query) == (1.5, 0.9, "Who wrote a?")
    assert [(p.text, p.marked) for p in example.sources[0].pieces] == [("text", True), (" 4", False)]


def test_examples_are_found_in_files_of_many_batches(tmp_path):
    rows = [answered(f"q{n}", score=1.0) for n in range(2 * BATCH_ROWS + 100)]
    for place, score in ((0, 3.0), (BATCH_ROWS - 1, 2.9), (BATCH_ROWS, 2.8), (2 * BATCH_ROWS + 99, 2.7)):
        rows[place]["segments"] = [segment(score)]
    best = ids(of(write_set(tmp_path, rows)), "best")[:4]
    assert best == ["q0", f"q{BATCH_ROWS - 1}", f"q{BATCH_ROWS}", f"q{2 * BATCH_ROWS + 99}"]


def test_answer_without_segments_can_be_an_example(tmp_path):
    (example,) = of(write_set(tmp_path, [answered("a", answer=None, segments=[], passages=None)]))
    assert (example.answer, example.score, example.sources) == ("", None, ())


def test_long_texts_are_shortened(tmp_path):
    (example,) = of(write_set(tmp_path, [answered("a", query="x" * 9000, answer="y" * 9000)]))
    assert len(example.query) == len(example.answer) == LONGEST_TEXT
    assert example.query.endswith("x…")


@pytest.mark.parametrize(
    ("text", "answer", "expected"),
    [
        ("Dune is by Frank Herbert.", "frank herbert", ["Frank Herbert"]),
        ("The Treaty of Paris, of 1763.", "the Treaty of Paris", ["Treaty of Paris"]),
        ("Of the many, one of them.", "of the", []),  # small words tell nothing on their own
        ("Herberts and herbert's", "Herbert", ["herbert"]),  # whole words only
        ("in 1965, and 19650", "1965", ["1965"]),
        ("no word of it", "", []),
        ("Straße der Nationen", "STRASSE", ["Straße"]),
    ],
)
def test_words_of_the_answer_are_marked(text, answer, expected):
    assert marked(text, answer) == expected


def test_pieces_join_to_the_text():
    text = "Dune, by Frank Herbert, is long; Herbert wrote six."
    assert "".join(piece.text for piece in mark_words(text, "Herbert six")) == text


def test_long_passage_is_shortened_around_the_first_marked_word():
    text = "a " * 3000 + "Herbert " + "b " * 3000
    found = mark_words(text, "Herbert")
    assert [piece.text for piece in found if piece.marked] == ["Herbert"]
    assert (found[0].text, found[-1].text) == ("…", "…")
    assert sum(len(piece.text) for piece in found) == LONGEST_PASSAGE + 2
    plain = mark_words(text, "nothing of it")
    assert "".join(piece.text for piece in plain) == text[:LONGEST_PASSAGE] + "…"
