"""A tiny model learns two trees by heart; an interrupted training ends with the same weights."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.training import train as module
from pipeline.training.batches import compute_loss
from pipeline.training.checkpoints import Checkpoint, TrainingProgress
from pipeline.training.measurement import measure_held_out
from pipeline.training.recipe import Recipe
from pipeline.training.student import Student
from pipeline.training.train import Pace, choose_pace, describe_progress, take_step, train
from pipeline.training.trees import TokenTree
from tests.support.students import RECIPE, build_trees, load_student, write_base

PACE = Pace(batch_tokens=200)


class Rote:
    """Lessons that repeat the same trees."""

    def __init__(self, trees: list[TokenTree]) -> None:
        self.trees = trees

    def __getitem__(self, number: int) -> TokenTree:
        return self.trees[number % len(self.trees)]


class StoppedError(Exception):
    """The training is interrupted."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"))


def run(student: Student, folder: Path, recipe: Recipe = RECIPE, pace: Pace = PACE, stop: int = 0) -> TrainingProgress:
    """Train; with ``stop``, until so many checkpoints are written."""
    seen: list[None] = []

    def examine() -> None:
        seen.append(None)
        if len(seen) == stop:
            raise StoppedError

    lessons: Any = Rote(build_trees(student.prompts))
    return train(student, lessons, recipe, pace, Checkpoint(folder / "state.pt", {"seed": 0}), examine)


@pytest.fixture(scope="module")
def taught(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Student:
    student = load_student(base)
    progress = run(student, tmp_path_factory.mktemp("state"))
    assert progress.tokens >= RECIPE.tokens
    assert progress.tokens - RECIPE.tokens < 2 * RECIPE.step_tokens
    return student


def test_training_lowers_the_loss_and_learns_the_judgments(taught: Student, base: Path) -> None:
    trees = build_trees(taught.prompts)
    batch = taught.load_batch(trees)
    with torch.no_grad():
        assert compute_loss(taught.model, batch) < 0.2 * compute_loss(load_student(base).model, batch)
    figures = measure_held_out(taught, trees, 200).summarize()
    assert (figures["decision_accuracy"], figures["isrel_auc"], figures["issup_auc"]) == (1.0, 1.0, 1.0)


def test_interrupted_training_ends_with_the_same_weights(base: Path, tmp_path: Path) -> None:
    recipe = replace(RECIPE, tokens=1_500)
    whole, first, second = (load_student(base) for _ in range(3))
    expected = run(whole, tmp_path, recipe)
    (tmp_path / "other").mkdir()
    often = replace(PACE, checkpoint_minutes=0.0)
    with pytest.raises(StoppedError):
        run(first, tmp_path / "other", recipe, often, stop=3)
    found = run(second, tmp_path / "other", recipe)
    assert (found.steps, found.trees, found.tokens) == (expected.steps, expected.trees, expected.tokens)
    assert found.steps > 3
    for name, weight in whole.trainable.items():
        assert torch.equal(second.trainable[name], weight), name


def test_diverged_training_ends_before_it_is_kept(base: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="has diverged"):
        run(load_student(base), tmp_path, replace(RECIPE, learning_rate=1e30), replace(PACE, checkpoint_minutes=0.0))
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert all(weight.isfinite().all() for weight in state["weights"].values())


def test_finished_training_takes_no_further_step(base: Path, tmp_path: Path) -> None:
    recipe = replace(RECIPE, tokens=500)
    once = run(load_student(base), tmp_path, recipe)
    assert run(load_student(base), tmp_path, recipe) == once


@pytest.mark.parametrize("batch_tokens", [1, 100, 10_000])
def test_a_step_does_not_depend_on_the_size_of_its_batches(base: Path, batch_tokens: int) -> None:
    def step(tokens: int) -> tuple[float, dict[str, torch.nn.Parameter]]:
        student = load_student(base)
        optimizer = torch.optim.SGD(student.trainable.values(), lr=1.0)
        loss = take_step(student, build_trees(student.prompts) * 2, optimizer, tokens)
        return loss, student.trainable

    loss, weights = step(200)
    other_loss, other = step(batch_tokens)
    assert other_loss == pytest.approx(loss, rel=1e-5)
    for name, weight in weights.items():
        assert torch.allclose(other[name], weight, atol=1e-5), name


def test_progress_tells_speed_loss_and_time_left() -> None:
    progress = TrainingProgress(steps=12, trees=90, tokens=30_000, seconds=20.0)
    line = describe_progress(progress, Recipe(tokens=120_000), loss=0.4321)
    assert line == "step 12: 25.0 % done, 1,500 tokens/s, loss 0.432, 0:01:00 left"


def test_progress_is_logged(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "LOG_SECONDS", 0.0)
    with caplog.at_level(logging.INFO):
        progress = run(load_student(base), tmp_path, replace(RECIPE, tokens=500))
    assert len([line for line in caplog.messages if "tokens/s" in line]) == progress.steps


def test_pace_suits_the_device() -> None:
    assert choose_pace(torch.device("cuda"), None, None) == Pace(20_480, 2)
    assert choose_pace(torch.device("cpu"), None, None) == Pace(320, 0)
    assert choose_pace(torch.device("cpu"), 99, 3) == Pace(99, 3)
