"""The answers of the demo's queries on a CPU, which a card's are compared with.

``python -m tests.gpu.cpu_answers`` makes the file anew, in some minutes on two cores.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pyarrow.dataset as ds
import pyarrow.parquet as pq

from jobs.demo import QUERIES, get_demo_index
from pipeline.demo_models import ADAPTER, LANGUAGE_MODEL, hash_adapter

FILE = Path(__file__).with_name("cpu_answers.json")
SETTINGS = ["execution.unit_rows=8"]
DECODING = {"passages": 3, "max_tokens": 40}


def first_queries(source: Path, rows: int | None, file: Path) -> Path:
    """Write the first rows of a query set, all of them where no number is given, without their tasks."""
    table = pq.read_table(source, columns=["id", "query"])
    pq.write_table(table if rows is None else table.slice(0, rows), file)
    return file


def make_record() -> dict[str, object]:
    """Describe what the answers were made with."""
    return {"adapter": hash_adapter(ADAPTER, LANGUAGE_MODEL), "decoding": DECODING, "dtype": "float32"}


def main() -> None:
    """Answer all queries on this machine's CPU and write the file."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        queries = first_queries(QUERIES, None, folder / "queries.parquet")
        command = [sys.executable, "-m", "jobs.annotate", "--queries", queries, "--index", get_demo_index()]
        command += ["--output", folder / "out", "--model", "demo", "--set", "execution.gpus_per_actor=0"]
        command += [w for s in SETTINGS for w in ("--set", s)]
        command += [w for key, value in DECODING.items() for w in ("--set", f"decoding.{key}={value}")]
        subprocess.run(list(map(str, command)), check=True)
        rows = ds.dataset(folder / "out" / "data").to_table(columns=["id", "retrieved", "answer"]).to_pylist()
    answers = {row["id"]: [row["retrieved"], row["answer"]] for row in sorted(rows, key=lambda row: row["id"])}
    FILE.write_text(json.dumps({**make_record(), "answers": answers}, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
