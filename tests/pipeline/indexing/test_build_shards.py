import re
from pathlib import Path

import pytest

from pipeline.indexing.build import BuildFolder
from pipeline.retrieval.manifest import ShardEntry
from tests.support.indexes import place, save, unit_vectors


def make_shards(folder: Path) -> tuple[ShardEntry, ...]:
    return save(place(folder), [unit_vectors(5), unit_vectors(6)]).shards


@pytest.mark.parametrize("name", ["shard-00000.faiss", "shard-00001.passages.arrow"])
@pytest.mark.parametrize("size", [None, 0, 7])
def test_missing_and_other_files_of_shards_are_named(tmp_path: Path, name: str, size: int | None) -> None:
    entries = make_shards(tmp_path)
    BuildFolder(place(tmp_path)).check_shards(entries)
    whole = (tmp_path / name).stat().st_size
    (tmp_path / name).unlink()
    if size is not None:
        (tmp_path / name).write_bytes(b"x" * size)
    problem = (
        f"output {tmp_path}: {name} was built with {whole} bytes, but has {size or 'none'} here; use a folder that"
    )
    with pytest.raises(RuntimeError, match=re.escape(problem)):
        BuildFolder(place(tmp_path)).check_shards(entries)
