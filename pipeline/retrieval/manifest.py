"""Reads and writes the manifest of an index, and checks whether a run can use the index."""

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from operator import not_
from typing import Annotated, Literal

from pyarrow import fs
from pydantic import Field, ValidationError, model_validator

from pipeline.config.loading import Frozen
from pipeline.config.sections import Positive, RetrievalConfig
from pipeline.retrieval.encoder import ENCODERS, Encoder, EncoderStyle
from pipeline.retrieval.index_cache import REMEDY, DamagedIndexError, check_size
from pipeline.retrieval.passage_columns import MetadataType
from pipeline.retrieval.words import WordForm
from pipeline.storage.location import Location

MANIFEST = "index.json"
# Errors whose message shows the value.
SHOWN = ("literal_error", "string_pattern_mismatch")

# The names that a build gives to files, so that an untrusted index cannot refer to files outside its folder or the
# cache.
_SHARD = r"^(update-[0-9]{5}/)?shard-[0-9]{5,9}"
FaissFile = Annotated[str, Field(pattern=_SHARD + r"\.faiss$")]
LexicalFile = Annotated[str, Field(pattern=_SHARD + r"\.lexical\.arrow$")]
PassagesFile = Annotated[str, Field(pattern=_SHARD + r"\.passages\.arrow$")]
RemovedFile = Annotated[str, Field(pattern=_SHARD + r"\.removed\.arrow$")]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
# The name of the manifest of an earlier version.
VERSION_FILE = re.compile(r"index-[0-9a-f]{16}\.json")


def _is_none(value: object) -> bool:
    return value is None


class LexicalEntry(Frozen):
    """The manifest's entry of the lexical part of a shard.

    Attributes:
        file: name of the file in the index folder.
        bytes: its size.
        sha256: its digest, in hex.
        words: number of words of all passages, with repetitions; part of the statistics of the corpus.
    """

    file: LexicalFile
    bytes: Positive
    sha256: Digest
    words: int = Field(ge=0)


class RemovedEntry(Frozen):
    """The manifest's entry of the removed passages of a shard.

    Attributes:
        file: name in the index folder of the file with their rows.
        bytes: its size.
        sha256: its digest, in hex.
        rows: number of removed passages.
    """

    file: RemovedFile
    bytes: Positive
    sha256: Digest
    rows: Positive


class ShardEntry(Frozen):
    """The manifest's entry of a shard.

    Attributes:
        file, bytes, sha256: name, size in bytes and digest in hex of the FAISS index.
        passages_file, passages_bytes, passages_sha256: name, size in bytes and digest in hex of the passages, an Arrow
            IPC file.
        rows: number of vectors, and of passages, with the removed ones.
        truncated_passages: number of passages of which the encoder read only the beginning; 0 if the vectors were
            given, None if an earlier version built the shard.
        lexical: scores of words; None if the index has none.
        removed: passages that are no longer found; None if there are none.
    """

    file: FaissFile
    passages_file: PassagesFile
    rows: Positive
    bytes: Positive
    sha256: Digest
    passages_bytes: Positive
    passages_sha256: Digest
    truncated_passages: int | None = Field(default=None, exclude_if=_is_none)
    lexical: LexicalEntry | None = Field(default=None, exclude_if=_is_none)
    removed: RemovedEntry | None = Field(default=None, exclude_if=_is_none)

    def below(self, folder: str) -> "ShardEntry":
        """Return the entry with file names that begin with a folder."""
        lexical = self.lexical and self.lexical.model_copy(update={"file": f"{folder}/{self.lexical.file}"})
        files = {"file": f"{folder}/{self.file}", "passages_file": f"{folder}/{self.passages_file}"}
        return self.model_copy(update={**files, "lexical": lexical})

    @property
    def kept(self) -> int:
        """Number of passages that can be found."""
        return self.rows - (self.removed.rows if self.removed else 0)

    def list_files(self, vectors: bool = True, words: bool = True) -> list[tuple[str, int, str]]:
        """Return name, size and digest of the FAISS index, of the passages, and, if any, of words and removed rows.

        Args:
            vectors: whether the FAISS index is wanted.
            words: whether the lexical part is wanted, if there is one.
        """
        index = [(self.file, self.bytes, self.sha256)] if vectors else []
        passages = (self.passages_file, self.passages_bytes, self.passages_sha256)
        lexical = [(self.lexical.file, self.lexical.bytes, self.lexical.sha256)] if words and self.lexical else []
        removed = [(self.removed.file, self.removed.bytes, self.removed.sha256)] if self.removed else []
        return [*index, passages, *lexical, *removed]


class EncoderEntry(EncoderStyle):
    """The encoder that an index was built with, and its usage; attributes as in :class:`Encoder`."""

    name: str
    revision: str | None
    digest: str

    @classmethod
    def of(cls, encoder: Encoder) -> "EncoderEntry":
        """Return the entry of a loaded encoder."""
        style = encoder.style.model_dump()
        return cls(name=encoder.name, revision=encoder.revision, digest=encoder.digest, **style)

    @property
    def style(self) -> EncoderStyle:
        """Usage of the encoder when the index was built."""
        return EncoderStyle(**self.model_dump(include=set(EncoderStyle.model_fields)))


class IndexManifest(Frozen):
    """The content of ``index.json``: all data of an index except its vectors and passages.

    Attributes:
        format_version: version of this format.
        encoder: encoder of the queries, and of the passages unless ``embeddings`` is set.
        embeddings: column that the vectors were read from; None if the encoder computed them.
        columns: columns that id, title and text were read from, if they have other names.
        max_words: number of words of the longest part that a passage was split into; None if all are whole.
        metadata: types of the columns that are kept beside id, title and text, by name.
        lexical: form of the words of the lexical part, which every shard has then; None if there is none.
        dimension: number of dimensions of the vectors.
        metric: always the inner product, which is the cosine if ``encoder.normalised``.
        factory: FAISS factory string of every shard.
        updates: number of the last update since the index was built.
        added: number of shards, the last ones, that updates have added.
        passages: number of passages, or parts of them, in all shards.
        shards: entries of the shards in the order of the passages.

    Unset values that earlier versions do not know are left out, so that the digests of their indexes stay.
    """

    format_version: Literal[1] = 1
    encoder: EncoderEntry
    embeddings: str | None = None
    columns: Mapping[str, str] = Field(default_factory=dict, exclude_if=not_)
    max_words: Positive | None = Field(default=None, exclude_if=_is_none)
    metadata: Mapping[str, MetadataType] = Field(default_factory=dict, exclude_if=not_)
    lexical: WordForm | None = Field(default=None, exclude_if=_is_none)
    dimension: Positive
    metric: Literal["inner_product"] = "inner_product"
    factory: str
    passages: Positive
    updates: int = Field(default=0, ge=0, exclude_if=not_)
    added: int = Field(default=0, ge=0, exclude_if=not_)
    shards: Annotated[tuple[ShardEntry, ...], Field(min_length=1)]

    @property
    def bytes(self) -> int:
        """Size of the FAISS files of all shards, in bytes."""
        return sum(shard.bytes for shard in self.shards)

    @property
    def truncated_passages(self) -> int | None:
        """Number of passages of which the encoder read only the beginning; None if it was not counted."""
        counts = [shard.truncated_passages for shard in self.shards]
        return None if None in counts else sum(filter(None, counts))

    def replace_shards(self, shards: Sequence[ShardEntry], added: int, number: int) -> "IndexManifest":
        """Return the manifest of the next version.

        Args:
            shards: its shards.
            added: number of them, the last ones, that updates have added.
            number: number of the update that makes it.

        Raises:
            ValueError: no passage is left.
        """
        passages = sum(shard.kept for shard in shards)
        if not passages:
            raise ValueError("no passage would be left in the index; delete it instead")
        values = {name: getattr(self, name) for name in IndexManifest.model_fields}
        changed = {"shards": tuple(shards), "passages": passages, "updates": number, "added": added}
        return IndexManifest(**{**values, **changed})

    def compute_digest(self) -> str:
        """Return the SHA-256, in hex, of the manifest; it identifies the whole index, as it covers all file digests."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()

    @model_validator(mode="after")
    def _counts_agree(self) -> "IndexManifest":
        if sum(shard.kept for shard in self.shards) != self.passages:
            raise ValueError(f"the shards do not add up to {self.passages} passages")
        names = Counter(name for shard in self.shards for name, _, _ in shard.list_files())
        if double := next((name for name, count in names.items() if count > 1), None):
            raise ValueError(f"two shards have the file {double}")
        if any((shard.lexical is None) != (self.lexical is None) for shard in self.shards):
            raise ValueError("some shards have a lexical part, others have none")
        return self


def write_manifest(folder: Location, manifest: IndexManifest) -> None:
    """Write ``index.json``, the last step of a build or an update: a folder without it is not an index."""
    (folder / MANIFEST).write(manifest.model_dump_json(indent=2).encode() + b"\n")


def name_update(number: int) -> str:
    """Return the name of the folder of an update."""
    return f"update-{number:05d}"


def number_next_update(folder: Location, manifest: IndexManifest) -> int:
    """Return the number of the next update, whose folder no version of the index refers to.

    Raises:
        ValueError: the manifest of an earlier version is damaged.
        StorageError: the storage cannot be read.
    """
    kept = [_parse_manifest(file) for file in folder.list_files(".json") if VERSION_FILE.fullmatch(file.name)]
    return 1 + max(version.updates for version in (manifest, *kept))


def publish_version(folder: Location, before: IndexManifest, now: IndexManifest) -> None:
    """Replace ``index.json``; the earlier version stays beside it, for runs that began with it.

    Raises:
        DamagedIndexError: another command has replaced it meanwhile.
        StorageError: the storage cannot be written.
    """
    if read_manifest(folder) != before:
        raise DamagedIndexError(f"{folder.uri}: the index was replaced during the update; run the command again")
    earlier = folder / name_version(before.compute_digest())
    earlier.write(before.model_dump_json(indent=2).encode() + b"\n")
    write_manifest(folder, now)


def name_version(digest: str) -> str:
    """Return the name of the manifest of an earlier version of an index."""
    return f"index-{digest[:16]}.json"


def read_manifest(folder: Location, digest: str | None = None) -> IndexManifest:
    """Read the manifest of an index: ``index.json``, or that of an earlier version, which updates keep.

    Args:
        digest: required digest, that of the index at the start of the run; any by default.

    Raises:
        ValueError: there is no manifest, or it is damaged or of another version; the message names file and key.
        DamagedIndexError: there is no manifest with this digest.
        StorageError: the manifest cannot be read.
    """
    file = folder / MANIFEST
    if file.get_type() != fs.FileType.File:
        raise ValueError(f"{folder.uri}: no index here ({MANIFEST} is missing); build one with jobs.build_index")
    manifest = _parse_manifest(file)
    if digest in (None, manifest.compute_digest()):
        return manifest
    if digest is not None and has_earlier_version(folder, digest):
        return _parse_manifest(folder / name_version(digest))
    raise DamagedIndexError(f"{file.uri}: the index was replaced during the run; restore it, or choose another output")


def has_earlier_version(folder: Location, digest: str) -> bool:
    """Whether an update has kept the manifest with this digest.

    Raises:
        ValueError: it is damaged.
        StorageError: it cannot be read.
    """
    earlier = folder / name_version(digest)
    return earlier.get_type() == fs.FileType.File and _parse_manifest(earlier).compute_digest() == digest


def _parse_manifest(file: Location) -> IndexManifest:
    try:
        return IndexManifest.model_validate_json(file.read())
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"])
        found = f", found {problem['input']!r}" if problem["type"] in SHOWN else ""
        where = f"key {key}: " if key else ""
        raise ValueError(
            f"{file.uri}: {where}{problem['msg'].lower()}{found}; rebuild the index with this version"
        ) from None


def check_encoder(encoder: Encoder, manifest: IndexManifest) -> None:
    """Reject an encoder other than the one that an index was built with; the name may differ, the content may not.

    Raises:
        ValueError: the digest or the dimension differs.
    """
    if encoder.dimension != manifest.dimension:
        raise ValueError(
            f"encoder {encoder.name} has {encoder.dimension} dimensions, but the index has {manifest.dimension}: "
            f"{_advise_on_encoder(manifest)}"
        )
    _check_digest(encoder.name, encoder.digest, manifest)


def _check_digest(name: str, digest: str | None, manifest: IndexManifest) -> None:
    built = manifest.encoder
    if digest != built.digest:
        raise ValueError(
            f"encoder {name} (digest {(digest or 'unknown')[:12]}) is not the one that the index was built with "
            f"({built.name}, digest {built.digest[:12]}): {_advise_on_encoder(manifest)}"
        )


def _advise_on_encoder(manifest: IndexManifest) -> str:
    return f"set retrieval.encoder to the original version of {manifest.encoder.name}, or rebuild the index"


def check_index_manifest(folder: Location, retrieval: RetrievalConfig, digest: str | None = None) -> IndexManifest:
    """Check an index without opening it: manifest, encoder and file sizes.

    Args:
        digest: required digest of the manifest; any by default.

    Raises:
        ValueError: the index cannot be used, or does not match the configuration; the message is one line with advice.
        StorageError: the storage cannot be read.
    """
    manifest = read_manifest(folder, digest)
    if retrieval.searches_vectors:
        _check_present_encoder(manifest, retrieval)
    check_words(folder, manifest, retrieval)
    check_files(folder, manifest)
    return manifest


def _check_present_encoder(manifest: IndexManifest, retrieval: RetrievalConfig) -> None:
    wanted, revision = choose_encoder(manifest, retrieval)
    digest = ENCODERS.hash_present(wanted, revision)
    if digest is not None or wanted != manifest.encoder.name:
        _check_digest(wanted, digest, manifest)  # without a download yet, checked on loading


def check_words(folder: Location, manifest: IndexManifest, retrieval: RetrievalConfig) -> None:
    """Check that an index can be searched by words if ``retrieval.fusion`` does.

    Raises:
        ValueError: it has no lexical part.
    """
    if retrieval.searches_words and manifest.lexical is None:
        raise ValueError(
            f"{folder.uri}: the index has no lexical part, which retrieval.fusion={retrieval.fusion} needs; build it "
            "with --lexical, or set retrieval.fusion=dense"
        )


def check_files(folder: Location, manifest: IndexManifest) -> None:
    """Compare the sizes of all files with the manifest.

    Raises:
        DamagedIndexError: a file is missing or has another size.
        StorageError: the storage cannot be read.
    """
    files = [file for shard in manifest.shards for file in shard.list_files()]
    paths = [(folder / name).path for name, _, _ in files]
    found = folder.retrying(lambda: folder.filesystem.get_file_info(paths))
    for (name, size, _), info in zip(files, found, strict=True):
        if info.type != fs.FileType.File:
            raise DamagedIndexError(f"{(folder / name).uri}: missing; {REMEDY}")
        check_size((folder / name).uri, info.size, size)


def choose_encoder(manifest: IndexManifest, retrieval: RetrievalConfig) -> tuple[str, str | None]:
    """Return name and revision of the encoder of the queries: as configured, or as the index was built."""
    if retrieval.encoder in (None, manifest.encoder.name):
        return manifest.encoder.name, manifest.encoder.revision
    return str(retrieval.encoder), None
