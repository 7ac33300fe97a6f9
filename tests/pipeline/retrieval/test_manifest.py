import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.config.sections import RetrievalConfig
from pipeline.retrieval.encoder import EncoderStyle
from pipeline.retrieval.manifest import (
    IndexManifest,
    check_encoder,
    check_index_manifest,
    read_manifest,
    write_manifest,
)
from pipeline.storage.location import Location
from tests.support.indexes import CPU
from tests.support.names import EVIL_NAMES


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        (b'"format_version": 1', b'"format_version": 9', "key format_version: input should be 1, found 9"),
        (b'"dimension": 16', b'"dimension": "x"', "key dimension: "),
        (b'"shard-00000.faiss"', b'"../outside.faiss"', "key shards.0.file: "),
        (b'"passages": 60', b'"passages": 61', "the shards do not add up to 61 passages"),
        (b'"factory"', b'"other"', "key (factory|other): "),
        (b"{", b"", "invalid json"),
    ],
)
def test_damaged_manifest_names_file_and_key(saved: Location, old: bytes, new: bytes, problem: str) -> None:
    file = Path((saved / "index.json").path)
    file.write_bytes(file.read_bytes().replace(old, new, 1))
    with pytest.raises(ValueError, match=rf"^\S+/index\.json: .*{problem}.*; rebuild the index"):
        read_manifest(saved)


@pytest.mark.parametrize("key", ["file", "passages_file"])
@pytest.mark.parametrize("name", EVIL_NAMES.values(), ids=EVIL_NAMES.keys())
def test_a_shard_cannot_name_a_file_elsewhere(saved: Location, key: str, name: str) -> None:
    file = Path((saved / "index.json").path)
    manifest = json.loads(file.read_text())
    manifest["shards"][0][key] = evil = name.format(manifest["shards"][0][key])
    file.write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=rf"^\S+/index\.json: key shards\.0\.{key}: .*; rebuild the index") as refused:
        read_manifest(saved)
    assert f"found {evil!r}" in str(refused.value)


def test_two_shards_cannot_have_one_file(saved: Location) -> None:
    file = Path((saved / "index.json").path)
    file.write_bytes(file.read_bytes().replace(b"shard-00001.faiss", b"shard-00000.faiss"))
    with pytest.raises(ValueError, match=r"index\.json: .*two shards have the file shard-00000\.faiss; rebuild"):
        read_manifest(saved)


def test_folder_without_index_is_named(folder: Location) -> None:
    with pytest.raises(ValueError, match=r"no index here \(index.json is missing\)"):
        check_index_manifest(folder, CPU)


class TinyEncoder:
    def __init__(self, name: str, digest: str, dimension: int) -> None:
        self.name, self.digest, self.dimension = name, digest, dimension


def test_encoder_is_identified_by_its_digest(saved: Location) -> None:
    manifest = read_manifest(saved)
    check: Any = check_encoder
    check(TinyEncoder("renamed", "d" * 64, 16), manifest)
    with pytest.raises(
        ValueError, match=r"encoder tiny .*is not the one.*set retrieval.encoder to the original version of tiny"
    ):
        check(TinyEncoder("tiny", "e" * 64, 16), manifest)
    with pytest.raises(ValueError, match="has 8 dimensions, but the index has 16"):
        check(TinyEncoder("tiny", "d" * 64, 8), manifest)


def test_manifest_check_compares_the_configured_encoder_by_digest(
    saved: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    digests = {"same": "d" * 64, "other": "e" * 64, "remote": None}
    monkeypatch.setattr("pipeline.retrieval.manifest.ENCODERS", SimpleNamespace(hash_present=digests.get))
    for name in (None, "tiny", "same"):
        assert check_index_manifest(saved, RetrievalConfig(encoder=name)).passages == 60
    for name in ("other", "remote"):
        with pytest.raises(ValueError, match=f"encoder {name} .*not the one that the index was built with"):
            check_index_manifest(saved, RetrievalConfig(encoder=name))


def test_encoder_style_is_read_back(saved: Location) -> None:
    manifest = read_manifest(saved)
    assert manifest.encoder.style == EncoderStyle()
    style = {"query_prefix": "query: ", "passage_prefix": "passage: ", "normalised": False, "dtype": "float16"}
    changed = manifest.encoder.model_copy(update=style)
    assert changed.style == EncoderStyle.model_validate(style)
    assert manifest.model_copy(update={"encoder": changed}).compute_digest() != manifest.compute_digest()


def test_index_size_covers_all_faiss_files(saved: Location) -> None:
    assert read_manifest(saved).bytes == sum(file.stat().st_size for file in Path(saved.path).glob("*.faiss"))


OLD = """{"format_version": 1, "encoder": {"query_prefix": "", "passage_prefix": "", "normalised": true,
"dtype": "float32", "name": "tiny", "revision": null, "digest": "DIGEST"}, "embeddings": null, "dimension": 16,
"metric": "inner_product", "factory": "Flat", "passages": 5, "shards": [{"file": "shard-00000.faiss",
"passages_file": "shard-00000.passages.arrow",
"rows": 5, "bytes": 365, "sha256": "DIGEST", "passages_bytes": 900, "passages_sha256": "DIGEST"}]}"""


def test_index_of_an_earlier_version_keeps_its_digest() -> None:
    old = IndexManifest.model_validate_json(OLD.replace("DIGEST", "d" * 64))
    assert old.compute_digest() == "7cd0b69981411460a4efbeda49f3f85b3502bf7d33acd7f4bc1cd546d339d319"
    assert (dict(old.columns), old.max_words, old.truncated_passages) == ({}, None, None)
    assert not {"columns", "max_words", "truncated_passages"} & set(json.loads(old.model_dump_json()))


@pytest.mark.parametrize("update", [{"columns": {"text": "contents"}}, {"max_words": 150}])
def test_form_of_the_passages_is_read_back_and_part_of_the_digest(saved: Location, update: dict[str, Any]) -> None:
    manifest = read_manifest(saved)
    changed = manifest.model_copy(update=update)
    write_manifest(saved, changed)
    assert read_manifest(saved) == changed
    assert changed.compute_digest() != manifest.compute_digest()


@pytest.mark.parametrize(
    ("counts", "total"), [([1, 0, 4], 5), ([0, 0, 0], 0), ([None, 1, 2], None), ([None, None, None], None)]
)
def test_truncated_passages_are_summed_over_the_shards(
    saved: Location, counts: list[int | None], total: int | None
) -> None:
    manifest = read_manifest(saved)
    pairs = zip(manifest.shards, counts, strict=True)
    shards = tuple(shard.model_copy(update={"truncated_passages": count}) for shard, count in pairs)
    write_manifest(saved, manifest.model_copy(update={"shards": shards}))
    assert read_manifest(saved).truncated_passages == total
