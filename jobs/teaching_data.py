"""The data of the commands that train models: options, the held-out part, and mined passages."""

import logging
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import typer

from pipeline.retrieval.encoder import ENCODERS
from pipeline.training.data import FEW_HELD_OUT, TeachingData, read_data
from pipeline.training.mining import mine_negatives
from pipeline.training.rows import Negatives

log = logging.getLogger(__name__)

# Maximum held-out reading rows: every run mines negatives for them.
HELD_OUT_ROWS = 300

Data = Annotated[Path, typer.Option(help="File of readings (.csv, .jsonl, .parquet), or folder with rc.jsonl.")]
MiningEncoder = Annotated[str, typer.Option(help="Encoder that mines hard negatives: name, folder or 'demo'.")]
Seed = Annotated[int, typer.Option(help="Random seed.")]


def sample_data(data: TeachingData, readings: int, pairs: int, seed: int) -> TeachingData:
    """Draw at most so many readings and pairs, since mining encodes each of them; keep all other rows."""
    rng = random.Random(seed)

    def draw(rows: tuple[Any, ...], n: int) -> tuple[Any, ...]:
        return rows if len(rows) <= n else tuple(rng.sample(rows, n))

    return TeachingData(draw(data.readings, readings), data.instructions, draw(data.pairs, pairs), data.claims)


@dataclass(frozen=True)
class DataPart:
    """A part of the data: the rows to use, and the pool that their wrong passages are drawn from."""

    rows: TeachingData
    pool: TeachingData


def mine_parts(encoder: str, *parts: DataPart) -> list[Negatives]:
    """Mine hard negatives for each part; the encoder's memory is freed afterwards."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(ENCODERS.obtain(encoder)))

    def encode(texts: Sequence[str]) -> npt.NDArray[np.float32]:
        return np.asarray(model.encode(list(texts), batch_size=32, normalize_embeddings=True), np.float32)

    return [mine_negatives(encode, part.rows, part.pool) for part in parts]


def list_command(job: str) -> list[str]:
    """Return the command line of this process, which runs ``job``, for a model card."""
    arguments = sys.argv[1:]
    if arguments and arguments[0].replace("-", "_") == job:
        return ["selfrag", *arguments]
    return ["python", "-m", f"jobs.{job}", *arguments]


def split_data(data: Path, readings: int, pairs: int, seed: int) -> tuple[DataPart, DataPart]:
    """Read the data and split it into a part to train on and a held-out part.

    Raises:
        ValueError: the data is wrong.
    """
    rows = read_data(data)
    train, test = rows.split(held_out=0.03, seed=20231017)
    few = len({row.passage for row in test.readings}) < FEW_HELD_OUT
    held_out = DataPart(sample_data(test, HELD_OUT_ROWS, 100, 0), rows if few else test)
    return DataPart(sample_data(train, readings, pairs, seed), train), held_out
