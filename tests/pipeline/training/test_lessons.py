import random
import re
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from pipeline.decoding.prompts import PromptTokenizer
from pipeline.decoding.reflection import CONTROL_TOKENS, Retrieve
from pipeline.training.data import Claim, Instruction, Pair, ReadingTriple, TeachingData
from pipeline.training.lessons import Lessons, stream_lessons
from pipeline.training.rows import Negatives, TreeBuilder
from pipeline.training.trees import Branch, TokenTree
from tests.support.fakes import word_tokenizer
from tests.support.tokenizers import load_kind

ROLLO = ReadingTriple("Who led?", "Normans", "The Norse came to France. They were led by Rollo in 911.", "Rollo")
PARIS = ReadingTriple("What is the capital?", "France", "The capital of France is Paris and always was.", "Paris")
SEINE = ReadingTriple("Which river is near?", "France", "The capital of France is Paris and always was.", "always")
CLAIM = Claim("Rollo was Norse.", ("SUPPORTS", "REFUTES"), "SUPPORTS", "Rollo", "A Norse leader.")
OTHERS = [("Sharks", "Sharks swim in deep Water all day long."), ("", "Untitled words about Nothing much.")]
ALL = TeachingData((ROLLO, PARIS, SEINE), (Instruction("Say", "Hello"),), (Pair("q?", "a b."),), (CLAIM,))


@pytest.fixture
def builder() -> TreeBuilder:
    return TreeBuilder(word_tokenizer(), Negatives({}, OTHERS), max_output_tokens=4)


def write_out(builder: TreeBuilder, branch: Branch) -> str:
    """All texts of a tree."""
    return " ".join([builder.tokenizer.decode(list(branch.ids)), *(write_out(builder, c) for c in branch.children)])


def are_equal(first: TokenTree, second: TokenTree) -> bool:
    return all(np.array_equal(value, getattr(second, name)) for name, value in vars(first).items())


def test_a_tree_depends_on_the_seed_and_its_number_alone(builder: TreeBuilder) -> None:
    lessons = Lessons(builder, ALL, 60, seed=3)
    backwards = [lessons[n] for n in reversed(range(30))][::-1]
    again, other = (Lessons(builder, ALL, 60, seed=seed) for seed in (3, 4))
    assert all(are_equal(tree, again[n]) for n, tree in enumerate(backwards))
    assert not all(are_equal(tree, other[n]) for n, tree in enumerate(backwards))


def test_any_number_of_processes_yields_the_same_trees(tmp_path: Path) -> None:
    tokenizer = load_kind("byte-level", tmp_path)
    tokenizer.add_special_tokens({"additional_special_tokens": list(CONTROL_TOKENS)})
    builder = TreeBuilder(PromptTokenizer.of(tokenizer, "demo"), Negatives({}, OTHERS))
    lessons = Lessons(builder, ALL, 60, seed=5)
    alone = list(islice(stream_lessons(lessons), 70))
    assert all(are_equal(tree, lessons[n]) for n, tree in enumerate(alone))
    together = list(islice(stream_lessons(lessons, start=20, workers=2), 50))
    assert all(are_equal(ours, theirs) for ours, theirs in zip(together, alone[20:], strict=True))


def test_kinds_without_data_are_left_out(builder: TreeBuilder) -> None:
    lessons = Lessons(builder, TeachingData((ROLLO, PARIS, SEINE)), 60, seed=0)
    written = " ".join(write_out(builder, lessons.build_tree(random.Random(n))) for n in range(200))
    assert Retrieve.NO not in written
    assert Retrieve.CONTINUE in written
    assert not re.search("claim", written)


def test_all_kinds_of_data_are_used(builder: TreeBuilder) -> None:
    written = " ".join(
        write_out(builder, Lessons(builder, ALL, 60, seed=0).build_tree(random.Random(n))) for n in range(200)
    )
    assert all(part in written for part in (Retrieve.NO, Retrieve.CONTINUE, "claim", "q?", "Rollo", "capital"))


def test_windows_are_at_most_as_long_as_configured(builder: TreeBuilder) -> None:
    words = " ".join(f"w{n}" for n in range(500))
    data = TeachingData((ReadingTriple("q?", "", words, "w250"), ReadingTriple("p?", "", f"{words} x", "w250")))
    lengths = {
        len(passage.ids) - 2
        for n in range(200)
        for passage in Lessons(builder, data, 50, seed=0).build_tree(random.Random(n)).children
        if "w250" in builder.tokenizer.decode(list(passage.ids))
    }
    assert lengths == set(range(40, 51))


def test_sources_of_instructions_are_drawn_evenly(builder: TreeBuilder) -> None:
    many = tuple(Instruction(f"sum {n}", "two", "sums") for n in range(50))
    lessons = Lessons(builder, TeachingData((ROLLO,), (*many, Instruction("poem", "roses", "poems"))), 60, seed=0)
    texts = [write_out(builder, lessons.build_tree(random.Random(n))) for n in range(1000)]
    poems, sums = (sum(f"### Instruction: {word} " in text for text in texts) for word in ("poem", "sum"))
    assert poems + sums > 100
    assert poems == pytest.approx(sums, rel=0.3)


def test_trees_that_are_too_long_or_too_deep_are_left_out(builder: TreeBuilder) -> None:
    long = Claim("word " * 5_000, ("SUPPORTS", "REFUTES"), "SUPPORTS", "Rollo", "A Norse leader.")
    data = TeachingData((ROLLO, PARIS), claims=(long,))
    assert max(len(Lessons(builder, data, 60, seed=0)[n]) for n in range(100)) < 200
    deepest = max(int(Lessons(builder, ALL, 60, seed=0, max_positions=40)[n].positions.max()) for n in range(100))
    assert 30 < deepest < 40
    with pytest.raises(ValueError, match="100 training trees in a row are longer than"):
        Lessons(builder, ALL, 60, seed=0, max_positions=5)[0]
