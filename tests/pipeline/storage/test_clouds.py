"""Google's and Azure's stores, on emulators; Azure's is skipped without Azurite."""

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pyarrow import fs
from pydantic import SecretStr

from pipeline.config.run import RunConfig
from pipeline.config.sections import StorageConfig
from pipeline.nodes.check import _resolve
from pipeline.nodes.places import Source
from pipeline.storage import clouds
from pipeline.storage.faults import advise, is_transient
from pipeline.storage.location import Location, MissingFileError, StorageError, check_apart, check_writable, locate
from tests.support.clouds import ACCOUNT, AZURITE, KEY, CloudStore, serving

ROOT = Path(__file__).parents[3]
HERE = StorageConfig()
CONNECTION = f"DefaultEndpointsProtocol=https;AccountName=one;AccountKey={KEY};EndpointSuffix=core.windows.net"


@pytest.fixture(scope="module", params=["google", pytest.param("azure", marks=AZURITE)])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[CloudStore]:
    with serving(request.param, tmp_path_factory.mktemp("store")) as store:
        yield store


@pytest.fixture
def bucket(store: CloudStore, monkeypatch: pytest.MonkeyPatch) -> Location:
    for name, value in store.environment.items():
        monkeypatch.setenv(name, value)
    return locate(store.place, HERE)


def test_files_are_written_listed_read_and_deleted(bucket: Location) -> None:
    folder = bucket / "round" / "trip"
    assert not folder.exists()
    odd = folder / "data" / "ü b#1?%20.parquet"
    for content in (b"", b"one", b"x" * 9_000_000, b"two"):
        odd.write(content)
        assert odd.read() == content
    (folder / "_hidden" / "file").write(b"x")
    (folder / "data" / "a.txt").write(b"x")
    assert [file.uri for file in folder.list_files(".parquet")] == [odd.uri]
    assert [file.name for file in (folder / "data").list_files()] == ["a.txt", odd.name]
    assert [place.name for place in folder.list_folders()] == ["data"]
    (stamp,) = [file.stamp for file in folder.list_files(".parquet")]
    assert stamp is not None
    assert (stamp.size, abs(stamp.mtime_ns / 1e9 - time.time()) < 60) == (3, True)
    odd.delete()
    odd.delete()  # a missing file is no error
    assert [file.name for file in folder.list_files()] == ["a.txt"]
    with pytest.raises(MissingFileError, match="trip/data/ü b#1"):
        odd.read()


def test_replaced_file_has_another_version(bucket: Location) -> None:
    file = bucket / "version"
    file.write(b"one")
    first = file.get_version()
    assert file.get_version() == first
    file.write(b"two")
    assert file.get_version() != first
    assert first.startswith("3 bytes with ETag ")


def test_file_is_never_seen_in_part(bucket: Location) -> None:
    file, contents = bucket / "atomic", [bytes([n]) * 100_000 for n in range(40)]
    file.write(contents[0])
    seen, over = list[bytes](), threading.Event()

    def read() -> None:
        while not over.is_set():
            seen.append(file.read())

    reading = threading.Thread(target=read)
    reading.start()
    for content in contents:
        file.write(content)
    over.set()
    reading.join()
    assert len(seen) > 10
    assert set(seen) <= set(contents)
    assert [place.name for place in bucket.list_files() if place.name.startswith("atomic")] == ["atomic"]
    selector = fs.FileSelector(bucket.path)
    assert [info.path for info in bucket.filesystem.get_file_info(selector) if info.path.endswith(".tmp")] == []


def test_missing_bucket_is_named(store: CloudStore, bucket: Location) -> None:
    place = store.place.replace("bucket", "missing")
    with pytest.raises(ValueError, match="the store has no bucket 'missing'"):
        check_writable(locate(f"{place}/out", HERE))
    with pytest.raises(StorageError, match=f"{place}/out: "):
        (locate(place, HERE) / "out").write(b"x")


@pytest.mark.parametrize("kind", ["google", "azure"])
def test_silent_store_is_tried_again_and_named(kind: str, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    monkeypatch.setattr(clouds, "GOOGLE_RETRIES_S", 1)
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:9")
    connection = f"AccountName={ACCOUNT};AccountKey={KEY};BlobEndpoint=http://127.0.0.1:9/{ACCOUNT}"
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", connection)
    uri = {"google": "gs://bucket/x", "azure": "abfss://bucket/x"}[kind]
    with pytest.raises(StorageError) as refused:
        locate(uri, StorageConfig(patience_s=4)).read()
    assert str(refused.value).startswith(f"{uri}: ")
    assert len(str(refused.value).splitlines()) == 1
    assert KEY not in str(refused.value)
    if kind == "google":  # Azure's client alone takes all the patience
        assert "retrying in" in caplog.text


@AZURITE
def test_wrong_key_is_refused_at_once(store: CloudStore, monkeypatch: pytest.MonkeyPatch) -> None:
    if store.place.startswith("gs://"):
        pytest.skip("the emulator accepts everybody")
    right = store.environment["AZURE_STORAGE_CONNECTION_STRING"]
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", right.replace(KEY, KEY[:-8] + "AAAAAA=="))
    started = time.monotonic()
    with pytest.raises(StorageError, match="403") as refused:
        locate(f"{store.place}/x", HERE).read()
    assert time.monotonic() - started < 10
    assert "AccountKey" not in str(refused.value)


@pytest.mark.parametrize(
    ("uri", "path", "account"),
    [
        ("abfss://box@one.dfs.core.windows.net/a/b/", "box/a/b", "one"),
        ("abfs://box@one.blob.core.windows.net", "box", "one"),
        ("az://box/a", "box/a", "one"),
        ("abfss://box/a#1?b", "box/a#1?b", "one"),
    ],
)
def test_uri_of_azure_names_container_and_account(uri: str, path: str, account: str) -> None:
    found = locate(uri, StorageConfig(azure_connection_string=SecretStr(CONNECTION)))
    assert isinstance(found.filesystem, fs.AzureFileSystem)
    assert (found.uri, found.path) == (uri, path)
    assert read_options(found.filesystem)["account_name"] == account
    assert read_options(found.filesystem)["blob_storage_authority"] == ".blob.core.windows.net"


def read_options(filesystem: Any) -> dict[str, str]:
    """The arguments that a file system of Azure was opened with."""
    return dict(filesystem.__reduce__()[1][0])


@pytest.mark.parametrize(
    ("text", "blob", "dfs", "scheme"),
    [
        ("", ".blob.core.windows.net", ".dfs.core.windows.net", "https"),
        ("EndpointSuffix=core.windows.net;", ".blob.core.windows.net", ".dfs.core.windows.net", "https"),
        ("EndpointSuffix=core.chinacloudapi.cn", ".blob.core.chinacloudapi.cn", ".dfs.core.chinacloudapi.cn", "https"),
        (  # as az storage account show-connection-string prints it
            "BlobEndpoint=https://one.blob.core.windows.net/;FileEndpoint=https://one.file.core.windows.net/",
            ".blob.core.windows.net",
            ".dfs.core.windows.net",
            "https",
        ),
        ("BlobEndpoint=http://127.0.0.1:10000/one;", "127.0.0.1:10000", "127.0.0.1:10000", "http"),
    ],
)
def test_connection_string_names_the_endpoint(text: str, blob: str, dfs: str, scheme: str) -> None:
    secret = SecretStr(f"DefaultEndpointsProtocol=https;AccountName=one;AccountKey={KEY};{text}")
    options = read_options(locate("abfss://box/a", StorageConfig(azure_connection_string=secret)).filesystem)
    assert (options["blob_storage_authority"], options["dfs_storage_authority"]) == (blob, dfs)
    assert options["blob_storage_scheme"] == scheme


def test_other_accounts_and_clouds_are_opened_with_default_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = list[Any]()
    monkeypatch.setattr(clouds, "_try_default_credentials", lambda *options: tried.append(options))
    storage = StorageConfig(azure_connection_string=SecretStr(CONNECTION))
    found = locate("abfss://box@two.dfs.core.usgovcloudapi.net/a", storage)
    options = read_options(found.filesystem)
    assert (options["account_name"], options["account_key"]) == ("two", "")
    assert options["blob_storage_authority"] == ".blob.core.usgovcloudapi.net"
    assert [container for container, _ in tried] == ["box"]


def test_missing_credentials_are_one_line_and_do_not_end_the_process(tmp_path: Path) -> None:
    uri = "abfss://box@selfragnoaccount.dfs.core.windows.net/a"
    script = (
        "from pipeline.storage.location import *\nfor n in range(2):\n"
        f" try:\n  locate('{uri}', StorageConfig(patience_s=0)).read()\n"
        " except StorageError as error: print(error)"
    )
    environment = {"HOME": str(tmp_path), "PATH": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False, cwd=ROOT
    )
    assert result.returncode == 0, result.stderr
    assert [line.startswith(f"{uri}: ") for line in result.stdout.splitlines()] == [True, True]


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("abfss://box/a", "abfss://box/a: names no account; write abfss://box@ACCOUNT.dfs.core.windows.net/PATH"),
        ("abfss:///a", "expected abfss://CONTAINER@ACCOUNT.dfs.core.windows.net/PATH"),
        ("abfss://@one.dfs.core.windows.net/a", "expected abfss://CONTAINER@ACCOUNT.dfs.core.windows.net/PATH"),
        ("abfss://box@example.com/a", "expected abfss://CONTAINER@ACCOUNT.dfs.core.windows.net/PATH"),
        ("abfss://one.dfs.core.windows.net/box", "expected abfss://CONTAINER@ACCOUNT.dfs.core.windows.net/PATH"),
        ("gs:///a", "gs:///a: expected gs://BUCKET/PATH"),
    ],
)
def test_wrong_uris_are_refused(uri: str, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("/", r"\/")):
        locate(uri, HERE)


@pytest.mark.parametrize(
    "uri",
    [
        "abfss://box:hunter2@one.dfs.core.windows.net/a",
        "abfss://box@one.dfs.core.windows.net/a?sv=1&sig=hunter2",
        "abfss://box@one.dfs.core.windows.net/a?client_secret=hunter2",
        "gs://user:hunter2@bucket/a",
        "gs://bucket/a?access_token=hunter2",
        "s3://key:hunter2@bucket/a",
        "s3://bucket/a?secret_key=hunter2",
        "hdfs://user:hunter2@host/a",
    ],
)
def test_uris_with_a_secret_are_refused_and_not_repeated(uri: str) -> None:
    with pytest.raises(ValueError, match="the URI contains a password or a key") as refused:
        locate(uri, HERE)
    assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (" ", "expected AccountName=…;AccountKey=…"),
        ("AccountName=one", "expected AccountName=…;AccountKey=…"),
        ("AccountKey=hunter2", "expected AccountName=…;AccountKey=…"),
        ("nonsense;hunter2", "expected AccountName=…;AccountKey=…"),
        ("AccountName=one;SharedAccessSignature=hunter2", "expected AccountName=…;AccountKey=…"),
        (
            "AccountName=one;AccountKey=hunter2;BlobEndpoint=https://cdn.example.com/",
            "expected BlobEndpoint=https://one",
        ),
    ],
)
def test_wrong_connection_strings_are_refused_and_not_repeated(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        locate("abfss://box/a", StorageConfig(azure_connection_string=SecretStr(text)))
    assert "hunter2" not in str(refused.value)


def test_equal_paths_of_different_stores_are_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clouds, "_try_default_credentials", lambda *_: None)
    one, two, three = (
        locate(uri, HERE)
        for uri in (
            "abfss://data@one.dfs.core.windows.net/set",
            "abfss://data@two.dfs.core.windows.net/set",
            "gs://data/set",
        )
    )
    check_apart(one, two)
    check_apart(two, three)
    for place in (one, three):
        with pytest.raises(ValueError, match="one contains the other"):
            check_apart(locate(place.uri, HERE), place / "below")


def test_workers_get_the_connection_string_and_no_file_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", CONNECTION)
    sent = _resolve([Source("--index", {"abfss://box/index/index.json": 0})], "gs://bucket/out", HERE)
    assert sent.azure_connection_string is not None
    assert sent.azure_connection_string.get_secret_value() == CONNECTION
    assert _resolve([], "gs://bucket/out", HERE) == HERE
    run = RunConfig.model_validate({"queries": "q", "output": "o", "model": {"name": "m"}, "storage": sent})
    assert KEY not in str(run.to_record())
    assert KEY not in repr(run)


def google(code: str, said: str) -> OSError:
    return OSError(f"google::cloud::Status({code}: Retry policy exhausted, with a last message of {said})")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (google("UNAVAILABLE", "PerformWork() - CURL error [7]=Could not connect to server"), True),
        (google("RESOURCE_EXHAUSTED", "Received HTTP status code: 429"), True),
        (google("INTERNAL", "Received HTTP status code: 500"), True),
        (google("UNAVAILABLE", "Could not create a OAuth2 access token to authenticate the request."), False),
        (google("PERMISSION_DENIED", "Received HTTP status code: 403"), False),
        (google("UNAUTHENTICATED", "Received HTTP status code: 401"), False),
        (FileNotFoundError("google::cloud::Status(NOT_FOUND: Permanent error)"), False),
        (OSError("GetProperties failed for 'u'. Azure Error: [] Fail to get a new connection for: http://h"), True),
        (OSError("x. Azure Error: [ServerBusy] 503 The server is busy."), True),
        (OSError("x. Azure Error: [OperationTimedOut] 500 Operation could not be completed."), True),
        (OSError("x. Azure Error: [TooManyRequests] 429 Slow down."), True),
        (OSError("x. Azure Error: [AuthorizationFailure] 403 Server failed to authenticate the request."), False),
        (OSError("x. Azure Error: [ContainerNotFound] 404 The specified container does not exist."), False),
        (OSError("Couldn't deserialize thrift: TProtocolException: Invalid data"), False),
    ],
)
def test_transient_errors_of_google_and_azure_are_recognized(error: OSError, expected: bool) -> None:
    assert is_transient(error) is expected


@pytest.mark.parametrize(
    ("said", "remedy"),
    [
        ("Could not create a OAuth2 access token to authenticate the request", "GOOGLE_APPLICATION_CREDENTIALS"),
        (
            "N5Azure4Core11Credentials23AuthenticationExceptionE: Failed to get token",
            "az login",
        ),
        ("AWS Error UNKNOWN (HTTP status 301) during HeadObject operation", "storage.region"),
    ],
)
def test_errors_of_credentials_and_regions_name_a_remedy(said: str, remedy: str) -> None:
    assert remedy in advise(OSError(said))
    assert advise(OSError("Azure Error: [ServerBusy] 503")) == ""
