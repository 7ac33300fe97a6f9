"""Passages in Parquet → embeddings → FAISS shards with their manifest; or what they will take; or a check of them.

``python -m jobs.build_index --passages URI --output URI [--plan]``
``python -m jobs.build_index --check URI``

The driver checks the passages, has a sample encoded and trains the index on it where its kind needs that, and hands
the same empty index to every shard, so that scores can be compared across shards. Ray Data runs the shards over a pool
of actors, each with its own encoder and one shard in memory. ``index.json`` comes last: a build that was killed leaves
no index, and the same command goes on with the shards that are missing.
"""

import logging
import sys
import time
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from jobs.index_check import CheckRequest, check_command
from jobs.index_plan import survey, tables
from pipeline.cluster import reason
from pipeline.config.loading import validated
from pipeline.config.run import RetrievalConfig, StorageConfig, load_sections
from pipeline.indexing.build import BuildFolder, BuildPlan, BuildRequest
from pipeline.indexing.build_pool import execute
from pipeline.indexing.passages import check_passages, find_passages, plan_shards
from pipeline.retrieval.encoder import Encoder, EncoderStyle
from pipeline.retrieval.index_cache import DamagedIndexError
from pipeline.retrieval.manifest import EncoderEntry
from pipeline.retrieval.shard_files import empty_index
from pipeline.storage.location import locate

log = logging.getLogger(__name__)


def check(request: BuildRequest) -> BuildPlan:
    """Check everything that can be wrong with the inputs, the cheapest first.

    Raises:
        ValueError: one line that says what to do.
        StorageError: storage does not answer.
    """
    output = locate(request.output, request.storage)
    folder = BuildFolder(output)
    folder.check(request.overwrite)
    files = find_passages(locate(request.passages, request.storage), request.embeddings)
    shards = plan_shards(files, request.shards)
    # The cards belong to the builders; the driver only needs to know what the encoder is.
    encoder = Encoder.load(_absolute(request.encoder), "cpu", style=request.style)
    entry = EncoderEntry.of(encoder)
    plan = BuildPlan(request, files, shards, output, entry, encoder.dimension)
    plan.check_factory(empty_index(request.factory, encoder.dimension))
    if not folder.begun(plan.identity()):  # or they have been checked before
        check_passages(files)
    return plan


def _absolute(encoder: str) -> str:
    """A folder by its whole path, since actors and later runs work in other folders; other names as they are."""
    folder = Path(encoder).expanduser()
    return str(folder.resolve()) if encoder != "demo" and folder.is_dir() else encoder


def show_plan(request: BuildRequest) -> None:
    """Print what the index will take; nothing is written.

    Raises:
        ValueError: the passages, the encoder or the factory string are wrong.
    """
    files = find_passages(locate(request.passages, request.storage), request.embeddings)
    encoder = Encoder.load(_absolute(request.encoder), style=request.style)
    corpus = survey(files, encoder, request.batch_size)
    for table in tables(corpus, request.factory, request.shards):
        Console().print(table)


def build_index(
    passages: Annotated[
        str | None, typer.Option(help="Parquet file or folder with the columns id, title and text.")
    ] = None,
    output: Annotated[str | None, typer.Option(help="Folder for the index.")] = None,
    encoder: Annotated[str, typer.Option(help="Encoder: hub name, folder, or 'demo'.")] = "demo",
    query_prefix: Annotated[str, typer.Option(help="Put before every query, such as 'query: ' for E5.")] = "",
    passage_prefix: Annotated[str, typer.Option(help="Put before every passage, such as 'passage: '.")] = "",
    normalise: Annotated[
        bool, typer.Option("--normalise/--no-normalise", help="Vectors of unit length; not for Contriever.")
    ] = True,
    dtype: Annotated[
        str, typer.Option(help="Of the encoder's weights on a GPU: float32, float16, bfloat16.")
    ] = "float32",
    embeddings: Annotated[
        str | None, typer.Option(help="Column with the passages' vectors, made by that encoder before.")
    ] = None,
    factory: Annotated[str, typer.Option(help="FAISS factory string, such as IVF4096,SQ8 or HNSW32.")] = "Flat",
    shards: Annotated[int, typer.Option(min=1, help="Files to cut the index into.")] = 1,
    batch_size: Annotated[int, typer.Option(min=1, help="Passages encoded at once.")] = 32,
    actors: Annotated[
        int | None, typer.Option(min=1, help="Encoders at work; by default one per GPU or machine.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an index that is there.")] = False,
    plan_only: Annotated[bool, typer.Option("--plan", help="Build nothing; say what the index will take.")] = False,
    check_uri: Annotated[
        str | None, typer.Option("--check", help="Build nothing; check this index, and measure its recall and speed.")
    ] = None,
    queries: Annotated[str | None, typer.Option(help="Query set for --check; passages by default.")] = None,
    sample: Annotated[int, typer.Option(min=1, help="Queries for --check.")] = 200,
    k: Annotated[int, typer.Option("--k", min=1, help="Passages for each query of --check.")] = 10,
    recall: Annotated[float, typer.Option(min=0.0, max=1.0, help="Recall wanted of --check.")] = 0.95,
    as_json: Annotated[bool, typer.Option("--json", help="Print what --check found as JSON.")] = False,
    config: Annotated[
        str | None, typer.Option(help="YAML file of a run, for its sections 'storage' and 'retrieval'.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="A setting, such as storage.endpoint_url=http://host:9000, or retrieval.threads=4."),
    ] = None,
) -> None:
    """Build a FAISS index of passages.

    A build that was interrupted goes on where it was when the same command is given again.
    Exit status: 0 built, 1 failed (or, with --check, damaged), 2 bad usage.
    """
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    for name in (__name__, "pipeline.indexing.build_pool"):
        logging.getLogger(name).setLevel(logging.INFO)
    begun = time.monotonic()
    try:
        sections = load_sections(config, settings or [], ["storage", "retrieval"])
        storage = validated(StorageConfig, sections["storage"], "storage")
        if check_uri is not None:
            retrieval = validated(RetrievalConfig, sections["retrieval"], "retrieval")
            check_command(CheckRequest(check_uri, storage, retrieval, queries, sample, k, recall), as_json)
            return
        style = validated(
            EncoderStyle,
            {"query_prefix": query_prefix, "passage_prefix": passage_prefix, "normalised": normalise, "dtype": dtype},
            "encoder",
        )
        request = BuildRequest(
            passages=_given(passages, "--passages"),
            output=_given(output, "--output") if not plan_only else "",
            encoder=encoder,
            style=style,
            embeddings=embeddings,
            factory=factory,
            shards=shards,
            batch_size=batch_size,
            actors=actors,
            overwrite=overwrite,
            storage=storage,
        )
        if plan_only:
            show_plan(request)
            return
        plan = check(request)
    except (ValueError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1 if isinstance(error, DamagedIndexError) else 2) from None
    log.info("%d passages into %d shards of %s", plan.passages, shards, factory)
    try:
        execute(plan)
    except Exception as error:  # noqa: BLE001  whatever it is, one line and the status say so
        _fail(error)
    seconds = time.monotonic() - begun
    typer.echo(f"index: {output}, {plan.passages} passages, {shards} shards, {seconds:.1f} s", err=True)


def _given(value: str | None, option: str) -> str:
    if value is None:
        raise ValueError(f"{option} is missing")
    return value


def _fail(error: Exception) -> NoReturn:
    from ray.exceptions import RayError

    if isinstance(error, ValueError) and not isinstance(error, RayError):
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    log.error("the build failed; the same command goes on with it", exc_info=error)
    typer.echo(f"error: {reason(error)}", err=True)
    raise typer.Exit(1) from None


if __name__ == "__main__":
    typer.run(build_index)
