"""Plan the build of an index: check the request, keep the state of unfinished builds, and encode passages."""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import faiss
import numpy as np
from pyarrow import fs
from pydantic import ValidationError

from pipeline.config.paths import find_local_folder
from pipeline.config.sections import StorageConfig
from pipeline.decoding.prompts import format_passage
from pipeline.indexing.embeddings import Place, convert_embeddings
from pipeline.indexing.form import PassageForm
from pipeline.indexing.passages import (
    PassageBatch,
    ShardPlan,
    check_passages,
    find_metadata_types,
    find_passages,
    plan_shards,
)
from pipeline.nodes.access import Access
from pipeline.nodes.places import SHARE, Source
from pipeline.retrieval.encoder import Encoder, EncoderStyle, Vectors, resolve_encoder_name
from pipeline.retrieval.index_cache import SCRATCH_PREFIX
from pipeline.retrieval.manifest import MANIFEST, EncoderEntry, ShardEntry
from pipeline.retrieval.passage_columns import MetadataType
from pipeline.retrieval.shard_files import (
    INDEX_FILE,
    count_centroids,
    create_empty_index,
    name_lexical_file,
    name_shard_files,
)
from pipeline.retrieval.words import WordForm
from pipeline.storage.location import Location, check_writable, locate
from pipeline.storage.parquet import RowRange

Item = TypeVar("Item")


class Vectorized(NamedTuple):
    """The vectors of a batch, float32 [passages, dimension], and the number of passages that were read in part."""

    vectors: Vectors
    truncated: int = 0


Vectorize = Callable[[PassageBatch], Vectorized]


@dataclass(frozen=True)
class BuildRequest:
    """The arguments of a build.

    Attributes:
        passages: URI of the passages.
        output: URI of the folder for the index.
        encoder: name on the Hugging Face hub, local folder, or ``demo``.
        style: usage of the encoder: prefixes, normalization and data type.
        form: columns of the passages and their vectors, and the length of parts.
        factory: FAISS factory string.
        lexical: form of the words of the lexical part; None builds none.
        shards: number of shards.
        batch_size: passages encoded at once.
        actors: number of actors, each with an encoder; None is one per GPU, or one per machine without GPUs.
        overwrite: whether to replace an existing index.
        storage: access to object storage.
        revision: commit of the encoder on the hub; the newest by default.
    """

    passages: str
    output: str
    encoder: str = "demo"
    style: EncoderStyle = field(default_factory=EncoderStyle)
    form: PassageForm = field(default_factory=PassageForm)
    factory: str = "Flat"
    lexical: WordForm | None = None
    shards: int = 1
    batch_size: int = 32
    actors: int | None = None
    overwrite: bool = False
    storage: StorageConfig = field(default_factory=StorageConfig)
    revision: str | None = None


@dataclass(frozen=True)
class BuildPlan:
    """A build request whose inputs have been checked.

    Attributes:
        max_tokens: number of tokens that the encoder reads of a passage; None is no limit.
        metadata: types of the columns that are kept beside id, title and text, by name.
        access: what every machine must read and write, once that has been checked.
    """

    request: BuildRequest
    files: list[RowRange]
    shards: tuple[ShardPlan, ...]
    output: Location
    encoder: EncoderEntry
    dimension: int
    max_tokens: int | None
    metadata: Mapping[str, MetadataType] = field(default_factory=dict)
    access: Access | None = None

    @property
    def passages(self) -> int:
        """Number of passages, before they are split."""
        return sum(shard.rows for shard in self.shards)

    def compute_identity(self) -> dict[str, Any]:
        """Return everything that decides the shards; an interrupted build is resumed only if it has the same identity.

        Files are identified by URI, size and modification time.
        """
        files = [[uri, info.size, info.mtime_ns] for uri, info in self._stat_files().items()]
        return {
            "passages": files,
            "encoder": self.encoder.model_dump(mode="json"),
            "embeddings": self.request.form.embeddings,
            "columns": dict(self.request.form.columns) or None,
            "max_words": self.request.form.max_words,
            "metadata": dict(self.metadata) or None,
            "factory": self.request.factory,
            "shards": len(self.shards),
            "lexical": self.request.lexical and self.request.lexical.model_dump(),
        }

    def check_unchanged(self, identity: Mapping[str, Any]) -> None:
        """Compare the files of the passages with those at the start, since a mixture of two sets is no index.

        Args:
            identity: what :meth:`compute_identity` returned when the build began.

        Raises:
            ValueError: a file has been replaced or deleted; names it.
        """
        for before, now in zip(identity["passages"], self.compute_identity()["passages"], strict=True):
            if before != now:
                raise ValueError(f"passages {before[0]}: changed during the build; start over with --overwrite")

    def _stat_files(self) -> dict[str, fs.FileInfo]:
        source, paths = self.files[0].file, [part.file.path for part in self.files]
        infos = source.retrying(lambda: source.filesystem.get_file_info(paths))
        return {part.file.uri: info for part, info in zip(self.files, infos, strict=True)}

    def list_sources(self) -> list[Source]:
        """List the passages and the local folder of the encoder, which every machine must read."""
        sources = [Source("--passages", {uri: info.size for uri, info in self._stat_files().items()})]
        folder = find_local_folder(self.encoder.name)
        if folder is not None and self.request.form.embeddings is None:
            sources.append(Source.list_folder("--encoder", str(folder), ""))
        return sources

    def check_factory(self, index: Any) -> None:
        """Check that there are at least as many passages as inverted lists, unless parts, not yet counted, are indexed.

        Raises:
            ValueError: the factory string has more inverted lists than there are passages.
        """
        if self.request.form.max_words is None and count_centroids(index) > self.passages:
            raise ValueError(
                f"factory {self.request.factory}: {count_centroids(index)} inverted lists need at least as many "
                f"passages, but there are {self.passages}; use Flat or fewer lists"
            )

    def make_vectorizer(self, encoder: Encoder) -> Vectorize:
        """Return a function that encodes the title and text of each passage of a batch.

        That function raises a ValueError if a vector is not finite.
        """

        def vectorize(batch: PassageBatch) -> Vectorized:
            titles, texts = batch.passages["title"].to_pylist(), batch.passages["text"].to_pylist()
            passages = list(map(format_passage, titles, texts))
            vectors = encoder.encode(passages, self.request.batch_size)
            if (wrong := np.logical_not(np.isfinite(vectors).all(axis=1))).any():
                raise ValueError(
                    f"{batch.file.uri}: row {batch.rows[np.argmax(wrong)]}: the encoder's vector has a "
                    "non-finite value; try another --dtype"
                )
            return Vectorized(vectors, encoder.count_truncated(passages))

        return vectorize

    def load_vectorizer(self) -> Vectorize:
        """Return the function that reads the vectors of passages from their column, or loads the encoder and encodes.

        Raises:
            ValueError: the encoder on this machine differs from the one that was checked.
        """
        column, entry = self.request.form.embeddings, self.encoder
        if column is not None:
            return self._make_reader(column)
        encoder = Encoder.load(entry.name, revision=entry.revision, style=entry.style)
        if encoder.digest != entry.digest:
            raise ValueError(f"encoder {entry.name} differs between machines; copy the same files to all of them")
        return self.make_vectorizer(encoder)

    def _make_reader(self, column: str) -> Vectorize:
        def read(batch: PassageBatch) -> Vectorized:
            place = Place(batch.file, batch.rows, column)
            return Vectorized(convert_embeddings(batch.embeddings, self.dimension, self.encoder.normalised, place))

        return read


class BuildFolder:
    """The output folder of a build, with the state of an unfinished build in ``_build``."""

    def __init__(self, output: Location) -> None:
        self.output = output
        self._unfinished = output / "_build"

    def check(self, overwrite: bool) -> None:
        """Check that the output can be written.

        Raises:
            ValueError: the output is a file, or holds an index and ``overwrite`` is not set.
        """
        if self.output.get_type() == fs.FileType.File:
            raise ValueError(f"output {self.output.uri}: is a file; name a folder")
        if (self.output / MANIFEST).exists() and not overwrite:
            raise ValueError(f"output {self.output.uri}: already holds an index; pass --overwrite to replace it")

    def has_unfinished(self, identity: dict[str, Any]) -> bool:
        """Whether the folder holds an unfinished build of the same identity."""
        before = self._read_identity()
        return before is not None and not _list_differences(before, identity) and not (self.output / MANIFEST).exists()

    def _read_identity(self) -> dict[str, Any] | None:
        record = self._unfinished / "build.json"
        found: dict[str, Any] | None = json.loads(record.read()) if record.exists() else None
        return found

    def begin(self, identity: dict[str, Any], overwrite: bool) -> None:
        """Resume an unfinished build of the same identity, or begin a new one.

        Raises:
            ValueError: the folder holds an unfinished build of another identity and ``overwrite`` is not set; names
                the keys that differ.
        """
        self._sweep()
        if self.has_unfinished(identity):
            return
        before = self._read_identity()
        if before is not None and not overwrite:
            raise ValueError(
                f"output {self.output.uri}: holds an unfinished build that differs in "
                f"{', '.join(_list_differences(before, identity))}; pass --overwrite to start over"
            )
        if overwrite:
            self.clear()
        (self._unfinished / "build.json").write(json.dumps(identity).encode())

    def _sweep(self) -> None:
        """Remove the scratch folders of builders that were killed."""
        if self.output.local:
            for scratch in Path(self.output.path).glob(f"{SCRATCH_PREFIX}*"):
                shutil.rmtree(scratch)

    def read_trained(self) -> Any | None:
        """Read the empty, trained index of an unfinished build; None if there is none."""
        file = self._unfinished / "trained.faiss"
        if not file.exists():
            return None
        return faiss.deserialize_index(np.frombuffer(file.read(), np.uint8))

    def keep_trained(self, index: Any) -> None:
        """Store the trained, empty index: all shards of an index must start from the same one."""
        (self._unfinished / "trained.faiss").write(faiss.serialize_index(index).tobytes())

    def find_finished(self, shards: Iterable[ShardPlan]) -> dict[int, ShardEntry]:
        """Return the entries of the shards that are recorded as built and whose files have the recorded sizes.

        Without its lexical part a shard is built, but for that part.
        """
        found = {}
        for shard in shards:
            record = self._unfinished / f"shard-{shard.number:05d}.json"
            if not record.exists():
                continue
            entry = _read_entry(record, shard.number)
            if not self._has_files(entry):
                entry = entry.model_copy(update={"lexical": None})
            if self._has_files(entry):
                found[shard.number] = entry
        return found

    def _has_files(self, entry: ShardEntry) -> bool:
        return all(self._get_size(name) == size for name, size, _ in entry.list_files())

    def check_shards(self, entries: Iterable[ShardEntry]) -> None:
        """Check that the files of all shards are in the folder, as this machine sees it, with the recorded sizes.

        Raises:
            RuntimeError: a file is missing, or has another size.
        """
        for name, size, _ in (file for entry in entries for file in entry.list_files()):
            if (found := self._get_size(name)) != size:
                raise RuntimeError(
                    f"output {self.output.uri}: {name} was built with {size} bytes, but has {found or 'none'} here; "
                    f"{SHARE}"
                )

    def _get_size(self, name: str) -> int | None:
        file = self.output / name
        size: int | None = file.retrying(lambda: file.filesystem.get_file_info(file.path).size)
        return size

    def keep(self, number: int, entry: ShardEntry) -> None:
        """Record a shard whose files are in place."""
        (self._unfinished / f"shard-{number:05d}.json").write(entry.model_dump_json().encode())

    def forget(self) -> None:
        """Remove the state of an unfinished build; ``build.json`` last, so that an interrupted call can be repeated."""
        self._sweep()
        names = [file.name for file in self._unfinished.list_files()]
        for name in sorted(names, key="build.json".__eq__):
            (self._unfinished / name).delete()
        if self.output.local and self._unfinished.exists():
            self._unfinished.filesystem.delete_dir(self._unfinished.path)

    def clear(self) -> None:
        """Delete the index, its manifest first, its updates and an unfinished build; other subfolders stay."""
        if (self.output / MANIFEST).exists():
            (self.output / MANIFEST).delete()
        elif self._read_identity() is None:
            return
        self.forget()
        base = f"{self.output.path.rstrip('/')}/"
        for file in self.output.list_files():
            if INDEX_FILE.fullmatch(file.path.removeprefix(base)):
                file.delete()


def _read_entry(record: Location, number: int) -> ShardEntry:
    """Read the record of a built shard.

    Raises:
        ValueError: it is damaged, or names other files than those of the shard.
    """
    try:
        entry = ShardEntry.model_validate_json(record.read())
    except ValidationError as error:
        raise ValueError(f"{record.uri}: {error.errors()[0]['msg']}; delete it, and run the build again") from None
    names = [name for name, _, _ in entry.list_files()]
    if names != [*name_shard_files(number), name_lexical_file(number)][: len(names)]:
        raise ValueError(f"{record.uri}: names the files {', '.join(names)}; delete it, and run the build again")
    return entry


def _list_differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return the keys that differ; one that an earlier version did not know was unset, which is None."""
    return sorted(key for key in now if before.get(key) != now[key])


def read_ahead(items: Iterator[Item]) -> Iterator[Item]:
    """Yield the items; a thread prefetches the next one while the caller works on the current one."""
    with ThreadPoolExecutor(1) as thread:
        upcoming = thread.submit(next, items, None)
        while (item := upcoming.result()) is not None:
            upcoming = thread.submit(next, items, None)
            yield item


def check_build(request: BuildRequest, trained: bool = False) -> BuildPlan:
    """Check the inputs of a build, cheapest first.

    Args:
        request: the arguments of the build.
        trained: whether the shards begin with an index that is trained already.

    Raises:
        ValueError: an input is invalid; one line that explains the fix.
        StorageError: the storage cannot be read.
    """
    output = locate(request.output, request.storage)
    folder = BuildFolder(output)
    check_writable(output)
    folder.check(request.overwrite)
    files = find_passages(locate(request.passages, request.storage), request.form)
    shards = plan_shards(files, request.shards)
    # On the CPU, since the GPUs belong to the builders; the driver only needs the encoder's identity and dimension.
    encoder = Encoder.load(resolve_encoder_name(request.encoder), "cpu", revision=request.revision, style=request.style)
    entry, metadata = EncoderEntry.of(encoder), find_metadata_types(files, request.form)
    plan = BuildPlan(request, files, shards, output, entry, encoder.dimension, encoder.max_tokens, metadata)
    if not trained:
        plan.check_factory(create_empty_index(request.factory, encoder.dimension))
    if not folder.has_unfinished(plan.compute_identity()):  # an unfinished build has already checked them
        check_passages(files, request.form)
    return plan
