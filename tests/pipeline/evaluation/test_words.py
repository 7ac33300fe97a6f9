import re
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.evaluation.words import split_pair, split_squad_pair


@pytest.mark.parametrize(
    ("text", "words", "squad"),
    [
        ("The  Eiffel Tower!", "eiffel tower", "eiffel tower"),
        ("an apple, a day", "apple day", "apple day"),
        ("Theatre of the Absurd", "theatre of absurd", "theatre of absurd"),
        ("don't", "dont", "dont"),
        ("well-known", "wellknown", "wellknown"),
        ("$1.2 million", "1.2 million", "12 million"),
        ("1,234,567.8 km", "1234567.8 km", "12345678 km"),
        ("3,5", "3,5", "35"),
        ("It was 35.", "it was 35", "it was 35"),
        ("(-5)", "-5", "5"),
        ("\u22125 °C", "-5 °c", "\u22125 °c"),
        ("US-5", "us5", "us5"),
        ("1914\u20131918", "1914-1918", "1914\u20131918"),
        ("10:30", "10:30", "1030"),
        ("C++ and C#", "c++ and c#", "c and c"),
        ("10th\u201311th", "10th 11th", "10th\u201311th"),
        ("Paris\u2014the capital", "paris capital", "paris\u2014 capital"),
        ("wait\u2026Paris", "wait paris", "wait\u2026paris"),
        ("1,00,000", "100000", "100000"),
        ("首都はParis、London、Tokyoです", "首 都 は paris london tokyo で す", "首都はparis、london、tokyoです"),
        ("1、2、3", "1 2 3", "1、2、3"),
        ("3，4", "3 4", "3，4"),
        ("ལྷ་ས་གྲོང", "ལྷ ས གྲོང", "ལྷ་ས་གྲོང"),
        ("አዲስ፡አበባ፡ናት", "አዲስ አበባ ናት", "አዲስ፡አበባ፡ናት"),
        ("a²the", "a²the", "a²the"),
        ("“Paris”", "paris", "“paris”"),
        ("don\u2019t", "dont", "don\u2019t"),
        ("cafe\u0301", "caf\u00e9", "cafe\u0301"),
        ("Straße", "strasse", "straße"),
        ("东京。", "东 京", "东京。"),
        ("第3章", "第 3 章", "第3章"),
        ("スーパー", "ス ー パ ー", "スーパー"),
        ("«Москва»", "москва", "«москва»"),
        ("¿Qué?", "qué", "¿qué"),
        ("नई दिल्ली।", "नई दिल्ली", "नई दिल्ली।"),
        ("A", "A", ""),
        ("The The", "The The", ""),
        ("-", "-", ""),
        ("", "", ""),
    ],
)
def test_words_match_worked_examples(text: str, words: str, squad: str) -> None:
    assert split_pair(text, text) == (tuple(words.split()),) * 2
    assert split_squad_pair(text, text) == (tuple(squad.split()),) * 2


def test_articles_and_case_count_only_beside_a_gold_answer_of_articles() -> None:
    assert split_pair("the answer is A.", "A") == (("the", "answer", "is", "A"), ("A",))
    assert split_pair("the answer is A.", "answer") == (("answer", "is"), ("answer",))
    assert split_pair("the sign is -", "-") == (("the", "sign", "is", "-"), ("-",))


@given(st.text("abthenxyzABC '\"!?,.;()", max_size=40))
def test_english_words_are_split_as_in_squad(text: str) -> None:
    words, gold = split_pair(text, "x")
    assert (words, gold) == split_squad_pair(text, "x")


@given(st.text())
def test_squad_words_are_those_of_its_script(text: str) -> None:
    plain = "".join(character for character in text.lower() if character not in set(string.punctuation))
    assert split_squad_pair(text, "")[0] == tuple(re.sub(r"\b(a|an|the)\b", " ", plain).split())


@given(st.text())
def test_answer_and_gold_are_split_alike_into_words_without_spaces(text: str) -> None:
    words, gold = split_pair(text, text)
    assert words == gold
    assert all(word and not any(map(str.isspace, word)) for word in words)
