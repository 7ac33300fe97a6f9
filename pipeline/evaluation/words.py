"""Split answers and gold answers into comparable words, in any script.

English text is split as in SQuAD's evaluation script (Rajpurkar et al. 2016): lower case, without punctuation and
articles. Unlike it, :func:`split_pair` keeps what tells numbers and names apart (``-5``, ``3.5``, ``C++``), knows the
punctuation of all scripts, and treats each character of a script without spaces as a word. A gold answer of which
SQuAD's rule leaves nothing (``A``, ``The The``, ``-``) is compared with its articles, and with its case.
"""

import re
import string
import unicodedata
from collections.abc import Callable
from functools import lru_cache

import regex

Words = tuple[str, ...]
# Splits an answer and a gold answer in the same way.
SplitPair = Callable[[str, str], tuple[Words, Words]]

ARTICLES = frozenset({"a", "an", "the"})
# An answer is compared with several golds, and a passage with those of several candidates.
CACHED_TEXTS = 1024
_ASCII_PUNCTUATION = str.maketrans("", "", string.punctuation)
_SQUAD_ARTICLES = re.compile(r"\b(a|an|the)\b")

# A character of a script that is written without spaces, with its marks.
UNSPACED = r"[\p{Han}\p{Hiragana}\p{Katakana}ー\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]\p{M}*"
_UNSPACED = regex.compile(f"({UNSPACED})")
_IN_NUMBER = r"(?<=\d)[.,:/-](?=\d)"  # 3.5, 10:30, 1/2, 1914-1918
_MINUS = r"(?<![\w)\]])-(?=\d)"
_IN_NAME = r"(?<=\p{L}[+#]{0,2})[+#]"  # C++, C#
_THOUSANDS = r"(?<=\d),(?=(?:\d{2},)*\d{3}(?!\d))"  # 1,000,000 and 10,00,000
# Within words: ASCII punctuation, as in SQuAD's script, quotation marks, hyphens, and marks that are not seen.
_WITHIN_WORDS = rf"[{re.escape(string.punctuation)}‘’ʼ‛“”„‟«»‹›\u2010\u2011\u00ad\u200b\u200e\u200f\ufeff]"
_REMOVED = regex.compile(f"{_THOUSANDS}|(?!{_IN_NUMBER}|{_MINUS}|{_IN_NAME}){_WITHIN_WORDS}")
# What is left of Unicode's punctuation stands between words: dashes, ellipses, 、 and 。, separators of Ethiopic.
_BETWEEN_WORDS = regex.compile(rf"(?![{re.escape(string.punctuation)}])\p{{P}}")
# Hyphens and dashes between digits, and the minus sign.
_DASHES = regex.compile(r"\u2212|(?<=\d)[\u2010-\u2014](?=\d)")


def split_squad_pair(answer: str, gold: str) -> tuple[Words, Words]:
    """Split both as SQuAD's evaluation script does."""
    return _split_as_squad(answer), _split_as_squad(gold)


@lru_cache(CACHED_TEXTS)
def _split_as_squad(text: str) -> Words:
    return tuple(_SQUAD_ARTICLES.sub(" ", text.lower().translate(_ASCII_PUNCTUATION)).split())


def split_pair(answer: str, gold: str) -> tuple[Words, Words]:
    """Split both into words; articles, punctuation and case count only if the gold answer has nothing else."""
    for split in (_split_without_articles, _split_without_punctuation):
        if words := split(gold):
            return split(answer), words
    return tuple(answer.split()), tuple(gold.split())


@lru_cache(CACHED_TEXTS)
def _split_without_articles(text: str) -> Words:
    return tuple(word for word in _split_without_punctuation(fold(text)) if word not in ARTICLES)


def _split_without_punctuation(text: str) -> Words:
    plain = _REMOVED.sub("", _DASHES.sub("-", unicodedata.normalize("NFC", text)))
    return tuple(_UNSPACED.sub(r" \1 ", _BETWEEN_WORDS.sub(" ", plain)).split())


def fold(text: str) -> str:
    """Fold case, and compose characters with their marks (NFC)."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold())
