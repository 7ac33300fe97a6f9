"""Teaching on the card: bfloat16 beside float32 on the CPU, workers that feed it, and a model that learns."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipeline.training.batches import compute_loss
from pipeline.training.checkpoints import Checkpoint
from pipeline.training.data import ReadingTriple, TeachingData
from pipeline.training.lessons import Lessons
from pipeline.training.rows import Negatives, TreeBuilder
from pipeline.training.student import Student
from pipeline.training.train import choose_pace, train
from tests.support.students import RECIPE, build_trees, load_student, write_base

pytestmark = pytest.mark.gpu


def compute_total(student: Student) -> float:
    with torch.no_grad(), student.choose_precision():
        return float(compute_loss(student.model, student.load_batch(build_trees(student.prompts))))


def test_a_batch_has_the_loss_of_the_cpu(tmp_path: Path, real_card: None, monkeypatch: pytest.MonkeyPatch) -> None:
    base = write_base(tmp_path)
    on_card = load_student(base)
    assert on_card.device.type == "cuda"
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        on_cpu = load_student(base)
    assert compute_total(on_card) == pytest.approx(compute_total(on_cpu), rel=0.02)


def test_processes_feed_a_training_that_learns(tmp_path: Path) -> None:
    student = load_student(write_base(tmp_path / "base"))
    rows = tuple(ReadingTriple(f"Who is {n}?", "", f"Here lives name{n} of old.", f"name{n}") for n in range(20))
    negatives = Negatives({}, [("", row.passage) for row in rows])
    lessons = Lessons(TreeBuilder(student.prompts, negatives), TeachingData(rows), 60, seed=0)
    before = compute_total(student)
    pace = choose_pace(student.device, None, workers=2)
    recipe = replace(RECIPE, tokens=60_000, step_tokens=2_000)
    progress = train(student, lessons, recipe, pace, Checkpoint(tmp_path / "state.pt", {}), lambda: None)
    assert progress.tokens >= recipe.tokens
    assert compute_total(student) < 0.8 * before
