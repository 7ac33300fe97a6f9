import pytest

from jobs.common import FailedError, checking, parse_columns, working
from pipeline.retrieval.index_cache import DamagedIndexError
from pipeline.storage.lease import OutputInUseError
from pipeline.storage.location import StorageError


def fails(work, error: Exception) -> FailedError:
    with pytest.raises(FailedError) as caught, work:
        raise error
    return caught.value


@pytest.mark.parametrize("error", [ValueError("a\nb"), StorageError("a\n b")])
def test_failed_checks_exit_with_status_2_and_one_line(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    assert fails(checking(), error).exit_code == 2
    assert capsys.readouterr().err == "error: a b\n"


def test_unlisted_errors_pass_through_checks() -> None:
    with pytest.raises(RuntimeError), checking():
        raise RuntimeError
    assert fails(checking(RuntimeError), RuntimeError("x")).exit_code == 2


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError("x"), 2),
        (DamagedIndexError("x"), 1),
        (StorageError("x"), 1),
        (RuntimeError("x"), 1),
    ],
)
def test_bad_input_and_failures_have_distinct_exit_statuses(error: Exception, status: int) -> None:
    failed = fails(working(), error)
    assert (failed.exit_code, failed.message) == (status, "x")


def test_bad_input_error_types_can_be_narrowed() -> None:
    assert fails(working(bad_input=(OutputInUseError,)), ValueError("x")).exit_code == 1
    assert fails(working(bad_input=(OutputInUseError,)), OutputInUseError("x")).exit_code == 2
    assert fails(working(bad_input=()), OutputInUseError("x")).exit_code == 1


def test_message_keeps_its_subject_and_all_lines() -> None:
    error = RuntimeError("Repository Not Found\n\nInvalid username")
    assert fails(working(subject="me/a"), error).message == "me/a: Repository Not Found Invalid username"


def test_unexpected_error_logs_its_traceback(caplog: pytest.LogCaptureFixture) -> None:
    assert fails(working(), KeyError("v2")).exit_code == 1
    assert "KeyError" in caplog.text


@pytest.mark.parametrize(
    ("options", "columns"),
    [
        ([], {}),
        (["id=docid", "text=contents"], {"id": "docid", "text": "contents"}),
        (["text=a=b"], {"text": "a=b"}),
        (["text=two words"], {"text": "two words"}),
        (["text=a", "text=b"], {"text": "b"}),
    ],
)
def test_column_options_are_parsed(options: list[str], columns: dict[str, str]) -> None:
    assert parse_columns(options, "text=contents") == columns


@pytest.mark.parametrize("option", ["", "text", "=", "=contents", "text="])
def test_column_option_without_name_or_column_is_refused(option: str) -> None:
    with pytest.raises(ValueError, match=f"^--column {option}: expected NAME=COLUMN, such as text=contents$"):
        parse_columns(["id=docid", option], "text=contents")
