"""Add passages to an index and remove others, without building it anew.

``python -m jobs.update_index --index URI [--add URI] [--remove URI]``

Added passages become shards of their own, on the trained quantizers of the index; removed ones are left out of
searches. ``index.json`` is replaced last, and runs that began with the earlier version go on with it.
"""

import logging
import time
from typing import Annotated

import typer
from rich.filesize import decimal

from jobs.common import (
    BatchSize,
    IndexFile,
    IndexSettings,
    checking,
    load_index_storage,
    require,
    start_logging,
    working,
)
from jobs.shell import run
from pipeline.indexing.compaction import prune_index, run_compaction
from pipeline.indexing.update import Updated, UpdateRequest, run_update

log = logging.getLogger(__name__)


def update_index(
    index: Annotated[str, typer.Option(help="Index folder made by jobs.build_index.")] = "",
    add: Annotated[
        str | None,
        typer.Option(help="Passages to add, with the columns of those of the build; a known id is replaced."),
    ] = None,
    remove: Annotated[
        str | None, typer.Option(help="Parquet file or folder with the ids of passages to remove in the column id.")
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Refuse ids to remove that the index does not have.")
    ] = False,
    compact: Annotated[
        bool,
        typer.Option("--compact", help="Fold the index and all updates into fresh shards, without removed passages."),
    ] = False,
    prune: Annotated[
        bool, typer.Option("--prune", help="Delete the files of earlier versions; no run may be using these.")
    ] = False,
    shards: Annotated[
        int | None,
        typer.Option(min=1, help="Shards of the added passages, by default 1; with --compact of the whole index."),
    ] = None,
    encoder: Annotated[
        str | None, typer.Option(help="Name or folder of the index's encoder, if it has been moved.")
    ] = None,
    batch_size: BatchSize = 32,
    actors: Annotated[
        int | None, typer.Option(min=1, help="Number of actors; by default one per GPU or machine, with --compact one.")
    ] = None,
    config: IndexFile = None,
    settings: IndexSettings = None,
) -> None:
    """Add passages to an index, and remove others.

    Run the same command again to continue an interrupted update.
    Exit status: 0 updated, 1 failed, 2 bad usage.
    """
    start_logging(progress=[__name__, "pipeline.indexing"], timestamps=True)
    begun = time.monotonic()
    with checking():
        storage = load_index_storage(config, settings)
        _check_options(add, remove, strict, compact, prune, shards)
        request = UpdateRequest(
            require(index, "--index"), add, remove, strict, shards or 1, batch_size, actors, encoder, storage
        )
    with working("the update failed; rerun the same command to continue", resumable=True):
        done = _prune(request) if prune else _compact(request, shards) if compact else _describe(run_update(request))
    typer.echo(f"index: {index}, {done}, {time.monotonic() - begun:.1f} s", err=True)


def _compact(request: UpdateRequest, shards: int | None) -> str:
    manifest = run_compaction(request.index, shards, request.actors, request.storage)
    return f"{manifest.passages} passages in {len(manifest.shards)} fresh shards"


def _prune(request: UpdateRequest) -> str:
    files, size = prune_index(request.index, request.storage)
    return f"{files} files of earlier versions deleted, {decimal(size)}"


def _check_options(
    add: str | None, remove: str | None, strict: bool, compact: bool, prune: bool, shards: int | None
) -> None:
    """Check that the options ask for one thing, which a repetition of the command continues.

    Raises:
        ValueError: they do not, or one of them would be ignored.
    """
    if bool(add or remove) + compact + prune != 1:
        raise ValueError("give --add, --remove or both, or --compact, or --prune")
    if strict and not remove:
        raise ValueError("--strict concerns --remove, which is missing")
    if shards and not (add or compact):
        raise ValueError("--shards concerns --add or --compact, which are missing")


def _describe(updated: Updated) -> str:
    unknown = f"; ids to remove that it does not have: {updated.unknown}" if updated.unknown else ""
    return (
        f"{updated.manifest.passages} passages: {updated.added} added, {updated.removed} removed; "
        f"ids replaced: {updated.replaced}{unknown}"
    )


if __name__ == "__main__":
    run(update_index)
