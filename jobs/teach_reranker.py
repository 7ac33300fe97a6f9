"""Train a cross-encoder to rank passages, for ``retrieval.rerank.model``.

``python -m jobs.teach_reranker --data DATA --base MODEL --output FOLDER``

What is left is the folder of a cross-encoder, with its adapter in the subfolder ``adapter``.
"""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from jobs.common import checking, start_logging, working
from jobs.shell import run
from jobs.teaching_data import Data, DataPart, MiningEncoder, Seed, list_command, mine_parts, split_data
from pipeline.demo_models import ENCODER_MODEL
from pipeline.retrieval.encoder import ENCODERS
from pipeline.training.folder import TrainingFolder
from pipeline.training.rerank_recipe import RerankRecipe

log = logging.getLogger(__name__)

# Held-out questions that the figures are from, and the passages that are ranked for each.
EXAMINED, EXAMINED_PASSAGES = 200, 10
# Readings and pairs mined for a question that is trained on: some yield too few wrong passages.
SPARE = 1.25

Base = Annotated[str, typer.Option(help="Encoder to start from: name, folder or 'demo'.")]
Output = Annotated[Path, typer.Option(help="Folder for the reranker; must not exist.")]
Questions = Annotated[int, typer.Option(min=1, help="Questions to train on.")]
ListLength = Annotated[int, typer.Option("--passages", min=2, help="Passages of a question, one of them right.")]
BatchQuestions = Annotated[int, typer.Option(min=1, help="Questions of an optimizer step.")]
Words = Annotated[int, typer.Option(min=20, help="Words that a passage is cut to.")]
Rank = Annotated[int, typer.Option(min=1, help="Rank of the adapter.")]
LearningRate = Annotated[float, typer.Option(min=1e-9, help="Peak learning rate.")]


def run_training(
    data: tuple[DataPart, DataPart], base: str, encoder: str, recipe: RerankRecipe, folder: TrainingFolder
) -> None:
    """Train on one part of the data, evaluate on the other, and leave a folder with its card.

    Args:
        data: the part to train on, and the held-out part.
        base: encoder to start from: name, folder or ``demo``.
        encoder: encoder that mines wrong passages.
        recipe: hyperparameters.
        folder: where the reranker is left.

    Raises:
        ValueError: the base model cannot be had or does not suit, or the data has too few passages.
        RuntimeError: the training diverges.
    """
    from pipeline.training.card import render_reranker_card
    from pipeline.training.reranking import (
        attach_rank_adapter,
        draw_tasks,
        load_untrained,
        measure_ranking,
        save_reranker,
        train_reranker,
    )

    name = ENCODER_MODEL if base == "demo" else base
    model = load_untrained(str(ENCODERS.obtain(base)), recipe.seed)
    adapted = attach_rank_adapter(model, recipe)
    train, test = data
    negatives, test_negatives = mine_parts(encoder, train, test)
    tasks = draw_tasks(train.rows, negatives, recipe, recipe.questions)
    wide = replace(recipe, passages=EXAMINED_PASSAGES, seed=1)
    held_out = len(test.rows.readings) + len(test.rows.pairs)
    examined = draw_tasks(test.rows, test_negatives, wide, min(EXAMINED, held_out))
    if not tasks or not examined:
        raise ValueError("the data has too few different passages to draw wrong ones from")
    train_reranker(model, tasks, recipe)
    save_reranker(model, adapted, folder.unfinished, name)
    figures = measure_ranking(model, examined)
    log.info("held out: %s", figures)
    command = list_command("teach_reranker")
    card = render_reranker_card(name, command, train.rows, (len(tasks), len(examined)), recipe, figures)
    (folder.unfinished / "README.md").write_text(card, encoding="utf-8")
    folder.finish()
    log.info("written: %s", folder.output)


def teach_reranker(
    data: Data,
    base: Base = "demo",
    output: Output = Path("reranker"),
    encoder: MiningEncoder = "demo",
    questions: Questions = RerankRecipe.questions,
    passages: ListLength = RerankRecipe.passages,
    batch_questions: BatchQuestions = RerankRecipe.batch_questions,
    words: Words = RerankRecipe.words,
    rank: Rank = RerankRecipe.rank,
    learning_rate: LearningRate = RerankRecipe.learning_rate,
    seed: Seed = 0,
) -> None:
    """Train a cross-encoder that orders the passages of a search."""
    start_logging(logging.INFO, timestamps=True)
    recipe = RerankRecipe(
        questions=questions,
        passages=passages,
        batch_questions=batch_questions,
        words=words,
        rank=rank,
        learning_rate=learning_rate,
        seed=seed,
    )
    with checking():
        wanted = int(SPARE * questions)
        parts = split_data(data, wanted, wanted // 3, seed)
        folder = TrainingFolder(output)
        folder.begin(resume=False)
    with working():
        run_training(parts, base, encoder, recipe, folder)


if __name__ == "__main__":
    run(teach_reranker)
