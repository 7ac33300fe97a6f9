from pathlib import Path

import numpy as np
import pytest

from pipeline.decoding.prompts import PromptTokenizer
from pipeline.decoding.reflection import IsRel, IsSup, IsUse, Retrieve
from pipeline.training.measurement import HeldOut, measure_held_out, read_predictions
from pipeline.training.trees import lay_out, make_given, make_taught
from tests.support.fakes import word_tokenizer
from tests.support.students import build_trees, load_student, write_base


@pytest.fixture
def prompts() -> PromptTokenizer:
    return word_tokenizer()


def test_figures_match_a_worked_example() -> None:
    held_out = HeldOut(
        decisions=[(True, True), (True, True), (True, False), (False, False)],
        answers=[True, False],
        relevance=[(True, 2.0), (False, 1.0), (True, 0.5), (False, -1.0)],
        support=[(True, 1.0), (False, 0.0)],
    )
    # Of the four pairs of a relevant and an irrelevant passage, three are in the right order.
    assert held_out.summarize() == {
        "decision_accuracy": 0.75,
        "answer_exact": 0.5,
        "isrel_auc": 0.75,
        "issup_auc": 1.0,
    }


def test_figures_that_nothing_was_measured_for_are_left_out() -> None:
    assert HeldOut().summarize() == {}
    assert HeldOut([(True, True)], [True], [(True, 1.0), (True, 2.0)]).summarize() == {"answer_exact": 1.0}


def test_predictions_are_read_by_their_role(prompts: PromptTokenizer) -> None:
    control = prompts.encode_control
    answer = make_taught(prompts.encode_text("Rollo then"), 4.0)
    end = make_taught([*control(IsUse.FIVE), prompts.eos], 2.0)
    right = make_taught(control(IsRel.RELEVANT), 4.0) + answer + make_taught(control(IsSup.FULLY), 2.0) + end
    guess = make_taught(control(IsRel.IRRELEVANT), 4.0) + make_taught(prompts.encode_text("Bjorn"), 0.2)
    question = make_given(prompts.encode_prompt("Who?")) + make_taught(control(Retrieve.YES), 2.0)
    tree = lay_out(question.with_children(right, guess))
    logprobs = np.full(
        (len(tree.targets), 1 + max(prompts.reflection.control | set(tree.targets.tolist()))), -9.0, np.float32
    )
    for n, target in enumerate(tree.targets):
        logprobs[n, target] = -0.5
    held_out = HeldOut()
    read_predictions(held_out, tree, logprobs, prompts)
    assert held_out.decisions == [(True, True)]
    assert held_out.answers == [True]  # the guess and the end are no answers
    assert held_out.relevance == [(True, 8.5), (False, -8.5)]
    assert held_out.support == [(True, 8.5)]
    logprobs[tree.targets.tolist().index(prompts.encode_text("then")[0]), 0] = 0.0
    read_predictions(held_out, tree, logprobs, prompts)
    assert held_out.answers == [True, False]


def test_batches_change_no_figure(tmp_path: Path) -> None:
    student = load_student(write_base(tmp_path))
    trees = build_trees(student.prompts) * 3
    together, alone = (measure_held_out(student, trees, tokens) for tokens in (10_000, 1))
    assert sorted(together.decisions) == sorted(alone.decisions)
    assert len(together.relevance) == 9
    assert np.allclose(sorted(odds for _, odds in together.relevance), sorted(o for _, o in alone.relevance), atol=1e-5)
