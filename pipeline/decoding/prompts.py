"""Prompts as token ids, in the format of the paper's models.

Queries and passages are untrusted: a reflection token written inside one of them stays plain characters. Control tokens
enter a prompt only by id.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Any

from pipeline.decoding.reflection import CONTROL_TOKENS, Paragraph, ReflectionIds, Retrieve
from pipeline.decoding.tokenization import TextTokenizer
from pipeline.decoding.types import Passage, Query, RetrievedPassage

# Between passages that are read together.
BETWEEN = "\n\n"


def format_instruction(instruction: str, context: str | None = None) -> str:
    """Format the prompt of the paper's models (appendix D): an instruction, optionally with an input."""
    middle = f"\n\n### Input:\n{context}" if context else ""
    return f"### Instruction:\n{instruction}{middle}\n\n### Response:\n"


def format_passage(title: str, text: str) -> str:
    """Format a passage: its title, if any, on a line before its text."""
    return f"{title}\n{text}" if title else text


def format_evidence(evidence: RetrievedPassage) -> str:
    """Format a passage and those that are read beside it, with blank lines between them."""
    return BETWEEN.join(format_passage(read.passage.title, read.passage.text) for read in evidence.read)


def drop_unread(evidence: RetrievedPassage, kept: int, encode: Callable[[str], list[int]]) -> RetrievedPassage:
    """Drop the passages of which nothing is left if the text of the evidence is cut to its first ``kept`` ids.

    Args:
        evidence: passages that are read together.
        kept: number of ids that are left of :func:`format_evidence`.
        encode: encodes a text.
    """
    before = [format_evidence(evidence.keep_first(number)) + BETWEEN for number in range(1, len(evidence.read))]
    return evidence.keep_first(1 + sum(len(encode(text)) < kept for text in before))


@dataclass(frozen=True)
class PromptTokenizer:
    """A tokenizer that separates trusted control tokens from untrusted text.

    Attributes:
        tokenizer: a Hugging Face tokenizer.
        reflection: ids of the control tokens in its vocabulary.
    """

    tokenizer: Any
    reflection: ReflectionIds

    @classmethod
    def of(cls, tokenizer: Any, model: str) -> "PromptTokenizer":
        """Wrap a tokenizer.

        Raises:
            ValueError: the tokenizer lacks control tokens, or finds them in untrusted text.
        """
        prompts = cls(tokenizer, ReflectionIds.of(tokenizer, model))
        found = [token for token in CONTROL_TOKENS if prompts.reflection.ids[token] in prompts.encode_text(token)]
        if found:
            raise ValueError(
                f"model {model}: its tokenizer finds control tokens in plain text ({', '.join(found)}), so a passage "
                "could pass for a judgment; add them to the tokenizer with add_special_tokens instead"
            )
        return prompts

    @cached_property
    def text(self) -> TextTokenizer:
        """The tokenizer for text."""
        return TextTokenizer(self.tokenizer)

    @cached_property
    def eos(self) -> int:
        """Id of the end-of-sequence token."""
        return int(self.tokenizer.eos_token_id)

    def encode_prompt(self, instruction: str, context: str | None = None) -> list[int]:
        """Encode the instruction prompt, with the beginning-of-sequence token if the tokenizer adds one."""
        return self.text.encode_start(format_instruction(instruction, context))

    def encode_text(self, text: str) -> list[int]:
        """Encode untrusted text behind a control token."""
        return self.text.encode_middle(text)

    def encode_control(self, *tokens: StrEnum) -> list[int]:
        """Return the ids of control tokens."""
        return [self.reflection[token] for token in tokens]

    def wrap_paragraph(self, body: list[int]) -> list[int]:
        """Put the ids of a passage between paragraph marks."""
        return [*self.encode_control(Paragraph.START), *body, *self.encode_control(Paragraph.END)]

    def encode_passage(self, title: str, text: str) -> list[int]:
        """Encode a passage with its paragraph marks."""
        return self.wrap_paragraph(self.encode_text(format_passage(title, text)))

    def decode(self, ids: list[int]) -> str:
        """Decode ids, control tokens included."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def compare_pieces(self, query: Query, passage: Passage) -> str | None:
        """See :meth:`Critic.compare_pieces`."""
        instruction, body = query.instruction or query.query, format_passage(passage.title, passage.text)
        prompt = format_instruction(instruction, query.input)
        if self.text.contains_control_token(f"{prompt}{body}"):
            return None
        pieces = [
            *self.encode_prompt(instruction, query.input),
            *self.encode_control(Retrieve.YES),
            *self.encode_passage(passage.title, passage.text),
        ]
        whole = f"{prompt}{Retrieve.YES}{Paragraph.START}{body}{Paragraph.END}"
        return self.text.describe_difference(pieces, whole)
