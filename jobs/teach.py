"""Train a causal language model to write reflection tokens.

``python -m jobs.teach --data DATA --base MODEL --output FOLDER``

What is left is a model folder for ``jobs.annotate --model``, with the adapter in its subfolder ``adapter``.
"""

import logging
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import pyarrow.parquet as pq
import typer

from jobs.common import checking, start_logging, working
from jobs.shell import run
from jobs.teaching_data import HELD_OUT_ROWS, Data, DataPart, MiningEncoder, Seed, list_command, mine_parts, split_data
from pipeline.config.sections import ModelConfig
from pipeline.decoding.prompts import PromptTokenizer
from pipeline.demo_models import BASE_MODEL, build_demo_base_model
from pipeline.engine.models import load_tokenizer, resolve_model_path
from pipeline.training.data import ReadingTriple
from pipeline.training.folder import TrainingFolder
from pipeline.training.held_out import build_held_out_queries
from pipeline.training.recipe import Recipe
from pipeline.training.rows import TreeBuilder
from pipeline.versions import read_versions

log = logging.getLogger(__name__)

# Held-out trees: enough to tell checkpoints apart, few enough to take a minute on two cores.
EXAMINED = 90
# Peak learning rate if all weights are trained: that of the paper (training details in its appendix).
FULL_RATE = 2e-5


@dataclass(frozen=True)
class Course:
    """The data and settings that a model is taught with.

    Attributes:
        train: rows to train on.
        test: held-out rows.
        base: base model: name, folder, or ``demo``.
        encoder: encoder that mines wrong passages.
        adapter: earlier adapter to continue from.
        recipe: hyperparameters.
    """

    train: DataPart
    test: DataPart
    base: str
    encoder: str
    adapter: Path | None
    recipe: Recipe

    @property
    def base_name(self) -> str:
        """Name of the base model, on the hub for ``demo``."""
        return BASE_MODEL if self.base == "demo" else self.base

    @property
    def base_path(self) -> str:
        """Folder or name to load the base model from."""
        return str(build_demo_base_model()) if self.base == "demo" else resolve_model_path(self.base)

    def load_tokenizer(self) -> Any:
        """Load the base model's tokenizer."""
        return load_tokenizer(ModelConfig(name=self.base_path))

    def identify(self) -> dict[str, Any]:
        """Return all that the trained weights depend on; a training continues only under the same."""
        adapter = str(self.adapter) if self.adapter else None
        origin = {"data": self.train.rows.compute_digest(), "base": self.base_name, "adapter": adapter}
        return {**origin, "encoder": self.encoder, **asdict(self.recipe)}


def save_taught(student: Any, course: Course, folder: Path) -> None:
    """Write the model; unless all weights were trained, also the adapter, which is merged into it."""
    from pipeline.training.student import merge_adapter, save_adapter, save_model

    if course.recipe.full:
        save_model(student.model, student.prompts.tokenizer, folder)
        return
    save_adapter(student.model, course.base_name, folder / "adapter")
    (folder / "adapter" / "README.md").unlink()  # peft's form, which says nothing of this model
    merge_adapter(course.base_path, student.prompts.tokenizer, folder / "adapter", folder)


def check_tokenizer(prompts: PromptTokenizer, row: ReadingTriple, folder: Path) -> None:
    """Check that the saved tokenizer encodes a row as the one in training did.

    Raises:
        RuntimeError: it does not, so the model would not understand its prompts.
    """
    saved = PromptTokenizer.of(load_tokenizer(ModelConfig(name=str(folder))), str(folder))
    same_prompt = saved.encode_prompt(row.question) == prompts.encode_prompt(row.question)
    if not same_prompt or saved.encode_passage(row.title, row.passage) != prompts.encode_passage(
        row.title, row.passage
    ):
        raise RuntimeError(f"{folder}: the saved tokenizer encodes text differently than the one in training")


def build_lessons(student: Any, course: Course) -> tuple[Any, list[Any]]:
    """Return the training trees by number, and the held-out trees, which are the same in every training."""
    from pipeline.training.lessons import Lessons

    longest, positions = course.recipe.longest_words, student.max_positions
    negatives, test_negatives = mine_parts(course.encoder, course.train, course.test)
    builder, test_builder = (TreeBuilder(student.prompts, part) for part in (negatives, test_negatives))
    lessons = Lessons(builder, course.train.rows, longest, course.recipe.seed, positions)
    examined = Lessons(test_builder, course.test.rows, longest, seed=1, max_positions=positions)
    return lessons, [examined[n] for n in range(EXAMINED)]


def run_teaching(
    course: Course, tokenizer: Any, folder: TrainingFolder, batch_tokens: int | None, workers: int | None
) -> None:
    """Train on one part, evaluate on the other, and leave a model folder with its card.

    Args:
        course: what is taught.
        tokenizer: tokenizer of the base model.
        folder: where the results are left.
        batch_tokens: tokens of a forward pass; by default, what suits the device.
        workers: processes that build trees; by default, what suits the device.

    Raises:
        ValueError: the base model does not suit.
        RuntimeError: the memory does not suffice, the training diverges, or the tokenizer cannot be saved.
    """
    import torch

    from pipeline.training.checkpoints import Checkpoint
    from pipeline.training.measurement import measure_held_out
    from pipeline.training.student import Student
    from pipeline.training.train import choose_pace, train

    student = Student.load(course.base_path, tokenizer, course.recipe, course.adapter)
    lessons, held_out = build_lessons(student, course)
    pace = choose_pace(student.device, batch_tokens, workers)

    def examine() -> dict[str, float]:
        figures = measure_held_out(student, held_out, pace.batch_tokens).summarize()
        log.info("held out: %s", figures)
        return figures

    try:
        progress = train(student, lessons, course.recipe, pace, Checkpoint(folder.state, course.identify()), examine)
    except torch.OutOfMemoryError as error:
        raise RuntimeError(f"{error}; lower --batch-tokens, now {pace.batch_tokens}") from None
    figures = examine()
    save_taught(student, course, folder.unfinished)
    check_tokenizer(student.prompts, course.test.rows.readings[0], folder.unfinished)
    (folder.unfinished / "README.md").write_text(
        describe_training(student, course, progress, figures), encoding="utf-8"
    )
    folder.finish()
    log.info("written: %s", folder.output)


def describe_training(student: Any, course: Course, progress: Any, figures: dict[str, float]) -> str:
    """Write the model card of a finished training."""
    from pipeline.training.card import Training, render_model_card
    from pipeline.training.student import describe

    return render_model_card(
        Training(
            course.base_name,
            list_command("teach"),
            course.train.rows,
            course.test.rows,
            course.train.rows.compute_digest(),
            EXAMINED,
            course.recipe,
            progress,
            describe(student.device),
            figures,
            read_versions(),
        )
    )


def check_start(course: Course, folder: TrainingFolder, resume: bool) -> Any:
    """Check all that is cheap to check, prepare the folder, and return the base model's tokenizer.

    Raises:
        ValueError: the tokenizer cannot be loaded, or the folder holds another training or a finished one.
    """
    from pipeline.training.checkpoints import Checkpoint

    tokenizer = course.load_tokenizer()
    folder.begin(resume)
    Checkpoint(folder.state, course.identify()).check()
    return tokenizer


def follow_adapter(recipe: Recipe, adapter: Path) -> Recipe:
    """Return the recipe with the rank and the frozen layers of an earlier adapter, which cannot change.

    Raises:
        ValueError: the folder holds no LoRA adapter.
    """
    from pipeline.training.student import read_adapter

    rank, frozen_layers = read_adapter(adapter)
    return replace(recipe, rank=rank, frozen_layers=frozen_layers)


def write_held_out(part: DataPart, encoder: str, file: Path) -> None:
    """Write held-out rows as a query set for ``jobs.annotate``."""
    (negatives,) = mine_parts(encoder, part)
    pq.write_table(build_held_out_queries(part.rows, negatives, HELD_OUT_ROWS), file)
    log.info("written: %s", file)


Base = Annotated[str, typer.Option(help="Base model: name, folder, or 'demo'.")]
Output = Annotated[Path, typer.Option(help="Folder for the taught model; must not exist.")]
HeldOutFile = Annotated[
    Path | None, typer.Option(help="Do not train; write the held-out part as a query set to this Parquet file.")
]
Adapter = Annotated[Path | None, typer.Option(help="Earlier adapter to continue from, with its rank and layers.")]
Full = Annotated[bool, typer.Option("--full", help="Train all weights instead of an adapter.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue an interrupted training, if there is one.")]
Tokens = Annotated[int, typer.Option(min=1, help="Tokens to train on.")]
Minutes = Annotated[float, typer.Option(min=0.01, help="Time limit in minutes.")]
StepTokens = Annotated[int, typer.Option(min=1, help="Tokens of an optimizer step.")]
Rank = Annotated[int, typer.Option(min=1, help="Rank of the adapter.")]
RATES = f"{Recipe.learning_rate}; {FULL_RATE} with --full"
LearningRate = Annotated[float | None, typer.Option(min=1e-9, help="Peak learning rate.", show_default=RATES)]
LongestWords = Annotated[int, typer.Option(min=40, help="Longest passage window, in words.")]
FrozenLayers = Annotated[int, typer.Option(min=0, help="Number of lowest layers to freeze.")]
Readings = Annotated[int, typer.Option(min=2, help="Maximum number of reading rows.")]
Pairs = Annotated[int, typer.Option(min=0, help="Maximum number of question-sentence pairs.")]
Workers = Annotated[
    int | None,
    typer.Option(min=0, help="Processes that build training trees.", show_default="2 on a GPU, 0 on CPUs"),
]
BatchTokens = Annotated[
    int | None,
    typer.Option(
        min=1, help="Tokens of a forward pass; fewer take less memory.", show_default="20480 on a GPU, 320 on CPUs"
    ),
]


def teach(
    data: Data,
    base: Base = "demo",
    output: Output = Path("taught"),
    held_out: HeldOutFile = None,
    encoder: MiningEncoder = "demo",
    adapter: Adapter = None,
    full: Full = False,
    resume: Resume = False,
    tokens: Tokens = Recipe.tokens,
    minutes: Minutes = Recipe.minutes,
    step_tokens: StepTokens = Recipe.step_tokens,
    rank: Rank = Recipe.rank,
    learning_rate: LearningRate = None,
    longest_words: LongestWords = Recipe.longest_words,
    frozen_layers: FrozenLayers = Recipe.frozen_layers,
    readings: Readings = 100_000,
    pairs: Pairs = 100_000,
    workers: Workers = None,
    batch_tokens: BatchTokens = None,
    seed: Seed = 0,
) -> None:
    """Train a language model to write the reflection tokens."""
    start_logging(logging.INFO, timestamps=True)
    rate = learning_rate if learning_rate is not None else FULL_RATE if full else Recipe.learning_rate
    recipe = Recipe(tokens, minutes, step_tokens, full, rank, frozen_layers, rate, longest_words, seed)
    with checking():
        if full and adapter:
            raise ValueError("--full trains all weights, so it cannot continue from --adapter")
        if adapter:
            recipe = follow_adapter(recipe, adapter)
        train, test = split_data(data, readings, pairs, seed)
        if not train.rows.instructions:
            log.warning("%s: no instructions, so the model learns to retrieve for every query", data)
    if held_out is not None:
        with working():
            write_held_out(test, encoder, held_out)
        return
    course, folder = Course(train, test, base, encoder, adapter, recipe), TrainingFolder(output)
    with checking():
        tokenizer = check_start(course, folder, resume)
    with working(resumable=resume):
        run_teaching(course, tokenizer, folder, batch_tokens, workers)


if __name__ == "__main__":
    run(teach)
