"""Prompts as token ids, in the format of the paper's models.

Queries and passages are untrusted: they are tokenized with ``split_special_tokens``, so that a reflection token
written inside one of them stays plain characters. Control tokens enter a prompt only by id.
"""

from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Any

from pipeline.decoding.reflection import Paragraph, ReflectionIds


def format_instruction(instruction: str, context: str | None = None) -> str:
    """Format the prompt of the paper's models (appendix D): an instruction, optionally with an input."""
    middle = f"\n\n### Input:\n{context}" if context else ""
    return f"### Instruction:\n{instruction}{middle}\n\n### Response:\n"


def format_passage(title: str, text: str) -> str:
    """Format a passage: its title, if any, on a line before its text."""
    return f"{title}\n{text}" if title else text


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
            ValueError: the tokenizer lacks control tokens.
        """
        return cls(tokenizer, ReflectionIds.of(tokenizer, model))

    @cached_property
    def eos(self) -> int:
        """Id of the end-of-sequence token."""
        return int(self.tokenizer.eos_token_id)

    def encode_prompt(self, instruction: str, context: str | None = None) -> list[int]:
        """Encode the instruction prompt, with the beginning-of-sequence token if the tokenizer adds one."""
        text = format_instruction(instruction, context)
        return list(self.tokenizer(text, split_special_tokens=True)["input_ids"])

    def encode_text(self, text: str) -> list[int]:
        """Encode untrusted text for the middle of a sequence."""
        return list(self.tokenizer(text, split_special_tokens=True, add_special_tokens=False)["input_ids"])

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
