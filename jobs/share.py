"""Write the dataset card of an annotated set, and optionally push both to the Hugging Face hub.

``python -m jobs.share --annotations URI [--license ID] [--push-to-hub OWNER/NAME]``

The card is ``README.md`` in the set's folder. An existing card is kept, so that it can be edited before it is pushed.
"""

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from jobs.common import RunFile, StorageSettings, checking, start_logging, working
from jobs.shell import run
from pipeline.config.run import load_storage
from pipeline.output.dataset_card import FinishedSet, format_end_time, render_card
from pipeline.output.folder import CARD, COMPACTED, OutputFolder
from pipeline.output.unit_log import UNITS
from pipeline.storage.location import Location, locate

log = logging.getLogger(__name__)

ROWS = ["data/*.parquet", "errors/*.parquet"]
RECORDS = ["_manifest.json", UNITS, COMPACTED]
SHARED = [CARD, *RECORDS, *ROWS]


def write_card(folder: Location, found: FinishedSet, title: str, licence: str | None, overwrite: bool) -> None:
    """Write the card; keep an existing one of the same run, which may have been edited.

    Raises:
        ValueError: the existing card is of another run, or has another licence.
    """
    card = folder / CARD
    if card.exists() and not overwrite:
        text = card.read().decode()
        for wanted, what in ((format_end_time(found.manifest), "run"), (licence or "", "license")):
            if wanted not in text:
                raise ValueError(
                    f"{card.uri} is for another {what} ({wanted} is not in it); pass --overwrite to replace it"
                )
        log.info("card: %s exists and is kept (pass --overwrite to replace it)", card.uri)
        return
    card.write(render_card(found, title, licence).encode())
    log.info("card: %s", card.uri)


def reserve_dataset(name: str) -> str:
    """Create a private dataset of this name on the hub if there is none, and return the URL of its page.

    The token comes from ``HF_TOKEN`` or from ``hf auth login``.
    """
    from huggingface_hub import HfApi

    return str(HfApi().create_repo(name, repo_type="dataset", private=True, exist_ok=True))


def push(folder: Location, name: str) -> None:
    """Upload rows, card and manifest; delete Parquet files of an earlier push that are no longer in the set."""
    # https://huggingface.co/docs/huggingface_hub/guides/upload
    from huggingface_hub import HfApi

    with _fetching_files(folder) as path:
        HfApi().upload_folder(
            repo_id=name,
            repo_type="dataset",
            folder_path=path,
            allow_patterns=SHARED,
            delete_patterns=ROWS,
            commit_message="Annotated set by selfrag-batch",
        )


@contextmanager
def _fetching_files(folder: Location) -> Iterator[Path]:
    """Yield a local folder with the shared files: the set's own, or a temporary copy if it is on object storage."""
    if folder.local:
        yield Path(folder.path)
        return
    with tempfile.TemporaryDirectory(prefix="selfrag-share-") as scratch:
        found = {name: folder / name for name in (CARD, *RECORDS)}
        # Sets of earlier versions have no list of units, and only compacted ones have a record of it.
        files = {name: file for name, file in found.items() if file.exists()}
        for part in ("data", "errors"):
            files |= {f"{part}/{file.name}": file for file in (folder / part).list_files(".parquet")}
        for name, file in files.items():
            copy = Path(scratch) / name
            copy.parent.mkdir(exist_ok=True)
            file.fetch(copy)
        yield Path(scratch)


def share(
    annotations: Annotated[str, typer.Option(help="Folder of a finished annotated set.")],
    licence: Annotated[
        str | None,
        typer.Option("--license", help="License of the set, as an identifier of the hub: cc-by-sa-4.0, mit, …"),
    ] = None,
    hub_name: Annotated[
        str | None,
        typer.Option("--push-to-hub", help="Dataset on the hub, OWNER/NAME; created as private if it does not exist."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing card.")] = False,
    config: RunFile = None,
    settings: StorageSettings = None,
) -> None:
    """Write the dataset card of an annotated set; with --push-to-hub, push both to the Hugging Face hub.

    Exit status: 0 done, 1 storage or hub error, 2 bad usage.
    """
    start_logging(progress=[__name__])
    with checking():
        folder = locate(annotations, load_storage(config, settings or []))
        found = FinishedSet.of(OutputFolder(folder))
    title = hub_name or folder.name
    with working(subject=title):
        page = reserve_dataset(hub_name) if hub_name else None
        write_card(folder, found, title, licence, overwrite)
        if hub_name:
            push(folder, hub_name)
            log.info("pushed: %s", page)


if __name__ == "__main__":
    run(share)
