"""Checks on a few rows that a model gets its prompts as it was trained to read them."""

from collections.abc import Iterable

from pipeline.decoding.protocols import Critic
from pipeline.decoding.types import Passage, Query

# Beginnings that tokenizers treat differently: a letter, a space, a digit, a quote, another script, a line break.
SAMPLE_PASSAGES = (
    Passage("1", "Cologne", "Cologne is a city in Germany."),
    Passage("2", "", " The river Rhine flows through it."),
    Passage("3", "1248", "“The cathedral” was begun."),
    Passage("4", "東京", "東京は日本の首都です。"),
    Passage("5", "", "\nÉ, the fifth letter"),
)
SAMPLE_QUERY = Query("sample", "Which river flows through Cologne?", "Name it.", passages=SAMPLE_PASSAGES)


PIECES_ADVICE = (
    "answers may be worse; compare the chat template, and the added tokens in tokenizer_config.json (lstrip, rstrip, "
    "normalized), with those of the training, or set model.engine.tokenizer"
)


def check_pieces(critic: Critic, queries: Iterable[Query]) -> str | None:
    """Describe the first prompt with other tokens than those of its whole string, or a repeated beginning of sequence.

    Queries without passages are tried with ``SAMPLE_PASSAGES``. Returns None if there is no such prompt.
    """
    for query in queries:
        for passage in query.passages or SAMPLE_PASSAGES:
            if difference := critic.compare_pieces(query, passage):
                return (
                    f"the prompt of row {query.id!r} with passage {passage.id!r} has other tokens than the "
                    f"strings on which models are trained: {difference}"
                )
    return None
