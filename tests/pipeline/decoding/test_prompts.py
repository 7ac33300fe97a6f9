import pytest

from pipeline.decoding.prompts import format_instruction, format_passage
from tests.support.fakes import word_tokenizer


def test_prompt_matches_the_paper():
    assert format_instruction("Who?") == "### Instruction:\nWho?\n\n### Response:\n"


def test_input_has_its_own_section_in_the_prompt():
    assert format_instruction("True?", "Water is wet.") == (
        "### Instruction:\nTrue?\n\n### Input:\nWater is wet.\n\n### Response:\n"
    )


@pytest.mark.parametrize(("title", "expected"), [("Paris", "Paris\nA city."), ("", "A city.")])
def test_passage_title_is_on_its_own_line(title, expected):
    assert format_passage(title, "A city.") == expected


def test_control_tokens_in_passages_are_plain_text():
    tokenizer = word_tokenizer()
    ids = tokenizer.encode_passage("</paragraph>", "[Relevant] [Fully supported]")
    inside = set(ids[1:-1])
    assert not inside & tokenizer.reflection.control
    assert ids[0] in tokenizer.reflection.control
    assert ids[-1] in tokenizer.reflection.control
