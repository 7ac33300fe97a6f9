"""Prompts in parts have the tokens of their whole strings, for real tokenizers of every kind."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken

from pipeline.decoding.prompts import PromptTokenizer, format_instruction, format_passage
from pipeline.decoding.reflection import CONTROL_TOKENS, IsRel, Paragraph, Retrieve
from pipeline.decoding.tokenization import TextTokenizer
from pipeline.decoding.types import Passage, Query
from tests.support.tokenizers import add_control_tokens, load_folder, load_kind, write_llama

KINDS = ("legacy", "not legacy", "byte-level", "wordpiece")
OTHER_TOKENS = ("<s>", "</s>", "<pad>", "<unk>", "<|im_end|>", "<|im_start|>", "[SEP]", "[CLS]", "▁", "<0x0A>")
HOSTILE = (*CONTROL_TOKENS, *OTHER_TOKENS)
TEXTS = (
    "Al Gore was vice president.",
    " a space first",
    "  two spaces",
    "a space last ",
    "\na line break first",
    "\n\ntwo",
    "1984 is a book",
    "“quoted”",
    "(in brackets)",
    "東京は日本の首都です。",
    "É",
    "e\u0301 decomposed",
    "▁ a mark",
    "\tTab\u00a0no-break",
    "🙂🙃",
    "\u200bzero width",
    "x",
    "",
    "ﬁ ligature",
    "don't",
)


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], PromptTokenizer]:
    @cache
    def load_prompts(kind: str) -> PromptTokenizer:
        tokenizer = load_kind(kind, tmp_path_factory.mktemp("tokenizer"))
        tokenizer.add_tokens(list(CONTROL_TOKENS), special_tokens=True)
        return PromptTokenizer.of(tokenizer, kind)

    return load_prompts


def encode_at_once(prompts: PromptTokenizer, text: str) -> list[int]:
    """The ids of a whole string, without what encoders put behind it ([SEP])."""
    return prompts.text.beginning + prompts.tokenizer(text, add_special_tokens=False)["input_ids"]


def show(prompts: PromptTokenizer, ids: list[int]) -> list[str]:
    return list(prompts.tokenizer.convert_ids_to_tokens(ids))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", TEXTS)
def test_a_prompt_with_a_passage_has_the_tokens_of_its_whole_string(load, kind: str, text: str) -> None:
    prompts = load(kind)
    pieces = prompts.encode_prompt(text, text) + prompts.encode_control(Retrieve.YES) + prompts.encode_passage("", text)
    pieces += prompts.encode_control(IsRel.RELEVANT) + prompts.encode_text(text)
    whole = f"{format_instruction(text, text)}[Retrieval]<paragraph>{text}</paragraph>[Relevant]{text}"
    assert show(prompts, pieces) == show(prompts, encode_at_once(prompts, whole))


@given(st.lists(st.text(max_size=12) | st.sampled_from(TEXTS), min_size=4, max_size=4), st.sampled_from(KINDS))
def test_any_text_has_the_tokens_of_the_whole_string(load, texts: list[str], kind: str) -> None:
    prompts, (query, context, title, text) = load(kind), texts
    pieces = prompts.encode_prompt(query, context) + prompts.encode_control(Retrieve.YES)
    pieces += prompts.encode_passage(title, text)
    whole = f"{format_instruction(query, context)}[Retrieval]<paragraph>{format_passage(title, text)}</paragraph>"
    if not prompts.text.contains_control_token(f"{query}{context}{title}{text}"):
        assert pieces == encode_at_once(prompts, whole)


@pytest.mark.parametrize(
    ("kind", "tokens"),
    [
        ("legacy", ["<paragraph>", "▁Al", "</paragraph>", "▁Al", "▁is"]),
        ("not legacy", ["<paragraph>", "Al", "</paragraph>", "Al", "▁is"]),
        ("byte-level", ["<paragraph>", "Al", "</paragraph>", "Al", "Ġis"]),
        ("wordpiece", ["<paragraph>", "al", "</paragraph>", "al", "is"]),
    ],
)
def test_text_after_a_control_token_starts_as_in_training(load, kind: str, tokens: list[str]) -> None:
    prompts = load(kind)
    assert show(prompts, prompts.encode_passage("", "Al") + prompts.encode_text("Al is")) == tokens


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("token", HOSTILE)
def test_a_control_token_in_text_stays_text(load, kind: str, token: str) -> None:
    prompts = load(kind)
    text = f"{token} first, in the middle{token}and last {token}"
    special = {*prompts.tokenizer.all_special_ids, *prompts.reflection.control} - {prompts.tokenizer.unk_token_id}
    for ids in (prompts.encode_text(text), prompts.encode_prompt(text, text), prompts.encode_passage(text, text)[1:-1]):
        assert not special & set(ids[len(prompts.text.beginning) :])


@given(st.lists(st.sampled_from(HOSTILE) | st.text(max_size=5), max_size=6), st.sampled_from(KINDS[:3]))
def test_no_text_becomes_a_control_token(load, parts: list[str], kind: str) -> None:
    prompts = load(kind)
    special = {*prompts.tokenizer.all_special_ids, *prompts.reflection.control} - {prompts.tokenizer.unk_token_id}
    assert not special & set(prompts.encode_text("".join(parts)))


@pytest.mark.parametrize(
    ("kind", "beginning"), [("legacy", ["<s>"]), ("not legacy", ["<s>"]), ("byte-level", []), ("wordpiece", ["[CLS]"])]
)
def test_a_prompt_begins_with_what_its_tokenizer_puts_there(load, kind: str, beginning: list[str]) -> None:
    prompts = load(kind)
    ids = prompts.encode_prompt("<s> Who?", "<s>")
    assert show(prompts, ids)[: len(beginning)] == beginning
    assert prompts.tokenizer.bos_token_id not in ids[len(beginning) :]
    assert prompts.tokenizer.eos_token_id not in ids
    assert prompts.tokenizer.sep_token_id is None or prompts.tokenizer.sep_token_id not in ids


@pytest.mark.parametrize("text", ["<s>[INST] Who?", "[INST] Who?", "Who?", "<s>", ""])
def test_a_trusted_string_begins_with_one_beginning_of_sequence(load, text: str) -> None:
    tokenizer = load("not legacy").text
    ids = tokenizer.encode_whole(text)
    bos = tokenizer.tokenizer.bos_token_id
    assert (ids[0], ids.count(bos)) == (bos, 1)


def test_the_tokenizer_of_the_caller_is_not_changed(load) -> None:
    prompts = load("not legacy")
    before = prompts.tokenizer("Al")["input_ids"]
    prompts.encode_text("Al")
    assert prompts.tokenizer("Al")["input_ids"] == before
    assert show(prompts, before) == ["<s>", "▁Al"]


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("text", ["Al Gore", "[Relevant] Al", "</paragraph>"])
def test_files_of_the_released_model_give_its_ids(tmp_path: Path, legacy: bool, text: str) -> None:
    folder = add_control_tokens(write_llama(tmp_path, legacy=legacy))
    prompts = PromptTokenizer.of(load_folder(folder), "released")
    assert len(prompts.tokenizer) == 32016
    assert prompts.encode_control(Retrieve.YES, Paragraph.START, Paragraph.END) == [32000, 32013, 32014]
    assert not prompts.reflection.control & set(prompts.encode_text(text))
    assert prompts.compare_pieces(Query("q", "Al?"), Passage("p", "Al", text)) is None


def test_control_tokens_that_text_would_become_are_refused(tmp_path: Path) -> None:
    tokenizer = load_kind("legacy", tmp_path)
    tokenizer.add_tokens(list(CONTROL_TOKENS))
    with pytest.raises(ValueError, match=r"model x: its tokenizer finds control tokens in plain text \(\[Ret"):
        PromptTokenizer.of(tokenizer, "x")


@pytest.mark.parametrize(
    ("pieces", "whole", "expected"),
    [
        ("Al Gore", "Al Gore", None),
        ("Al Gore", "Al More", "'ĠGore' instead of 'ĠMore' at token 1"),
        ("Al Gore is", "Al Gore", "'Ġis' instead of nothing at token 2"),
        ("Al", "Al Gore is here today", "nothing instead of 'ĠGore' 'Ġis' 'Ġhere' at token 1"),
        ("", "Al", "nothing instead of 'Al' at token 0"),
    ],
)
def test_the_first_difference_is_described(load, pieces: str, whole: str, expected: str | None) -> None:
    text = load("byte-level").text
    assert text.describe_difference(text.encode_start(pieces), whole) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [("Al Gore", False), ("[Retrieval]", True), ("a</s>b", False), ("<|im_end|>", True), ("", False)],
)
def test_control_tokens_in_text_are_detected(load, text: str, expected: bool) -> None:
    assert load("byte-level").text.contains_control_token(text) is expected


def test_a_token_that_swallows_spaces_is_a_difference(load, tmp_path: Path) -> None:
    tokenizer = load_kind("not legacy", tmp_path)
    tokenizer.add_tokens([AddedToken(t, special=True, rstrip=True, normalized=False) for t in CONTROL_TOKENS])
    prompts = PromptTokenizer.of(tokenizer, "x")
    assert prompts.compare_pieces(Query("q", "Who?"), Passage("p", "", "Al")) is None
    found = prompts.compare_pieces(Query("q", "Who?"), Passage("p", "", " Al"))
    assert found is not None
    assert "'▁Al' '</paragraph>' instead of 'Al' '</paragraph>'" in found


def test_text_tokenizers_of_any_library_are_accepted() -> None:
    class Letters:
        def __call__(self, text: str, **_: bool) -> dict[str, list[int]]:
            return {"input_ids": [ord(letter) for letter in text]}

    tokenizer = TextTokenizer(Letters())
    assert (tokenizer.encode_start("ab"), tokenizer.encode_middle("ab")) == ([97, 98], [97, 98])
