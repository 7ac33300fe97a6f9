from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config.run import RunConfig
from pipeline.indexing.update import UpdateRequest, run_update
from pipeline.run.plan import check_run
from tests.support.indexes import place, save, unit_vectors


@pytest.fixture
def config(tmp_path: Path, demo_model: Path) -> RunConfig:
    """A run of one question over nine passages."""
    save(place(tmp_path / "index"), [unit_vectors(9)])
    pq.write_table(pa.table({"id": ["a"], "query": ["Who?"]}), tmp_path / "queries.parquet")
    places = {name: str(tmp_path / name) for name in ("index", "output")}
    queries = str(tmp_path / "queries.parquet")
    return RunConfig.model_validate({**places, "queries": queries, "model": {"name": str(demo_model)}})


def begin(config: RunConfig) -> None:
    plan = check_run(config)
    plan.output.begin({"configuration": config.to_record(), **plan.compute_identity()})


def test_begun_run_keeps_its_version_of_the_index(
    config: RunConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    begun = check_run(config).index
    begin(config)
    pq.write_table(pa.table({"id": ["3", "4"]}), tmp_path / "gone.parquet")
    run_update(UpdateRequest(str(config.index), remove=str(tmp_path / "gone.parquet")))

    assert check_run(config).index == begun
    assert "index has been updated since the output was begun, which goes on with the earlier version" in caplog.text
    other = check_run(config.model_copy(update={"output": str(tmp_path / "other")}))
    for plan in (check_run(config, overwrite=True), other):
        assert plan.index is not None
        assert plan.index["passages"] == 7
    for file in (tmp_path / "index").glob("index-*.json"):
        file.unlink()
    with pytest.raises(ValueError, match="contains a run that differs in index; choose another output"):
        check_run(config)


def test_filter_is_part_of_a_run(config: RunConfig) -> None:
    def filtered(condition: str) -> RunConfig:
        return config.model_copy(update={"retrieval": config.retrieval.model_copy(update={"filter": condition})})

    begin(filtered("id <> '3'"))
    assert not check_run(filtered("id <> '3'")).finished
    with pytest.raises(ValueError, match="contains a run that differs in retrieval.filter; choose another output"):
        check_run(filtered("id <> '4'"))
