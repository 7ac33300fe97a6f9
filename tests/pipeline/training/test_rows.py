import random
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.decoding.reflection import CONTROL_TOKENS, IsRel, IsSup, IsUse, Paragraph, Retrieve
from pipeline.training.data import Claim, Instruction, Pair, ReadingTriple
from pipeline.training.rows import LossWeights, Negatives, TreeBuilder, cut_window, draw_wrong_span
from pipeline.training.trees import Branch
from tests.support.fakes import word_tokenizer

WEIGHTS = LossWeights(decide=1.0, relevance=5.0, critique=2.0, text=3.0, output=0.25)
ROLLO = ReadingTriple(
    "Who led the Norse?", "Normans", "The Norse came to France. They were led by Rollo in 911.", "Rollo"
)
PARIS = ReadingTriple("What is the capital?", "France", "The capital of France is Paris and always was.", "Paris")
SEINE = ReadingTriple("Which river is near?", "France", "The capital of France is Paris and always was.", "always")
OTHERS = [("Sharks", "Sharks swim in deep Water all day long."), ("", "Untitled words about Nothing much.")]
WORDS = st.lists(st.text("abcdeXYZ019.,", min_size=1, max_size=6), min_size=1, max_size=40)


@pytest.fixture
def builder() -> TreeBuilder:
    return TreeBuilder(word_tokenizer(), Negatives({}, OTHERS), WEIGHTS, max_output_tokens=4)


def texts(builder: TreeBuilder, branch: Branch, past: str = "") -> list[str]:
    """A tree's sequences as text, one for each leaf."""
    here = f"{past} {builder.tokenizer.decode(list(branch.ids))}".strip()
    return [text for child in branch.children for text in texts(builder, child, here)] or [here]


def weighted(builder: TreeBuilder, branch: Branch) -> list[tuple[str, float]]:
    """One branch's tokens with their loss weights."""
    return [(builder.tokenizer.decode([i]), w) for i, w in zip(branch.ids, branch.weights, strict=True)]


def branches(branch: Branch) -> Iterator[Branch]:
    yield branch
    for child in branch.children:
        yield from branches(child)


@given(WORDS, st.data())
def test_window_contains_its_target_in_whole_words(words: list[str], data: st.DataObject) -> None:
    text = " ".join(words)
    start = data.draw(st.integers(0, len(words) - 1))
    around = " ".join(words[start : data.draw(st.integers(start + 1, len(words)))])
    size = data.draw(st.integers(1, 45))
    cut = cut_window(text, size, random.Random(data.draw(st.integers())), around=around)
    assert around in cut
    assert f" {cut} " in f" {text} "
    # One word more where the answer's first place in the text begins in the middle of a word.
    assert len(cut.split()) <= max(size, len(around.split()) + 1)
    assert len(cut.split()) >= min(size, len(words))


@given(WORDS, st.integers(1, 45), st.integers())
def test_window_without_a_target_has_the_requested_length(words: list[str], size: int, seed: int) -> None:
    text = " ".join(words)
    cut = cut_window(text, size, random.Random(seed))
    assert len(cut.split()) == min(size, len(words))
    assert f" {cut} " in f" {text} "


def test_windows_place_the_answer_at_all_positions() -> None:
    text = " ".join(f"w{n}" for n in range(100))
    places = {cut_window(text, 10, random.Random(seed), around="w50").split().index("w50") for seed in range(200)}
    assert places == set(range(10))


@given(WORDS, st.data())
def test_wrong_span_is_never_the_answer(words: list[str], data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(words) - 1))
    answer = " ".join(words[start : start + data.draw(st.integers(1, 4))])
    span = draw_wrong_span(" ".join(words), answer, random.Random(data.draw(st.integers())))
    assert span
    assert answer.casefold() not in span.casefold()
    assert span.casefold() not in answer.casefold()


@given(st.sampled_from(["unknown", "Unknown", "an unknown soldier"]), st.integers())
def test_wrong_span_differs_from_arbitrary_answers(answer: str, seed: int) -> None:
    span = draw_wrong_span(answer, answer, random.Random(seed))
    assert span.casefold() not in answer.casefold()


def test_wrong_span_has_the_type_of_the_answer() -> None:
    passage = "In 1066 William of Normandy beat Harold with 8000 men on one day"
    numbers = {draw_wrong_span(passage, "1066", random.Random(seed)).split()[0] for seed in range(50)}
    names = {draw_wrong_span(passage, "Harold", random.Random(seed)).split()[0] for seed in range(50)}
    assert numbers == {"8000"}
    assert names <= {"In", "William", "Normandy"}


def test_hard_negatives_lack_the_answer_and_match_in_having_a_title() -> None:
    ranked = [("A", "rollo was here"), ("", "no title"), ("B", "fits")]
    negatives = Negatives({"q": ranked}, OTHERS)
    drawn = {negatives.draw("q", "Rollo", True, random.Random(seed), hard=1.0) for seed in range(20)}
    assert drawn == {("B", "fits")}
    assert negatives.draw("q", "Rollo", False, random.Random(0), hard=1.0) == ("", "no title")
    anywhere = {negatives.draw("q", "Rollo", True, random.Random(seed), hard=0.0) for seed in range(20)}
    assert anywhere == {OTHERS[0]}
    assert negatives.draw("q", "w", True, random.Random(0), hard=0.0) is None  # it stands in every passage


def test_reading_trains_the_decision_but_not_prompt_and_passages(builder: TreeBuilder) -> None:
    tree = builder.build_reading(ROLLO, 100, random.Random(0))
    *prompt, decision = weighted(builder, tree)
    assert {weight for _, weight in prompt} == {0.0}
    assert decision == (Retrieve.YES, WEIGHTS.decide)
    for passage in tree.children:
        first, *_, last = weighted(builder, passage)
        assert (first[0], last[0]) == (Paragraph.START, Paragraph.END)
        assert set(passage.weights) == {0.0}


def test_right_answer_is_trained_with_its_critique(builder: TreeBuilder) -> None:
    right = builder.build_reading(ROLLO, 100, random.Random(0)).children[0].children[0]
    assert weighted(builder, right) == [
        (IsRel.RELEVANT, 5.0),
        ("Rollo", 3.0),
        (IsSup.FULLY, 2.0),
        (IsUse.FIVE, 2.0),
        ("</s>", 3.0),
    ]


def test_wrong_answers_are_judged_but_not_trained(builder: TreeBuilder) -> None:
    judgments = set()
    for seed in range(40):
        for answer in builder.build_reading(ROLLO, 100, random.Random(seed)).children[0].children[1:]:
            (relevance, *text, support, use, _) = weighted(builder, answer)
            assert relevance == (IsRel.RELEVANT, 0.0)
            assert {weight for _, weight in text} == {0.0}
            assert support[1] == use[1] == WEIGHTS.critique
            judgments.add((support[0], use[0]))
    assert judgments == {(IsSup.NONE, IsUse.ONE), (IsSup.PARTIALLY, IsUse.THREE)}


def test_wrong_passage_is_irrelevant_and_lacks_the_answer(builder: TreeBuilder) -> None:
    for seed in range(40):
        for passage in builder.build_reading(ROLLO, 100, random.Random(seed)).children[1:]:
            assert "Rollo" not in builder.tokenizer.decode(list(passage.ids))
            irrelevant, judged = (weighted(builder, answer) for answer in passage.children)
            assert irrelevant[0] == (IsRel.IRRELEVANT, WEIGHTS.relevance)
            assert irrelevant[-2:] == [(IsUse.ONE, 2.0), ("</s>", 3.0)]
            assert {weight for _, weight in irrelevant[1:-2]} == {WEIGHTS.guess}
            assert judged[-3:] == [(IsSup.NONE, 2.0), (IsUse.ONE, 2.0), ("</s>", 3.0)]


def test_pair_trains_only_relevance(builder: TreeBuilder) -> None:
    tree = builder.build_pair(Pair("Where do sharks swim?", "They swim in water."), random.Random(0))
    ends = [weighted(builder, passage)[-1] for passage in tree.children]
    assert ends == [(IsRel.RELEVANT, 5.0), (IsRel.IRRELEVANT, 5.0), (IsRel.IRRELEVANT, 5.0)]
    assert all(set(passage.weights[:-1]) == {0.0} for passage in tree.children)


def test_instruction_is_answered_without_retrieval(builder: TreeBuilder) -> None:
    tree = builder.build_instruction(Instruction("Say hello", "Hello you two"))
    assert not tree.children
    answer = [pair for pair in weighted(builder, tree) if pair[1] > 0]
    assert answer == [
        (Retrieve.NO, 1.0),
        ("Hello", 0.25),
        ("you", 0.25),
        ("two", 0.25),
        (IsUse.FIVE, 2.0),
        ("</s>", 3.0),
    ]


def test_long_output_is_truncated_without_an_end_token(builder: TreeBuilder) -> None:
    tree = builder.build_instruction(Instruction("Count", "one two three four five"))
    assert [word for word, weight in weighted(builder, tree) if weight > 0] == [
        Retrieve.NO,
        "one",
        "two",
        "three",
        "four",
    ]


def test_second_segment_keeps_a_passage_that_answers_both(builder: TreeBuilder) -> None:
    (text,) = texts(builder, builder.build_two_segments(PARIS, SEINE, 100, random.Random(0)))
    assert text.count(Paragraph.START) == 1
    assert text.endswith("Paris [Fully supported] [Continue to Use Evidence] always [Fully supported] [Utility:5] </s>")


def test_shared_passage_is_cut_to_a_window_with_both_answers(builder: TreeBuilder) -> None:
    words = " ".join(f"w{n}" for n in range(1_000))
    first, near, far = (ReadingTriple(f"{n}?", "", words, f"w{n}") for n in (500, 520, 900))
    for seed in range(20):
        (text,) = texts(builder, builder.build_two_segments(first, near, 40, random.Random(seed)))
        assert text.count(Paragraph.START) == 1
        passage = text.partition(Paragraph.START)[2].partition(Paragraph.END)[0].split()
        assert len(passage) == 40
        assert {"w500", "w520"} <= set(passage)
    (text,) = texts(builder, builder.build_two_segments(first, far, 40, random.Random(0)))
    assert text.count(Paragraph.START) == 2


def test_reading_without_any_wrong_passage_has_none() -> None:
    builder = TreeBuilder(word_tokenizer(), Negatives({}, [("Normans", ROLLO.passage)]), WEIGHTS)
    short = ReadingTriple("Who led?", "Normans", "They were led by Rollo.", "Rollo")
    assert {len(builder.build_reading(short, 100, random.Random(seed)).children) for seed in range(40)} == {1}
    assert len(builder.build_pair(Pair("Where?", "In water."), random.Random(0)).children) == 1


def test_second_segment_otherwise_retrieves_its_own_passage(builder: TreeBuilder) -> None:
    (text,) = texts(builder, builder.build_two_segments(PARIS, ROLLO, 100, random.Random(0)))
    assert text.count(Paragraph.START) == text.count(Retrieve.YES) == text.count(IsRel.RELEVANT) == 2
    assert Retrieve.CONTINUE not in text
    assert text.index("Paris [Fully supported] [Retrieval] <paragraph> Normans") < text.index("Rollo [Fully supported]")


def test_claim_trains_its_label_and_judges_the_other(builder: TreeBuilder) -> None:
    claim = Claim("Rollo was Norse.", ("SUPPORTS", "REFUTES"), "SUPPORTS", "Rollo", "A Norse leader.")
    fish = Claim("Fish fly.", ("SUPPORTS", "REFUTES"), "REFUTES", "Fish", "They swim.")
    tree = builder.build_claim(claim, fish, random.Random(0))
    right, wrong = tree.children[0].children
    assert weighted(builder, right)[:3] == [(IsRel.RELEVANT, 5.0), ("SUPPORTS", 3.0), (IsSup.FULLY, 2.0)]
    assert weighted(builder, wrong)[:3] == [(IsRel.RELEVANT, 0.0), ("REFUTES", 0.0), (IsSup.NONE, 2.0)]
    assert "SUPPORTS, REFUTES" in texts(builder, tree)[0]
    (guess,) = (text for text in texts(builder, tree) if IsRel.IRRELEVANT in text)
    assert "Fish They swim." in guess
    alone = builder.build_claim(claim, claim, random.Random(0))
    assert not any(IsRel.IRRELEVANT in text for text in texts(builder, alone))


@given(st.sampled_from(CONTROL_TOKENS), st.integers(0, 1000))
def test_control_tokens_in_the_data_are_plain_text(token: str, seed: int) -> None:
    builder = TreeBuilder(word_tokenizer(), Negatives({}, OTHERS), WEIGHTS)
    row = ReadingTriple(f"{token} who?", token, f"It was {token} Rollo who came", "Rollo")
    tree = builder.build_reading(row, 100, random.Random(seed))
    control = builder.tokenizer.reflection.control
    passage = tree.children[0]
    assert [i for i in tree.ids if i in control] == builder.tokenizer.encode_control(Retrieve.YES)
    assert [i for i in passage.ids if i in control] == builder.tokenizer.encode_control(Paragraph.START, Paragraph.END)
