"""A user's turn in the chat template of a model, as token ids."""

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pipeline.decoding.tokenization import TextTokenizer, encode_untrusted

# Placeholder for the text of a turn, at which a rendered chat template is split.
PLACE = "USERTEXTGOESHERE"


@dataclass(frozen=True)
class UserTurn:
    """The rendered chat template around a user's text.

    A control token is a boundary of tokenization, and other characters are not. So the template's plain text next to
    the user's is encoded together with it, and the rest by itself.

    Attributes:
        text: tokenizer of the model.
        before: rendered template up to the user's text.
        after: rendered template behind it, up to the model's answer.
    """

    text: TextTokenizer
    before: str
    after: str

    @classmethod
    def render(cls, text: TextTokenizer, model: str) -> "UserTurn":
        """Render the chat template of a tokenizer.

        Raises:
            ValueError: the template does not render the text of a turn exactly once and unchanged.
        """
        turn = [{"role": "user", "content": PLACE}]
        rendered = text.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        return cls(text, *split_at_place(rendered, model))

    def encode(self, turn: str) -> list[int]:
        """Encode the turn, whose text is untrusted, up to the place of the model's answer."""
        return self._open(turn + self._tail[0]) + self._close()

    def encode_cut(self, head: str, body: str, tail: str, room: int) -> tuple[list[int], int]:
        """Encode a turn, and cut the end of its body to leave at most ``room`` ids.

        Returns:
            The ids, and the number of ids cut. Head and tail are never cut, even if they need more room.
        """
        whole = self.encode(f"{head}{body}{tail}")
        if len(whole) <= room or not body:
            return whole, 0
        start, ids = self._open(head), self.text.encode_middle(body)
        end = [*self.text.encode_middle(tail + self._tail[0]), *self._close()]
        kept = ids[: max(0, room - len(start) - len(end))]
        return [*start, *kept, *end], len(ids) - len(kept)

    def encode_answer(self, answer: str) -> list[int]:
        """Encode a short answer as the template renders it behind the turn, such as with a space before it."""
        turns = [{"role": "user", "content": PLACE}, {"role": "assistant", "content": answer}]
        _, _, after = self.text.tokenizer.apply_chat_template(turns, tokenize=False).partition(PLACE)
        if not after.startswith(self.after):
            after = self.after + answer
        alone, answered = self.text.encode_trusted(self.after), self.text.encode_trusted(after)
        if answered[: len(alone)] == alone:
            return answered[len(alone) :]
        return self.text.encode_middle(answer)

    def compare_pieces(self, turn: str) -> str | None:
        """Describe a repeated beginning of sequence, or where the ids of a turn differ from those of the whole string.

        Returns:
            None if the template repeats none and the ids are equal.
        """
        if repetition := self.text.describe_repetition(self.before):
            return repetition
        if self.text.contains_control_token(turn):
            return None
        return self.text.describe_difference(self.encode(turn), f"{self.before}{turn}{self.after}")

    def _open(self, text: str) -> list[int]:
        """Encode everything up to the end of a text."""
        trusted, plain = self._head
        if not trusted:
            return [*self._beginning, *encode_untrusted(self.text.tokenizer, plain + text)]
        return [*self._beginning, *self.text.encode_trusted(trusted), *self.text.encode_middle(plain + text)]

    def _close(self) -> list[int]:
        """Encode everything from the first control token behind the text on."""
        return self.text.encode_trusted(self._tail[1])

    @cached_property
    def _beginning(self) -> list[int]:
        """Ids that precede the rendered template, which may have a beginning of sequence at any place."""
        return self.text.find_beginning(self.before + self.after)

    @cached_property
    def _head(self) -> tuple[str, str]:
        """The template before the text, split behind its last control token."""
        place = max((found.end() for found in self._marks.finditer(self.before)), default=0)
        return self.before[:place], self.before[place:]

    @cached_property
    def _tail(self) -> tuple[str, str]:
        """The template behind the text, split before its first control token."""
        found = self._marks.search(self.after)
        place = found.start() if found else len(self.after)
        return self.after[:place], self.after[place:]

    @cached_property
    def _marks(self) -> re.Pattern[str]:
        """Pattern of the control tokens, the longest first, each with the white space that it swallows."""
        tokens = [token for token in self.text.tokenizer.added_tokens_decoder.values() if token.special]
        tokens.sort(key=lambda token: len(token.content), reverse=True)
        return re.compile("|".join(map(match_token, tokens)) or "(?!)")


def match_token(token: Any) -> str:
    """Return a pattern of an added token with the white space around it that belongs to it."""
    before, after = (r"\s*" if strips else "" for strips in (token.lstrip, token.rstrip))
    return f"{before}{re.escape(token.content)}{after}"


def split_at_place(rendered: str, model: str) -> tuple[str, str]:
    """Split a rendered chat template at the placeholder.

    Raises:
        ValueError: the placeholder is not there exactly once.
    """
    if rendered.count(PLACE) != 1:
        raise ValueError(f"model {model}: its chat template does not render a turn's text exactly once and unchanged")
    before, _, after = rendered.partition(PLACE)
    return before, after
