"""Plan an index: estimate the memory and time that an index of your passages takes, before it is built.

``python -m jobs.plan_index --passages URI [--factory IVF4096,SQ8] [--shards 4]``
"""

from rich.console import Console
from rich.table import Table

from jobs.common import (
    BatchSize,
    Embeddings,
    EncoderName,
    EncoderType,
    Factory,
    IndexFile,
    IndexSettings,
    MaxWords,
    Normalise,
    PassageColumns,
    PassagePrefix,
    Passages,
    QueryPrefix,
    Shards,
    build_encoder_style,
    checking,
    load_index_storage,
    parse_columns,
    require,
    start_logging,
)
from jobs.shell import run
from pipeline.indexing.form import PassageForm
from pipeline.indexing.parts import estimate_words
from pipeline.indexing.passages import find_passages
from pipeline.indexing.sizing import (
    CARDS,
    USUAL_FACTORIES,
    Corpus,
    SizePlan,
    compute_room_beside_7b,
    compute_share_beside,
    count_cards,
    count_machines,
    estimate_search_cost,
    find_gpu_setting,
    plan_sizes,
    survey_corpus,
)
from pipeline.retrieval.encoder import Encoder, resolve_encoder_name
from pipeline.storage.location import locate

GB, MB = 1e9, 1e6
# Memory of a machine that holds shards, in bytes.
MACHINE = 256_000_000_000


def plan_index(
    passages: Passages,
    encoder: EncoderName = "demo",
    query_prefix: QueryPrefix = "",
    passage_prefix: PassagePrefix = "",
    normalise: Normalise = True,
    dtype: EncoderType = "float32",
    embeddings: Embeddings = None,
    column: PassageColumns = None,
    max_words: MaxWords = None,
    factory: Factory = "Flat",
    shards: Shards = 1,
    batch_size: BatchSize = 32,
    config: IndexFile = None,
    settings: IndexSettings = None,
) -> None:
    """Estimate the bytes, GPUs, machines and encoding hours of an index of your passages; builds nothing.

    Exit status: 0 done, 2 bad usage.
    """
    start_logging(timestamps=True)
    with checking():
        source = locate(require(passages, "--passages"), load_index_storage(config, settings))
        form = PassageForm(parse_columns(column or [], "text=contents"), embeddings, max_words)
        files = find_passages(source, form)
        style = build_encoder_style(query_prefix, passage_prefix, normalise, dtype)
        loaded = Encoder.load(resolve_encoder_name(encoder), style=style)
        rows = sum(part.rows for part in files)
        plan_sizes(rows, loaded.dimension, shards, [factory])  # rejects a bad factory before the sample is encoded
        tables = build_plan_tables(survey_corpus(files, form, loaded, batch_size), factory, shards)
    for table in tables:
        Console().print(table)


def build_plan_tables(corpus: Corpus, factory: str, shards: int) -> list[Table]:
    """Return tables of the corpus, and of sizes and placements for the given factory and the usual ones."""
    about = Table(title="Passages", show_header=False)
    hours = corpus.passages / corpus.rate / 3600
    about.add_row("passages", f"{corpus.passages:,}")
    about.add_row("text, memory-mapped", f"{corpus.text_bytes / GB:.2f} GB")
    about.add_row("dimensions", str(corpus.dimension))
    about.add_row("one encoder on this machine", f"{corpus.rate:.0f} passages/s, {hours:.1f} h in total")
    if corpus.max_tokens is not None:
        words = estimate_words(corpus.max_tokens)
        about.add_row("tokens that the encoder reads", f"{corpus.max_tokens}, some {words} English words")
        about.add_row("longer passages", f"{corpus.truncated:.0%} of a sample; --max-words splits them")
    sizes = Table(title=f"FAISS index in {shards} shards: memory of the process that searches it")
    for heading in ("factory", "bytes per passage", "all shards", "largest shard"):
        sizes.add_column(heading, justify="left" if heading == "factory" else "right")
    lines = plan_sizes(corpus.passages, corpus.dimension, shards, dict.fromkeys([factory, *USUAL_FACTORIES]))
    for line in lines:
        sizes.add_row(
            line.factory, f"{line.per_vector:,.0f}", f"{line.index / GB:.2f} GB", f"{line.largest_shard / GB:.2f} GB"
        )
    return [about, sizes, build_placement_table(corpus, lines, shards)]


def build_placement_table(corpus: Corpus, lines: list[SizePlan], shards: int) -> Table:
    """Return a table of where the index fits: beside a 7B model on its GPU, on its own GPUs, or in CPU memory."""
    table = Table(title="Placement (local topology, or number of servers of a partitioned one), and cost of a query")
    headings = [f"beside a 7B model, {card / GB:.0f} GB GPU" for card in CARDS]
    headings += [f"servers, {CARDS[-1] / GB:.0f} GB GPUs", f"servers, {MACHINE / GB:.0f} GB memory"]
    headings += ["compared", "read"]
    for heading in ("factory", *headings):
        table.add_column(heading, justify="left" if heading == "factory" else "right")
    largest = -(-corpus.passages // shards)
    for line in lines:
        cost = estimate_search_cost(line.factory, corpus.dimension, largest)
        need = find_gpu_setting(line.factory, corpus.dimension)
        on_cards = [*(_format_share(line.index, card, need) for card in CARDS), str(count_cards(line.index, CARDS[-1]))]
        if need == "none":
            on_cards = ["–"] * len(on_cards)
        costs = [f"{shards * cost.compared:,}", f"{shards * cost.bytes / MB:,.1f} MB"]
        table.add_row(line.factory, *on_cards, str(count_machines(line.index, MACHINE)), *costs)
    return table


def _format_share(index: int, card: int, need: str) -> str:
    if index > compute_room_beside_7b(card):
        return "no"
    share = f"{compute_share_beside(index, card):.2f}"
    return f"{share} {need}" if need else share


if __name__ == "__main__":
    run(plan_index)
