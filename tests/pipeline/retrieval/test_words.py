import pytest
from pydantic import ValidationError

from pipeline.retrieval.words import WordForm, WordSplitter


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The A380's range, 15.2 km", ["the", "a380", "s", "range", "15", "2", "km"]),
        ("x-ray X X", ["x", "ray", "x", "x"]),
        ("ＡＢＣ１２ ﬁle", ["abc12", "file"]),
        ("Straße CAFÉ cafe\u0301", ["strasse", "café", "café"]),
        ("東京タワー。Tokyo", ["東", "京", "タ", "ワ", "ー", "tokyo"]),
        ("हिन्दी", ["हिन्दी"]),
        (" … ", []),
    ],
)
def test_words_are_runs_of_letters_and_digits_without_case(text: str, words: list[str]) -> None:
    assert WordSplitter(WordForm()).split(text) == words


def test_stop_words_are_left_out_before_words_are_stemmed() -> None:
    splitter = WordSplitter(WordForm(stemmer="english", stop_words="english"))
    assert splitter.split("The dogs of the running man") == ["dog", "run", "man"]
    assert WordSplitter(WordForm(stemmer="german")).split("Häuser") == ["haus"]


@pytest.mark.parametrize("settings", [{"stemmer": "klingon"}, {"stop_words": "klingon"}, {"b": 1.5}, {"k1": -1}])
def test_wrong_settings_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match=r"unknown language 'klingon'; expected one of|less than|greater than"):
        WordForm.model_validate(settings)


def test_words_of_which_a_stemmer_leaves_nothing_are_left_out() -> None:
    assert WordSplitter(WordForm(stemmer="porter")).split("Anna's s") == ["anna"]


def test_stop_words_are_compared_without_case() -> None:
    assert WordSplitter(WordForm(stop_words="german")).split("Er sagt, daß es regnet") == ["sagt", "regnet"]
