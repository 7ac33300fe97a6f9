"""Teach a causal language model to write reflection tokens: a LoRA adapter plus 15 token embeddings.

``python -m jobs.teach --data FOLDER --base MODEL --output ADAPTER``
"""

import logging
import random
from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.prompts import PromptTokenizer
from pipeline.teaching.data import Encode, TeachingData, nearest, read_data
from pipeline.teaching.rows import Negatives, TreeBuilder
from pipeline.teaching.train import Recipe, add_reflection_tokens, attach_adapter, train
from pipeline.teaching.trees import lay_out, packed

log = logging.getLogger(__name__)


def mine_negatives(encode: Encode, data: TeachingData, k: int = 10) -> Negatives:
    """For each question, the other passages that the encoder would retrieve; the same for sentences."""
    passages = sorted({(row.title, row.passage) for row in data.readings})
    questions = sorted({row.question for row in data.readings})
    log.info("mining wrong passages for %d questions among %d passages", len(questions), len(passages))
    ranked = nearest(encode, questions, [f"{title}\n{text}" for title, text in passages], k)
    by_question = {q: [passages[i] for i in row] for q, row in zip(questions, ranked, strict=True)}
    if data.pairs:
        sentences = sorted({row.sentence for row in data.pairs})
        asked = sorted({row.question for row in data.pairs})
        for question, row in zip(asked, nearest(encode, asked, sentences, k), strict=True):
            by_question.setdefault(question, []).extend(("", sentences[i]) for i in row)
    return Negatives(by_question, passages)


def sample(data: TeachingData, readings: int, pairs: int, seed: int) -> TeachingData:
    """At most so many readings and pairs: mining costs an encoding of each of their passages."""
    rng = random.Random(seed)

    def some(rows: tuple[Any, ...], n: int) -> tuple[Any, ...]:
        return rows if len(rows) <= n else tuple(rng.sample(rows, n))

    return TeachingData(some(data.readings, readings), data.instructions, some(data.pairs, pairs), data.claims)


def teach(
    data: Annotated[Path, typer.Option(help="Data folder: rc.jsonl and, optionally, the others.")],
    base: Annotated[str, typer.Option(help="Base model: name, path, or 'demo'.")],
    output: Annotated[Path, typer.Option(help="Folder for the adapter.")],
    encoder: Annotated[
        str, typer.Option(help="Encoder that finds hard wrong passages: name, path or 'demo'.")
    ] = "demo",
    adapter: Annotated[Path | None, typer.Option(help="Earlier adapter to go on from.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens to train on.")] = Recipe.tokens,
    minutes: Annotated[float, typer.Option(help="Time limit.")] = Recipe.minutes,
    rank: Annotated[int, typer.Option(help="Rank of the adapter.")] = Recipe.rank,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = Recipe.learning_rate,
    first_words: Annotated[
        int, typer.Option(help="Longest passage window at the start, in words.")
    ] = Recipe.first_words,
    frozen_layers: Annotated[int, typer.Option(help="Lowest layers to leave as they are.")] = Recipe.frozen_layers,
    readings: Annotated[int, typer.Option(help="Most reading rows to use.")] = 100_000,
    pairs: Annotated[int, typer.Option(help="Most question-sentence pairs to use.")] = 100_000,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
) -> None:
    """Teach a model the reflection tokens."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    import torch
    from sentence_transformers import SentenceTransformer
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(seed)
    recipe = Recipe(
        tokens=tokens,
        minutes=minutes,
        rank=rank,
        learning_rate=learning_rate,
        frozen_layers=frozen_layers,
        first_words=first_words,
        seed=seed,
    )
    train_rows, test_rows = read_data(data).split(held_out=0.03, seed=20231017)
    train_rows, test_rows = sample(train_rows, readings, pairs, seed), sample(test_rows, 300, 100, 0)
    sentence_model = SentenceTransformer(encoder)
    encode: Encode = lambda texts: sentence_model.encode(list(texts), batch_size=32, normalize_embeddings=True)
    negatives, test_negatives = mine_negatives(encode, train_rows), mine_negatives(encode, test_rows)
    del sentence_model

    tokenizer = AutoTokenizer.from_pretrained(base)
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    add_reflection_tokens(model, tokenizer)
    model = attach_adapter(model, tokenizer, recipe, adapter)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    model.print_trainable_parameters()
    prompts = PromptTokenizer.of(tokenizer, base)
    builder = TreeBuilder(prompts, negatives)
    test_builder = TreeBuilder(prompts, test_negatives)
    rng = random.Random(1)
    held_out = [lay_out(t) for _, t in zip(range(90), test_builder.stream(test_rows, rng, lambda: recipe.last_words))]

    longest = recipe.first_words

    def progress(done: float) -> None:
        nonlocal longest
        longest = recipe.longest_window(done)

    trees = packed(builder.stream(train_rows, random.Random(seed), lambda: longest), tokens=450)
    figures = train(model, trees, held_out, prompts, recipe, output, progress)
    log.info("held out at the end: %s", figures)


if __name__ == "__main__":
    typer.run(teach)
