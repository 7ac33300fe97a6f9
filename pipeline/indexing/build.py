"""Building an index: what was asked for, what is done already, and how passages become vectors."""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import faiss
import numpy as np
from pyarrow import fs

from pipeline.config.sections import StorageConfig
from pipeline.decoding.prompts import passage_text
from pipeline.indexing.embeddings import Place, vectors_of
from pipeline.indexing.passages import PassageBatch, ShardPlan, check_passages, find_passages, plan_shards
from pipeline.retrieval.encoder import Encoder, EncoderStyle, Vectors, absolute_name
from pipeline.retrieval.index_cache import SCRATCH_PREFIX
from pipeline.retrieval.manifest import MANIFEST, EncoderEntry, ShardEntry
from pipeline.retrieval.shard_files import SHARD_FILE, centroids, empty_index
from pipeline.storage.location import Location, locate
from pipeline.storage.parquet import RowRange

Vectorise = Callable[[PassageBatch], Vectors]
Item = TypeVar("Item")


@dataclass(frozen=True)
class BuildRequest:
    """What the command was asked for.

    Attributes:
        passages, output: URIs.
        encoder: Hugging Face name, local folder, or ``demo``.
        style: how the encoder is used.
        embeddings: column of the passages with their vectors; None has the encoder make them.
        factory: FAISS factory string.
        batch_size: passages encoded at once.
        actors: encoders at work; None takes one for each GPU, or for each machine where there are none.
        overwrite: replace an index that is there.
        storage: access to object storage.
    """

    passages: str
    output: str
    encoder: str = "demo"
    style: EncoderStyle = field(default_factory=EncoderStyle)
    embeddings: str | None = None
    factory: str = "Flat"
    shards: int = 1
    batch_size: int = 32
    actors: int | None = None
    overwrite: bool = False
    storage: StorageConfig = field(default_factory=StorageConfig)


@dataclass(frozen=True)
class BuildPlan:
    """A request whose inputs have been checked."""

    request: BuildRequest
    files: list[RowRange]
    shards: tuple[ShardPlan, ...]
    output: Location
    encoder: EncoderEntry
    dimension: int

    @property
    def passages(self) -> int:
        """How many."""
        return sum(shard.rows for shard in self.shards)

    def identity(self) -> dict[str, Any]:
        """What decides the shards: a build goes on only with shards of the same. Files count by name, size and time."""
        source, paths = self.files[0].file, [part.file.path for part in self.files]
        infos = source.attempt(lambda: source.filesystem.get_file_info(paths))
        files = [[part.file.uri, info.size, info.mtime_ns] for part, info in zip(self.files, infos, strict=True)]
        return {
            "passages": files,
            "encoder": self.encoder.model_dump(mode="json"),
            "embeddings": self.request.embeddings,
            "factory": self.request.factory,
            "shards": len(self.shards),
        }

    def check_factory(self, index: Any) -> None:
        """Refuse more inverted lists than there are passages.

        Raises:
            ValueError: the factory string does not suit the passages.
        """
        if centroids(index) > self.passages:
            raise ValueError(
                f"factory {self.request.factory}: {centroids(index)} inverted lists need as many passages, "
                f"there are {self.passages}; use Flat or fewer lists"
            )

    def encode(self, encoder: Encoder) -> Vectorise:
        """Vectors of passages read as title and text."""

        def vectorise(batch: PassageBatch) -> Vectors:
            titles, texts = batch.passages["title"].to_pylist(), batch.passages["text"].to_pylist()
            pairs = zip(titles, texts, strict=True)
            vectors = encoder.encode([passage_text(title, text) for title, text in pairs], self.request.batch_size)
            if (wrong := np.logical_not(np.isfinite(vectors).all(axis=1))).any():
                raise ValueError(
                    f"{batch.file.uri}: row {batch.rows[np.argmax(wrong)]}: the encoder's vector holds a number "
                    "that is not finite; try another --dtype"
                )
            return vectors

        return vectorise

    def vectoriser(self) -> Vectorise:
        """What makes vectors of passages, from their column or with the encoder, which it loads.

        Raises:
            ValueError: this machine has another encoder than the one that was checked.
        """
        column, entry = self.request.embeddings, self.encoder
        if column is not None:
            return lambda batch: vectors_of(
                batch.embeddings, self.dimension, entry.normalised, Place(batch.file, batch.rows, column)
            )
        encoder = Encoder.load(entry.name, revision=entry.revision, style=entry.style)
        if encoder.digest != entry.digest:
            raise ValueError(f"encoder {entry.name} differs between machines; put the same files on all")
        return self.encode(encoder)


class BuildFolder:
    """The output folder of a build, and below it, until the index is there, what an interrupted build has done."""

    def __init__(self, output: Location) -> None:
        self.output = output
        self._unfinished = output / "_build"

    def check(self, overwrite: bool) -> None:
        """Refuse to touch an index unless that is asked for.

        Raises:
            ValueError: the output is a file, or holds an index and ``overwrite`` is not set.
        """
        if self.output.kind() == fs.FileType.File:
            raise ValueError(f"output {self.output.uri}: is a file; name a folder")
        if (self.output / MANIFEST).exists() and not overwrite:
            raise ValueError(f"output {self.output.uri}: already holds an index; say --overwrite to replace it")

    def begun(self, identity: dict[str, Any]) -> bool:
        """Whether a build of the same identity was interrupted here."""
        return self._before() == identity and not (self.output / MANIFEST).exists()

    def _before(self) -> dict[str, Any] | None:
        record = self._unfinished / "build.json"
        found: dict[str, Any] | None = json.loads(record.read()) if record.exists() else None
        return found

    def begin(self, identity: dict[str, Any], overwrite: bool) -> None:
        """Go on with an interrupted build of the same identity, or begin one.

        Raises:
            ValueError: another build was interrupted here and may not be overwritten; names what differs.
        """
        self._sweep()
        if self.begun(identity):
            return
        before = self._before()
        if before is not None and not overwrite:
            differing = sorted(key for key in identity if before.get(key) != identity[key])
            raise ValueError(
                f"output {self.output.uri}: holds an unfinished build that differs in {', '.join(differing)}; "
                "say --overwrite to begin anew"
            )
        if overwrite:
            self.clear()
        (self._unfinished / "build.json").write(json.dumps(identity).encode())

    def _sweep(self) -> None:
        """Remove the half-written shards of builders that were killed."""
        if self.output.local:
            for scratch in Path(self.output.path).glob(f"{SCRATCH_PREFIX}*"):
                shutil.rmtree(scratch)

    def trained(self) -> Any | None:
        """The empty, trained index of an interrupted build."""
        file = self._unfinished / "trained.faiss"
        return faiss.deserialize_index(np.frombuffer(file.read(), np.uint8)) if file.exists() else None

    def keep_trained(self, index: Any) -> None:
        """Keep the trained index: shards of one index must share their training."""
        (self._unfinished / "trained.faiss").write(faiss.serialize_index(index).tobytes())

    def finished(self, shards: Iterable[ShardPlan]) -> dict[int, ShardEntry]:
        """Entries of the shards that were built before and whose files are there in full."""
        found = {}
        for shard in shards:
            record = self._unfinished / f"shard-{shard.number:05d}.json"
            if record.exists():
                entry = ShardEntry.model_validate_json(record.read())
                if all(self._size(name) == size for name, size, _ in entry.files()):
                    found[shard.number] = entry
        return found

    def _size(self, name: str) -> int | None:
        file = self.output / name
        size: int | None = file.attempt(lambda: file.filesystem.get_file_info(file.path).size)
        return size

    def keep(self, number: int, entry: ShardEntry) -> None:
        """Record a shard whose files are in place."""
        (self._unfinished / f"shard-{number:05d}.json").write(entry.model_dump_json().encode())

    def forget(self) -> None:
        """Remove what only an unfinished build needs; ``build.json`` last, so that this can be done again."""
        self._sweep()
        names = [file.name for file in self._unfinished.files()]
        for name in sorted(names, key="build.json".__eq__):
            (self._unfinished / name).delete()
        if self.output.local and self._unfinished.exists():
            self._unfinished.filesystem.delete_dir(self._unfinished.path)

    def clear(self) -> None:
        """Delete an index that is here, its manifest first, and what an interrupted build left; nothing below."""
        if (self.output / MANIFEST).exists():
            (self.output / MANIFEST).delete()
        elif self._before() is None:
            return
        self.forget()
        base = f"{self.output.path.rstrip('/')}/"
        for file in self.output.files():
            if SHARD_FILE.fullmatch(file.path.removeprefix(base)):
                file.delete()


def read_ahead(items: Iterator[Item]) -> Iterator[Item]:
    """The same items, each of them fetched in a thread while the one before is worked on."""
    with ThreadPoolExecutor(1) as thread:
        upcoming = thread.submit(next, items, None)
        while (item := upcoming.result()) is not None:
            upcoming = thread.submit(next, items, None)
            yield item


def check_build(request: BuildRequest) -> BuildPlan:
    """Check the inputs of a build, cheapest first.

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
    encoder = Encoder.load(absolute_name(request.encoder), "cpu", style=request.style)
    entry = EncoderEntry.of(encoder)
    plan = BuildPlan(request, files, shards, output, entry, encoder.dimension)
    plan.check_factory(empty_index(request.factory, encoder.dimension))
    if not folder.begun(plan.identity()):  # or they have been checked before
        check_passages(files)
    return plan
