"""Files of training triples."""

import csv
from collections.abc import Iterable
from pathlib import Path


def write_triples(file: Path, rows: Iterable[tuple[str, str, str]]) -> Path:
    """Write a CSV file of questions, passages and answers."""
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["question", "passage", "answer"])
        writer.writerows(rows)
    return file
