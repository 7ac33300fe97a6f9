"""Train a causal language model to write reflection tokens: a LoRA adapter plus 15 token embeddings.

``python -m jobs.teach --data FOLDER --base MODEL --output ADAPTER``
"""

import logging
import random
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import typer

from jobs.common import start_logging
from jobs.shell import run
from pipeline.config.sections import ModelConfig
from pipeline.decoding.prompts import PromptTokenizer
from pipeline.demo_models import BASE_MODEL, build_demo_base_model, build_demo_encoder
from pipeline.engine.models import load_tokenizer
from pipeline.training.data import Encode, TeachingData, find_nearest, read_data
from pipeline.training.held_out import build_held_out_queries
from pipeline.training.recipe import Recipe
from pipeline.training.rows import Negatives, TreeBuilder
from pipeline.training.trees import TokenTree, lay_out, pack_trees

log = logging.getLogger(__name__)

# Held-out trees: enough to tell checkpoints apart, few enough to take a minute on two cores.
EXAMINED = 90
# Maximum held-out reading rows: every run mines negatives for them.
HELD_OUT_ROWS = 300


def mine_negatives(encode: Encode, data: TeachingData, pool: TeachingData, k: int = 10) -> Negatives:
    """Mine hard negatives: the k passages of the pool, or sentences of the pairs, that rank highest for a question."""
    passages = sorted({(row.title, row.passage) for row in pool.readings})
    questions = sorted({row.question for row in data.readings})
    log.info("mining hard negatives for %d questions among %d passages", len(questions), len(passages))
    ranked = find_nearest(encode, questions, [f"{title}\n{text}" for title, text in passages], k)
    by_question = {}
    for question, row in zip(questions, ranked, strict=True):
        by_question[question] = [passages[i] for i in row]
    if data.pairs:
        sentences = sorted({row.sentence for row in data.pairs})
        asked = sorted({row.question for row in data.pairs})
        for question, row in zip(asked, find_nearest(encode, asked, sentences, k), strict=True):
            by_question.setdefault(question, []).extend(("", sentences[i]) for i in row)
    return Negatives(by_question, passages)


def sample_data(data: TeachingData, readings: int, pairs: int, seed: int) -> TeachingData:
    """Draw at most so many readings and pairs, since mining encodes each of them; keep all other rows."""
    rng = random.Random(seed)

    def draw(rows: tuple[Any, ...], n: int) -> tuple[Any, ...]:
        return rows if len(rows) <= n else tuple(rng.sample(rows, n))

    return TeachingData(draw(data.readings, readings), data.instructions, draw(data.pairs, pairs), data.claims)


def mine_parts(encoder: str, *parts: tuple[TeachingData, TeachingData]) -> list[Negatives]:
    """Mine hard negatives for each part (rows, pool); the encoder's memory is freed afterwards."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(build_demo_encoder()) if encoder == "demo" else encoder)

    def encode(texts: Sequence[str]) -> npt.NDArray[np.float32]:
        return np.asarray(model.encode(list(texts), batch_size=32, normalize_embeddings=True), np.float32)

    return [mine_negatives(encode, rows, pool) for rows, pool in parts]


def load_student(base: str, adapter: Path | None, recipe: Recipe) -> tuple[Any, PromptTokenizer]:
    """Load the base model with a trainable adapter, and its tokenizer with the control tokens."""
    import torch
    from transformers import AutoModelForCausalLM

    from pipeline.training.train import add_reflection_tokens, attach_adapter

    torch.manual_seed(recipe.seed)
    folder = str(build_demo_base_model()) if base == "demo" else base
    tokenizer = load_tokenizer(ModelConfig(name=folder))
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    add_reflection_tokens(model, tokenizer)
    peft = attach_adapter(model, tokenizer, recipe, adapter)
    peft.to("cuda" if torch.cuda.is_available() else "cpu")
    peft.print_trainable_parameters()
    return peft, PromptTokenizer.of(tokenizer, base)


def build_held_out_trees(builder: TreeBuilder, data: TeachingData, recipe: Recipe) -> list[TokenTree]:
    """Return the held-out trees, the same in every run."""
    trees = builder.stream_trees(data, random.Random(1), lambda: recipe.last_words)
    return [lay_out(tree) for tree in islice(trees, EXAMINED)]


def build_lessons(
    builder: TreeBuilder, data: TeachingData, recipe: Recipe
) -> tuple[Iterator[TokenTree], Callable[[float], None]]:
    """Return an endless stream of packed training trees, and a callback that lengthens its passage windows.

    The callback takes the share of the training that is done.
    """
    longest = recipe.first_words

    def lengthen_windows(done: float) -> None:
        nonlocal longest
        longest = recipe.compute_longest_window(done)

    trees = builder.stream_trees(data, random.Random(recipe.seed), lambda: longest)
    return pack_trees(trees, tokens=300), lengthen_windows


def run_teaching(
    train_part: tuple[TeachingData, TeachingData],
    test_part: tuple[TeachingData, TeachingData],
    base: str,
    encoder: str,
    adapter: Path | None,
    recipe: Recipe,
    output: Path,
) -> dict[str, float]:
    """Train on one part, evaluate on the other, save the adapter in ``output`` and return the held-out figures.

    Args:
        train_part, test_part: rows to use, and the pool from which their negatives are drawn.
    """
    from pipeline.training.train import measure_held_out, save_adapter, train_adapter

    negatives, test_negatives = mine_parts(encoder, train_part, test_part)
    model, prompts = load_student(base, adapter, recipe)
    held_out = build_held_out_trees(TreeBuilder(prompts, test_negatives), test_part[0], recipe)
    trees, lengthen_windows = build_lessons(TreeBuilder(prompts, negatives), train_part[0], recipe)

    def save_checkpoint() -> dict[str, float]:
        save_adapter(model, BASE_MODEL if base == "demo" else base, output)
        figures = measure_held_out(model, held_out, prompts).summarize()
        log.info("held out: %s", figures)
        return figures

    train_adapter(model, trees, recipe, lengthen_windows, save_checkpoint)
    return save_checkpoint()


def write_held_out(part: tuple[TeachingData, TeachingData], encoder: str, rows: int, file: Path) -> None:
    """Write held-out rows as a query set for ``jobs.annotate``."""
    (negatives,) = mine_parts(encoder, part)
    pq.write_table(build_held_out_queries(part[0], negatives, rows), file)
    log.info("written: %s", file)


def teach(
    data: Annotated[Path, typer.Option(help="Data folder with rc.jsonl and, optionally, the other files.")],
    base: Annotated[str, typer.Option(help="Base model: name, path, or 'demo'.")] = "demo",
    output: Annotated[Path, typer.Option(help="Folder for the adapter.")] = Path("adapter"),
    held_out: Annotated[
        Path | None, typer.Option(help="Do not train; write the held-out part as a query set to this Parquet file.")
    ] = None,
    encoder: Annotated[str, typer.Option(help="Encoder that mines hard negatives: name, path or 'demo'.")] = "demo",
    adapter: Annotated[Path | None, typer.Option(help="Earlier adapter to continue from.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens to train on.")] = Recipe.tokens,
    minutes: Annotated[float, typer.Option(help="Time limit in minutes.")] = Recipe.minutes,
    rank: Annotated[int, typer.Option(help="Rank of the adapter.")] = Recipe.rank,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = Recipe.learning_rate,
    first_words: Annotated[
        int, typer.Option(help="Longest passage window at the start, in words.")
    ] = Recipe.first_words,
    last_words: Annotated[
        int, typer.Option(help="Longest passage window from two thirds of the training on.")
    ] = Recipe.last_words,
    frozen_layers: Annotated[int, typer.Option(help="Number of lowest layers to freeze.")] = Recipe.frozen_layers,
    readings: Annotated[int, typer.Option(help="Maximum number of reading rows.")] = 100_000,
    pairs: Annotated[int, typer.Option(help="Maximum number of question-sentence pairs.")] = 100_000,
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0,
) -> None:
    """Train a language model to write the reflection tokens."""
    start_logging(logging.INFO, timestamps=True)
    recipe = Recipe(
        tokens=tokens,
        minutes=minutes,
        rank=rank,
        learning_rate=learning_rate,
        first_words=first_words,
        last_words=last_words,
        frozen_layers=frozen_layers,
        seed=seed,
    )
    parts = read_data(data).split(held_out=0.03, seed=20231017)
    train_part, test_part = (
        (sample_data(parts[0], readings, pairs, seed), parts[0]),
        (sample_data(parts[1], HELD_OUT_ROWS, 100, 0), parts[1]),
    )
    if held_out is not None:
        write_held_out(test_part, encoder, HELD_OUT_ROWS, held_out)
        return
    run_teaching(train_part, test_part, base, encoder, adapter, recipe, output)


if __name__ == "__main__":
    run(teach)
