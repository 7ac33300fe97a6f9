"""Updates of an index: searches find what an index built anew finds, and earlier versions stay readable."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer
from typer.testing import CliRunner, Result

from jobs.update_index import update_index
from pipeline.config.sections import RetrievalConfig
from pipeline.retrieval.filters import Conditions
from pipeline.retrieval.fusion import QueryBatch, retrieve_fused
from pipeline.retrieval.index import PassageIndex
from pipeline.retrieval.manifest import has_earlier_version, read_manifest
from pipeline.retrieval.words import WordForm, WordSplitter
from tests.support.building import given_vectors, run
from tests.support.indexes import place

pytestmark = pytest.mark.usefixtures("lasting_ray")

APP = typer.Typer()
APP.command()(update_index)
ROWS, MORE = 200, 40
QUERIES = np.random.default_rng(3).normal(size=(5, 384)).astype(np.float32)
OPTIONS = ("--embeddings", "vector", "--metadata", "year", "--shards", "3")


def make_passages(rows: int, start: int) -> pa.Table:
    table, _ = given_vectors(rows, start)
    texts = [f"Passage {n} about {['iron', 'gold', 'sea', 'wind'][n % 4]}." for n in range(start, start + rows)]
    return table.set_column(2, "text", pa.array(texts)).append_column(
        "year", pa.array([2000 + n % 5 for n in range(start, start + rows)])
    )


def write(file: Path, table: pa.Table) -> Path:
    pq.write_table(table, file)
    return file


def update(folder: Path, **options: Path | bool | int) -> Result:
    words = [word for name, value in options.items() for word in ([f"--{name}"] + ([str(value)] * (value is not True)))]
    return CliRunner().invoke(APP, ["--index", str(folder), *words])


@pytest.fixture(scope="module")
def first() -> pa.Table:
    return make_passages(ROWS, 0)


@pytest.fixture(scope="module", params=["Flat", pytest.param("IVF4,Flat", marks=pytest.mark.slow)])
def base(request: pytest.FixtureRequest, first: pa.Table, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    passages = write(folder / "passages.parquet", first)
    result = run(passages, folder / "index", *OPTIONS, "--factory", request.param, "--lexical")
    assert result.exit_code == 0, result.stderr
    return folder / "index"


@pytest.fixture
def folder(base: Path, tmp_path: Path) -> Path:
    """A copy of the index."""
    return shutil.copytree(base, tmp_path / "index")


def build_anew(passages: pa.Table, folder: Path) -> Path:
    file = write(folder / "anew.parquet", passages)
    result = run(file, folder / "anew", *OPTIONS, "--factory", "Flat", "--lexical")
    assert result.exit_code == 0, result.stderr
    return folder / "anew"


def without(passages: pa.Table, gone: set[str]) -> pa.Table:
    return passages.filter(pa.array([name not in gone for name in passages["id"].to_pylist()]))


def find(folder: Path, fusion: str = "dense", conditions: Conditions = ()) -> list[list[tuple[str, str, float]]]:
    """Id, text and score of the ten best passages of five queries."""
    search = {"search": "nprobe=4"} if "IVF" in read_manifest(place(folder)).factory else {}
    retrieval = RetrievalConfig.model_validate({"device": "cpu", "fusion": fusion, **search})
    splitter = WordSplitter(WordForm())
    words = [splitter.split(text) for text in ("iron", "gold sea", "passage 7", "passage 205", "wind 3")]
    batch = QueryBatch(QUERIES, words, [conditions] * 5).select(retrieval)
    found = retrieve_fused(PassageIndex.open(place(folder), retrieval), batch, [10] * 5, retrieval)
    return [[(p.passage.id, p.passage.text, round(p.score or 0, 4)) for p in of_query] for of_query in found]


def rank_exactly(passages: pa.Table) -> list[list[tuple[str, str, float]]]:
    """What :func:`find` finds among passages, computed from their vectors."""
    vectors = np.stack(passages["vector"].to_numpy(zero_copy_only=False))
    scores = QUERIES @ (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).T
    ids, texts = passages["id"].to_pylist(), passages["text"].to_pylist()
    best = np.argsort(-scores, axis=1)[:, :10]
    return [[(ids[r], texts[r], round(float(of[r]), 4)) for r in rows] for of, rows in zip(scores, best, strict=True)]


def test_index_is_updated_and_compacted(folder: Path, first: pa.Table, tmp_path: Path) -> None:
    before = read_manifest(place(folder))
    changed = make_passages(2, 5000).set_column(0, "id", pa.array(["17", "150"]))
    more = pa.concat_tables([changed, make_passages(MORE, ROWS)])
    ids = write(tmp_path / "removed.parquet", pa.table({"id": ["3", "60", "199", "nowhere"]}))
    result = update(folder, add=write(tmp_path / "added.parquet", more), remove=ids)
    assert result.exit_code == 0, result.stderr
    line = result.stderr.splitlines()[-1]
    assert "237 passages: 42 added, 5 removed; ids replaced: 2; ids to remove that it does not have: 1" in line
    now = read_manifest(place(folder))
    assert (now.passages, now.updates, now.added, len(now.shards)) == (237, 1, 1, 4)
    wanted = rank_exactly(pa.concat_tables([without(first, {"3", "17", "60", "150", "199"}), more]))
    assert find(folder) == wanted
    words = find(folder, "lexical")
    assert {name for hits in words for name, *_ in hits}.isdisjoint({"3", "60", "199"})
    assert words[3][0][:2] == ("205", "Passage 205 about gold.")
    recent = find(folder, "dense", ("year = 2003",))

    compacted = update(folder, compact=True)
    assert compacted.exit_code == 0, compacted.stderr
    assert "files of earlier versions deleted" in update(folder, prune=True).stderr
    assert "237 passages in 3 fresh shards" in compacted.stderr
    manifest = read_manifest(place(folder))
    assert (manifest.passages, manifest.updates, manifest.added) == (237, 2, 0)
    assert [shard.rows for shard in manifest.shards] == [79, 79, 79]
    assert find(folder) == wanted
    assert find(folder, "dense", ("year = 2003",)) == recent
    assert not has_earlier_version(place(folder), before.compute_digest())
    names = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    assert names == {"index.json", *(name for shard in manifest.shards for name, _, _ in shard.list_files())}


@pytest.mark.slow
def test_earlier_version_stays_while_passages_are_replaced_twice(folder: Path, tmp_path: Path) -> None:
    before, hits = read_manifest(place(folder)), find(folder)
    one = write(tmp_path / "one.parquet", make_passages(5, ROWS))
    assert update(folder, add=one).exit_code == 0
    again = update(folder, add=one, remove=write(tmp_path / "ids.parquet", pa.table({"id": ["0", "1"]})))
    assert "203 passages: 5 added, 7 removed; ids replaced: 5" in again.stderr
    last = update(folder, remove=write(tmp_path / "more.parquet", pa.table({"id": ["1", "2", "204"]})))
    assert "201 passages: 0 added, 2 removed; ids replaced: 0; ids to remove that it does not have: 1" in last.stderr
    manifest = read_manifest(place(folder))
    assert [shard.kept for shard in manifest.shards[3:]] == [0, 4]
    assert manifest.updates == 3
    found = {
        name for fusion in ("dense", "lexical", "rrf") for of_query in find(folder, fusion) for name, *_ in of_query
    }
    assert found.isdisjoint({"0", "1", "2", "204"})
    (folder / "index.json").write_bytes((folder / f"index-{before.compute_digest()[:16]}.json").read_bytes())
    assert find(folder) == hits


def test_bad_updates_change_nothing(folder: Path, tmp_path: Path) -> None:
    before = (folder / "index.json").read_bytes()
    ids = write(tmp_path / "ids.parquet", pa.table({"id": ["x", "1", "y"]}))
    wrong = write(tmp_path / "a.parquet", make_passages(3, 900).drop(["year"]))
    other = write(tmp_path / "b.parquet", make_passages(3, 900).set_column(4, "year", pa.array(["a", "b", "c"])))
    cases: dict[str, dict[str, Path | bool | int]] = {
        "'x' is not in the index, ids like this: 2": {"remove": ids, "strict": True},
        "give --add, --remove or both, or --compact, or --prune": {},
        "or --compact, or --prune": {"remove": ids, "compact": True},
        "--strict concerns --remove, which is missing": {"compact": True, "strict": True},
        "--shards concerns --add or --compact, which are missing": {"remove": ids, "shards": 2},
        "column id is null in 1 rows; leave them out": {
            "remove": write(tmp_path / "e.parquet", pa.table({"id": ["1", None]}))
        },
        "f.parquet: row 0: column id is null": {
            "add": write(
                tmp_path / "f.parquet", make_passages(1, 900).set_column(0, "id", pa.array([None], pa.string()))
            )
        },
        "no column year (--metadata)": {"add": wrong},
        "its further columns hold {'year': 'string'}, but {'year': 'integer'} in the index; convert them": {
            "add": other
        },
        "c.parquet: no column id, found name": {"remove": write(tmp_path / "c.parquet", pa.table({"name": ["1"]}))},
        "column id is double; convert it to string": {"remove": write(tmp_path / "d.parquet", pa.table({"id": [1.0]}))},
        "nowhere: not found": {"remove": tmp_path / "nowhere"},
    }
    for message, options in cases.items():
        result = update(folder, **options)
        assert result.exit_code == 2, result.stderr
        assert message in result.stderr.splitlines()[-1]
    assert (folder / "index.json").read_bytes() == before
    assert not list(folder.glob("index-*.json"))


@pytest.mark.slow
def test_compacted_index_equals_one_built_anew(folder: Path, first: pa.Table, tmp_path: Path) -> None:
    gone = {str(n) for n in range(ROWS) if n % 3 == 0}
    removed = write(tmp_path / "removed.parquet", pa.table({"id": sorted(gone)}))
    more = make_passages(MORE, ROWS)
    assert update(folder, add=write(tmp_path / "added.parquet", more), remove=removed).exit_code == 0
    assert update(folder, compact=True, shards=2).exit_code == 0
    assert [shard.rows for shard in read_manifest(place(folder)).shards] == [86, 87]
    anew = build_anew(pa.concat_tables([without(first, gone), more]), tmp_path)
    for fusion in ("dense", "lexical", "rrf"):
        for conditions in ((), ("year = 2003",), ("year > 3000",)):
            assert find(folder, fusion, conditions) == find(anew, fusion, conditions), (fusion, conditions)
