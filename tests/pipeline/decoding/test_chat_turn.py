"""A turn in a chat template, for real tokenizers: tokens of the whole string, one beginning of sequence, cuts."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken

from pipeline.decoding.chat_turn import UserTurn, split_at_place
from pipeline.decoding.tokenization import TextTokenizer
from tests.support.tokenizers import CHAT, load_kind

KINDS = ("legacy", "not legacy", "byte-level")
PLAIN = "{% for m in messages %}{{ 'USER: ' + m.content + '\nASSISTANT:' }}{% endfor %}"
CHATML = PLAIN.replace("USER: ", "<|im_start|>user\n").replace("\nASSISTANT:", "<|im_end|>\n<|im_start|>assistant\n")
TEMPLATES = {**CHAT, "plain": PLAIN, "chatml": CHATML}
# Templates that write their beginning of sequence at other places than the first.
LATE = {
    "line break before <s>": "\n" + CHAT["with <s>"],
    "space before <s>": " " + CHAT["with <s>"],
    "text before <s>": "System: be brief.\n" + CHAT["with <s>"],
    "token before <s>": "<|im_start|>" + CHAT["with <s>"],
    "line break before bos_token": "\n{{ bos_token }}" + CHAT["without <s>"],
    "<s> behind the text": "{% for m in messages %}{{ m.content + '<s>ASSISTANT:' }}{% endfor %}",
    "<s> between the role and the text": "{% for m in messages %}{{ 'USER:<s>' + m.content + '\n' }}{% endfor %}",
}
TWICE = {
    "twice": "<s>" + CHAT["with <s>"],
    "twice with a line break": "<s>\n" + CHAT["with <s>"],
    "thrice": "<s><s>" + CHAT["with <s>"],
    "twice behind a line break": "\n<s>" + CHAT["with <s>"],
}
# One beginning of sequence for each turn, as some models are trained.
EACH = {"for each turn": "<s>system\nBe brief.</s>\n" + CHAT["with <s>"]}
# Templates that render an answer in other ways: by the roles of the turns, with more before it, or not at all.
ROLES = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + 'THINK' * (m.role == 'assistant') + m.content }}"
    "{{ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ANSWERS = {
    "by roles": ROLES.replace("THINK", "").replace("'<|im_end|>'", "'<|im_end|>\n'"),
    "thinking": ROLES.replace("THINK", "<think></think>"),
    "of users": "{{ 'USER: ' + messages[0].content + '\nASSISTANT:' * add_generation_prompt }}",
}
TURNS = (
    "Who is Al Gore?",
    " spaces ",
    "\na line break",
    "a line break\n",
    "1984",
    "“quoted”",
    "東京?",
    "",
    "[INST]",
    "e\u0301",
)


@pytest.fixture(scope="module")
def render(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], UserTurn]:
    @cache
    def render_turn(kind: str, template: str) -> UserTurn:
        tokenizer = load_kind(kind, tmp_path_factory.mktemp("tokenizer"))
        tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
        tokenizer.chat_template = (TEMPLATES | ANSWERS | LATE | TWICE | EACH)[template]
        return UserTurn.render(TextTokenizer(tokenizer), kind)

    return render_turn


def show(turn: UserTurn, ids: list[int]) -> list[str]:
    return list(turn.text.tokenizer.convert_ids_to_tokens(ids))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("text", TURNS)
def test_a_turn_has_the_tokens_of_the_whole_string(render, kind: str, template: str, text: str) -> None:
    turn = render(kind, template)
    tokenizer, whole = turn.text.tokenizer, f"{turn.before}{text}{turn.after}"
    own = whole.startswith("<s>") and kind != "byte-level"
    assert show(turn, turn.encode(text)) == show(turn, tokenizer(whole, add_special_tokens=not own)["input_ids"])


@given(st.text(max_size=20), st.sampled_from(KINDS), st.sampled_from(list(TEMPLATES)))
def test_any_turn_has_the_tokens_of_the_whole_string(render, text: str, kind: str, template: str) -> None:
    assert render(kind, template).compare_pieces(text) is None


@pytest.mark.parametrize("kind", ["legacy", "not legacy"])
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("text", ["Who?", "<s>", "</s><s>[INST] Who? [/INST]", "<|im_end|>\n<|im_start|>system\n"])
def test_a_turn_begins_with_one_beginning_of_sequence(render, kind: str, template: str, text: str) -> None:
    turn = render(kind, template)
    tokens = show(turn, turn.encode(text))
    assert tokens[0] == "<s>"
    assert tokens.count("<s>") == 1
    assert "</s>" not in tokens
    assert tokens.count("<|im_start|>") == turn.before.count("<|im_start|>") + turn.after.count("<|im_start|>")


@pytest.mark.parametrize("kind", ["legacy", "not legacy"])
@pytest.mark.parametrize("template", [*LATE, *EACH, *TWICE])
@pytest.mark.parametrize("text", ["Who?", "<s>", ""])
def test_no_beginning_of_sequence_is_added_to_that_of_the_template(render, kind: str, template: str, text: str) -> None:
    turn = render(kind, template)
    expected = (turn.before + turn.after).count("<s>")
    assert show(turn, turn.encode(text)).count("<s>") == expected
    assert show(turn, turn.encode_cut("", text, "", 0)[0]).count("<s>") == expected
    whole = turn.text.tokenizer(f"{turn.before}Who?{turn.after}", add_special_tokens=False)["input_ids"]
    assert show(turn, turn.encode("Who?")) == show(turn, whole)


@pytest.mark.parametrize("kind", ["legacy", "not legacy"])
@pytest.mark.parametrize(
    ("template", "expected"),
    [
        *((template, None) for template in (*TEMPLATES, *LATE, *EACH)),
        *((template, "'<s>' twice in a row, which the chat template itself writes") for template in TWICE),
    ],
)
def test_a_repeated_beginning_of_sequence_is_described(render, kind: str, template: str, expected: str | None) -> None:
    for text in ("Who?", "<s> Who?"):
        assert render(kind, template).compare_pieces(text) == expected


@pytest.mark.parametrize("template", [*LATE, *TWICE])
def test_models_that_begin_with_nothing_read_the_template_as_it_is(render, template: str) -> None:
    assert render("byte-level", template).compare_pieces("Who?") is None


@pytest.mark.parametrize("template", ["plain", "without <s>"])
def test_models_that_begin_with_nothing_get_nothing(render, template: str) -> None:
    turn = render("byte-level", template)
    assert not {"<s>", "<|im_start|>", "<|endoftext|>"} & set(show(turn, turn.encode("Who?")))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize(("room", "cut"), [(1000, False), (60, True), (40, True)])
def test_the_end_of_the_body_is_cut_to_the_room(render, kind: str, template: str, room: int, cut: bool) -> None:
    turn = render(kind, template)
    ids, lost = turn.encode_cut("Read this: ", "word " * 200, "\n\nWho?", room)
    whole = len(turn.encode("Read this: " + "word " * 200 + "\n\nWho?"))
    assert (len(ids) == room, lost > 100) == (cut, cut)
    assert (ids == turn.encode("Read this: " + "word " * 200 + "\n\nWho?")) is not cut
    assert abs(len(ids) + lost - whole) <= 2  # the cut ends may need another token
    assert turn.text.tokenizer.decode(ids).count("Who?") == 1


def test_head_and_tail_are_never_cut(render) -> None:
    turn = render("byte-level", "chatml")
    ids, lost = turn.encode_cut("Head", " body" * 5, "Tail", room=3)
    assert turn.text.tokenizer.decode(ids) == f"{turn.before}HeadTail{turn.after}"
    assert lost == 5


@pytest.mark.parametrize(
    ("strips", "expected"),
    [
        ("rstrip", ["<|user|>", "Who", "?", "Ċ", "<|end|>"]),
        ("lstrip", ["<|user|>", "Ċ", "Who", "?", "<|end|>", "Ċ"]),
    ],
)
def test_white_space_of_the_template_that_its_tokens_swallow_is_not_encoded(
    tmp_path: Path, strips: str, expected: list[str]
) -> None:
    tokenizer: Any = load_kind("byte-level", tmp_path)
    marks: dict[str, Any] = {strips: True, "special": True, "normalized": False}
    tokenizer.add_tokens([AddedToken(mark, **marks) for mark in ("<|user|>", "<|end|>")])
    tokenizer.chat_template = "{% for m in messages %}{{ '<|user|>\n' + m.content + '\n<|end|>\n' }}{% endfor %}"
    turn = UserTurn.render(TextTokenizer(tokenizer), "x")
    assert turn.compare_pieces("Who?") is None
    assert show(turn, turn.encode("Who?")) == expected


@pytest.mark.parametrize(
    ("kind", "template", "answer", "expected"),
    [
        ("not legacy", "with <s>", "Yes", ["▁Yes", "▁", "</s>"]),
        ("not legacy", "with <s>", "1", ["▁", "1", "▁", "</s>"]),
        ("legacy", "without <s>", "Yes", ["▁Yes", "▁", "</s>"]),
        ("byte-level", "with <s>", "Yes", ["ĠYes", "Ġ</", "s", ">"]),
        ("byte-level", "by roles", "Yes", ["Yes", "<|im_end|>", "Ċ"]),
        ("not legacy", "by roles", "Yes", ["Yes", "<|im_end|>", "<0x0A>"]),
        ("byte-level", "thinking", "Yes", ["<", "think", "></", "think", ">", "Yes", "<|im_end|>"]),
        ("byte-level", "of users", "Yes", ["Yes"]),
    ],
)
def test_an_answer_is_encoded_as_the_template_renders_it(
    render, kind: str, template: str, answer: str, expected: list[str]
) -> None:
    turn = render(kind, template)
    assert show(turn, turn.encode_answer(answer)) == expected


@pytest.mark.parametrize("rendered", ["nothing", "USERTEXTGOESHERE twice: USERTEXTGOESHERE", "usertextgoeshere"])
def test_templates_that_change_the_text_are_refused(rendered: str) -> None:
    with pytest.raises(ValueError, match="model x: its chat template does not render a turn's text exactly once"):
        split_at_place(rendered, "x")
