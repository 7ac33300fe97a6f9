"""Bad input: one clear line that names the culprit, exit status 2, no engine, and nothing written; or an error row."""

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer
from typer.testing import CliRunner

from jobs.annotate import annotate as command
from tests.support.s3 import S3Server

APP = typer.Typer()
APP.command()(command)
NOT_UTF8 = b"caf\xe9 \xed\xa0\x80"  # Latin-1, and a lone surrogate


@dataclass
class Case:
    """A call of the command that a case spoils.

    Attributes:
        index: a good one.
        base: a model without reflection tokens.
    """

    folder: Path
    options: dict[str, str]
    index: Path
    base: Path
    s3: S3Server
    settings: list[str] = field(default_factory=lambda: ["decoding.mode=never"])
    environment: dict[str, str] = field(default_factory=dict)

    def call(self) -> Any:
        words = [word for pair in self.options.items() for word in pair]
        words += [word for setting in self.settings for word in ("--set", setting)]
        return CliRunner().invoke(APP, words, env=self.environment)

    def write(self, name: str = "queries.parquet", /, **columns: Any) -> Path:
        """A query file that the call reads, alone or with its neighbors."""
        file = self.folder / "bad" / name
        file.parent.mkdir(exist_ok=True)
        pq.write_table(pa.table(columns), file)
        self.options["--queries"] = str(file.parent)
        return file

    def damage(self, name: str, change: Callable[[bytes], bytes | None]) -> None:
        """Read a copy of the index in which one file is changed, or missing."""
        folder = self.folder / "index"
        folder.mkdir()
        for file in self.index.iterdir():
            os.link(file, folder / file.name)
        content = change((folder / name).read_bytes())
        (folder / name).unlink()
        if content is not None:
            (folder / name).write_bytes(content)
        self.options["--index"] = str(folder)
        self.settings = ["decoding.mode=always"]

    def manifest(self, change: Callable[[dict], object]) -> None:
        """Read a copy of the index whose manifest is changed."""

        def changed(content: bytes) -> bytes:
            manifest = json.loads(content)
            change(manifest)
            return json.dumps(manifest).encode()

        self.damage("index.json", changed)

    def yaml(self, text: str) -> None:
        """Read a configuration file."""
        (self.folder / "run.yaml").write_text(text)
        self.options["--config"] = str(self.folder / "run.yaml")

    def set(self, *settings: str) -> None:
        """Read these settings."""
        self.settings += settings

    def use(self, **options: object) -> None:
        """Give these options."""
        self.options |= {f"--{name}": str(value) for name, value in options.items()}


@pytest.fixture
def case(tmp_path: Path, demo_model: Path, small_index: Path, s3: S3Server) -> Case:
    from pipeline.demo_models import build_demo_base_model

    pq.write_table(pa.table({"id": ["a", "b"], "query": ["Who?", "What?"]}), tmp_path / "queries.parquet")
    options = {"--queries": tmp_path / "queries.parquet", "--output": tmp_path / "out", "--model": demo_model}
    texts = {name: str(value) for name, value in options.items()}
    return Case(tmp_path, texts, small_index, build_demo_base_model(), s3)


def text(values: list[bytes]) -> pa.Array:
    """Strings of any bytes, as other writers leave them."""
    return pa.array(values, pa.binary()).view(pa.string())


def cut(content: bytes) -> bytes:
    return content[:-100]


def garble(file: Path, part: slice) -> None:
    content = bytearray(file.read_bytes())
    content[part] = bytes(byte ^ 0xFF for byte in content[part])
    file.write_bytes(content)


def query_page(file: Path) -> slice:
    """Some bytes of the queries' own page."""
    column = pq.read_metadata(file).row_group(0).column(1)
    return slice(column.data_page_offset + 20, column.data_page_offset + column.total_compressed_size - 10)


ONE = {"id": ["a"], "query": ["Who?"]}
NONE = {"id": pa.array([], pa.string()), "query": pa.array([], pa.string())}
SECOND = {"id": ["b"], "query": ["What?"]}

Spoil = Callable[[Case], object]
PARQUET: dict[str, tuple[Spoil, str]] = {
    "no query column": (lambda c: c.write(id=["a"], question=["?"]), "no column 'query'; it has id, question"),
    "no id column": (lambda c: c.write(query=["Who?"]), "no column 'id'; it has query"),
    "id is null": (lambda c: c.write(id=["a", None], query=["x", "y"]), "column 'id' is null in row 1"),
    "ids are integers": (lambda c: c.write(id=[1], query=["x"]), "column 'id' is int64, expected string"),
    "id is not UTF-8": (lambda c: c.write(id=text([b"a", NOT_UTF8]), query=["x", "y"]), "column 'id' is not UTF-8"),
    "id twice": (lambda c: c.write(id=["a", "b", "a"], query=["x", "y", "z"]), "id 'a' is not unique"),
    "id twice in two files": (
        lambda c: (c.write("one.parquet", **ONE), c.write("two.parquet", **ONE)),
        "id 'a' is not unique: .*one.parquet row 0, .*two.parquet row 0",
    ),
    "query is a list": (lambda c: c.write(id=["a"], query=[["x"]]), "column 'query' is list"),
    "query is bytes": (lambda c: c.write(id=["a"], query=[b"x"]), "column 'query' is binary, expected string"),
    "choices are a string": (lambda c: c.write(**ONE, choices=["A,B"]), "column 'choices' is string, expected list"),
    "passages are strings": (lambda c: c.write(**ONE, passages=[["text"]]), "column 'passages' is list"),
    "answers are a string": (lambda c: c.write(**ONE, answers=["Paris"]), "column 'answers' is string, expected list"),
    "task is a number": (lambda c: c.write(**ONE, task=[3]), "column 'task' is int64, expected string"),
    "output's names twice": (
        lambda c: c.write(**ONE, answer=["y"], input_answer=["z"]),
        "columns 'answer' and 'input_answer' would both be written as 'input_answer'",
    ),
    "output's names twice but for case": (
        lambda c: c.write(**ONE, Answer=["y"], answer=["z"]),
        "columns 'Answer' and 'answer' would both be written as 'input_Answer'",
    ),
    "a type that cannot be read": (
        lambda c: c.write(**ONE, tags=pa.array([["x"]], pa.large_list_view(pa.string()))),
        "column 'tags' is large_list_view<.*>, which pyarrow cannot read; use large_list",
    ),
    "no rows": (lambda c: c.write(**NONE), "the query set has no rows"),
    "one column twice": (
        lambda c: pq.write_table(pa.table([["a"], ["x"], ["1"], ["2"]], ["id", "query", "n", "n"]), c.write(**ONE)),
        "2 columns are named 'n'",
    ),
    "types drift": (
        lambda c: (c.write("one.parquet", **ONE, year=[1]), c.write("two.parquet", **SECOND, year=["1"])),
        "two.parquet: column 'year' is string, not int64 as in .*one.parquet; write all files with one schema",
    ),
    "columns drift": (
        lambda c: (c.write("one.parquet", **ONE, year=[1]), c.write("two.parquet", **SECOND)),
        "two.parquet: no column 'year', which .*one.parquet has; write all files with one schema",
    ),
    "empty file": (lambda c: c.write(**ONE).write_bytes(b""), "queries.parquet: not a readable Parquet file"),
    "not Parquet": (lambda c: c.write(**ONE).write_text("id,query\na,b\n"), "not a readable Parquet file"),
    "corrupt footer": (
        lambda c: garble(c.write(**ONE), slice(-60, -8)),
        "queries.parquet: not a readable Parquet file",
    ),
    "truncated": (lambda c: (f := c.write(**ONE)).write_bytes(cut(f.read_bytes())), "not a readable Parquet file"),
    "corrupt ids": (lambda c: garble(c.write(**ONE), slice(4, 40)), "queries.parquet: not a readable"),
    "corrupt queries": (
        lambda c: garble(f := c.write(id=["a"], query=[" ".join(map(str, range(3000)))]), query_page(f)),
        "queries.parquet: not a readable Parquet file",
    ),
    "task is not UTF-8": (lambda c: c.write(**ONE, task=text([NOT_UTF8])), "queries.parquet: column 'task' is not UTF"),
    "missing file": (lambda c: c.use(queries=c.folder / "no.parquet"), "no.parquet: not found"),
    "no Parquet in it": (lambda c: ((c.folder / "e").mkdir(), c.use(queries=c.folder / "e")), "no Parquet files in it"),
}
CONFIGURATION: dict[str, tuple[Spoil, str]] = {
    "unknown key": (
        lambda c: c.set("decoding.treshold=0.3"),
        "unknown configuration key decoding.treshold; did you mean decoding.threshold?",
    ),
    "no value": (lambda c: c.set("decoding"), "expected KEY=VALUE"),
    "value is not YAML": (
        lambda c: c.set("storage.secret_key=*abc/def"),
        "--set storage.secret_key: the value",
    ),
    "wrong type": (lambda c: c.set("decoding.passages=many"), "configuration key decoding.passages: .* valid integer"),
    "threshold above 1": (lambda c: c.set("decoding.threshold=1.5"), "decoding.threshold: .* less than or equal to 1"),
    "negative weight": (lambda c: c.set("decoding.weights.support=-1"), "configuration key decoding.weights.support"),
    "weight is not a number": (lambda c: c.set("decoding.weights.support=.nan"), "key decoding.weights.support"),
    "no beam": (lambda c: c.set("decoding.beam_width=0"), "configuration key decoding.beam_width"),
    "no passages": (lambda c: c.set("decoding.passages=0"), "configuration key decoding.passages"),
    "unknown mode": (lambda c: c.set("decoding.mode=sometimes"), "configuration key decoding.mode"),
    "no patience": (lambda c: c.set("execution.row_timeout_s=0"), "configuration key execution.row_timeout_s"),
    "empty units": (lambda c: c.set("execution.unit_rows=0"), "configuration key execution.unit_rows"),
    "all may fail": (lambda c: c.set("execution.max_error_rate=2"), "configuration key execution.max_error_rate"),
    "unknown profile": (lambda c: c.set("task=popqua"), "task: no profile .popqua.; expected one of .*popqa"),
    "unknown engine argument": (lambda c: c.set("model.engine.tensor_paralel_size=2"), "tensor_paralel_size"),
    "unknown key in the file": (lambda c: c.yaml("decoding:\n  depth: 3\n"), "unknown .* key decoding.depth"),
    "file without keys": (lambda c: c.yaml("- decoding\n"), "run.yaml"),
    "file is not YAML": (lambda c: c.yaml("decoding: [\n"), "run.yaml"),
    "missing file": (lambda c: c.use(config=c.folder / "no.yaml"), "no.yaml"),
    "model without reflection tokens": (lambda c: c.use(model=c.base), "lacks 15 of 15 reflection tokens"),
    "missing model": (lambda c: c.use(model=c.folder / "no-model"), "its tokenizer cannot be loaded"),
    "missing adapter": (lambda c: c.set(f"model.lora={c.folder}"), "model.lora"),
}
INDEX: dict[str, tuple[Spoil, str]] = {
    "none": (lambda c: c.set("decoding.mode=adaptive"), "--index is missing"),
    "no manifest": (lambda c: (c.use(index=c.folder), c.set("decoding.mode=always")), "index.json is missing"),
    "manifest is not JSON": (lambda c: c.damage("index.json", cut), "index.json: "),
    "another version": (lambda c: c.manifest(lambda m: m.update(format_version=9)), "format_version.*found 9"),
    "missing shard": (lambda c: c.damage("shard-00001.faiss", lambda _: None), "shard-00001.faiss: missing"),
    "truncated shard": (lambda c: c.damage("shard-00000.faiss", cut), "shard-00000.faiss: has .* bytes, but"),
    "truncated passages": (lambda c: c.damage("shard-00000.passages.arrow", cut), "passages.arrow: has .* bytes, but"),
    "shard outside": (
        lambda c: c.manifest(lambda m: m["shards"][0].update(file="../../etc/passwd")),
        "index.json: key shards.0.file: string should match pattern",
    ),
    "shard above": (
        lambda c: c.manifest(lambda m: m["shards"][0].update(passages_file="..")),
        "index.json: key shards.0.passages_file: string should match pattern",
    ),
    "counts disagree": (lambda c: c.manifest(lambda m: m.update(passages=9)), "do not add up to 9 passages"),
    "another encoder": (
        lambda c: c.manifest(lambda m: m["encoder"].update(digest="0" * 64)),
        "is not the one that the index was built with",
    ),
}
STORAGE: dict[str, tuple[Spoil, str]] = {
    "no bucket to read": (
        lambda c: (c.use(queries="s3://no-such-bucket/q"), c.environment.update(c.s3.environment)),
        "s3://no-such-bucket/q",
    ),
    "no bucket to write": (
        lambda c: (c.use(output="s3://no-such-bucket/out"), c.environment.update(c.s3.environment)),
        "--output s3://no-such-bucket/out: the store has no bucket 'no-such-bucket'",
    ),
    "wrong credentials": (
        lambda c: (
            c.use(queries=f"s3://{c.s3.bucket}/q"),
            c.environment.update({**c.s3.environment, "AWS_SECRET_ACCESS_KEY": "wrong"}),
        ),
        "s3://bucket/q: ",
    ),
    "unknown scheme": (lambda c: c.use(queries="ftp://host/q.parquet"), "ftp://host/q.parquet"),
    "output is a file": (lambda c: c.use(output=c.folder / "queries.parquet"), "queries.parquet"),
    "output below a file": (lambda c: c.use(output=c.folder / "queries.parquet" / "out"), "queries.parquet"),
    "output in the input": (lambda c: c.use(output=c.write(**ONE).parent / "out"), "one contains the other"),
    "input in the output": (lambda c: c.use(output=c.write(**ONE).parent.parent), "one contains the other"),
    "output of something else": (
        lambda c: ((c.folder / "out").mkdir(), (c.folder / "out" / "thesis.txt").write_text("years of work")),
        "out contains files that are not part of an annotated set .*thesis.txt",
    ),
    "a set that no run has written": (
        lambda c: ((c.folder / "out").mkdir(), pq.write_table(pa.table(ONE), c.folder / "out" / "mine.parquet")),
        "out contains files that are not part of an annotated set .*mine.parquet",
    ),
}
REFUSED = {
    f"{kind}: {name}": how
    for kind, table in {"Parquet": PARQUET, "configuration": CONFIGURATION, "index": INDEX, "storage": STORAGE}.items()
    for name, how in table.items()
}


def state(folder: Path) -> dict[str, int]:
    """Every file below a folder, and when it was written."""
    return {str(file): file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_refused_in_one_line_before_anything_starts(
    name: str, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("pipeline.run.driver.connect")  # what would start Ray
    spoil, message = REFUSED[name]
    spoil(case)
    before = state(case.folder)
    result = case.call()
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert re.search(message, line), line
    assert "abc/def" not in line  # what stands after a key may be a secret
    assert state(case.folder) == before


def test_missing_configuration_key_is_named() -> None:
    result = CliRunner().invoke(APP, [])
    assert result.exit_code == 2
    assert "missing configuration key queries (flag --queries)" in result.stderr
