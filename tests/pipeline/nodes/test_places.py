from pathlib import Path

import pytest
from pyarrow import fs
from pydantic import SecretStr

from pipeline.config.sections import StorageConfig
from pipeline.nodes.places import Output, Refusal, Source

HERE = StorageConfig(patience_s=0)


@pytest.fixture
def there(s3, monkeypatch: pytest.MonkeyPatch) -> StorageConfig:
    """Access to the store."""
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    keys = {"access_key": s3.access_key, "secret_key": s3.secret_key}
    return StorageConfig.model_validate({"endpoint_url": s3.endpoint, "region": "us-east-1", **keys})


def refused(source: Source) -> str | None:
    refusal = source.find_refusal(HERE)
    return refusal and refusal.explain("worker (10.0.0.2)")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("weights", None),
        (None, "does not see this file (No such file or directory)"),
        ("", "sees another file there, of 0 instead of 7 bytes"),
        ("other weights", "sees another file there, of 13 instead of 7 bytes"),
    ],
)
def test_local_files_are_the_same_on_every_machine(tmp_path: Path, content: str | None, problem: str | None) -> None:
    file = tmp_path / "model" / "weights.bin"
    file.parent.mkdir()
    file.write_text("weights")
    source = Source.list_folder("--model", str(file.parent), "")
    if content is None:
        file.unlink()
    else:
        file.write_text(content)
    remedy = "copy the same files to every machine, or use a shared folder or an object store"
    assert refused(source) == (problem and f"--model {file}: node worker (10.0.0.2) {problem}; {remedy}")


def test_missing_folder_is_named(tmp_path: Path) -> None:
    source = Source("--queries", {str(tmp_path / "away" / "a.parquet"): 4, str(tmp_path): tmp_path.stat().st_size})
    assert str(refused(source)).startswith(f"--queries {tmp_path}/away/a.parquet: node worker (10.0.0.2) does not see")


def test_file_in_place_of_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("")
    source = Source("--model", {str(tmp_path / "model" / "config.json"): 2})
    assert "does not see this file (Not a directory)" in str(refused(source))


def test_hidden_files_of_a_folder_need_not_be_the_same(tmp_path: Path) -> None:
    for name in ("config.json", ".cache/lock", "_build/state", "deep/weights.bin", "deep/.part"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    source = Source.list_folder("--model", str(tmp_path), "")
    assert source.files == {f"{tmp_path}/config.json": 11, f"{tmp_path}/deep/weights.bin": 16}


def test_one_file_of_a_store_is_read(s3, there: StorageConfig) -> None:
    with s3.filesystem().open_output_stream(f"{s3.bucket}/places/index.json") as stream:
        stream.write(b"{}")
    present, missing = f"s3://{s3.bucket}/places/index.json", f"s3://{s3.bucket}/places/other.json"
    assert Source("--index", {present: 2, missing: 2}).find_refusal(there) is None
    refusal = Source("--index", {missing: 2, present: 2}).find_refusal(there)
    assert refusal is not None
    assert (refusal.uri, refusal.problem[:16]) == (missing, "cannot read it (")


@pytest.mark.parametrize("action", ["read", "write"])
def test_wrong_rights_are_reported_at_once_with_the_action(s3, there: StorageConfig, action: str) -> None:
    storage = there.model_copy(update={"secret_key": SecretStr("nothing")})
    uri = f"s3://{s3.bucket}/rights"
    place = Source("--output", {uri: 1}) if action == "read" else Output(uri)
    refusal = place.find_refusal(storage) if isinstance(place, Source) else place.find_refusal("node", storage)
    assert isinstance(refusal, Refusal)
    words = {"read": "cannot read it (", "write": "cannot write to it ("}
    assert refusal.explain("worker (10.0.0.2)").startswith(f"--output {uri}: node worker (10.0.0.2) {words[action]}")
    assert refusal.remedy.startswith("give this machine the same credentials")


def test_trial_of_a_store_leaves_only_the_file_of_leases(s3, there: StorageConfig) -> None:
    output = Output(f"s3://{s3.bucket}/tried")
    output.prepare()
    assert output.find_refusal("node", there) is None
    output.clear()
    found = s3.filesystem().get_file_info(fs.FileSelector(f"{s3.bucket}/tried", recursive=True))
    assert [info.path for info in found if info.is_file] == [f"{s3.bucket}/tried/_running/README"]


def test_shared_output_is_recognized_and_left_as_it_was(tmp_path: Path) -> None:
    output = Output(str(tmp_path / "out"))
    output.prepare()
    assert not output.has_reply("node")
    assert output.find_refusal("node", HERE) is None
    assert output.has_reply("node")
    output.clear()
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("made", [[], [""], ["other"]])
def test_output_of_another_disk_is_refused(tmp_path: Path, made: list[str]) -> None:
    output = Output(str(tmp_path / "out"))
    assert output.hidden is not None
    for content in made:
        output.hidden.mkdir(parents=True)
        (output.hidden / "driver").write_text(content)
    refusal = output.find_refusal("node", HERE)
    assert refusal is not None
    assert refusal.explain("worker (10.0.0.2)") == (
        f"--output {tmp_path}/out: node worker (10.0.0.2) does not see this folder, or sees another one; "
        "use a folder that all machines share, or an object store such as s3://"
    )


def test_output_that_cannot_be_written_to_is_refused(tmp_path: Path) -> None:
    output = Output(str(tmp_path / "out"))
    output.prepare()
    assert output.hidden is not None
    (output.hidden / "node").mkdir()  # in the way, for root too
    refusal = output.find_refusal("node", HERE)
    assert refusal is not None
    assert refusal.problem == "cannot write to it (Is a directory)"


def test_traces_of_a_killed_run_are_removed(tmp_path: Path) -> None:
    first, second = Output(str(tmp_path)), Output(f"file://{tmp_path}")
    first.prepare()
    second.prepare()
    assert [path.name for path in tmp_path.iterdir()] == [f".nodes-{second.token}"]
