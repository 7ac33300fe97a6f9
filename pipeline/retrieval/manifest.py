"""What an index folder says about itself, and whether a run may use it."""

import hashlib
from typing import Annotated, Literal

from pyarrow import fs
from pydantic import Field, ValidationError, model_validator

from pipeline.config.loading import Frozen
from pipeline.config.sections import Positive, RetrievalConfig
from pipeline.retrieval.encoder import Encoder, EncoderStyle, encoder_digest
from pipeline.retrieval.index_cache import REMEDY, DamagedIndexError, check_size
from pipeline.storage.location import Location

MANIFEST = "index.json"

# A plain name: an index that somebody else has written must not lead out of its folder, nor out of the cache.
FileName = Annotated[str, Field(pattern=r"^[\w-][\w.-]*$")]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class ShardEntry(Frozen):
    """What the manifest says of a shard.

    Attributes:
        file, bytes, sha256: of the FAISS index.
        passages_file, passages_bytes, passages_sha256: of the passages, an Arrow IPC file.
        rows: of both.
    """

    file: FileName
    passages_file: FileName
    rows: Positive
    bytes: Positive
    sha256: Digest
    passages_bytes: Positive
    passages_sha256: Digest

    def files(self) -> tuple[tuple[str, int, str], tuple[str, int, str]]:
        """Name, size in bytes and digest of the two files."""
        index = (self.file, self.bytes, self.sha256)
        return index, (self.passages_file, self.passages_bytes, self.passages_sha256)


class EncoderEntry(EncoderStyle):
    """The encoder that an index was built with; attributes as those of ``Encoder``, and how it was used."""

    name: str
    revision: str | None
    digest: str

    @classmethod
    def of(cls, encoder: Encoder) -> "EncoderEntry":
        """The entry of a loaded encoder."""
        style = encoder.style.model_dump()
        return cls(name=encoder.name, revision=encoder.revision, digest=encoder.digest, **style)

    @property
    def style(self) -> EncoderStyle:
        """How it was used."""
        return EncoderStyle(**self.model_dump(include=set(EncoderStyle.model_fields)))


class IndexManifest(Frozen):
    """``index.json``: everything about an index but its vectors and passages.

    Attributes:
        embeddings: column that the vectors came from; None where the encoder made them.
        metric: always the inner product, which is the cosine where ``encoder.normalised``.
        factory: FAISS factory string of every shard.
        passages: in all shards.
        shards: in the order of the passages.
    """

    format_version: Literal[1] = 1
    encoder: EncoderEntry
    embeddings: str | None = None
    dimension: Positive
    metric: Literal["inner_product"] = "inner_product"
    factory: str
    passages: Positive
    shards: Annotated[tuple[ShardEntry, ...], Field(min_length=1)]

    @property
    def bytes(self) -> int:
        """Of the FAISS files of all shards."""
        return sum(shard.bytes for shard in self.shards)

    def digest(self) -> str:
        """SHA-256, in hex, of everything above: with the shards' own digests, the identity of the whole index."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()

    @model_validator(mode="after")
    def _counts_agree(self) -> "IndexManifest":
        if sum(shard.rows for shard in self.shards) != self.passages:
            raise ValueError(f"the shards do not hold {self.passages} passages together")
        return self


def write_manifest(folder: Location, manifest: IndexManifest) -> None:
    """Write ``index.json``, which makes the folder an index: the last step of a build."""
    (folder / MANIFEST).write(manifest.model_dump_json(indent=2).encode() + b"\n")


def read_manifest(folder: Location, digest: str | None = None) -> IndexManifest:
    """Read ``index.json``.

    Args:
        digest: that it must have: that of the index which the run began with.

    Raises:
        ValueError: there is none, or it is damaged or of another version; names file and key.
        DamagedIndexError: it has another digest.
        StorageError: it cannot be read.
    """
    file = folder / MANIFEST
    if file.kind() != fs.FileType.File:
        raise ValueError(f"{folder.uri}: no index here ({MANIFEST} is missing); build one with jobs.build_index")
    try:
        manifest = IndexManifest.model_validate_json(file.read())
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"])
        found = f", found {problem['input']!r}" if problem["type"] == "literal_error" else ""
        where = f"key {key}: " if key else ""
        raise ValueError(
            f"{file.uri}: {where}{problem['msg'].lower()}{found}; build the index anew with this version"
        ) from None
    if digest not in (None, manifest.digest()):
        raise DamagedIndexError(f"{file.uri}: the index was replaced while the run is at work; start the run anew")
    return manifest


def check_encoder(encoder: Encoder, manifest: IndexManifest) -> None:
    """Refuse an encoder other than the one an index was built with; its name may differ, its content may not.

    Raises:
        ValueError: digest or dimension differ.
    """
    if encoder.dimension != manifest.dimension:
        raise ValueError(
            f"encoder {encoder.name} gives {encoder.dimension} dimensions, the index has {manifest.dimension}: "
            f"{_encoder_advice(manifest)}"
        )
    _check_digest(encoder.name, encoder.digest, manifest)


def _check_digest(name: str, digest: str | None, manifest: IndexManifest) -> None:
    built = manifest.encoder
    if digest != built.digest:
        raise ValueError(
            f"encoder {name} (digest {(digest or 'unknown')[:12]}) is not the one that the index was built with "
            f"({built.name}, digest {built.digest[:12]}): {_encoder_advice(manifest)}"
        )


def _encoder_advice(manifest: IndexManifest) -> str:
    return f"set retrieval.encoder to {manifest.encoder.name} as it was then, or build the index anew"


def check_index_manifest(folder: Location, retrieval: RetrievalConfig, digest: str | None = None) -> IndexManifest:
    """Check what can be checked without opening an index: manifest, encoder, file sizes.

    Args:
        digest: as :func:`read_manifest`.

    Raises:
        ValueError: no usable index, or one that the configuration does not match; one line with advice.
        StorageError: storage does not answer.
    """
    manifest = read_manifest(folder, digest)
    wanted, revision = wanted_encoder(manifest, retrieval)
    digest = encoder_digest(wanted, revision)
    if digest is not None or wanted != manifest.encoder.name:
        _check_digest(wanted, digest, manifest)  # a model not downloaded yet is compared when it is
    check_files(folder, manifest)
    return manifest


def check_files(folder: Location, manifest: IndexManifest) -> None:
    """Compare the sizes of all files with the manifest.

    Raises:
        DamagedIndexError: a file is missing or has another size.
        StorageError: storage does not answer.
    """
    files = [file for shard in manifest.shards for file in shard.files()]
    paths = [(folder / name).path for name, _, _ in files]
    found = folder.attempt(lambda: folder.filesystem.get_file_info(paths))
    for (name, size, _), info in zip(files, found, strict=True):
        if info.type != fs.FileType.File:
            raise DamagedIndexError(f"{(folder / name).uri}: missing; {REMEDY}")
        check_size((folder / name).uri, info.size, size)


def wanted_encoder(manifest: IndexManifest, retrieval: RetrievalConfig) -> tuple[str, str | None]:
    """Name and revision of the encoder to search with: the configured one, or the one that the index was built with."""
    if retrieval.encoder in (None, manifest.encoder.name):
        return manifest.encoder.name, manifest.encoder.revision
    return str(retrieval.encoder), None
