"""Split long passages at sentence ends into parts that an encoder reads in full, and advise to do so."""

from itertools import chain

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import regex

from pipeline.decoding.passage_ids import name_parts
from pipeline.retrieval.manifest import IndexManifest
from pipeline.retrieval.words import UNSPACED

# Each character of a script without spaces counts as a word, with its marks and the punctuation after it.
_WORD = regex.compile(rf"(?:[{UNSPACED}]\p{{M}}*\p{{P}}*|[^\s{UNSPACED}]+)\s*")
# The end of a sentence, by Unicode's property Sentence_Break: a terminator (ST) of any script, or a full stop that does
# not follow an initial, then closing marks (CL).
_SENTENCE_END = regex.compile(r"(?:(?<!\b\p{Lu})[.．]|\p{SB=ST})\p{SB=CL}*\s*$")
_BLANK_LINE = regex.compile(r"\n\s*\n")


def split_text(text: str, most: int) -> list[str]:
    """Split a text into parts of at most ``most`` words, at the last sentence end of each part that has one.

    A text that is short enough is returned unchanged. A sentence of more words is cut between two of them.
    """
    words = _WORD.findall(text)
    if len(words) <= most:
        return [text]
    parts, first = [], 0
    while first < len(words):
        end = _find_part_end(words, first, most)
        parts.append("".join(words[first:end]).rstrip())
        first = end
    return parts


def _find_part_end(words: list[str], first: int, most: int) -> int:
    last = first + most
    if last >= len(words):
        return len(words)
    return next((end for end in range(last, first, -1) if _ends_sentence(words[end - 1], words[end])), last)


def _ends_sentence(word: str, following: str) -> bool:
    ends = _SENTENCE_END.search(word) and not following[0].islower()
    return bool(ends or _BLANK_LINE.search(word))


def split_passages(passages: pa.RecordBatch, most: int) -> tuple[pa.RecordBatch, npt.NDArray[np.int64]]:
    """Split passages into parts of at most ``most`` words of text; each part keeps the title.

    Args:
        passages: passages in ``PASSAGE_SCHEMA``, with further columns or without.
        most: number of words of a part.

    Returns:
        Parts with the same columns, and for each the position of its passage: int64 [parts], ascending.
    """
    parts = [split_text(text, most) for text in passages["text"].to_pylist()]
    counts = [len(texts) for texts in parts]
    ids = map(name_parts, passages["id"].to_pylist(), counts)
    positions = np.repeat(np.arange(len(parts)), counts)
    split = {"id": chain.from_iterable(ids), "text": chain.from_iterable(parts)}
    whole = passages.take(pa.array(positions))
    arrays = [pa.array(split[name], pa.string()) if name in split else whole[name] for name in passages.schema.names]
    return pa.record_batch(arrays, schema=passages.schema), positions


def estimate_words(tokens: int) -> int:
    """Return the number of English words, in tens, that fit into so many tokens beside a title."""
    return tokens * 3 // 50 * 10


def describe_truncation(manifest: IndexManifest) -> str | None:
    """Return a line about the passages of which the encoder read only the beginning; None if there are none."""
    if not manifest.truncated_passages:
        return None
    option = "a smaller --max-words" if manifest.max_words else "--max-words"
    return (
        f"{manifest.truncated_passages} of {manifest.passages} passages are longer than the encoder reads, and only "
        f"their beginning is searched; to split them, build the index with {option}"
    )
