"""Splits texts into the words that a lexical search compares."""

import unicodedata
from collections.abc import Sequence
from functools import cached_property
from types import MappingProxyType
from typing import Annotated

import bm25s.stopwords
import regex
import Stemmer
from pydantic import AfterValidator, Field

from pipeline.config.loading import Frozen

# Characters between which a line may break without a space, by Unicode's property Line_Break: Han and kana (ID, CJ);
# Thai, Lao, Khmer, Myanmar and others (SA). Each is a word, with its marks.
UNSPACED = r"\p{LB=ID}\p{LB=CJ}\p{LB=SA}"
_WORD = regex.compile(rf"(?V1)[[{UNSPACED}]&&\w]\p{{M}}*|[\w--[{UNSPACED}]]+")
# Stop words that bm25s has, by language.
STOP_WORDS = MappingProxyType(
    {
        "danish": bm25s.stopwords.STOPWORDS_DANISH,
        "dutch": bm25s.stopwords.STOPWORDS_DUTCH,
        "english": bm25s.stopwords.STOPWORDS_EN,
        "french": bm25s.stopwords.STOPWORDS_FRENCH,
        "german": bm25s.stopwords.STOPWORDS_GERMAN,
        "italian": bm25s.stopwords.STOPWORDS_ITALIAN,
        "norwegian": bm25s.stopwords.STOPWORDS_NORWEGIAN,
        "portuguese": bm25s.stopwords.STOPWORDS_PORTUGUESE,
        "russian": bm25s.stopwords.STOPWORDS_RUSSIAN,
        "spanish": bm25s.stopwords.STOPWORDS_SPANISH,
        "swedish": bm25s.stopwords.STOPWORDS_SWEDISH,
        "turkish": bm25s.stopwords.STOPWORDS_TURKISH,
    }
)


def _check_stemmer(language: str | None) -> str | None:
    if language is not None and language not in Stemmer.algorithms():
        raise ValueError(f"unknown language {language!r}; expected one of {', '.join(Stemmer.algorithms())}")
    return language


def _check_stop_words(language: str | None) -> str | None:
    if language is not None and language not in STOP_WORDS:
        raise ValueError(f"unknown language {language!r}; expected one of {', '.join(STOP_WORDS)}")
    return language


class WordForm(Frozen):
    """The form in which words are compared, and the parameters of BM25.

    Attributes:
        stemmer: language of the Snowball stemmer; words are compared whole by default.
        stop_words: language whose stop words are left out; none are by default.
        k1: saturation of repeated words.
        b: influence of the passage's length, from 0 to 1.
    """

    stemmer: Annotated[str | None, AfterValidator(_check_stemmer)] = None
    stop_words: Annotated[str | None, AfterValidator(_check_stop_words)] = None
    k1: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.5
    b: Annotated[float, Field(ge=0, le=1)] = 0.75


class WordSplitter:
    """Splits texts into words: runs of letters and digits without case, each character of scripts without spaces.

    Args:
        form: form of the words.
    """

    def __init__(self, form: WordForm) -> None:
        self._form = form
        left_out = STOP_WORDS[form.stop_words] if form.stop_words else ()
        self._left_out = frozenset(word.casefold() for word in left_out)

    @cached_property
    def _stemmer(self) -> Stemmer.Stemmer:
        return Stemmer.Stemmer(self._form.stemmer)

    def split(self, text: str) -> list[str]:
        """Return the words of a text in order, with repetitions."""
        words: Sequence[str] = _WORD.findall(unicodedata.normalize("NFKC", text).casefold())
        kept = [word for word in words if word not in self._left_out]
        if not self._form.stemmer:
            return kept
        # Some stemmers leave nothing of a word.
        return [stem for stem in self._stemmer.stemWords(kept) if stem]
