import datetime as dt
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.indexing.form import PassageForm
from pipeline.indexing.passages import check_passages, find_metadata_types, find_passages, read_passages
from tests.support.indexes import place

IDS, TEXTS = ["1", "2"], ["x", "y"]
MARCO = {"id": "docid", "text": "segment"}


def read(folder: Path, **options: Any) -> list[tuple[str, str, str]]:
    form = PassageForm(**options)
    files = find_passages(place(folder), form)
    check_passages(files, form)
    return [tuple(row.values()) for batch in read_passages(files, form) for row in batch.passages.to_pylist()]


def write(folder: Path, columns: dict[str, Any], name: str = "a") -> None:
    pq.write_table(pa.table(columns), folder / f"{name}.parquet")


@pytest.mark.parametrize(
    ("title", "read_as"),
    [
        (["t", None], ["t", ""]),
        (["", "u"], ["", "u"]),
        (pa.array(["t", "u"], pa.large_string()), ["t", "u"]),
        (pa.array(["t", None], pa.string_view()), ["t", ""]),
        (pa.array(["t", "t"]).dictionary_encode(), ["t", "t"]),
        (pa.array(["t", None], pa.large_string()).dictionary_encode(), ["t", ""]),
        (pa.nulls(2), ["", ""]),
        (pa.nulls(2, pa.string()), ["", ""]),
    ],
)
def test_titles_may_be_of_any_string_type_or_null(tmp_path: Path, title: Any, read_as: list[str]) -> None:
    write(tmp_path, {"id": IDS, "title": title, "text": TEXTS})
    assert read(tmp_path) == [("1", read_as[0], "x"), ("2", read_as[1], "y")]


@pytest.mark.parametrize(
    ("ids", "read_as"),
    [
        ([7, 10], ["7", "10"]),
        (pa.array([0, 255], pa.uint8()), ["0", "255"]),
        (pa.array([1, 2**64 - 1], pa.uint64()), ["1", str(2**64 - 1)]),
        ([-1, 1], ["-1", "1"]),
        (pa.array(["a", "b"], pa.large_string()), ["a", "b"]),
        (pa.array(["a", "b"], pa.string_view()), ["a", "b"]),
        (pa.array(["a", "b"]).dictionary_encode(), ["a", "b"]),
    ],
)
def test_ids_may_be_strings_or_integers(tmp_path: Path, ids: Any, read_as: list[str]) -> None:
    write(tmp_path, {"id": ids, "title": ["t", "t"], "text": TEXTS})
    assert read(tmp_path) == [(read_as[0], "t", "x"), (read_as[1], "t", "y")]


@pytest.mark.parametrize(
    ("table", "columns", "expected"),
    [
        ({"id": IDS, "contents": TEXTS}, {"text": "contents"}, ("1", "", "x")),
        ({"docid": IDS, "title": ["t", "u"], "segment": TEXTS}, MARCO, ("1", "t", "x")),
        ({"_id": IDS, "title": ["t", "u"], "text": TEXTS}, {"id": "_id"}, ("1", "t", "x")),
        ({"id": IDS, "text": TEXTS, "heading": ["h", None]}, {"title": "heading"}, ("1", "h", "x")),
        ({"id": IDS, "title": ["t", "u"], "text": TEXTS, "body": ["b", "c"]}, {"text": "body"}, ("1", "t", "b")),
        ({"id": IDS, "title": ["t", "u"]}, {"text": "title"}, ("1", "", "t")),
        ({"id": IDS, "doc.text": TEXTS}, {"text": "doc.text"}, ("1", "", "x")),
        ({"id": IDS, "text": ["a", "b"], "title": TEXTS}, {"text": "title", "title": "text"}, ("1", "a", "x")),
        ({"text": TEXTS}, {"id": "text", "text": "text"}, ("x", "", "x")),
    ],
)
def test_mapped_columns_are_read(
    tmp_path: Path, table: dict[str, Any], columns: dict[str, str], expected: tuple[str, str, str]
) -> None:
    write(tmp_path, table)
    assert read(tmp_path, columns=columns)[0] == expected


def test_files_may_differ_in_schema(tmp_path: Path) -> None:
    write(tmp_path, {"id": ["a"], "title": ["t"], "text": ["x"], "more": [1.5]}, "1")
    write(tmp_path, {"text": pa.array(["y"], pa.large_string()), "id": [2], "title": pa.nulls(1)}, "2")
    write(tmp_path, {"id": pa.array(["c"]).dictionary_encode(), "text": ["z"]}, "3")
    write(tmp_path, {"id": [], "text": pa.array([], pa.string())} | {"id": pa.array([], pa.int64())}, "4")
    assert read(tmp_path) == [("a", "t", "x"), ("2", "", "y"), ("c", "", "z")]


def test_integer_and_text_ids_are_compared_as_text(tmp_path: Path) -> None:
    write(tmp_path, {"id": ["7"], "title": ["t"], "text": ["x"]}, "1")
    write(tmp_path, {"id": [6, 7], "title": ["t", "u"], "text": ["x", "y"]}, "2")
    with pytest.raises(ValueError, match=r"2.parquet: row 1: column id: '7' is also in .*1.parquet: row 0; ids must"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("columns", "warned"),
    [
        ({"id": IDS, "text": TEXTS}, True),
        ({"id": IDS, "text": TEXTS, "Title": ["t", "u"]}, True),
        ({"id": IDS, "text": TEXTS, "title": pa.nulls(2)}, False),
    ],
)
def test_passages_without_titles_are_read_with_a_warning(
    tmp_path: Path, columns: dict[str, Any], warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, columns)
    assert read(tmp_path) == [("1", "", "x"), ("2", "", "y")]
    assert ("no file has titles; if another column holds them, pass --column title=COLUMN" in caplog.text) is warned


@pytest.mark.parametrize(
    ("table", "columns", "problem"),
    [
        ({"id": IDS, "contents": TEXTS}, {}, r"a.parquet: no column text, found id, contents; .*text=COLUMN"),
        ({"text": TEXTS}, {}, r"no column id, found text; name another with --column id=COLUMN"),
        ({"id": IDS, "text": TEXTS}, {"text": "body"}, r"no column body, found id, text; name another"),
        ({"id": IDS, "text": TEXTS}, {"title": "head"}, r"no file has the column head of --column title"),
        (
            {"id": IDS, "text": TEXTS},
            {"text": "id"},
            r"no column id, found id, text; name another .*--column id=",
        ),
        ({"id": [1.0, 2.0], "text": TEXTS}, {}, r"column id is double; convert it to string"),
        ({"id": [True, False], "text": TEXTS}, {}, r"column id is bool; convert it to string"),
        ({"id": pa.nulls(2), "text": TEXTS}, {}, r"column id is null; convert it to string"),
        ({"id": IDS, "text": pa.nulls(2)}, {}, r"column text is null; convert it to string"),
        ({"id": IDS, "text": [["x"], ["y"]]}, {}, r"column text is list<.*>; convert it to string"),
        ({"id": IDS, "text": [b"x", b"y"]}, {}, r"column text is binary; convert it to string"),
        ({"id": IDS, "text": TEXTS, "title": [1, 2]}, {}, r"column title is int64; convert it to string"),
        (
            {"docid": [1, None], "text": TEXTS},
            {"id": "docid"},
            r"row 1: column docid is null; give every passage an id",
        ),
        ({"id": IDS, "body": ["x", " "]}, {"text": "body"}, r"row 1: column body is empty; give every passage an id"),
    ],
)
def test_unusable_columns_are_named(
    tmp_path: Path, table: dict[str, Any], columns: dict[str, str], problem: str
) -> None:
    write(tmp_path, table)
    with pytest.raises(ValueError, match=problem):
        read(tmp_path, columns=columns)


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
@pytest.mark.parametrize("wrong", ["id", "title", "text"])
def test_value_that_is_not_utf8_is_named(tmp_path: Path, wrong: str, kind: pa.DataType) -> None:
    binary = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary()}[kind]
    latin = pa.Array.from_buffers(kind, 3, pa.array([b"a", b"caf\xe9", b"\xe9"], binary).buffers())
    write(tmp_path, {name: ["x", "y", "z"] for name in ("id", "title", "text")} | {wrong: latin})
    with pytest.raises(ValueError, match=rf"a.parquet: row 1: column {wrong} is not UTF-8; convert it to UTF-8$"):
        read(tmp_path)


def test_repeated_column_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table([IDS, TEXTS, TEXTS], names=["id", "text", "text"]), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a.parquet: several columns are named text; rename all but one"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"columns": {"Text": "body"}}, r"--column Text=…: passages have the columns id, title, text"),
        ({"columns": {"vector": "v"}}, r"--column vector=…: passages have the columns id, title, text"),
        ({"embeddings": "v", "max_words": 9}, r"--max-words 9: the vectors of --embeddings v are those of whole pas"),
    ],
)
def test_unusable_options_are_refused(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        PassageForm(**options)


FURTHER = {
    "year": pa.array([2020, None], pa.int16()),
    "kind": pa.array(["a", "b"]).dictionary_encode(),
    "tags": [["x"], []],
    "day": pa.array([dt.date(2020, 1, 1), None]),
    "unread": [[1], [2]],
}


def test_further_columns_are_kept(tmp_path: Path) -> None:
    write(tmp_path, {"id": IDS, "text": ["One two. Three.", "x"], **FURTHER})
    form = PassageForm(metadata=("tags", "year", "kind", "day"), max_words=2)
    files = find_passages(place(tmp_path), form)
    check_passages(files, form)
    assert find_metadata_types(files, form) == {"tags": "strings", "year": "integer", "kind": "string", "day": "date"}
    (batch,) = read_passages(files, form)
    assert batch.passages.schema.names == ["id", "title", "text", "tags", "year", "kind", "day"]
    assert batch.passages.schema.field("year").type == pa.int64()
    day = dt.date(2020, 1, 1)
    assert [tuple(row.values()) for row in batch.passages.to_pylist()] == [
        ("1#1", "", "One two.", ["x"], 2020, "a", day),
        ("1#2", "", "Three.", ["x"], 2020, "a", day),
        ("2", "", "x", [], None, "b", None),
    ]


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ("unread", r"a\.parquet: column unread is list<element: int64>; --metadata keeps strings, integers, numbers"),
        ("pages", r"a\.parquet: no column pages \(--metadata\), found id, text, year"),
    ],
)
def test_further_columns_that_cannot_be_kept_are_named(tmp_path: Path, column: str, message: str) -> None:
    write(tmp_path, {"id": IDS, "text": TEXTS, **FURTHER})
    with pytest.raises(ValueError, match=message):
        find_passages(place(tmp_path), PassageForm(metadata=("year", column)))


@pytest.mark.parametrize("names", [("text",), ("Title",), ("year", "YEAR")])
def test_names_of_further_columns_are_unique(names: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="the index has a column of this name; rename it"):
        PassageForm(metadata=names)


def test_further_column_of_two_types_is_named(tmp_path: Path) -> None:
    write(tmp_path, {"id": ["1"], "text": ["x"], "year": [2020]})
    write(tmp_path, {"id": ["2"], "text": ["y"], "year": ["2020"]}, "b")
    form = PassageForm(metadata=("year",))
    with pytest.raises(ValueError, match=r"b\.parquet: column year holds string, but integer in .*a\.parquet"):
        find_metadata_types(find_passages(place(tmp_path), form), form)


def test_further_column_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    wrong = pa.array([b"ok", b"caf\xe9"], pa.binary()).view(pa.string())
    write(tmp_path, {"id": IDS, "text": TEXTS, "kind": wrong})
    form = PassageForm(metadata=("kind",))
    with pytest.raises(ValueError, match=r"a\.parquet: row 1: column kind is not UTF-8"):
        check_passages(find_passages(place(tmp_path), form), form)


def test_integer_that_does_not_fit_is_named(tmp_path: Path) -> None:
    write(tmp_path, {"id": IDS, "text": TEXTS, "size": pa.array([1, 2**64 - 1], pa.uint64())})
    form = PassageForm(metadata=("size",))
    with pytest.raises(ValueError, match=r"a\.parquet: rows 0 to 1: Integer value 18446744073709551615 not in range"):
        check_passages(find_passages(place(tmp_path), form), form)
