"""How many answers of a set are others than in an earlier one, in bounded memory however many rows there are."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa

# Rows of each set that are compared, at 16 bytes a row; of larger sets, a sample of their ids.
MOST_COMPARED = 4_000_000


@dataclass(frozen=True, eq=False)
class Answers:
    """Hashes of ids and answers, uint64 [N] each.

    Equal texts have equal ones; that any two of four million others have is less likely than one in a million.
    """

    ids: npt.NDArray[np.uint64]
    answers: npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Changes:
    """Answers beside those of an earlier set.

    Attributes:
        shared: ids that both have answered, of those that were compared.
        changed: of them with another answer.
        sample: one id in how many was compared.
    """

    shared: int
    changed: int
    sample: int


def sample_of(*manifests: Mapping[str, Any]) -> int:
    """One id in how many is compared: every one in sets of up to ``MOST_COMPARED`` rows."""
    rows: int = max(manifest.get("queries", {}).get("rows", 0) for manifest in manifests)
    return max(1, -(-rows // MOST_COMPARED))


def hashed(ids: pa.ChunkedArray, answers: pa.ChunkedArray, sample: int) -> Answers:
    """Ids and answers of some rows, those of the sample: which ids are in it follows from the ids alone."""
    names = _hashes(ids)
    chosen = names % np.uint64(sample) == 0
    return Answers(names[chosen], _hashes(answers)[chosen])


def _hashes(texts: pa.ChunkedArray) -> npt.NDArray[np.uint64]:
    values = texts.cast(pa.string()).fill_null("").to_numpy(zero_copy_only=False)
    return np.asarray(pd.util.hash_array(np.asarray(values, object), categorize=False), np.uint64)


def changes(ours: Sequence[Answers], theirs: Sequence[Answers], sample: int) -> Changes:
    """Compare the answers of all units of two sets, by id."""
    now, before = _together(ours), _together(theirs)
    _, mine, other = np.intersect1d(now.ids, before.ids, assume_unique=True, return_indices=True)
    return Changes(len(mine), int((now.answers[mine] != before.answers[other]).sum()), sample)


def _together(parts: Sequence[Answers]) -> Answers:
    nothing = np.array([], np.uint64)
    ids, answers = [part.ids for part in parts], [part.answers for part in parts]
    return Answers(np.concatenate([nothing, *ids]), np.concatenate([nothing, *answers]))
