"""Split answers and gold answers into comparable words, in any script.

English text is split as in SQuAD's evaluation script (Rajpurkar et al. 2016): lower case, without punctuation and
articles. Unlike it, :func:`split_pair` keeps what tells numbers and names apart (``-5``, ``3.5``, ``C++``), removes
punctuation of all scripts, treats each character of a script without spaces as a word, and compares gold answers of
which SQuAD's rule leaves nothing (``A``, ``The The``, ``-``) as they are written.
"""

import string
import unicodedata
from collections.abc import Callable

import regex

Words = list[str]
# Splits an answer and a gold answer in the same way.
SplitPair = Callable[[str, str], tuple[Words, Words]]

ARTICLES = frozenset({"a", "an", "the"})
_ASCII_PUNCTUATION = str.maketrans("", "", string.punctuation)
_SQUAD_ARTICLES = regex.compile(r"\b(a|an|the)\b")

# A character of a script that is written without spaces, with its marks.
UNSPACED = r"[\p{Han}\p{Hiragana}\p{Katakana}ー\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]\p{M}*"
_UNSPACED = regex.compile(f"({UNSPACED})")
_PUNCTUATION = r"[\p{P}$+<=>^`|~]"
_IN_NUMBER = r"(?<=\d)[.,:/-](?=\d)"  # 3.5, 10:30, 1/2, 1914-1918
_MINUS = r"(?<![\w)\]])-(?=\d)"
_IN_NAME = r"(?<=\p{L}[+#]*)[+#]"  # C++, C#
_THOUSANDS = r"(?<=\d),(?=\d{3}(?!\d))"
_REMOVED = regex.compile(f"{_THOUSANDS}|(?!{_IN_NUMBER}|{_MINUS}|{_IN_NAME}){_PUNCTUATION}")
# Hyphens, dashes between digits, and the minus sign.
_DASHES = regex.compile(r"[\u2010\u2011\u2212]|(?<=\d)[\u2012-\u2014](?=\d)")


def split_squad_pair(answer: str, gold: str) -> tuple[Words, Words]:
    """Split both as SQuAD's evaluation script does."""
    return _split_squad(answer), _split_squad(gold)


def _split_squad(text: str) -> Words:
    return str(_SQUAD_ARTICLES.sub(" ", text.lower().translate(_ASCII_PUNCTUATION))).split()


def split_pair(answer: str, gold: str) -> tuple[Words, Words]:
    """Split both into words; articles and punctuation count only if the gold answer has nothing else."""
    for split in (_split_without_articles, _split_without_punctuation):
        if words := split(gold):
            return split(answer), words
    return fold(answer).split(), fold(gold).split()


def _split_without_articles(text: str) -> Words:
    return [word for word in _split_without_punctuation(text) if word not in ARTICLES]


def _split_without_punctuation(text: str) -> Words:
    plain = _REMOVED.sub("", _DASHES.sub("-", fold(text)))
    return str(_UNSPACED.sub(r" \1 ", plain)).split()


def fold(text: str) -> str:
    """Fold case, and compose characters with their marks (NFC)."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold())
