"""Build an index with a pool of Ray actors: encode a sample, train on it, then build the shards.

The driver trains the index. Every shard starts from a copy of this empty index, so that scores are comparable across
shards. Each actor has its own encoder and holds one shard in memory.
"""

import logging
import resource
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import faiss
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.cluster import connect
from pipeline.config.sections import ExecutionConfig
from pipeline.indexing.actor_pool import map_over_actors
from pipeline.indexing.base_index import BaseIndex
from pipeline.indexing.build import BuildFolder, BuildPlan, Vectorize, read_ahead
from pipeline.indexing.lexical_build import build_lexical
from pipeline.indexing.parts import describe_truncation, estimate_words
from pipeline.indexing.passages import PassageBatch, ShardPlan, read_passages, spread_samples
from pipeline.nodes.access import Packed
from pipeline.nodes.check import check_nodes
from pipeline.retrieval.encoder import Vectors
from pipeline.retrieval.manifest import IndexManifest, ShardEntry, write_manifest
from pipeline.retrieval.passage_columns import extend_schema
from pipeline.retrieval.shard_files import build_shard, count_training_rows, create_empty_index, train_index
from pipeline.storage.lease import Lease

log = logging.getLogger(__name__)


class SampleEncoder:
    """Encodes the samples that an index is trained on.

    Args:
        packed: plan of the build.
        size: number of passages that the index is trained on.
        tally: Ray handle of a :class:`BuildProgress`.
    """

    def __init__(self, packed: Packed[BuildPlan], size: int, tally: Any) -> None:
        self.plan, self.tally = packed.unpack(), tally
        self.samples = spread_samples(self.plan.files, size)
        self.vectorize = self.plan.load_vectorizer()

    def __call__(self, batch: pa.Table) -> dict[str, Vectors]:
        """Return the vectors of samples, given by their numbers: float32 [passages, dimension]."""
        vectors = []
        for part in read_ahead(self._read_samples(batch["item"].to_pylist())):
            vectors.append(self.vectorize(part).vectors)
            self.tally.add.remote(part.count_rows())
        return {"vectors": np.concatenate(vectors)}

    def _read_samples(self, numbers: list[int]) -> Iterator[PassageBatch]:
        for number in numbers:
            sample = self.samples[number]
            yield from (batch.thin(sample.parts) for batch in sample.read(self.plan.request.form))


@dataclass(frozen=True)
class ShardReport:
    """Report on a built shard.

    Attributes:
        number: number of the shard.
        entry: entry of the shard in the manifest.
        seconds: build time, from the first passage to the published files.
        peak_bytes: peak memory of the actor so far, libraries and encoder included.
    """

    number: int
    entry: ShardEntry
    seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class Built:
    """A finished index.

    Attributes:
        manifest: manifest of the index.
        reports: reports on the shards that this call has built.
    """

    manifest: IndexManifest
    reports: tuple[ShardReport, ...]


class ShardBuilder:
    """Builds shards; loads the encoder once.

    Args:
        packed: plan of the build.
        template: Ray reference to the empty index, serialized by FAISS: uint8 [bytes].
        tally: Ray handle of a :class:`BuildProgress`.

    Attributes:
        encodes: whether the actors encode passages, on GPUs if there are any.
        truncated: passages of the current shard, so far, of which the encoder read only the beginning.
    """

    encodes: ClassVar[bool] = True

    def __init__(self, packed: Packed[BuildPlan], template: Any, tally: Any) -> None:
        import ray

        self.plan, self.tally = packed.unpack(), tally
        self.template: npt.NDArray[np.uint8] = ray.get(template)
        self.vectorize = self.load_vectorizer()
        self.folder = BuildFolder(self.plan.output)
        self.truncated = 0

    def load_vectorizer(self) -> Vectorize | None:
        """Load what turns passages into vectors; None if the vectors exist."""
        return self.plan.load_vectorizer()

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Build the shards with the given numbers and return a row with the report of each."""
        reports = [self.build(self.plan.shards[number]) for number in batch["item"].to_pylist()]
        rows = [{**vars(report), "entry": report.entry.model_dump_json()} for report in reports]
        return pa.Table.from_pylist(rows)

    def build(self, shard: ShardPlan) -> ShardReport:
        """Fill the index of a shard, write its files, and record it as built."""
        begun, self.truncated = time.monotonic(), 0
        # FAISS writes into the index it deserializes, and Ray's arrays are read-only.
        index = faiss.deserialize_index(self.template.copy())
        batches, schema = self.read_batches(shard, index), extend_schema(self.plan.metadata)
        entry = build_shard(self.plan.output, shard.number, index, batches, schema)
        entry = entry.model_copy(update={"truncated_passages": self.truncated})
        self.folder.keep(shard.number, entry)
        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return ShardReport(shard.number, entry, time.monotonic() - begun, peak)

    def read_batches(self, shard: ShardPlan, index: Any) -> Iterator[tuple[pa.RecordBatch, Vectors]]:  # noqa: ARG002
        """Yield the passages of a shard, and those of their vectors that its index does not have yet."""
        assert self.vectorize is not None, "the vectors are computed or read"
        for batch in read_ahead(read_passages(shard.ranges, self.plan.request.form)):
            vectorized = self.vectorize(batch)
            self.truncated += vectorized.truncated
            yield batch.passages, vectorized.vectors
            self.tally.add.remote(batch.count_rows())


def prepare_index(plan: BuildPlan, folder: BuildFolder) -> Any:
    """Return the empty index that every shard starts from, trained if its kind needs training.

    Raises:
        ValueError: there are too few passages for the factory string.
        ray.exceptions.RayError: the sample could not be encoded.
    """
    index = create_empty_index(plan.request.factory, plan.dimension)
    size = count_training_rows(index)
    if not size:
        return index
    if (kept := folder.read_trained()) is not None:
        return kept
    samples = spread_samples(plan.files, size)
    passages = sum(len(sample.rows) for sample in samples)
    log.info("encoding %d passages to train %s on", passages, plan.request.factory)
    with map_over_actors(plan, SampleEncoder, size, range(len(samples)), passages) as encoded:
        parts = [batch["vectors"] for batch in encoded.iter_batches(batch_size=None, batch_format="numpy")]
    train_index(index, np.concatenate(parts))
    folder.keep_trained(index)
    return index


def build_shards(
    plan: BuildPlan, index: Any, missing: list[ShardPlan], builder: type[ShardBuilder]
) -> list[ShardReport]:
    """Build the missing shards and return a report on each.

    Args:
        plan: plan of the build.
        index: the empty index that every shard starts from.
        missing: shards to build.
        builder: class of the actors.

    Raises:
        ray.exceptions.RayError: a shard failed.
    """
    import ray

    template = ray.put(faiss.serialize_index(index))
    numbers = [shard.number for shard in missing]
    reports = []
    passages = sum(shard.rows for shard in missing)
    with map_over_actors(plan, builder, template, numbers, passages, builder.encodes) as built:
        for row in built.iter_rows():
            entry = ShardEntry.model_validate_json(row["entry"])
            report = ShardReport(row["number"], entry, row["seconds"], row["peak_bytes"])
            reports.append(report)
            what = (report.number, entry.rows, report.seconds, report.peak_bytes / 1e9)
            log.info("shard %d: %d passages in %.1f s, peak memory %.2f GB", *what)
    return reports


def run_build(plan: BuildPlan, base: BaseIndex | None = None, builder: type[ShardBuilder] | None = None) -> Built:
    """Build the missing shards of a checked plan, then write the manifest.

    Args:
        plan: plan of the build.
        base: the index that the shards are added to; None if they are the first.
        builder: class of the actors that build the shards; :class:`ShardBuilder` by default.

    Raises:
        ValueError: the output holds an index or an unfinished build of another identity and may not be overwritten,
            or there are too few passages for the factory string.
        NodeAccessError: a machine cannot read the passages or write to the output.
        OutputInUseError: another build is using the folder.
        LeaseLostError: another build has taken over.
        ray.exceptions.RayError: a shard failed.
        RuntimeError: files of shards are not in the output.
        StorageError: the output cannot be written.
    """
    with Lease(plan.output) as lease:
        BuildFolder(plan.output).check(plan.request.overwrite)  # another build may have finished meanwhile
        connect(ExecutionConfig())
        with check_nodes(plan.list_sources(), plan.output.uri, plan.request.storage) as access:
            return _execute(replace(plan, access=access), lease, base, builder or ShardBuilder)


def _execute(plan: BuildPlan, lease: Lease, base: BaseIndex | None, builder: type[ShardBuilder]) -> Built:
    folder = BuildFolder(plan.output)
    identity = plan.compute_identity()
    folder.begin(identity, plan.request.overwrite)
    entries = folder.find_finished(plan.shards)
    if entries:
        log.info("resuming an interrupted build: %d of %d shards are done", len(entries), len(plan.shards))
    missing = [shard for shard in plan.shards if shard.number not in entries]
    reports = []
    if missing:
        reports = build_shards(plan, base.template if base else prepare_index(plan, folder), missing, builder)
    entries |= {report.number: report.entry for report in reports}
    if plan.request.lexical:
        entries = build_lexical(plan, plan.request.lexical, entries, base.statistics if base else None)
    plan.check_unchanged(identity)
    folder.check_shards(entries.values())
    manifest = IndexManifest(
        encoder=plan.encoder,
        embeddings=plan.request.form.embeddings,
        columns=plan.request.form.columns,
        max_words=plan.request.form.max_words,
        metadata=plan.metadata,
        lexical=plan.request.lexical,
        dimension=plan.dimension,
        factory=plan.request.factory,
        passages=sum(entry.rows for entry in entries.values()),
        shards=tuple(entries[shard.number] for shard in plan.shards),
    )
    lease.renew()
    write_manifest(plan.output, manifest)
    folder.forget()
    if (line := describe_truncation(manifest)) and plan.max_tokens:
        words = estimate_words(plan.max_tokens)
        log.warning("%s (it reads %d tokens, some %d English words)", line, plan.max_tokens, words)
    return Built(manifest, tuple(reports))
