"""Encode the parts of a prompt so that their ids are those of the whole string, tokenized at once.

Queries and passages are untrusted: a control token written inside one of them stays plain characters. This is the only
place that decides so.
"""

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any


@dataclass(frozen=True)
class TextTokenizer:
    """A tokenizer that separates untrusted text from trusted control tokens.

    Attributes:
        tokenizer: a Hugging Face tokenizer.
    """

    tokenizer: Any

    @cached_property
    def beginning(self) -> list[int]:
        """Ids that the tokenizer puts before a string: its beginning-of-sequence token, or nothing."""
        text = encode_untrusted(self.tokenizer, "a")
        whole = encode_untrusted(self.tokenizer, "a", add_special_tokens=True)
        return whole[: whole.index(text[0])]

    def encode_start(self, text: str) -> list[int]:
        """Encode untrusted text at the start of a prompt, with the ids that the tokenizer puts there."""
        return [*self.beginning, *encode_untrusted(self.tokenizer, text)]

    def encode_middle(self, text: str) -> list[int]:
        """Encode untrusted text that follows a control token."""
        return encode_untrusted(self._inner, text)

    def encode_trusted(self, text: str) -> list[int]:
        """Encode a trusted string, whose control tokens count as such."""
        return list(self.tokenizer(text, add_special_tokens=False, split_special_tokens=False)["input_ids"])

    def encode_whole(self, text: str) -> list[int]:
        """Encode a trusted string as a prompt, with the ids that the tokenizer puts before it."""
        return [*self.find_beginning(text), *self.encode_trusted(text)]

    def find_beginning(self, text: str) -> list[int]:
        """Return the ids to put before a trusted string: :attr:`beginning`, or nothing if it occurs in the string."""
        return [] if set(self.beginning) & set(self.encode_trusted(text)) else self.beginning

    @cached_property
    def _inner(self) -> Any:
        """The tokenizer for text that follows a control token.

        A sentencepiece tokenizer with ``legacy: false`` (Metaspace, ``prepend_scheme`` "first") puts a word start
        before the first word of a string, and before no other that lacks a space.
        """
        if not any(map(marks_first_word, list_pre_tokenizers(self.tokenizer))):
            return self.tokenizer
        inner = copy.deepcopy(self.tokenizer)
        for step in filter(marks_first_word, list_pre_tokenizers(inner)):
            step.prepend_scheme = "never"
        return inner

    def contains_control_token(self, text: str) -> bool:
        """Whether the tokenizer, asked to trust the text, would find a control token in it."""
        return self.encode_trusted(text) != encode_untrusted(self.tokenizer, text)

    def describe_difference(self, pieces: Sequence[int], whole: str) -> str | None:
        """Describe where the ids of a prompt differ from those of the whole string; None if they are equal.

        Args:
            pieces: ids of the prompt, encoded in pieces.
            whole: text of the prompt.
        """
        expected = self.encode_whole(whole)
        if list(pieces) == expected:
            return None
        pairs = zip(pieces, expected, strict=False)
        place = next((n for n, (ours, theirs) in enumerate(pairs) if ours != theirs), min(len(pieces), len(expected)))
        ours, theirs = (self._show(ids[place : place + 3]) for ids in (pieces, expected))
        return f"{ours} instead of {theirs} at token {place}"

    def describe_repetition(self, template: str) -> str | None:
        """Describe a beginning of sequence that a chat template writes twice in a row; None if it does not."""
        mark = "".join(self.tokenizer.convert_ids_to_tokens(self.beginning))
        if not mark or not re.search(rf"{re.escape(mark)}\s*{re.escape(mark)}", template):
            return None
        return f"{mark!r} twice in a row, which the chat template itself writes"

    def _show(self, ids: Sequence[int]) -> str:
        return " ".join(map(repr, self.tokenizer.convert_ids_to_tokens(list(ids)))) or "nothing"


def encode_untrusted(tokenizer: Any, text: str, add_special_tokens: bool = False) -> list[int]:
    """Encode text in which control tokens are plain characters."""
    return list(tokenizer(text, split_special_tokens=True, add_special_tokens=add_special_tokens)["input_ids"])


def list_pre_tokenizers(tokenizer: Any) -> list[Any]:
    """List the pre-tokenizers of a tokenizer in their order; [None] if it has none."""
    step: Any = getattr(getattr(tokenizer, "backend_tokenizer", None), "pre_tokenizer", None)
    return list(step) if hasattr(step, "__getitem__") else [step]


def marks_first_word(step: Any) -> bool:
    """Whether a pre-tokenizer puts a word start before the first word of a string only."""
    return getattr(step, "prepend_scheme", None) == "first"
