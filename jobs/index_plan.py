"""What an index of the user's own passages will take: ``jobs.build_index --plan``."""

import time
from dataclasses import dataclass

from rich.table import Table

from pipeline.decoding.prompts import passage_text
from pipeline.indexing.passages import spread_samples
from pipeline.indexing.sizing import (
    CARDS,
    USUAL_FACTORIES,
    SizePlan,
    beside_7b,
    cards_needed,
    gpu_need,
    machines_needed,
    search_cost,
    share_beside,
    size_plan,
)
from pipeline.retrieval.encoder import Encoder
from pipeline.retrieval.shard_files import PASSAGE_SCHEMA
from pipeline.storage.parquet import RowRange, map_in_threads, read_footer

# Encoded to see how fast this machine is: a few seconds on a CPU.
SAMPLE = 64
GB, MB = 1e9, 1e6
# Memory of a machine that shards are put on.
MACHINE = 256_000_000_000


@dataclass(frozen=True)
class Corpus:
    """What the passages' files say.

    Attributes:
        text_bytes: of ids, titles and texts, uncompressed: what the passages files will have.
        rate: passages per second of one encoder on this machine.
    """

    passages: int
    text_bytes: int
    dimension: int
    rate: float


def survey(files: list[RowRange], encoder: Encoder, batch_size: int) -> Corpus:
    """Read the footers, and encode a sample."""
    batches = [batch.passages for sample in spread_samples(files, SAMPLE) for batch in sample.read()]
    texts = [passage_text(row["title"], row["text"]) for batch in batches for row in batch.to_pylist()]
    encoder.encode(texts[:batch_size], batch_size)  # the first batch warms up
    begun = time.monotonic()
    encoder.encode(texts, batch_size)
    rate = len(texts) / (time.monotonic() - begun)
    return Corpus(sum(file.rows for file in files), sum(map_in_threads(_text_bytes, files)), encoder.dimension, rate)


def _text_bytes(part: RowRange) -> int:
    footer, total = read_footer(part.file), 0
    for group in range(footer.num_row_groups):
        columns = [footer.row_group(group).column(n) for n in range(footer.num_columns)]
        total += sum(c.total_uncompressed_size for c in columns if c.path_in_schema in PASSAGE_SCHEMA.names)
    return total


def tables(corpus: Corpus, factory: str, shards: int) -> list[Table]:
    """The corpus, and sizes for the factory asked for beside the usual ones."""
    about = Table(title="Passages", show_header=False)
    hours = corpus.passages / corpus.rate / 3600
    about.add_row("passages", f"{corpus.passages:,}")
    about.add_row("their text, memory-mapped", f"{corpus.text_bytes / GB:.2f} GB")
    about.add_row("dimensions", str(corpus.dimension))
    about.add_row("one encoder on this machine", f"{corpus.rate:.0f} passages/s, {hours:.1f} h for all")
    sizes = Table(title=f"The FAISS index in {shards} shards: bytes in memory of who searches it")
    for heading in ("factory", "bytes per passage", "all shards", "largest shard"):
        sizes.add_column(heading, justify="left" if heading == "factory" else "right")
    lines = size_plan(corpus.passages, corpus.dimension, shards, dict.fromkeys([factory, *USUAL_FACTORIES]))
    for line in lines:
        sizes.add_row(
            line.factory, f"{line.per_vector:,.0f}", f"{line.index / GB:.2f} GB", f"{line.largest_shard / GB:.2f} GB"
        )
    return [about, sizes, placements(corpus, lines, shards)]


def placements(corpus: Corpus, lines: list[SizePlan], shards: int) -> Table:
    """Where the index fits: on the card of a 7B model, on cards of its own, in the memory of machines."""
    table = Table(title="Where it fits (topology local, or partitioned over so many servers), and what a query costs")
    headings = [f"beside a 7B model, {card / GB:.0f} GB" for card in CARDS]
    headings += [f"servers, {CARDS[-1] / GB:.0f} GB cards", f"servers, {MACHINE / GB:.0f} GB memory"]
    headings += ["compared", "read"]
    for heading in ("factory", *headings):
        table.add_column(heading, justify="left" if heading == "factory" else "right")
    largest = -(-corpus.passages // shards)
    for line in lines:
        cost = search_cost(line.factory, corpus.dimension, largest)
        need = gpu_need(line.factory, corpus.dimension)
        on_cards = [*(_beside(line.index, card, need) for card in CARDS), str(cards_needed(line.index, CARDS[-1]))]
        if need == "none":
            on_cards = ["–"] * len(on_cards)
        costs = [f"{shards * cost.compared:,}", f"{shards * cost.bytes / MB:,.1f} MB"]
        table.add_row(line.factory, *on_cards, str(machines_needed(line.index, MACHINE)), *costs)
    return table


def _beside(index: int, card: int, need: str) -> str:
    return " ".join(filter(None, [f"{share_beside(index, card):.2f}", need])) if index <= beside_7b(card) else "no"
