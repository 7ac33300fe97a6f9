"""Trains a model on training trees."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch

from pipeline.training.batches import compute_loss, group_trees
from pipeline.training.checkpoints import Checkpoint, TrainingProgress
from pipeline.training.lessons import Lessons, stream_lessons
from pipeline.training.recipe import Recipe
from pipeline.training.student import Student
from pipeline.training.trees import TokenTree, pack_trees

log = logging.getLogger(__name__)

# Maximum tokens of a sequence of several trees: attention costs more with every token, fixed costs weigh less.
SEQUENCE_TOKENS = 1_280
# Seconds between two lines about the progress.
LOG_SECONDS = 10.0


@dataclass(frozen=True)
class Pace:
    """The memory and processes of a training, without effect on what is learned.

    Attributes:
        batch_tokens: maximum tokens of a forward pass, padding included; it bounds the memory.
        workers: processes that build trees; with 0, the training process does.
        checkpoint_minutes: training minutes between checkpoints, each with an evaluation on held-out trees.
    """

    batch_tokens: int
    workers: int = 0
    checkpoint_minutes: float = 15.0


def choose_pace(device: torch.device, batch_tokens: int | None, workers: int | None) -> Pace:
    """Choose how a training runs on a device: the values given, or those that suit it.

    A GPU is fed by processes of their own, of which one builds some 135,000 tokens/s on a core of an AMD EPYC; on CPUs,
    building trees takes a few percent of the time.
    """
    on_gpu = device.type == "cuda"
    if batch_tokens is None:
        batch_tokens = 16 * SEQUENCE_TOKENS if on_gpu else 320
    if workers is None:
        workers = 2 if on_gpu else 0
    return Pace(batch_tokens, workers)


def take_step(
    student: Student, trees: Sequence[TokenTree], optimizer: torch.optim.Optimizer, batch_tokens: int
) -> float:
    """Take one optimizer step and return the weighted mean loss of the trees' predictions.

    Raises:
        RuntimeError: the gradients are not finite, so the step would ruin the weights.
    """
    weight = sum(float(tree.weights.sum()) for tree in trees)
    sequences = pack_trees(trees, min(SEQUENCE_TOKENS, batch_tokens))
    total = torch.zeros((), device=student.device)
    for batch in group_trees(sequences, batch_tokens, student.multiple):
        with student.choose_precision():
            share = compute_loss(student.model, student.load_batch(batch)) / weight
        share.backward()  # type: ignore[no-untyped-call]
        total += share.detach()
    norm = torch.nn.utils.clip_grad_norm_(list(student.trainable.values()), 1.0)
    if not norm.isfinite():
        raise RuntimeError("the training has diverged: its gradients are not finite; lower --learning-rate")
    optimizer.step()
    optimizer.zero_grad()
    return float(total)


def draw_trees(trees: Iterator[TokenTree], tokens: int) -> list[TokenTree]:
    """Take trees until they have at least so many tokens."""
    drawn: list[TokenTree] = []
    while tokens > 0:
        drawn.append(next(trees))
        tokens -= len(drawn[-1])
    return drawn


def train(
    student: Student,
    lessons: Lessons,
    recipe: Recipe,
    pace: Pace,
    checkpoint: Checkpoint,
    examine: Callable[[], object],
) -> TrainingProgress:
    """Train until the recipe's tokens or minutes are used up, and return how far the training came.

    Args:
        student: model with trainable weights.
        lessons: training trees.
        recipe: hyperparameters.
        pace: its memory and processes.
        checkpoint: state to continue from, if there is one, and to save to.
        examine: callback after each checkpoint; its time does not count as training time.
    """
    weights = list(student.trainable.values())
    fused = student.device.type == "cuda"
    optimizer = torch.optim.AdamW(weights, recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=fused)
    progress = checkpoint.restore(student, optimizer)
    saved = logged = progress.seconds
    trees = stream_lessons(lessons, progress.trees, pace.workers)
    while (done := recipe.compute_done(progress.tokens, progress.seconds)) < 1.0:
        started = time.monotonic()
        for group in optimizer.param_groups:
            group["lr"] = recipe.compute_rate(done)
        drawn = draw_trees(trees, recipe.step_tokens)
        loss = take_step(student, drawn, optimizer, pace.batch_tokens)
        progress.steps += 1
        progress.trees += len(drawn)
        progress.tokens += sum(map(len, drawn))
        progress.seconds += time.monotonic() - started
        if progress.seconds - logged > LOG_SECONDS:
            log.info("%s", describe_progress(progress, recipe, loss))
            logged = progress.seconds
        if progress.seconds - saved > 60 * pace.checkpoint_minutes:
            checkpoint.save(student, optimizer, progress)
            examine()
            saved = progress.seconds
    checkpoint.save(student, optimizer, progress)
    return progress


def describe_progress(progress: TrainingProgress, recipe: Recipe, loss: float) -> str:
    """Describe how far a training is, how fast it is, what it has reached and how long it will still take."""
    done = recipe.compute_done(progress.tokens, progress.seconds)
    left = timedelta(seconds=round(progress.seconds * (1 - min(1.0, done)) / done))
    rate = progress.tokens / progress.seconds
    return f"step {progress.steps}: {100 * done:.1f} % done, {rate:,.0f} tokens/s, loss {loss:.3f}, {left} left"
