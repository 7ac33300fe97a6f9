"""Build a FAISS index of passages: Parquet → embeddings → shards and a manifest.

``python -m jobs.build_index --passages URI --output URI``

The driver checks the passages. If the index type needs training, the actors encode a sample and the driver trains the
index on it. Every shard starts from the same empty index, so that scores can be compared across shards. Ray Data maps
the shards over a pool of actors, each with its own encoder and one shard in memory. ``index.json`` is written last: a
build that was killed leaves no index, and the same command continues with the missing shards.
"""

import logging
import time
from typing import Annotated, Any

import typer

from jobs.check_index import check_index
from jobs.common import (
    BatchSize,
    Embeddings,
    EncoderName,
    EncoderType,
    Factory,
    IndexFile,
    IndexSettings,
    Lexical,
    MaxWords,
    Metadata,
    Normalise,
    PassageColumns,
    PassagePrefix,
    Passages,
    QueryPrefix,
    Shards,
    Stemmer,
    StopWords,
    build_encoder_style,
    build_word_form,
    checking,
    hint_at_new_form,
    load_index_storage,
    parse_columns,
    require,
    start_logging,
    working,
)
from jobs.plan_index import plan_index
from jobs.shell import run
from pipeline.indexing.build import BuildRequest, check_build
from pipeline.indexing.build_pool import run_build
from pipeline.indexing.form import PassageForm

log = logging.getLogger(__name__)


Actors = Annotated[
    int | None, typer.Option(min=1, help="Number of encoding actors; by default one per GPU or machine.")
]


def build_index(
    passages: Passages = "",
    output: Annotated[str, typer.Option(help="Folder for the index.")] = "",
    encoder: EncoderName = "demo",
    query_prefix: QueryPrefix = "",
    passage_prefix: PassagePrefix = "",
    normalise: Normalise = True,
    dtype: EncoderType = "float32",
    embeddings: Embeddings = None,
    column: PassageColumns = None,
    max_words: MaxWords = None,
    metadata: Metadata = None,
    factory: Factory = "Flat",
    lexical: Lexical = False,
    stemmer: Stemmer = None,
    stop_words: StopWords = None,
    shards: Shards = 1,
    batch_size: BatchSize = 32,
    actors: Actors = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing index.")] = False,
    config: IndexFile = None,
    settings: IndexSettings = None,
    old_plan: Annotated[bool, typer.Option("--plan", hidden=True)] = False,
    old_check: Annotated[str | None, typer.Option("--check", hidden=True)] = None,
    queries: Annotated[str | None, typer.Option(hidden=True)] = None,
    sample: Annotated[int, typer.Option(min=1, hidden=True)] = 200,
    k: Annotated[int, typer.Option("--k", min=1, hidden=True)] = 10,
    recall: Annotated[float, typer.Option(min=0.0, max=1.0, hidden=True)] = 0.95,
    as_json: Annotated[bool, typer.Option("--json", hidden=True)] = False,
) -> None:
    """Build a FAISS index of passages.

    Run the same command again to continue an interrupted build. Exit status: 0 built, 1 failed, 2 bad usage.
    """
    asked = query_prefix, passage_prefix, normalise, dtype
    if old_check is not None:
        _check(old_check, queries, sample, k, recall, as_json, config, settings)
    elif old_plan:
        _plan(passages, encoder, *asked, embeddings, column, max_words, factory, shards, batch_size, config, settings)
    else:
        with checking():
            source, folder = require(passages, "--passages"), require(output, "--output")
            storage = load_index_storage(config, settings)
            style, words = build_encoder_style(*asked), build_word_form(lexical, stemmer, stop_words)
            columns = parse_columns(column or [], "text=contents")
            form = PassageForm(columns, embeddings, max_words, tuple(metadata or ()))
            request = BuildRequest(
                source, folder, encoder, style, form, factory, words, shards, batch_size, actors, overwrite, storage
            )
        _build(request)


def _check(*arguments: Any) -> None:
    hint_at_new_form("build_index --check INDEX", "check_index --index INDEX")
    check_index(*arguments)


def _plan(*arguments: Any) -> None:
    hint_at_new_form("build_index --plan", "plan_index")
    plan_index(*arguments)


def _build(request: BuildRequest) -> None:
    start_logging(progress=[__name__, "pipeline.indexing"], timestamps=True)
    begun = time.monotonic()
    with checking():
        plan = check_build(request)
    log.info("indexing %d passages into %d shards of %s", plan.passages, request.shards, request.factory)
    with working("the build failed; rerun the same command to continue", resumable=True, overwrite=request.overwrite):
        passages = run_build(plan).manifest.passages
    seconds = time.monotonic() - begun
    shards = f"{request.shards} shards"
    typer.echo(f"index: {request.output}, {passages} passages, {shards}, {seconds:.1f} s", err=True)


if __name__ == "__main__":
    run(build_index)
