"""Trains a cross-encoder to rank first the passage that answers a question."""

import logging
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from safetensors.torch import load_file, save_file
from sentence_transformers import CrossEncoder
from sentence_transformers.cross_encoder.losses import ListNetLoss
from sentence_transformers.cross_encoder.trainer import CrossEncoderTrainer
from sentence_transformers.cross_encoder.training_args import CrossEncoderTrainingArguments
from torch.nn import Identity
from transformers import PrinterCallback, TrainerCallback, set_seed
from transformers.utils import logging as transformers_logging

from pipeline.decoding.prompts import format_passage
from pipeline.training.data import Pair, ReadingTriple, TeachingData
from pipeline.training.rerank_recipe import RerankRecipe
from pipeline.training.rows import Negatives, cut_window

log = logging.getLogger(__name__)

# Label of the right passage. ListNet's target is a softmax over the labels, and others have 0: all of it is here.
CERTAIN = 30.0
# Tokens of a question with a passage that the reranker reads: the limit of BERT and its kind.
MAX_TOKENS = 512
ADAPTER_FILE = "adapter_model.safetensors"


@dataclass(frozen=True)
class RankingTask:
    """A question with passages to rank.

    Attributes:
        question: the question.
        passages: texts with their titles; the first answers the question, the others do not.
    """

    question: str
    passages: tuple[str, ...]


def draw_tasks(data: TeachingData, negatives: Negatives, recipe: RerankRecipe, size: int) -> list[RankingTask]:
    """Draw questions from the readings and pairs, without repetition until all have been drawn.

    Args:
        data: rows to draw from.
        negatives: wrong passages.
        recipe: hyperparameters.
        size: number of tasks.
    """
    tasks: list[RankingTask] = []
    for row, rng in _draw_rows([*data.readings, *data.pairs], recipe.seed):
        if len(tasks) == size:
            break
        task = _build_task(row, negatives, recipe, rng)
        if task is not None:
            tasks.append(task)
    return tasks


def _draw_rows(rows: Sequence[ReadingTriple | Pair], seed: int) -> Iterator[tuple[ReadingTriple | Pair, random.Random]]:
    """Yield all rows in random order, several times if need be, each with its own random numbers."""
    for number in range(10):
        order = list(range(len(rows)))
        random.Random(f"{seed} {number}").shuffle(order)
        for place in order:
            yield rows[place], random.Random(f"{seed} {number} {place}")


def _build_task(
    row: ReadingTriple | Pair, negatives: Negatives, recipe: RerankRecipe, rng: random.Random
) -> RankingTask | None:
    """Build the task of a row; None if fewer wrong passages are found than the recipe wants."""
    if isinstance(row, Pair):
        title, text, answer, around = "", row.sentence, row.sentence, ""
    else:
        title, text, answer, around = row.title, row.passage, row.answer, row.answer

    def write(title: str, text: str, around: str = "") -> str:
        return format_passage(title, cut_window(text, recipe.words, rng, around))

    right = write(title, text, around)
    wrong: dict[str, None] = {}
    for _ in range(4 * recipe.passages):
        drawn = negatives.draw(row.question, answer, bool(title), rng)
        if drawn is not None:
            wrong.setdefault(write(*drawn))
        if len(wrong) == recipe.passages - 1:
            return RankingTask(row.question, (right, *wrong))
    return None


def load_untrained(base: str, seed: int) -> CrossEncoder:
    """Load a base model, such as that of an encoder, as a cross-encoder whose score is still random, in float32.

    Raises:
        ValueError: it cannot be loaded as a classifier.
    """
    set_seed(seed)
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # the new score is reported as missing weights
    try:
        return CrossEncoder(base, num_labels=1, max_length=MAX_TOKENS, local_files_only=True).float()
    except (OSError, ValueError) as error:
        raise ValueError(
            f"base model {base}: cannot be loaded as a classifier ({' '.join(str(error).split())})"
        ) from None
    finally:
        transformers_logging.set_verbosity(verbosity)


def attach_rank_adapter(model: CrossEncoder, recipe: RerankRecipe) -> PeftModel:
    """Attach a trainable adapter to the linear layers of a cross-encoder, and make its score trainable.

    Raises:
        ValueError: the model is of a kind that peft does not support.
    """
    config = LoraConfig(
        r=recipe.rank, lora_alpha=2 * recipe.rank, target_modules="all-linear", task_type=TaskType.SEQ_CLS
    )
    try:
        return get_peft_model(model.model, config)
    except (TypeError, ValueError) as error:
        kind = type(model.model).__name__
        raise ValueError(f"base model: {kind} cannot get an adapter ({error}); choose another, such as BERT") from None


def train_reranker(model: CrossEncoder, tasks: Sequence[RankingTask], recipe: RerankRecipe) -> None:
    """Train the adapter and the score of a cross-encoder.

    Args:
        model: cross-encoder to which an adapter is attached.
        tasks: tasks to train on.
        recipe: hyperparameters.

    Raises:
        RuntimeError: the loss is not a number.
    """
    with tempfile.TemporaryDirectory() as scratch:
        trainer = CrossEncoderTrainer(
            model=model,
            args=_build_arguments(recipe, len(tasks), scratch),
            train_dataset=build_dataset(tasks),
            loss=ListNetLoss(model, mini_batch_size=recipe.batch_questions * recipe.passages),
            callbacks=[_Progress(len(tasks), recipe.batch_questions)],
        )
        trainer.remove_callback(PrinterCallback)
        loss = trainer.train().training_loss
    if not np.isfinite(loss):
        raise RuntimeError(f"the training diverged: its loss is {loss}; lower --learning-rate")


def save_reranker(model: CrossEncoder, adapted: PeftModel, output: Path, base: str) -> None:
    """Write the adapter and the score to the subfolder ``adapter``, and the model with both merged.

    Args:
        model: trained cross-encoder.
        adapted: the same with its adapter, which is merged.
        output: folder of the model, which exists.
        base: name of the base model, for the adapter's configuration.
    """
    _save_adapter(adapted, output / "adapter", base)
    adapted.merge_and_unload()
    model.save_pretrained(str(output), create_model_card=False)


def build_dataset(tasks: Sequence[RankingTask]) -> Dataset:
    """Return the tasks in the columns that ListNet reads."""
    labels = [[CERTAIN, *[0.0] * (len(task.passages) - 1)] for task in tasks]
    return Dataset.from_dict(
        {
            "query": [task.question for task in tasks],
            "docs": [list(task.passages) for task in tasks],
            "labels": labels,
        }
    )


def _build_arguments(recipe: RerankRecipe, tasks: int, scratch: str) -> CrossEncoderTrainingArguments:
    steps = -(-tasks // recipe.batch_questions)
    return CrossEncoderTrainingArguments(
        output_dir=scratch,
        num_train_epochs=1,
        per_device_train_batch_size=recipe.batch_questions,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, steps // 20),
        logging_steps=max(1, min(50, steps // 10)),
        save_strategy="no",
        report_to="none",
        logging_nan_inf_filter=False,  # it would hide that a training diverges
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
        seed=recipe.seed,
    )


class _Progress(TrainerCallback):  # type: ignore[misc]
    """Logs the loss, the pace and the time left."""

    def __init__(self, tasks: int, batch: int) -> None:
        self._tasks = tasks
        self._batch = batch
        self._began = time.monotonic()

    def on_log(self, _args: Any, state: Any, _control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if logs is None or "loss" not in logs:
            return
        done = min(self._tasks, state.global_step * self._batch)
        pace = done / (time.monotonic() - self._began)
        left = (self._tasks - done) / pace / 60
        log.info(
            "%d of %d questions, loss %.3f, %.1f questions/s, %.0f min left",
            done,
            self._tasks,
            float(logs["loss"]),
            pace,
            left,
        )


def _save_adapter(model: PeftModel, folder: Path, base: str) -> None:
    """Write the adapter and the score in half precision."""
    for config in model.peft_config.values():
        config.base_model_name_or_path = base
    model.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink()  # peft's form, which says nothing of this model
    tensors = {name: tensor.half().contiguous() for name, tensor in load_file(folder / ADAPTER_FILE).items()}
    save_file(tensors, folder / ADAPTER_FILE, metadata={"format": "pt"})


def merge_reranker(base: str, adapter: Path, output: Path) -> None:
    """Write the cross-encoder that an adapter makes of a base model."""
    model = load_untrained(base, RerankRecipe.seed)
    PeftModel.from_pretrained(model.model, str(adapter)).merge_and_unload()
    model.save_pretrained(str(output), create_model_card=False)


def measure_ranking(model: CrossEncoder, tasks: Sequence[RankingTask]) -> dict[str, float]:
    """Return the share of tasks whose right passage ranks first, and its mean reciprocal rank."""
    pairs = [(task.question, passage) for task in tasks for passage in task.passages]
    scores = np.asarray(model.predict(pairs, activation_fn=Identity(), show_progress_bar=False), np.float64)
    ends = np.cumsum([len(task.passages) for task in tasks])
    ranks = np.array([1 + int((part[1:] >= part[0]).sum()) for part in np.split(scores, ends[:-1])])
    return {"right passage first": float((ranks == 1).mean()), "mean reciprocal rank": float((1 / ranks).mean())}
