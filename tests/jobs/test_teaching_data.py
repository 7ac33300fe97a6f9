import pytest

from jobs.teaching_data import list_command


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        (["--data", "x"], ["python", "-m", "jobs.teach_reranker", "--data", "x"]),
        (["teach-reranker", "--data", "x"], ["selfrag", "teach-reranker", "--data", "x"]),
        (["teach_reranker", "--data", "x"], ["selfrag", "teach_reranker", "--data", "x"]),
        ([], ["python", "-m", "jobs.teach_reranker"]),
    ],
)
def test_card_names_the_command_as_it_was_given(
    arguments: list[str], command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["job", *arguments])
    assert list_command("teach_reranker") == command
