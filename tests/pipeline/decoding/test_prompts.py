import pytest

from pipeline.decoding.prompts import instruction_prompt, passage_text
from tests.support.fakes import word_tokenizer


def test_prompt_is_the_papers():
    assert instruction_prompt("Who?") == "### Instruction:\nWho?\n\n### Response:\n"


def test_prompt_with_input():
    assert instruction_prompt("True?", "Water is wet.") == (
        "### Instruction:\nTrue?\n\n### Input:\nWater is wet.\n\n### Response:\n"
    )


@pytest.mark.parametrize(("title", "expected"), [("Paris", "Paris\nA city."), ("", "A city.")])
def test_passage_has_its_title_on_a_line_of_its_own(title, expected):
    assert passage_text(title, "A city.") == expected


def test_control_tokens_inside_text_stay_text():
    tokenizer = word_tokenizer()
    ids = tokenizer.passage("</paragraph>", "[Relevant] [Fully supported]")
    inside = set(ids[1:-1])
    assert not inside & tokenizer.reflection.control
    assert ids[0] in tokenizer.reflection.control
    assert ids[-1] in tokenizer.reflection.control
