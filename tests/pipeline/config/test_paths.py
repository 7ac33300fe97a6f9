import os
from pathlib import Path

import pytest

from pipeline.config.paths import expand_home, find_local_path, is_writable
from pipeline.config.run import get_cache_folder


@pytest.mark.parametrize(
    ("uri", "path"),
    [
        ("/data/q.parquet", "/data/q.parquet"),
        ("/data/100%25 sure", "/data/100%25 sure"),
        ("file:/x", "/x"),
        ("file:///x", "/x"),
        ("FILE:///x", "/x"),
        ("file://localhost/x", "/x"),
        ("file:///my%20set/a", "/my set/a"),
        ("file:/my%20set", "/my set"),
        ("file:///caf%C3%A9", "/café"),
        ("file:///100%", "/100%"),
        ("file:///a#1?b", "/a#1?b"),
        ("file:///data/{date:%Y}", "/data/{date:%Y}"),
        ("file:///", "/"),
    ],
)
def test_paths_and_file_uris_name_local_paths(uri: str, path: str) -> None:
    assert find_local_path(uri) == Path(path)


def test_bytes_that_are_not_utf_8_are_kept() -> None:
    assert os.fsencode(find_local_path("file:///%ff") or "") == b"/\xff"


@pytest.mark.parametrize("relative", ["data", "./s3:/b", "./~x/q", "a/~", "2026:01/q", "run:1", "a/file:/x"])
def test_other_texts_are_relative_paths(relative: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_local_path(relative) == tmp_path / relative


def test_tilde_is_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert find_local_path("~/q") == Path("/home/me/q")


@pytest.mark.parametrize("path", ["~", "~/q", "~nosuchuser/q"])
def test_home_folder_that_is_unknown_is_refused(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pathlib.os.path.expanduser", lambda path: path)  # without HOME and a password entry
    with pytest.raises(ValueError, match=f"^{path}: the home folder {path.partition('/')[0]} is unknown; write the"):
        expand_home(path)


@pytest.mark.parametrize(("path", "expanded"), [("a/~b", "a/~b"), ("./~x/q", "~x/q"), ("~/q", "/home/me/q")])
def test_only_a_leading_tilde_is_expanded(path: str, expanded: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert expand_home(path) == Path(expanded)


def test_unknown_home_folder_of_the_cache_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SELFRAG_CACHE", "~nosuchuser/cache")
    with pytest.raises(ValueError, match="^~nosuchuser/cache: the home folder ~nosuchuser is unknown"):
        get_cache_folder()


@pytest.mark.parametrize(
    "uri", ["s3://bucket/q", "gs://bucket/q", "hdfs://host/q", "hdfs:///q", "abfs://c@a/q", "https://a/b"]
)
def test_other_schemes_name_no_local_path(uri: str) -> None:
    assert find_local_path(uri) is None


@pytest.mark.parametrize(
    ("uri", "advice"),
    [
        ("file:x", "write file:///…, or the path alone"),
        ("file:", "write file:///…, or the path alone"),
        ("file://", "write file:///…, or the path alone"),
        ("file:~/x", "write file:///…, or the path alone"),
        ("file://data/x", "'data' is taken as the name of a host; write file:///data/x, or the path alone"),
        ("s3:/bucket/q", "write s3://bucket/q, or ./s3:/bucket/q for a path"),
        ("hdfs:/q", "write hdfs:///q, or ./hdfs:/q for a path"),
        ("hdfs:/data/q", "write hdfs:///data/q, or ./hdfs:/data/q for a path"),
        ("HDFS:/data/q", "write HDFS:///data/q"),
        ("viewfs:/data/q", "write viewfs:///data/q"),
        ("gs:/bucket/q", "write gs://bucket/q"),
        ("abfs:/c@a/q", "write abfs://c@a/q"),
        ("https:/a/b", "write https://a/b"),
        ("~nosuchuser/q", "the home folder ~nosuchuser is unknown; write the whole path, or ./~nosuchuser/q if"),
        ("~nosuchuser", "the home folder ~nosuchuser is unknown; write the whole path, or ./~nosuchuser if"),
        ("~nosuchuser/a~b/c", "the home folder ~nosuchuser is unknown"),
        ("S3:/bucket/q", "write S3://bucket/q"),
    ],
)
def test_malformed_uris_are_rejected_with_the_right_form(uri: str, advice: str) -> None:
    with pytest.raises(ValueError, match=uri) as caught:
        find_local_path(uri)
    assert advice in str(caught.value)


@pytest.mark.parametrize(
    ("name", "writable"), [("", True), ("new", True), ("new/folder", True), ("file", False), ("file/below", False)]
)
def test_folder_is_writable_if_it_can_be_created(tmp_path: Path, name: str, writable: bool) -> None:
    (tmp_path / "file").touch()
    assert is_writable(tmp_path / name) is writable
