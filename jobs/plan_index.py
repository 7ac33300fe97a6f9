"""Plan an index: estimate the memory and time that an index of your passages takes, before it is built.

``python -m jobs.plan_index --passages URI [--factory IVF4096,SQ8] [--shards 4]``
"""

from rich.console import Console
from rich.filesize import decimal
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

GB = 1e9
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
    """Return tables of the corpus, and of sizes, placements and searches of the given factory and the usual ones."""
    lines = plan_sizes(corpus.passages, corpus.dimension, shards, dict.fromkeys([factory, *USUAL_FACTORIES]))
    return [
        build_corpus_table(corpus),
        build_sizes_table(lines, shards),
        build_placement_table(corpus, lines),
        build_search_table(corpus, lines, shards),
    ]


def build_corpus_table(corpus: Corpus) -> Table:
    """Return a table of the passages."""
    about = Table(title="Passages", show_header=False)
    hours = corpus.passages / corpus.rate / 3600
    about.add_row("passages", f"{corpus.passages:,}")
    about.add_row("text, memory-mapped", decimal(corpus.text_bytes))
    about.add_row("words, memory-mapped (--lexical)", decimal(corpus.lexical_bytes))
    about.add_row("dimensions", str(corpus.dimension))
    about.add_row("one encoder on this machine", f"{corpus.rate:.0f} passages/s, {hours:.1f} h in total")
    if corpus.max_tokens is not None:
        words = estimate_words(corpus.max_tokens)
        about.add_row("tokens that the encoder reads", f"{corpus.max_tokens}, some {words} English words")
        about.add_row("longer passages", f"{corpus.truncated:.0%} of a sample; --max-words splits them")
    return about


def build_sizes_table(lines: list[SizePlan], shards: int) -> Table:
    """Return a table of the memory that an index takes."""
    title = f"FAISS index in {shards} shard{'s' * (shards > 1)}: memory of the process that searches it"
    table = _start_table(title, "bytes per passage", "all shards", "largest shard")
    for line in lines:
        table.add_row(line.factory, f"{line.per_vector:,.0f}", decimal(line.index), decimal(line.largest_shard))
    return table


def build_placement_table(corpus: Corpus, lines: list[SizePlan]) -> Table:
    """Return a table of where the index fits: beside a 7B model on its GPU, on GPUs of its own, or in CPU memory."""
    beside = [f"beside 7B on {card / GB:.0f} GB" for card in CARDS]
    servers = [f"servers of {CARDS[-1] / GB:.0f} GB GPUs", f"servers of {MACHINE / GB:.0f} GB memory"]
    table = _start_table(
        "Placement: share of a GPU that is left to vLLM, or number of shard servers", *beside, *servers
    )
    for line in lines:
        need = find_gpu_setting(line.factory, corpus.dimension)
        on_cards = [*(_format_share(line.index, card, need) for card in CARDS), str(count_cards(line.index, CARDS[-1]))]
        if need == "none":
            on_cards = ["–"] * len(on_cards)
        table.add_row(line.factory, *on_cards, str(count_machines(line.index, MACHINE)))
    return table


def build_search_table(corpus: Corpus, lines: list[SizePlan], shards: int) -> Table:
    """Return a table of the cost of a query."""
    table = _start_table("Cost of a query, over all shards", "vectors compared", "read")
    largest = -(-corpus.passages // shards)
    for line in lines:
        cost = estimate_search_cost(line.factory, corpus.dimension, largest)
        table.add_row(line.factory, f"{shards * cost.compared:,}", decimal(shards * cost.bytes))
    return table


def _start_table(title: str, *headings: str) -> Table:
    table = Table(title=title)
    table.add_column("factory", no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right")
    return table


def _format_share(index: int, card: int, need: str) -> str:
    if index > compute_room_beside_7b(card):
        return "no"
    share = f"{compute_share_beside(index, card):.2f}"
    return f"{share} {need}" if need else share


if __name__ == "__main__":
    run(plan_index)
