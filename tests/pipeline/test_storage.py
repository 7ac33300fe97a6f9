from pathlib import Path

import pytest
from pyarrow import fs

from pipeline.config import StorageConfig
from pipeline.storage import StorageError, locate

HERE = StorageConfig()


def test_files_are_listed_by_name_without_hidden_ones(tmp_path):
    for name in ("b.parquet", "a.parquet", "sub/c.parquet", "_manifest.json", ".d.parquet", "_tmp/e.parquet", "f.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = [Path(file.uri).relative_to(tmp_path).as_posix() for file in locate(str(tmp_path), HERE).files(".parquet")]
    assert found == ["a.parquet", "b.parquet", "sub/c.parquet"]


def test_write_makes_folders_and_leaves_nothing_else(tmp_path):
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


def test_home_is_expanded_and_relative_paths_are_the_callers(monkeypatch, tmp_path):
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
    assert [file.uri for file in folder.files(".parquet")] == [f"s3://{s3.bucket}/round/trip/data/part-1.parquet"]
    assert (folder / "data" / "part-1.parquet").read() == b"two"
    assert (folder / "data" / "part-1.parquet").kind() == fs.FileType.File
    (folder / "data" / "part-1.parquet").delete()
    assert not (folder / "data" / "part-1.parquet").exists()
