"""Adds passages to an index and removes others, in a new version of its manifest.

Added passages are built as an index of their own in ``update-00001``, ``update-00002``, …, from the quantizers of the
first build, so that scores compare. Removed ones stay in their shards; their rows are left out of searches.
``index.json`` is written last, and its earlier version is kept beside it, for runs that began with that.
"""

import logging
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.config.sections import StorageConfig
from pipeline.decoding.passage_ids import PART_NUMBER
from pipeline.indexing.base_index import (
    BaseIndex,
    get_form,
    read_corpus_statistics,
    read_passage_ids,
    read_removed,
    read_template,
)
from pipeline.indexing.build import BuildPlan, BuildRequest, check_build
from pipeline.indexing.build_pool import run_build
from pipeline.indexing.form import TYPES
from pipeline.indexing.passages import read_passages
from pipeline.retrieval.index_cache import SCRATCH_PREFIX, hash_file
from pipeline.retrieval.manifest import (
    IndexManifest,
    RemovedEntry,
    ShardEntry,
    check_files,
    name_update,
    number_next_update,
    publish_version,
    read_manifest,
)
from pipeline.retrieval.selected_search import supports_selection
from pipeline.retrieval.shard_files import create_empty_index, write_removed_rows
from pipeline.storage.lease import Lease
from pipeline.storage.location import Location, locate
from pipeline.storage.parquet import list_parquet, read_checked, read_footer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class UpdateRequest:
    """The arguments of an update.

    Attributes:
        index: URI of the index.
        add: URI of passages to add, in the form that the index was built from; None adds none. A passage whose id the
            index has already replaces that one.
        remove: URI of Parquet files with the ids of passages to remove, in the column ``id``; None removes none.
        strict: whether an id that is not in the index ends the update.
        shards: number of shards of the added passages.
        batch_size: passages encoded at once.
        actors: number of actors, as for a build.
        encoder: name or folder of the index's encoder, if it has been moved.
        storage: access to object storage.
    """

    index: str
    add: str | None = None
    remove: str | None = None
    strict: bool = False
    shards: int = 1
    batch_size: int = 32
    actors: int | None = None
    encoder: str | None = None
    storage: StorageConfig = field(default_factory=StorageConfig)


@dataclass(frozen=True)
class Updated:
    """The result of an update.

    Attributes:
        manifest: new manifest of the index.
        added: number of added passages, or of their parts.
        removed: number of removed passages, or of their parts.
        replaced: number of ids that were added and had been in the index.
        unknown: number of ids to remove that were not in the index.
    """

    manifest: IndexManifest
    added: int
    removed: int
    replaced: int
    unknown: int


@dataclass(frozen=True)
class Removal:
    """The passages to remove.

    Attributes:
        rows: rows of each shard that has any, with those removed before, ascending: int64 [rows] by number.
        removed: number of passages, without those removed before.
        found: ids that are in the index.
    """

    rows: Mapping[int, npt.NDArray[np.int64]]
    removed: int
    found: frozenset[str]


def run_update(request: UpdateRequest) -> Updated:
    """Add and remove passages, and write a new version of the manifest; none if there is nothing to do.

    The same call continues an update that was interrupted.

    Raises:
        ValueError: there is no index, an input is wrong, an id is not in the index and ``strict`` is set, the index
            cannot leave passages out, or nothing would be left of it.
        OutputInUseError: a build or another update is using the index.
        LeaseLostError: another one has taken over.
        ray.exceptions.RayError: a shard failed.
        StorageError: the storage cannot be read or written.
    """
    folder = locate(request.index, request.storage)
    with Lease(folder) as lease:
        manifest = read_manifest(folder)
        check_files(folder, manifest)
        number = number_next_update(folder, manifest)
        plan = _plan_added(request, folder, manifest, number) if request.add else None
        wanted, added = _read_wanted(request), _read_added(plan) if plan else frozenset()
        removal = find_removal(folder, manifest, wanted | added)
        if request.strict and (unknown := sorted(wanted - removal.found)):
            raise ValueError(
                f"--remove {request.remove}: {unknown[0]!r} is not in the index, ids like this: {len(unknown)}"
            )
        if not (removal.rows or plan):
            return Updated(manifest, 0, 0, 0, len(wanted))
        if removal.rows:
            _check_removal(folder, manifest)
        added_shards = _build_added(plan, folder, manifest) if plan else ()
        changed = _write_removed(folder, manifest, removal, number)
        kept_shards = (changed.get(place, entry) for place, entry in enumerate(manifest.shards))
        shards = [*kept_shards, *(entry.below(name_update(number)) for entry in added_shards)]
        updated = manifest.replace_shards(shards, manifest.added + len(added_shards), number)
        lease.renew()
        publish_version(folder, manifest, updated)
    replaced, unknown_count = len(added & removal.found), len(wanted - removal.found)
    return Updated(updated, sum(shard.rows for shard in added_shards), removal.removed, replaced, unknown_count)


def _read_wanted(request: UpdateRequest) -> frozenset[str]:
    """Read the ids to remove.

    Raises:
        ValueError: a file is not Parquet, or has no column ``id`` of strings or integers without nulls.
    """
    if request.remove is None:
        return frozenset()
    try:
        files = list_parquet(locate(request.remove, request.storage))
    except ValueError as error:
        raise ValueError(f"--remove {error}") from None
    return frozenset(name for file in files for name in _read_ids(file))


def _read_ids(file: Location) -> Iterator[str]:
    schema = read_footer(file).schema.to_arrow_schema()
    if "id" not in schema.names:
        raise ValueError(f"--remove {file.uri}: no column id, found {', '.join(schema.names)}")
    if not TYPES["id"](kind := schema.field("id").type):
        raise ValueError(f"--remove {file.uri}: column id is {kind}; convert it to string")
    ids = read_checked(file, ["id"])["id"]
    if ids.null_count:
        raise ValueError(f"--remove {file.uri}: column id is null in {ids.null_count} rows; leave them out")
    yield from ids.cast(pa.string()).to_pylist()


def _read_added(plan: BuildPlan) -> frozenset[str]:
    """Read the ids of the passages to add, before they are split."""
    form = replace(plan.request.form, max_words=None, embeddings=None, metadata=())
    return frozenset(name for batch in read_passages(plan.files, form) for name in batch.passages["id"].to_pylist())


def find_removal(folder: Location, manifest: IndexManifest, ids: frozenset[str]) -> Removal:
    """Find the passages with the given ids, and their parts, among those that have not been removed yet."""
    if not ids:
        return Removal({}, 0, frozenset())
    wanted, rows, removed, found = pa.array(sorted(ids), pa.string()), {}, 0, set()
    for number, entry in enumerate(manifest.shards):
        names = read_passage_ids(folder, entry)
        if manifest.max_words:
            names = pc.if_else(pc.is_in(names, wanted), names, pc.replace_substring_regex(names, PART_NUMBER, ""))
        before = read_removed(folder, entry)
        new = np.setdiff1d(np.flatnonzero(pc.is_in(names, wanted)), before)
        if len(new):
            rows[number] = np.union1d(before, new)
            removed += len(new)
            found |= set(names.take(pa.array(new)).to_pylist())
    return Removal(rows, removed, frozenset(found))


def _check_removal(folder: Location, manifest: IndexManifest) -> None:
    if not supports_selection(create_empty_index(manifest.factory, manifest.dimension)):
        raise ValueError(
            f"{folder.uri}: FAISS cannot leave out passages of an index of {manifest.factory}; build it anew"
        )


def _plan_added(request: UpdateRequest, folder: Location, manifest: IndexManifest, number: int) -> BuildPlan:
    """Check the passages to add, and plan their shards.

    Raises:
        ValueError: an input is wrong, or the encoder or the further columns are not those of the index.
        StorageError: the storage cannot be read.
    """
    encoder, output = manifest.encoder, folder / name_update(number)
    name, revision = (request.encoder, None) if request.encoder else (encoder.name, encoder.revision)
    build = BuildRequest(
        str(request.add), output.uri, name, encoder.style, get_form(manifest), manifest.factory, manifest.lexical,
        request.shards, request.batch_size, request.actors, True, request.storage, revision,
    )  # fmt: skip
    plan = check_build(build, trained=True)
    if plan.encoder.digest != encoder.digest:
        advice = "name its folder with --encoder" if request.encoder is None else "choose another --encoder"
        raise ValueError(f"{folder.uri}: encoder {name} is not the one that the index was built with; {advice}")
    if plan.metadata != manifest.metadata:
        kinds = f"{dict(plan.metadata)}, but {dict(manifest.metadata)} in the index"
        raise ValueError(f"--add {request.add}: its further columns hold {kinds}; convert them")
    return plan


def _build_added(plan: BuildPlan, folder: Location, manifest: IndexManifest) -> tuple[ShardEntry, ...]:
    statistics = read_corpus_statistics(folder, manifest) if manifest.lexical else None
    return run_build(plan, BaseIndex(read_template(folder, manifest), statistics)).manifest.shards


def _write_removed(folder: Location, manifest: IndexManifest, removal: Removal, update: int) -> dict[int, ShardEntry]:
    """Write the rows of removed passages, and return the entries of their shards."""
    entries = {}
    for number, rows in removal.rows.items():
        name = f"{name_update(update)}/shard-{number:05d}.removed.arrow"
        with tempfile.TemporaryDirectory(prefix=SCRATCH_PREFIX) as scratch:
            file = Path(scratch) / "removed.arrow"
            write_removed_rows(file, rows)
            size, digest = file.stat().st_size, hash_file(file)
            (folder / name).write(file.read_bytes())
        removed = RemovedEntry(file=name, bytes=size, sha256=digest, rows=len(rows))
        entries[number] = manifest.shards[number].model_copy(update={"removed": removed})
    return entries
