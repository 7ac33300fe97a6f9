"""Passages in Parquet → embeddings → FAISS shards with their manifest.

``python -m jobs.build_index --passages URI --output URI [--plan]``

The driver checks the passages, trains the index where its kind needs that, and hands the same empty index to every
shard, so that scores can be compared across shards. Ray Data runs the shards over a pool of actors, each with its
own encoder. ``index.json`` comes last: a build that was killed leaves no index.
"""

import logging
import math
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import faiss
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import typer
from pyarrow import fs
from rich.console import Console

from jobs.cluster import connect
from jobs.index_plan import survey, tables
from pipeline.config import ExecutionConfig, StorageConfig, load_storage
from pipeline.encoder import Encoder, Vectors
from pipeline.index import MANIFEST, EncoderEntry, IndexManifest, write_manifest
from pipeline.passages import (
    PassageRange,
    ShardPlan,
    check_passages,
    find_passages,
    plan_shards,
    read_passages,
    sample_passages,
)
from pipeline.prompts import passage_text
from pipeline.shards import ShardEntry, build_shard, centroids, empty_index, train, training_rows
from pipeline.storage import Location, locate

log = logging.getLogger(__name__)

# Seconds between progress lines.
LINE_INTERVAL = 10.0
# A shard that kills its process this many times more fails the build.
SHARD_RETRIES = 2


@dataclass(frozen=True)
class BuildRequest:
    """What the command was asked for.

    Attributes:
        passages, output: URIs.
        encoder: Hugging Face name, local folder, or ``demo``.
        factory: FAISS factory string.
        batch_size: passages encoded at once.
        actors: encoders at work; None takes one for each GPU, or for each machine where there are none.
        overwrite: replace an index that is there.
        storage: access to object storage.
    """

    passages: str
    output: str
    encoder: str = "demo"
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
    files: list[PassageRange]
    shards: tuple[ShardPlan, ...]
    output: Location
    encoder: EncoderEntry

    @property
    def passages(self) -> int:
        """How many."""
        return sum(shard.rows for shard in self.shards)


def check_output(output: Location, overwrite: bool) -> None:
    """Refuse to touch an index unless that is asked for.

    Raises:
        ValueError: the output is a file, or holds an index and ``overwrite`` is not set.
    """
    if output.kind() == fs.FileType.File:
        raise ValueError(f"output {output.uri}: is a file; name a folder")
    if (output / MANIFEST).exists() and not overwrite:
        raise ValueError(f"output {output.uri}: already holds an index; say --overwrite to replace it")


def prepare_index(plan: BuildPlan, encoder: Encoder) -> Any:
    """The empty index that every shard starts from, trained where its kind needs that.

    Raises:
        ValueError: the factory string is wrong, or there are too few passages for it.
    """
    index = empty_index(plan.request.factory, encoder.dimension)
    if centroids(index) > plan.passages:
        raise ValueError(
            f"factory {plan.request.factory}: {centroids(index)} inverted lists need as many passages, "
            f"there are {plan.passages}; use Flat or fewer lists"
        )
    rows = training_rows(index)
    if rows:
        sample = sample_passages(plan.files, rows)
        log.info("training %s on %d passages", plan.request.factory, sample.num_rows)
        train(index, encode_passages(encoder, sample, plan.request.batch_size))
    return index


def encode_passages(encoder: Encoder, passages: pa.RecordBatch | pa.Table, batch_size: int) -> Vectors:
    """Vectors of passages, read as title and text: float32 [rows, dimension]."""
    pairs = zip(passages["title"].to_pylist(), passages["text"].to_pylist(), strict=True)
    return encoder.encode([passage_text(title, text) for title, text in pairs], batch_size)


class Tally:
    """A Ray actor that counts passages, so that a long shard shows its progress."""

    def __init__(self) -> None:
        self.rows = 0

    def add(self, rows: int) -> None:
        """Count passages."""
        self.rows += rows

    def total(self) -> int:
        """Passages so far."""
        return self.rows


class ShardBuilder:
    """Builds shards; loads the encoder once.

    Args:
        template: Ray reference to the empty index, serialised by FAISS: uint8 [bytes].
        tally: Ray handle of a ``Tally``.
    """

    def __init__(self, plan: BuildPlan, template: Any, tally: Any) -> None:
        import ray

        self.plan = plan
        self.template: npt.NDArray[np.uint8] = ray.get(template)
        self.tally = tally
        self.encoder = Encoder.load(plan.encoder.name)
        if self.encoder.digest != plan.encoder.digest:
            raise ValueError(f"encoder {plan.encoder.name} differs between machines; put the same files on all")

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Shard numbers in, manifest entries out, row by row."""
        numbers = batch["item"].to_pylist()
        entries = [self.build(self.plan.shards[number]).model_dump_json() for number in numbers]
        return pa.table({"shard": pa.array(numbers, pa.int64()), "entry": pa.array(entries, pa.string())})

    def build(self, shard: ShardPlan) -> ShardEntry:
        """Encode the passages of a shard and write its files."""
        # FAISS writes into the index it deserialises, and Ray's arrays are read-only.
        index = faiss.deserialize_index(self.template.copy())
        return build_shard(self.plan.output, shard.number, index, self._encoded(shard))

    def _encoded(self, shard: ShardPlan) -> Iterator[tuple[pa.RecordBatch, Vectors]]:
        for passages in read_passages(shard.ranges):
            yield passages, encode_passages(self.encoder, passages, self.plan.request.batch_size)
            self.tally.add.remote(passages.num_rows)


def build_shards(plan: BuildPlan, index: Any) -> tuple[ShardEntry, ...]:
    """Build all shards with Ray Data; their entries in order.

    Raises:
        ray.exceptions.RayError: a shard failed.
    """
    import ray

    actors, cpus, gpus = pool(plan)
    tally = ray.remote(num_cpus=0)(Tally).remote()
    arguments = {"plan": plan, "template": ray.put(faiss.serialize_index(index)), "tally": tally}
    numbers = ray.data.from_items(list(range(len(plan.shards))), override_num_blocks=len(plan.shards))
    built = numbers.map_batches(
        ShardBuilder,
        batch_size=1,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=actors),
        fn_constructor_kwargs=arguments,
        num_cpus=cpus,
        num_gpus=gpus,
        max_restarts=-1,
        max_task_retries=SHARD_RETRIES,
    )
    with progress_lines(tally, plan.passages):
        entries = {row["shard"]: ShardEntry.model_validate_json(row["entry"]) for row in built.iter_rows()}
    return tuple(entries[number] for number in range(len(plan.shards)))


def pool(plan: BuildPlan) -> tuple[int, int, int]:
    """How many actors, and the CPUs and GPUs of each: together all CPUs of a machine."""
    import ray

    machines = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    gpus = int(sum(machine.get("GPU", 0) for machine in machines))
    actors = min(plan.request.actors or gpus or len(machines), len(plan.shards))
    per_machine = math.ceil(actors / len(machines))
    cpus = max(1, int(min(machine["CPU"] for machine in machines)) // per_machine)
    return actors, cpus, int(gpus >= actors)


@contextmanager
def progress_lines(tally: Any, passages: int) -> Iterator[None]:
    """Log a line every ``LINE_INTERVAL`` seconds while the body runs."""
    import ray

    begun, over = time.monotonic(), threading.Event()

    def report() -> None:
        while not over.wait(LINE_INTERVAL):
            done = ray.get(tally.total.remote())
            rate = done / (time.monotonic() - begun)
            left = f", {(passages - done) / rate:.0f} s left" if done else ""
            log.info("%d/%d passages, %.1f passages/s%s", done, passages, rate, left)

    thread = threading.Thread(target=report, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def clear(output: Location) -> None:
    """Delete an earlier index, its manifest first, and what a killed build left."""
    if (output / MANIFEST).exists():
        (output / MANIFEST).delete()
    for file in output.files():
        if file.path.rpartition("/")[2].startswith("shard-") and file.path.endswith((".faiss", ".passages.arrow")):
            file.delete()


def check(request: BuildRequest) -> tuple[BuildPlan, Encoder]:
    """Check everything that can be wrong with the inputs, the cheapest first.

    Raises:
        ValueError: one line that says what to do.
        StorageError: storage does not answer.
    """
    output = locate(request.output, request.storage)
    check_output(output, request.overwrite)
    files = find_passages(locate(request.passages, request.storage))
    shards = plan_shards(files, request.shards)
    check_passages(files)
    encoder = Encoder.load(_absolute(request.encoder))
    entry = EncoderEntry(name=encoder.name, revision=encoder.revision, digest=encoder.digest)
    return BuildPlan(request, files, shards, output, entry), encoder


def _absolute(encoder: str) -> str:
    """A folder by its whole path, since actors and later runs work in other folders; other names as they are."""
    folder = Path(encoder).expanduser()
    return str(folder.resolve()) if encoder != "demo" and folder.is_dir() else encoder


def execute(plan: BuildPlan, index: Any) -> IndexManifest:
    """Build the shards of a checked plan, then write the manifest.

    Args:
        index: empty and trained.

    Raises:
        ray.exceptions.RayError: a shard failed.
        StorageError: the output cannot be written.
    """
    connect(ExecutionConfig())
    clear(plan.output)
    entries = build_shards(plan, index)
    manifest = IndexManifest(
        encoder=plan.encoder,
        dimension=index.d,
        factory=plan.request.factory,
        passages=plan.passages,
        shards=entries,
    )
    write_manifest(plan.output, manifest)
    return manifest


def show_plan(request: BuildRequest) -> None:
    """Print what the index will take; nothing is written.

    Raises:
        ValueError: the passages, the encoder or the factory string are wrong.
    """
    files = find_passages(locate(request.passages, request.storage))
    corpus = survey(files, Encoder.load(_absolute(request.encoder)), request.batch_size)
    for table in tables(corpus, request.factory, request.shards):
        Console().print(table)


def build_index(
    passages: Annotated[str, typer.Option(help="Parquet file or folder with the columns id, title and text.")],
    output: Annotated[str, typer.Option(help="Folder for the index.")],
    encoder: Annotated[str, typer.Option(help="Encoder: hub name, folder, or 'demo'.")] = "demo",
    factory: Annotated[str, typer.Option(help="FAISS factory string, such as IVF4096,SQ8 or HNSW32.")] = "Flat",
    shards: Annotated[int, typer.Option(min=1, help="Files to cut the index into.")] = 1,
    batch_size: Annotated[int, typer.Option(min=1, help="Passages encoded at once.")] = 32,
    actors: Annotated[
        int | None, typer.Option(min=1, help="Encoders at work; by default one per GPU or machine.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an index that is there.")] = False,
    plan_only: Annotated[bool, typer.Option("--plan", help="Build nothing; say what the index will take.")] = False,
    config: Annotated[str | None, typer.Option(help="YAML file of a run, for its section 'storage'.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="A storage setting, such as storage.endpoint_url=http://host:9000."),
    ] = None,
) -> None:
    """Build a FAISS index of passages.

    Exit status: 0 built, 1 failed, 2 bad usage.
    """
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    log.setLevel(logging.INFO)
    begun = time.monotonic()
    try:
        storage = load_storage(config, settings or [])
        request = BuildRequest(passages, output, encoder, factory, shards, batch_size, actors, overwrite, storage)
        if plan_only:
            show_plan(request)
            return
        plan, model = check(request)
        index = prepare_index(plan, model)
    except (ValueError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    log.info("encoding %d passages into %d shards of %s", plan.passages, shards, factory)
    from ray.exceptions import RayError

    try:
        execute(plan, index)
    except (RayError, ValueError, OSError) as error:
        log.exception("the build failed; there is no index")
        typer.echo(f"error: {(str(error).strip() or repr(error)).splitlines()[-1]}", err=True)
        raise typer.Exit(1) from None
    seconds = time.monotonic() - begun
    typer.echo(f"index: {output}, {plan.passages} passages, {shards} shards, {seconds:.1f} s", err=True)


if __name__ == "__main__":
    typer.run(build_index)
