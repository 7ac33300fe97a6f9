import dataclasses
import re
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import fs
from pydantic import SecretStr

from pipeline.config.sections import StorageConfig
from pipeline.storage.faults import is_transient
from pipeline.storage.location import (
    HIDDEN_S,
    Location,
    MissingFileError,
    StorageError,
    check_writable,
    locate,
)
from tests.support.flaky import BUSY, flaky
from tests.support.folders import make_read_only

HERE = StorageConfig()


def test_files_are_listed_by_name_without_hidden_ones(tmp_path):
    for name in ("b.parquet", "a.parquet", "sub/c.parquet", "_manifest.json", ".d.parquet", "_tmp/e.parquet", "f.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = [
        Path(file.uri).relative_to(tmp_path).as_posix() for file in locate(str(tmp_path), HERE).list_files(".parquet")
    ]
    assert found == ["a.parquet", "b.parquet", "sub/c.parquet"]


def test_write_creates_folders_and_leaves_no_temporary_files(tmp_path):
    place = locate(str(tmp_path), HERE) / "new" / "file"
    place.write(b"one")
    place.write(b"two")
    assert place.read() == b"two"
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["file"]


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    place = locate(str(tmp_path / "file"), HERE)
    place.write(b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StorageError, match="file: .*No space left"):
        place.write(b"new")
    assert place.read() == b"old"
    assert len(list(tmp_path.iterdir())) == 1


def test_missing_file_is_named(tmp_path):
    with pytest.raises(StorageError, match="absent"):
        locate(str(tmp_path / "absent"), HERE).read()


def test_home_and_relative_paths_are_resolved(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert locate("data", HERE).path == str(tmp_path / "data")
    assert locate("~/data", HERE).path == str(Path.home() / "data")


def test_unknown_scheme_is_refused():
    with pytest.raises(ValueError, match="ftp://host/x"):
        locate("ftp://host/x", HERE)


def test_s3_round_trip_with_configured_credentials(s3, monkeypatch):
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    storage = StorageConfig(
        endpoint_url=s3.endpoint, access_key=s3.access_key, secret_key=s3.secret_key, region="us-east-1"
    )
    folder = locate(f"s3://{s3.bucket}/round/trip", storage)
    assert not folder.exists()
    (folder / "data" / "part-1.parquet").write(b"one")
    (folder / "data" / "part-1.parquet").write(b"two")
    assert [file.uri for file in folder.list_files(".parquet")] == [f"s3://{s3.bucket}/round/trip/data/part-1.parquet"]
    (folder / "_hidden" / "file").write(b"x")
    assert [place.uri for place in folder.list_folders()] == [f"s3://{s3.bucket}/round/trip/data"]
    assert (folder / "data").list_folders() == []
    assert (folder / "data" / "part-1.parquet").read() == b"two"
    assert (folder / "data" / "part-1.parquet").get_type() == fs.FileType.File
    (folder / "data" / "part-1.parquet").delete()
    assert not (folder / "data" / "part-1.parquet").exists()


def test_deleted_files_of_a_folder_are_gone_and_the_others_are_there(s3, monkeypatch):
    """rclone's store hides the other files of a folder for a second after each deletion."""
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    folder = locate(f"s3://{s3.bucket}/several", HERE)
    for name in ("a", "b", "c"):
        (folder / name).write(b"x")
    for name in ("a", "b"):
        (folder / name).delete()
        assert folder.list_files()[-1].name == "c"
    assert [file.name for file in folder.list_files()] == ["c"]
    time.sleep(HIDDEN_S)
    assert [file.name for file in folder.list_files()] == ["c"]


def test_folders_are_listed_without_files_and_hidden_ones(tmp_path):
    for name in ("b/deep", "a", ".hidden", "_hidden"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "file").touch()
    folder = locate(str(tmp_path), HERE)
    assert [place.name for place in folder.list_folders()] == ["a", "b"]
    assert (folder / "missing").list_folders() == []


@pytest.fixture
def waits(monkeypatch):
    """Seconds that were waited; they pass at once."""
    waited = []
    clock = [0.0]

    def sleep(seconds):
        waited.append(seconds)
        clock[0] += seconds

    monkeypatch.setattr("tenacity.nap.time.sleep", sleep)
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    return waited


def test_transient_errors_are_retried_with_exponential_backoff(tmp_path, waits, caplog):
    (tmp_path / "file").write_bytes(b"content")
    folder, files = flaky(tmp_path, [BUSY] * 4)
    assert (folder / "file").read() == b"content"
    assert len(files.opened) == 5
    assert len(waits) == 4
    assert all(0.5 * 2**n <= wait <= 0.5 * 2**n + 1 for n, wait in enumerate(waits))
    assert caplog.messages[0].startswith("mem://folder/file: When reading: AWS Error SLOW_DOWN")
    assert re.search(r"; retrying in [01]\.\d s, for up to 60 s \(storage\.patience_s\)$", caplog.messages[0])


def test_retries_end_after_the_patience_with_the_uri(tmp_path, waits):
    folder, _ = flaky(tmp_path, [BUSY] * 1000, patience_s=100)
    with pytest.raises(StorageError, match="^mem://folder/file: .*SLOW_DOWN"):
        (folder / "file").write(b"content")
    assert 100 <= sum(waits) < 140


@pytest.mark.parametrize(
    "code", ["ACCESS_DENIED", "NO_SUCH_BUCKET", "SIGNATURE_DOES_NOT_MATCH", "UNKNOWN (HTTP status 403)"]
)
def test_permanent_errors_are_raised_at_once(tmp_path, waits, code):
    folder, files = flaky(tmp_path, [f"When reading: AWS Error {code} during GetObject operation"] * 9)
    with pytest.raises(StorageError, match="^mem://folder/file: "):
        (folder / "file").read()
    assert (len(files.opened), waits) == (1, [])


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError("AWS Error NETWORK_CONNECTION during HeadObject operation: curlCode: 7"), True),
        (OSError("AWS Error UNKNOWN (HTTP status 503) during PutObject operation"), True),
        (OSError("AWS Error UNKNOWN (HTTP status 429) during PutObject operation"), True),
        (OSError("AWS Error INTERNAL_FAILURE during GetObject operation"), True),
        (OSError("AWS Error UNKNOWN (HTTP status 403) during HeadObject operation"), False),
        (OSError("AWS Error NETWORK_CONNECTION during HeadObject: curlCode: 6, Could not resolve hostname"), True),
        (OSError("AWS Error UNKNOWN (HTTP status 301) during HeadObject operation: No response body."), False),
        (OSError("AWS Error UNKNOWN: the configured region is 'a' while the bucket is located in 'b'"), False),
        (OSError("AWS Error UNKNOWN (HTTP status 307) during PutObject operation"), False),
        (OSError("AWS Error UNKNOWN (HTTP status 400) during HeadObject operation: No response body."), False),
        (OSError("AWS Error UNKNOWN (HTTP status 411) during PutObject operation: MissingContentLength"), False),
        (OSError("AWS Error UNKNOWN (HTTP status 408) during PutObject operation"), True),
        (
            OSError("AWS Error UNKNOWN during GetObject: Unable to parse ExceptionName: PermanentRedirect"),
            False,
        ),
        (OSError("AWS Error UNKNOWN during GetObject: Unable to parse: AuthorizationHeaderMalformed"), False),
        (OSError("AWS Error NO_SUCH_UPLOAD during CompleteMultipartUpload operation"), True),
        (OSError("AWS Error ACCESS_DENIED during CompleteMultipartUpload operation"), False),
        (OSError("Couldn't deserialize thrift: TProtocolException: Invalid data"), False),
        (FileNotFoundError("AWS Error RESOURCE_NOT_FOUND"), False),
        (ValueError("AWS Error INTERNAL_FAILURE"), False),
    ],
)
def test_transient_errors_are_recognized(error, expected):
    assert is_transient(error) is expected


class Redirecting(BaseHTTPRequestHandler):
    """Answers as S3 does for a bucket of another region."""

    def answer(self):
        self.rfile.read(int(self.headers.get("content-length") or 0))
        body = b"<Error><Code>PermanentRedirect</Code><Message>use the specified endpoint</Message></Error>"
        self.send_response(301)
        self.send_header("x-amz-bucket-region", "eu-west-1")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_HEAD = do_PUT = do_POST = answer  # noqa: N815

    def log_message(self, *_):
        """Keep stderr quiet."""


@pytest.mark.parametrize(
    "work",
    [
        Location.exists,
        Location.read,
        Location.list_files,
        lambda file: file.write(b"content"),
        lambda file: file.fetch(Path("/dev/null")),
        lambda file: check_writable(file),
    ],
    ids=["stat", "read", "list", "write", "fetch", "check"],
)
def test_wrong_region_is_reported_at_once(work, waits):
    with ThreadingHTTPServer(("127.0.0.1", 0), Redirecting) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        storage = StorageConfig(
            endpoint_url=f"http://127.0.0.1:{server.server_port}",
            access_key=SecretStr("a"),
            secret_key=SecretStr("b"),
            region="us-east-1",
        )
        with pytest.raises(StorageError, match=r"HTTP status 301.*; set storage\.region to the region of the bucket"):
            work(locate("s3://bucket/file", storage))
        server.shutdown()
    assert waits == []


def test_local_disk_errors_are_not_retried(tmp_path, waits, monkeypatch):
    def busy(_):
        raise OSError(BUSY)

    monkeypatch.setattr("os.fsync", busy)
    with pytest.raises(StorageError):
        locate(str(tmp_path / "file"), HERE).write(b"x")
    assert waits == []


def test_delete_with_a_lost_response_succeeds(tmp_path, waits):
    (tmp_path / "file").write_bytes(b"content")
    folder, _ = flaky(tmp_path, [BUSY])
    (folder / "file").delete()
    assert not (tmp_path / "file").exists()
    assert waits == [HIDDEN_S]  # the deletion is not repeated


def test_missing_file_has_its_own_error_type(tmp_path, waits):
    folder, _ = flaky(tmp_path, [BUSY])
    with pytest.raises(MissingFileError, match="mem://folder/absent"):
        (folder / "absent").read()


def test_folder_deleted_during_listing_is_listed_again(tmp_path):
    answers: list[Any] = [FileNotFoundError(2, "Cannot list directory"), []]

    def listing(_: object) -> list[object]:
        answer = answers.pop(0)
        if isinstance(answer, OSError):
            raise answer
        return answer

    gone = dataclasses.replace(
        locate(str(tmp_path), StorageConfig()), filesystem=SimpleNamespace(get_file_info=listing, type_name="local")
    )
    assert gone.list_files() == []
    assert answers == []


@pytest.mark.parametrize("uri", ["s3://", "gs:///", "abfss://"])
def test_uri_without_a_bucket_is_refused(uri):
    with pytest.raises(ValueError, match=f"^{uri}: names no bucket$"):
        locate(uri, HERE)


@pytest.mark.parametrize("form", ["file://{}", "file:{}", "file://localhost{}"])
def test_files_of_a_file_uri_are_found_again_by_their_own_uris(tmp_path, form):
    (tmp_path / "my set").mkdir()
    (tmp_path / "my set" / "100%25 sure.parquet").touch()
    (file,) = locate(form.format(f"{tmp_path}/my%20set"), HERE).list_files()
    assert file.local
    assert locate(file.uri, HERE).path == file.path == str(tmp_path / "my set" / "100%25 sure.parquet")


@pytest.mark.parametrize(
    "reason",
    ["Unable to load libjvm\ndlopen(/usr/lib/jvm/libjvm.so) failed\n" * 9, "Prior attempt to load libhdfs failed"],
)
def test_missing_libraries_of_hdfs_are_explained_in_one_line(monkeypatch, reason):
    def fail(_):
        raise OSError(reason)

    monkeypatch.setattr("pipeline.storage.location.fs", SimpleNamespace(FileSystem=SimpleNamespace(from_uri=fail)))
    with pytest.raises(ValueError, match="^hdfs://host/x: HDFS needs Java.*JAVA_HOME") as caught:
        locate("hdfs://host/x", HERE)
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize(
    "reason",
    [
        pa.lib.ArrowException("Unknown error: first\nsecond"),
        pa.ArrowNotImplementedError("Got HDFS URI but\nArrow lacks it"),
        pa.ArrowInvalid("no\naccount"),
        OSError("no\nroute"),
    ],
)
def test_store_that_cannot_be_opened_is_named_in_one_line(monkeypatch, reason):
    def fail(_):
        raise reason

    monkeypatch.setattr("pipeline.storage.location.fs", SimpleNamespace(FileSystem=SimpleNamespace(from_uri=fail)))
    with pytest.raises(ValueError, match="^hdfs://x/q: ") as caught:
        locate("hdfs://x/q", HERE)
    assert str(caught.value) == f"hdfs://x/q: {' '.join(str(reason).split())}"


class FailingStore:
    """An object store that answers every request with an error."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def __getattr__(self, name: str) -> Any:
        def fail(*_: object, **__: object) -> None:
            raise self._error

        return fail


@pytest.mark.parametrize(
    "operation",
    [
        lambda place: place.get_type(),
        lambda place: place.exists(),
        lambda place: place.list_files(),
        lambda place: place.read(),
        lambda place: place.write(b"x"),
        lambda place: place.delete(),
        check_writable,
    ],
)
def test_errors_of_a_store_without_a_specific_type_are_named_in_one_line(monkeypatch, operation):
    monkeypatch.setattr("time.sleep", lambda _: None)
    place = dataclasses.replace(locate("mock://x/q", HERE), uri="abfs://c@x/q")
    refused = pa.lib.ArrowException("Unknown error: Check failed:\nFailed to get token")
    with pytest.raises(StorageError, match="^abfs://c@x/q: Unknown error: Check failed: Failed to get token$"):
        operation(dataclasses.replace(place, filesystem=FailingStore(refused)))


def test_errors_of_the_content_of_a_file_keep_their_type():
    place = dataclasses.replace(locate("mock://x/q", HERE), filesystem=FailingStore(pa.ArrowInvalid("damaged")))
    with pytest.raises(pa.ArrowInvalid, match="^damaged$"):
        place.read()


@pytest.mark.parametrize(
    ("output", "problem"),
    [
        ("", None),
        ("new", None),
        ("new/set", None),
        ("locked-not", None),
        ("locked", "this user cannot create files in {}/locked;"),
        ("locked/", "this user cannot create files in {}/locked;"),
        ("locked/set", "this user cannot create files in {}/locked;"),
        ("locked/a/b/c", "this user cannot create files in {}/locked;"),
        ("file", "{}/file is a file; name a folder"),
        ("file/below", "{}/file is a file; name a folder"),
    ],
)
@pytest.mark.parametrize("scheme", ["", "file://"])
def test_local_output_must_be_in_a_folder_that_can_be_written_to(tmp_path, monkeypatch, output, problem, scheme):
    (tmp_path / "locked").mkdir()
    (tmp_path / "file").touch()
    make_read_only(tmp_path / "locked", monkeypatch)
    place = locate(f"{scheme}{tmp_path}/{output}", HERE)
    if problem is None:
        check_writable(place)
        return
    with pytest.raises(ValueError, match=f"^--output {place.uri}: {problem.format(tmp_path)}"):
        check_writable(place)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "locked"]
