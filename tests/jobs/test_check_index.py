import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer
from typer.testing import CliRunner, Result

from jobs.build_index import build_index
from jobs.check_index import check_index
from pipeline.demo_models import build_demo_encoder
from pipeline.retrieval.encoder import Encoder
from pipeline.retrieval.manifest import EncoderEntry, IndexManifest, write_manifest
from pipeline.retrieval.passage_columns import PASSAGE_SCHEMA
from pipeline.retrieval.shard_files import build_shard, create_empty_index
from pipeline.storage.location import Location
from tests.support.indexes import place, save, unit_vectors
from tests.support.rerankers import write_cross_encoder

APP = typer.Typer()
APP.command()(check_index)


def check(index: Location | Path, *options: str) -> Result:
    uri = index.uri if isinstance(index, Location) else str(index)
    return CliRunner().invoke(APP, ["--index", uri, *options], env={"COLUMNS": "140"})


@pytest.fixture
def probed(folder: Location) -> Location:
    vectors = unit_vectors(500)
    save(folder, [vectors[:300], vectors[300:]], "IVF8,Flat")
    return folder


def test_check_recommends_the_fastest_setting_with_the_required_recall(probed: Location) -> None:
    result = check(probed, "--recall", "1.0", "--sample", "50")
    assert result.exit_code == 0, result.output
    assert "intact, 500 passages in 2 shards of IVF8,Flat" in result.stdout
    assert "recall measured against exact search over all vectors" in result.stdout
    assert "for a recall of 1: --set retrieval.search=nprobe=8" in result.stdout
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in result.stdout.splitlines() if "│" in line]
    assert [row[0] for row in cells] == ["nprobe=1", "nprobe=2", "nprobe=4", "nprobe=8"]
    assert [row[2] for row in cells] == ["", "", "", "✓"]


def test_check_writes_its_figures_as_json(probed: Location) -> None:
    result = check(probed, "--recall", "0.2", "--sample", "50", "--k", "3", "--json", "--set", "retrieval.threads=2")
    found = json.loads(result.stdout)
    assert (found["passages"], found["queries"], found["k"], found["advice"]) == (500, 50, 3, "nprobe=1")
    recalls = [speed["recall"] for speed in found["speeds"]]
    assert recalls == sorted(recalls)
    assert recalls[-1] == 1.0


def test_recall_against_codes_is_labeled(folder: Location) -> None:
    from pipeline.retrieval.manifest import read_manifest, write_manifest

    manifest = save(folder, [unit_vectors(400)], "SQ8")
    write_manifest(folder, manifest.model_copy(update={"embeddings": "vector"}))
    assert read_manifest(folder).embeddings == "vector"
    result = check(folder)
    assert result.exit_code == 0, result.output
    assert (
        "recall measured against exhaustive search over the codes; quantization loss is not measured" in result.stdout
    )


@pytest.mark.parametrize("name", ["shard-00000.faiss", "shard-00001.passages.arrow"])
def test_damaged_and_missing_files_are_named(probed: Location, name: str) -> None:
    file = Path((probed / name).path)
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    result = check(probed)
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert f"{name}: its SHA-256 differs from index.json" in result.stderr
    file.unlink()
    assert f"{name}: missing" in check(probed).stderr


def test_configured_parameters_are_kept_while_others_are_swept(folder: Location) -> None:
    save(folder, [unit_vectors(300)], "IVF3,SQ8,RFlat")
    found = json.loads(check(folder, "--json", "--set", "retrieval.search=k_factor_rf=4").stdout)
    assert [speed["search"] for speed in found["speeds"]] == [f"k_factor_rf=4,nprobe={n}" for n in (1, 2, 3)]
    assert found["speeds"][-1]["recall"] == pytest.approx(1.0, abs=0.01)


def test_too_few_passages_to_measure_are_refused(folder: Location, tmp_path: Path) -> None:
    save(folder, [unit_vectors(10)])
    result = check(folder)
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "10 passages are too few to retrieve 10" in result.stderr


def test_missing_index_is_bad_usage(tmp_path: Path) -> None:
    result = check(tmp_path)
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "no index here" in result.stderr


def test_quantized_index_is_checked_against_the_encoder(small_corpus: Path, tmp_path: Path) -> None:
    from pipeline.config.sections import StorageConfig
    from pipeline.decoding.prompts import format_passage
    from pipeline.retrieval.encoder import Encoder
    from pipeline.retrieval.manifest import EncoderEntry, IndexManifest, write_manifest
    from pipeline.retrieval.shard_files import build_shard, create_empty_index
    from pipeline.storage.location import locate

    rows = pq.read_table(small_corpus).slice(0, 30)
    encoder = Encoder.load("demo", "cpu")
    vectors = encoder.encode([format_passage(row["title"], row["text"]) for row in rows.to_pylist()])
    template = create_empty_index("SQ4", 384)
    template.train(vectors)
    folder = locate(str(tmp_path / "index"), StorageConfig())
    batch = pa.record_batch([rows[name].combine_chunks() for name in ("id", "title", "text")], ["id", "title", "text"])
    entry = build_shard(folder, 0, template, [(batch, vectors)])
    write_manifest(
        folder,
        IndexManifest(encoder=EncoderEntry.of(encoder), dimension=384, factory="SQ4", passages=30, shards=(entry,)),
    )
    pq.write_table(pa.table({"id": ["1", "2"], "query": ["Who ruled?", "What is it?"]}), tmp_path / "q.parquet")
    options = ["--queries", str(tmp_path / "q.parquet"), "--k", "2", "--json"]
    found = json.loads(check(folder, *options).stdout)
    assert found["queries"] == 2
    assert found["reference"].startswith("the 20 best codes of each query, reranked")
    asked = encoder.encode_queries(["Who ruled?", "What is it?"])
    exact = np.argsort(-(asked @ vectors.T), axis=1)[:, :2]
    coded = template.search(asked, 2)[1]
    wanted = np.mean([len(set(a) & set(b)) / 2 for a, b in zip(exact.tolist(), coded.tolist(), strict=True)])
    assert found["speeds"][0]["recall"] == wanted


def test_deprecated_check_option_works_with_a_hint(probed: Location) -> None:
    app = typer.Typer()
    app.command()(build_index)
    result = CliRunner().invoke(app, ["--check", probed.uri, "--sample", "50", "--json"])
    assert result.exit_code == 0, result.output
    assert (
        "build_index --check INDEX is deprecated and will be removed in version 0.3; use: check_index" in result.stderr
    )
    assert json.loads(result.stdout)["queries"] == 50


@pytest.fixture(scope="module")
def three_topics(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An index of three passages, and queries of which two name the passage to find."""
    folder = tmp_path_factory.mktemp("topics")
    texts = ["Rollo led the Normans.", "Sharks swim in the sea.", "Gold is a heavy metal."]
    encoder = Encoder.load("demo", "cpu")
    passages = pa.record_batch([["a", "b", "c"], [""] * 3, texts], schema=PASSAGE_SCHEMA)
    index = create_empty_index("Flat", encoder.dimension)
    shard = build_shard(place(folder / "index"), 0, index, [(passages, encoder.encode(texts))])
    entry = EncoderEntry.of(encoder)
    manifest = IndexManifest(encoder=entry, dimension=encoder.dimension, factory="Flat", passages=3, shards=(shard,))
    write_manifest(place(folder / "index"), manifest)
    queries = {"id": ["1", "2", "3"], "query": ["Who led the Normans?", "What swims?", "What?"]}
    pq.write_table(pa.table({**queries, "gold_passage_id": ["a", "b", None]}), folder / "queries.parquet")
    return folder / "index", folder / "queries.parquet"


def test_gold_passages_are_found_with_and_without_the_reranker(three_topics: tuple[Path, Path], tmp_path: Path) -> None:
    index, queries = three_topics
    reranker = f"retrieval.rerank.model={write_cross_encoder(tmp_path / 'tiny')}"
    options = ["--queries", str(queries), "--k", "2", "--set", reranker, "--set", "retrieval.rerank.candidates=3"]
    found = json.loads(check(index, *options, "--json").stdout)
    assert found["golds"] == 2
    assert [way["way"] for way in found["gold"]] == ["dense", "dense, the best 3 reranked (cpu)"]
    assert found["gold"][0]["recall"] == {"1": 1.0, "2": 1.0}
    shown = check(index, *options)
    assert shown.exit_code == 0, shown.output
    assert "gold passages of 2 queries" in shown.stdout
    alone = json.loads(check(index, "--queries", str(queries), "--k", "2", "--json").stdout)
    assert [way["way"] for way in alone["gold"]] == ["dense"]


def test_reranker_is_left_out_without_gold_passages(three_topics: tuple[Path, Path], tmp_path: Path, caplog) -> None:
    index, _ = three_topics
    reranker = f"retrieval.rerank.model={write_cross_encoder(tmp_path / 'tiny')}"
    result = check(index, "--k", "2", "--set", reranker, "--json")
    assert (result.exit_code, json.loads(result.stdout)["gold"]) == (0, [])
    assert "retrieval.rerank is not measured: this takes --queries with the column gold_passage_id" in caplog.text


def test_model_that_is_no_reranker_is_refused_before_the_index_is_read(tmp_path: Path) -> None:
    result = check(tmp_path / "nothing", "--set", f"retrieval.rerank.model={build_demo_encoder()}")
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "not a cross-encoder with one score" in result.stderr


def test_gold_passages_of_another_type_are_named(three_topics: tuple[Path, Path], tmp_path: Path) -> None:
    queries = tmp_path / "queries.parquet"
    pq.write_table(pa.table({"query": ["Who?"], "gold_passage_id": [["a", "b"]]}), queries)
    result = check(three_topics[0], "--k", "2", "--queries", str(queries))
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "queries.parquet: column gold_passage_id is of the type list<" in result.stderr
