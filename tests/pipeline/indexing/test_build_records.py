"""Records of built shards, which an interrupted build has left."""

import json
from pathlib import Path

import pytest

from pipeline.indexing.build import BuildFolder
from pipeline.indexing.passages import ShardPlan
from pipeline.retrieval.manifest import ShardEntry
from tests.support.indexes import place
from tests.support.names import EVIL_NAMES

PLANS = [ShardPlan(0, ()), ShardPlan(1, ())]
DIGEST = "d" * 64


def keep(folder: Path, number: int, **names: str) -> None:
    """Write two files of three bytes and the record of a shard, with other names."""
    file, passages = (f"shard-{number:05d}.{kind}" for kind in ("faiss", "passages.arrow"))
    for name in (file, passages):
        (folder / name).write_bytes(b"abc")
    entry = {"file": file, "passages_file": passages, "rows": 1, "bytes": 3, "sha256": DIGEST}
    record = {**entry, "passages_bytes": 3, "passages_sha256": DIGEST, **names}
    (folder / "_build").mkdir(exist_ok=True)
    (folder / "_build" / f"shard-{number:05d}.json").write_text(json.dumps(record))


def find(folder: Path) -> dict[int, ShardEntry]:
    return BuildFolder(place(folder)).find_finished(PLANS)


def test_recorded_shards_are_found(tmp_path: Path) -> None:
    keep(tmp_path, 1)
    assert list(find(tmp_path)) == [1]


@pytest.mark.parametrize("key", ["file", "passages_file"])
@pytest.mark.parametrize("name", EVIL_NAMES.values(), ids=EVIL_NAMES.keys())
def test_a_record_cannot_name_a_file_elsewhere(tmp_path: Path, key: str, name: str) -> None:
    keep(tmp_path, 0, **{key: name.format("shard-00000.faiss" if key == "file" else "shard-00000.passages.arrow")})
    with pytest.raises(ValueError, match=r"_build/shard-00000\.json: .*; delete it, and run the build again"):
        find(tmp_path)


def test_a_record_cannot_name_the_files_of_another_shard(tmp_path: Path) -> None:
    keep(tmp_path, 0)
    keep(tmp_path, 1, file="shard-00000.faiss")
    with pytest.raises(ValueError, match=r"_build/shard-00001\.json: names the files shard-00000\.faiss, shard-00001"):
        find(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"file": 1}', "\0", '"x"', "{}"])
def test_a_damaged_record_is_named(tmp_path: Path, content: str) -> None:
    keep(tmp_path, 0)
    (tmp_path / "_build" / "shard-00000.json").write_text(content)
    with pytest.raises(ValueError, match=r"_build/shard-00000\.json: .*; delete it, and run the build again"):
        find(tmp_path)
