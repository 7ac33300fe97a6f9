import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config.sections import StorageConfig
from pipeline.queries.converters import ColumnMapping
from pipeline.queries.source_rows import SourceBatch, SourceRow
from pipeline.queries.sources import SourceRequest, open_source
from tests.support.s3 import S3Server

EVERY_COLUMN = ColumnMapping({"query": "q", "answers": "n", "choices": "x", "task": "label", "input": "dt"})


def source(uri: object, mapping: ColumnMapping = EVERY_COLUMN, **options: str) -> Iterator[SourceBatch]:
    return open_source(SourceRequest(str(uri), **options), StorageConfig(), mapping)


def read(batches: Iterator[SourceBatch]) -> list[SourceRow]:
    return [row for batch in batches for row in batch.read_rows(EVERY_COLUMN)]


def rows(uri: object, **options: str) -> list[dict[str, Any]]:
    found = read(source(uri, EVERY_COLUMN, **options))
    assert not any(row.problem for row in found)
    return [dict(row.values) for row in found]


def lines(file: Path, *values: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{json.dumps(value)}\n" for value in values))
    return file


TEXT_FILES: dict[str, Callable[[Path], object]] = {
    "a.jsonl": lambda f: f.write_text('{"q": "é", "n": "1"}\n\n{"q": "b", "n": "2"}'),
    "b.json": lambda f: f.write_text('[{"q": "é", "n": "1"},\n {"q": "b", "n": "2"}]'),
    "c.json": lambda f: f.write_text('{"q": "é", "n": "1"}\n{"q": "b", "n": "2"}\n'),
    "d.csv": lambda f: f.write_text('q,n\né,1\n"b",2\n', encoding="utf-8-sig"),
    "e.tsv": lambda f: f.write_text("q\tn\né\t1\nb\t2\n"),
    "f.jsonl.gz": lambda f: f.write_bytes(gzip.compress('{"q": "é", "n": "1"}\n{"q": "b", "n": "2"}\n'.encode())),
    "g.parquet": lambda f: pq.write_table(pa.table({"q": ["é", "b"], "n": ["1", "2"]}), f),
}


@pytest.mark.parametrize("name", TEXT_FILES)
def test_all_text_file_types_are_read(name: str, tmp_path: Path) -> None:
    TEXT_FILES[name](tmp_path / name)
    assert rows(tmp_path / name) == [{"q": "é", "n": "1"}, {"q": "b", "n": "2"}]


def test_parquet_of_any_name_is_read_and_other_files_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a.PARQUET", "b.pq", "c"):
        pq.write_table(pa.table({"q": [name]}), tmp_path / name)
    (tmp_path / "notes.txt").write_text("q")
    assert [row["q"] for row in rows(tmp_path)] == ["a.PARQUET", "b.pq", "c"]
    assert "1 files are not read (notes.txt)" in caplog.text


def test_folder_is_read_in_file_order_without_other_file_types(tmp_path: Path) -> None:
    lines(tmp_path / "b.jsonl", {"q": "second"})
    lines(tmp_path / "a" / "one.jsonl", {"q": "first"})
    (tmp_path / "LICENSE.md").write_text("mine")
    found = read(source(tmp_path))
    assert [(row.place, row.values["q"]) for row in found] == [
        (f"{tmp_path}/a/one.jsonl row 0", "first"),
        (f"{tmp_path}/b.jsonl row 0", "second"),
    ]


def test_files_are_read_from_object_storage(tmp_path: Path, s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    for name, write in TEXT_FILES.items():
        write(tmp_path / name)
        with s3.filesystem().open_output_stream(f"{s3.bucket}/sources/{name}", compression=None) as stream:
            stream.write((tmp_path / name).read_bytes())
    assert rows(f"s3://{s3.bucket}/sources") == rows(tmp_path)
    assert len(rows(tmp_path)) == 2 * len(TEXT_FILES)


def test_parquet_keeps_its_types(tmp_path: Path) -> None:
    pq.write_table(pa.table({"n": pa.array([1], pa.int32())}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"n": pa.array([2], pa.int16()), "x": ["y"]}), tmp_path / "b.parquet")
    assert rows(tmp_path) == [{"n": 1}, {"n": 2, "x": "y"}]


@pytest.mark.parametrize(
    ("name", "content", "row", "problem"),
    [
        ("a.jsonl", b'{"q": 1}\n{"q": \n', 1, "not JSON"),
        ("a.jsonl", b'{"q": 1}\n["q"]\n', 1, "expected a JSON object, found list"),
        ("a.jsonl", b'{"q": 1}\n{"q": "\xe9"}\n', 1, "not JSON: 'utf-8' codec"),
        ("a.json", b'[{"q": 1}, 3]', 1, "expected a JSON object, found int"),
        ("a.csv", b"q,n\na,1\nb\n", 1, "1 cells, but the header has 2"),
        ("a.csv", b"q,n\na,1\n\xe9,2\n", 1, "not UTF-8"),
    ],
)
def test_unreadable_rows_are_reported_and_others_are_read(
    name: str, content: bytes, row: int, problem: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    good, bad = read(source(tmp_path / name))
    assert good.problem is None
    assert bad == SourceRow(f"{tmp_path}/{name} row {row}", {}, bad.problem)
    assert problem in str(bad.problem)


def test_invalid_utf8_in_parquet_is_reported(tmp_path: Path) -> None:
    column = pa.array([b"a", b"caf\xe9"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"q": column}), tmp_path / "a.parquet")
    good, bad = read(source(tmp_path / "a.parquet"))
    assert good.values == {"q": "a"}
    assert bad.place.endswith("a.parquet row 1")
    assert bad.problem == "column 'q' is not valid: Invalid UTF8 sequence at string index 0"


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.jsonl.gz", gzip.compress(b'{"q": 1}\n' * 1000, mtime=0)[:-9], "a.jsonl.gz: cannot be read"),
        ("a.jsonl.gz", b'{"q": 1}', "a.jsonl.gz: cannot be read: Not a gzipped file"),
        ("a.csv", b"q,q\n1,2\n", "a.csv: every column in the header .* needs a unique name"),
        ("a.parquet", b"PAR1", "a.parquet: not a readable Parquet file"),
        (
            "a.txt",
            b"q",
            "no files to import; supported are Parquet, .jsonl, .ndjson, .json, .csv, .tsv, text also",
        ),
    ],
)
def test_unreadable_file_is_named(name: str, content: bytes, problem: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=problem):
        rows(tmp_path / name)


def test_parquet_files_with_incompatible_schemas_are_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"n": [1]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"n": ["1"]}), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match="b.parquet: column 'n' is string, not int64 as in .*a.parquet; .* --drop n"):
        source(tmp_path, ColumnMapping())
    assert rows(tmp_path) == [{"n": 1}, {"n": "1"}]


def test_missing_source_is_refused_with_a_hint(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"not found \(a dataset on the Hugging Face hub is written hf:OWNER/NAME\)"):
        source(tmp_path / "PopQA")


def test_split_is_refused_for_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--split is for Hugging Face datasets"):
        source(lines(tmp_path / "a.jsonl", {"q": 1}), split="test")


@pytest.fixture
def hub_folder(tmp_path: Path) -> Path:
    """A folder as the hub has it."""
    lines(tmp_path / "hub" / "test.jsonl", *({"q": f"t{n}"} for n in range(2000)))
    lines(tmp_path / "hub" / "train.jsonl", {"q": "r"})
    return tmp_path / "hub"


def test_dataset_is_streamed_from_its_split(hub_folder: Path) -> None:
    found = read(source(f"hf:{hub_folder}", split="test"))
    assert [row.values["q"] for row in found] == [f"t{n}" for n in range(2000)]
    assert found[1999].place == f"hf:{hub_folder} row 1999"


def test_split_must_be_chosen_among_several(hub_folder: Path) -> None:
    with pytest.raises(ValueError, match="several splits; choose one with --split: train, test"):
        source(f"hf:{hub_folder}")
    with pytest.raises(ValueError, match="no split 'dev'; choose one with --split: train, test"):
        source(f"hf:{hub_folder}", split="dev")
    (hub_folder / "train.jsonl").unlink()
    assert len(rows(f"hf:{hub_folder}")) == 2000


def test_configuration_is_chosen_by_name(tmp_path: Path) -> None:
    card = "configs:\n- config_name: easy\n  data_files: easy.jsonl\n- config_name: hard\n  data_files: hard.jsonl\n"
    for name in ("easy", "hard"):
        lines(tmp_path / f"{name}.jsonl", {"q": name})
    (tmp_path / "README.md").write_text(f"---\n{card}---\n")
    assert rows(f"hf:{tmp_path}", name="hard") == [{"q": "hard"}]
    with pytest.raises(ValueError, match=rf"hf:{tmp_path}: .*easy.*hard"):
        source(f"hf:{tmp_path}")


def test_damaged_dataset_gives_one_line(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"q": "a"}\n{bad\n')
    with pytest.raises(ValueError, match=f"hf:{tmp_path}: .*JSON") as caught:
        rows(f"hf:{tmp_path}")
    assert "\n" not in str(caught.value)


def saved(folder: Path) -> datasets.Dataset:
    features = datasets.Features(
        {
            "q": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["false", "true"]),
            "n": datasets.Value("int8"),
        }
    )
    columns = {"q": ["a", "b", "c"], "label": [1, 0, -1], "n": [1, 2, None]}
    dataset = datasets.Dataset.from_dict(columns, features=features)
    dataset.save_to_disk(folder)
    return dataset


def test_saved_dataset_is_read_with_class_names(tmp_path: Path) -> None:
    saved(tmp_path / "one")
    assert rows(tmp_path / "one") == [
        {"q": "a", "label": "true", "n": 1},
        {"q": "b", "label": "false", "n": 2},
        {"q": "c", "label": None, "n": None},
    ]
    datasets.DatasetDict({"dev": saved(tmp_path / "one")}).save_to_disk(tmp_path / "several")
    assert rows(tmp_path / "several", split="dev") == rows(tmp_path / "one")
    with pytest.raises(ValueError, match="neither --name nor --revision"):
        source(tmp_path / "one", name="easy")
    with pytest.raises(ValueError, match="no split 'test'"):
        source(tmp_path / "one", split="test")


@pytest.mark.parametrize("form", ["file://{}", "file:{}", "file://localhost{}"])
def test_saved_dataset_is_found_by_its_file_uri(tmp_path: Path, form: str) -> None:
    saved(tmp_path / "my set")
    assert rows(form.format(f"{tmp_path}/my%20set")) == rows(tmp_path / "my set")
