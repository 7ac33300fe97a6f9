from pathlib import Path
from typing import Any

import pytest

from pipeline.config.run import RunConfig
from pipeline.config.sections import StorageConfig
from pipeline.output.folder import OutputFolder, hash_identity
from pipeline.output.unit_files import UnitSummary
from pipeline.run.earlier_set import identify_earlier, list_earlier_files
from tests.support.indexes import place

UNIT, OTHER = "a" * 20, "b" * 20
IDENTITY: dict[str, Any] = {
    "settings": {"decoding.threshold": 0.2, "retrieval.fusion": "rrf", "output.columns": "5"},
    "queries": {"files": 1, "rows": 3, "digest": "q"},
    "model": {"digest": "m"},
    "index": {"digest": "before"},
    "reranker": None,
}


def write_earlier(folder: Path, **changes: Any) -> dict[str, Any]:
    """A finished set of one unit with one row."""
    manifest = {**IDENTITY, **changes}
    OutputFolder(place(folder)).finish(manifest, [UnitSummary(UNIT, 1)])
    return manifest


def configure(tmp_path: Path, **changes: Any) -> RunConfig:
    places = {"queries": "q", "output": str(tmp_path / "new"), "index": "i", "stale": str(tmp_path / "old")}
    return RunConfig.model_validate({**places, "model": {"name": "m"}, **changes})


def identify(tmp_path: Path, config: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    now = {**IDENTITY, "index": {"digest": "now"}, **changes}
    return identify_earlier(configure(tmp_path, **(config or {})), now, {UNIT: 1, OTHER: 2})


def test_earlier_set_is_identified_by_run_and_index(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    manifest = write_earlier(tmp_path / "old", stale={"run": "r", "index": "i"})
    found = identify(tmp_path)
    assert found == {"run": hash_identity(manifest), "index": "before"}
    assert "old lacks 1 of the units, with 2 rows" in caplog.text
    assert (
        hash_identity({**IDENTITY, "stale": found})
        != hash_identity(IDENTITY)
        == hash_identity({**IDENTITY, "stale": None})
    )


def test_searches_may_have_other_settings(tmp_path: Path) -> None:
    write_earlier(tmp_path / "old")
    assert identify(tmp_path, settings={**IDENTITY["settings"], "retrieval.fusion": "dense"})["index"] == "before"


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        ({}, {"index": None}, "no answer of this run depends on an index .*; leave it out"),
        ({"sample": {"rows": 2}}, {}, "all queries are compared with it; leave out --sample"),
        ({"skip_annotated": "s"}, {}, "all queries are compared with it; leave out skip_annotated"),
        (
            {},
            {"settings": {**IDENTITY["settings"], "decoding.threshold": 0.3}},
            "this run differs in decoding.threshold;",
        ),
        ({}, {"settings": {}, "model": {}}, "this run differs in decoding.threshold, output.columns, model;"),
    ],
)
def test_set_that_cannot_be_carried_over_is_refused(
    tmp_path: Path, config: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    write_earlier(tmp_path / "old")
    with pytest.raises(ValueError, match=rf"--stale .*old: .*{message}"):
        identify(tmp_path, config, **changes)


def test_set_of_other_queries_is_refused(tmp_path: Path) -> None:
    write_earlier(tmp_path / "old")
    with pytest.raises(
        ValueError, match=r"old: it answers other queries, or in units of another size \(execution.unit"
    ):
        identify_earlier(configure(tmp_path), IDENTITY, {OTHER: 2})


def test_set_must_be_finished_and_apart(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="old: not a finished annotated set"):
        identify(tmp_path)
    write_earlier(tmp_path / "old")
    with pytest.raises(ValueError, match="one contains the other"):
        identify(tmp_path, {"output": str(tmp_path / "old")})
    (tmp_path / "old" / "_SUCCESS").unlink()
    with pytest.raises(ValueError, match="old: not a finished annotated set"):
        identify(tmp_path)


def test_every_machine_must_read_the_data_files(tmp_path: Path) -> None:
    file = tmp_path / "old" / "data" / f"part-{UNIT}.parquet"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"12345")
    found = list_earlier_files(str(tmp_path / "old"), StorageConfig())
    assert found.option == "--stale"
    assert list(found.files.values()) == [5]
