from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import fs

from pipeline.config import RetrievalConfig, StorageConfig
from pipeline.encoder import Vectors
from pipeline.index import (
    EncoderEntry,
    IndexManifest,
    PassageIndex,
    Shard,
    check_encoder,
    check_index,
    parse_search,
    read_manifest,
    write_manifest,
)
from pipeline.shards import PASSAGE_SCHEMA, build_shard, empty_index, faiss_reason, train
from pipeline.storage import Location, locate
from pipeline.types import Passage

CPU = RetrievalConfig(device="cpu")
ENCODER = EncoderEntry(name="tiny", revision=None, digest="d" * 64)


def passages(start: int, rows: int) -> pa.RecordBatch:
    names = [str(row) for row in range(start, start + rows)]
    return pa.record_batch([names, [f"title {n}" for n in names], [f"text {n}" for n in names]], schema=PASSAGE_SCHEMA)


def save(folder: Location, parts: list[Vectors], factory: str = "Flat") -> IndexManifest:
    """An index whose passage ids are row numbers over all shards; shards are written in batches of 7 rows."""
    dimension = parts[0].shape[1]
    template = empty_index(factory, dimension)
    if not template.is_trained:
        train(template, np.concatenate(parts))
    entries, start = [], 0
    for number, part in enumerate(parts):
        begins = range(0, len(part), 7)
        batches = [(passages(start + i, len(part[i : i + 7])), part[i : i + 7]) for i in begins]
        entries.append(build_shard(folder, number, faiss.clone_index(template), batches))
        start += len(part)
    manifest = IndexManifest(
        encoder=ENCODER, dimension=dimension, factory=factory, passages=start, shards=tuple(entries)
    )
    write_manifest(folder, manifest)
    return manifest


def unit_vectors(rows: int, seed: int = 0, dimension: int = 16) -> Vectors:
    vectors = np.random.default_rng(seed).normal(size=(rows, dimension)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.fixture
def folder(tmp_path: Path) -> Location:
    return locate(str(tmp_path / "index"), StorageConfig())


@pytest.fixture
def saved(folder: Location) -> Location:
    vectors = unit_vectors(60)
    save(folder, [vectors[:25], vectors[25:30], vectors[30:]])
    return folder


small = st.integers(-1, 1)


@settings(max_examples=100, deadline=None)
@given(
    rows=st.lists(st.tuples(small, small), min_size=1, max_size=40),
    queries=st.lists(st.tuples(small, small), min_size=1, max_size=3),
    cuts=st.sets(st.integers(1, 39), max_size=4),
    k=st.integers(1, 45),
)
def test_shards_rank_as_one_index_would_with_ties_by_shard_then_row(
    rows: list[tuple[int, int]], queries: list[tuple[int, int]], cuts: set[int], k: int
) -> None:
    vectors, asked = np.array(rows, np.float32), np.array(queries, np.float32)
    parts = [part for part in np.split(vectors, sorted(cut for cut in cuts if cut < len(vectors))) if len(part)]
    shards = []
    for part in parts:
        index = empty_index("Flat", 2)
        index.add(part)
        shards.append(Shard(index, None))  # type: ignore[arg-type]
    found = PassageIndex(None, shards).search(asked, k)  # type: ignore[arg-type]

    starts = np.cumsum([0, *(len(part) for part in parts)])
    scores = asked @ vectors.T
    for hits, expected in zip(found, scores, strict=True):
        best = sorted(range(len(vectors)), key=lambda row: (-expected[row], row))[:k]
        assert [starts[hit.shard] + hit.row for hit in hits] == best
        assert [hit.score for hit in hits] == [expected[row] for row in best]


@pytest.mark.parametrize("factory", ["Flat", "IVF4,Flat", "IVF4,SQ8", "PCA8,Flat"])
def test_saved_shards_find_what_one_index_finds(folder: Location, factory: str) -> None:
    vectors, queries = unit_vectors(60), unit_vectors(5, seed=1)
    save(folder, [vectors[:25], vectors[25:30], vectors[30:]], factory)
    one = empty_index(factory, 16)
    if not one.is_trained:
        one.train(vectors)
    one.add(vectors)
    scores, rows = one.search(queries, 8)
    found = PassageIndex.open(folder, CPU).retrieve(queries, 8)
    assert [[hit.passage.id for hit in hits] for hits in found] == [[str(r) for r in row if r >= 0] for row in rows]
    for hits, expected in zip(found, scores, strict=True):
        np.testing.assert_allclose([hit.score for hit in hits], expected[: len(hits)], atol=1e-6)
        assert [hit.rank for hit in hits] == list(range(1, len(hits) + 1))


def test_passages_come_with_title_and_text_from_every_batch_of_the_file(saved: Location) -> None:
    vectors = unit_vectors(60)
    found = PassageIndex.open(saved, CPU).retrieve(vectors, 1)
    assert [hits[0].passage for hits in found] == [Passage(str(n), f"title {n}", f"text {n}") for n in range(60)]


def test_asking_for_more_than_there_is_returns_all(saved: Location) -> None:
    (hits,) = PassageIndex.open(saved, CPU).search(unit_vectors(1, seed=3), 1000)
    assert len({(hit.shard, hit.row) for hit in hits}) == 60


def test_rows_that_faiss_does_not_find_are_left_out(folder: Location) -> None:
    # One of eight lists is probed, so FAISS fills most of the 60 places with row -1.
    manifest = save(folder, [unit_vectors(60)], "IVF8,Flat")
    query = unit_vectors(1, seed=2)
    _, rows = faiss.read_index((folder / manifest.shards[0].file).path).search(query, 60)
    (hits,) = PassageIndex.open(folder, CPU).search(query, 60)
    assert [hit.row for hit in hits] == [row for row in rows[0] if row >= 0]
    assert 0 < len(hits) < 60


def test_search_parameters_reach_faiss(folder: Location) -> None:
    vectors, queries = unit_vectors(60), unit_vectors(4, seed=5)
    save(folder, [vectors[:30], vectors[30:]], "IVF8,Flat")
    exact = faiss.IndexFlatIP(16)
    exact.add(vectors)
    wanted = [[str(row) for row in rows] for rows in exact.search(queries, 10)[1]]

    def ids(search: str) -> list[list[str]]:
        index = PassageIndex.open(folder, RetrievalConfig(device="cpu", search=search))
        return [[hit.passage.id for hit in hits] for hits in index.retrieve(queries, 10)]

    assert ids("nprobe=8") == wanted
    assert ids("") != wanted


def test_search_parameter_that_does_not_apply_is_named(saved: Location) -> None:
    with pytest.raises(ValueError, match=r"IndexFlatIP has no parameter efSearch"):
        PassageIndex.open(saved, RetrievalConfig(device="cpu", search="efSearch=64"))


@pytest.mark.parametrize("search", ["nprobe", "nprobe=many", "nprobe=0", "nprobe=inf"])
def test_malformed_search_is_refused(search: str) -> None:
    with pytest.raises(ValueError, match=f"retrieval.search {search}"):
        parse_search(search)


def test_search_string_is_parsed() -> None:
    assert parse_search(" nprobe=16, efSearch=64 ") == {"nprobe": 16, "efSearch": 64}
    assert parse_search("") == {}


def change(path: str, edit: Callable[[bytes], bytes]) -> None:
    file = Path(path)
    file.write_bytes(edit(file.read_bytes()))


@pytest.mark.parametrize("name", ["shard-00001.faiss", "shard-00002.passages.arrow"])
def test_changed_truncated_and_missing_files_are_named(saved: Location, name: str) -> None:
    path = (saved / name).path
    change(path, lambda content: content[:-1] + bytes([content[-1] ^ 1]))
    check_index(saved, CPU)
    with pytest.raises(ValueError, match=rf"{name}: its SHA-256 is not what index.json says"):
        PassageIndex.open(saved, CPU)
    change(path, lambda content: content[:-10])
    for opened in (check_index, PassageIndex.open):
        with pytest.raises(ValueError, match=rf"{name}: has \d+ bytes where index.json says"):
            opened(saved, CPU)
    Path(path).unlink()
    for opened in (check_index, PassageIndex.open):
        with pytest.raises(ValueError, match=rf"{name}: missing"):
            opened(saved, CPU)


def test_digests_are_not_read_where_verify_is_off(saved: Location) -> None:
    change((saved / "shard-00000.faiss").path, lambda content: content[:-1] + bytes([content[-1] ^ 1]))
    unverified = RetrievalConfig(device="cpu", verify=False)
    assert len(PassageIndex.open(saved, unverified).search(unit_vectors(1), 3)[0]) == 3


def test_files_of_another_index_are_refused(saved: Location) -> None:
    manifest = read_manifest(saved)
    first, second, third = manifest.shards
    swapped = second.model_copy(update={"file": first.file, "bytes": first.bytes, "sha256": first.sha256})
    write_manifest(saved, manifest.model_copy(update={"shards": (first, swapped, third)}))
    with pytest.raises(ValueError, match=r"25 vectors of 16 dimensions and 5 passages where index.json says 5 and 16"):
        PassageIndex.open(saved, CPU)


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        (b'"format_version": 1', b'"format_version": 9', "key format_version: input should be 1, found 9"),
        (b'"dimension": 16', b'"dimension": "x"', "key dimension: "),
        (b'"shard-00000.faiss"', b'"../outside.faiss"', "key shards.0.file: "),
        (b'"passages": 60', b'"passages": 61', "the shards do not hold 61 passages together"),
        (b'"factory"', b'"other"', "key (factory|other): "),
        (b"{", b"", "invalid json"),
    ],
)
def test_damaged_manifest_names_file_and_key(saved: Location, old: bytes, new: bytes, problem: str) -> None:
    change((saved / "index.json").path, lambda content: content.replace(old, new, 1))
    with pytest.raises(ValueError, match=rf"^\S+/index\.json: .*{problem}.*; build the index anew"):
        read_manifest(saved)


def test_folder_without_index_is_named(folder: Location) -> None:
    with pytest.raises(ValueError, match=r"no index here \(index.json is missing\)"):
        check_index(folder, CPU)


class TinyEncoder:
    def __init__(self, name: str, digest: str, dimension: int) -> None:
        self.name, self.digest, self.dimension = name, digest, dimension


def test_encoder_is_known_by_its_content_not_its_name(saved: Location) -> None:
    manifest = read_manifest(saved)
    check: Any = check_encoder
    check(TinyEncoder("renamed", "d" * 64, 16), manifest)
    with pytest.raises(ValueError, match=r"encoder tiny .*is not the one.*set retrieval.encoder to tiny as it was"):
        check(TinyEncoder("tiny", "e" * 64, 16), manifest)
    with pytest.raises(ValueError, match="gives 8 dimensions, the index has 16"):
        check(TinyEncoder("tiny", "d" * 64, 8), manifest)


def test_cheap_check_compares_the_asked_encoder_by_digest(saved: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    digests = {"same": "d" * 64, "other": "e" * 64, "remote": None}
    monkeypatch.setattr("pipeline.index.encoder_digest", digests.get)
    for name in (None, "tiny", "same"):
        assert check_index(saved, RetrievalConfig(encoder=name)).passages == 60
    for name in ("other", "remote"):
        with pytest.raises(ValueError, match=f"encoder {name} .*not the one that the index was built with"):
            check_index(saved, RetrievalConfig(encoder=name))


@pytest.fixture
def remote(saved: Location) -> Location:
    """The saved index behind a file system that is not a local disk."""
    path = Path(saved.path)
    return Location("mem://index", fs.SubTreeFileSystem(str(path.parent), fs.LocalFileSystem()), path.name)


def test_remote_files_are_fetched_once_and_checked(remote: Location, saved: Location, tmp_path: Path) -> None:
    cached = RetrievalConfig(device="cpu", cache=str(tmp_path / "cache"))
    expected = PassageIndex.open(saved, CPU).retrieve(unit_vectors(3), 5)
    assert PassageIndex.open(remote, cached).retrieve(unit_vectors(3), 5) == expected
    (tmp_path / "index" / "shard-00000.faiss").unlink()
    assert PassageIndex.open(remote, cached).retrieve(unit_vectors(3), 5) == expected


def test_wrong_remote_file_never_enters_the_cache(remote: Location, tmp_path: Path) -> None:
    change(str(tmp_path / "index" / "shard-00000.faiss"), lambda content: content[:-1] + bytes([content[-1] ^ 1]))
    cached = RetrievalConfig(device="cpu", cache=str(tmp_path / "cache"), verify=False)
    with pytest.raises(ValueError, match=r"mem://index/shard-00000.faiss: its SHA-256"):
        PassageIndex.open(remote, cached)
    assert [file.suffix for file in (tmp_path / "cache").iterdir()] == [".lock"]


def test_a_shard_goes_to_other_file_systems_whole(remote: Location, saved: Location, tmp_path: Path) -> None:
    entry = build_shard(remote, 9, empty_index("Flat", 16), [(passages(0, 4), unit_vectors(4))])
    assert (tmp_path / "index" / entry.file).stat().st_size == entry.bytes
    assert (tmp_path / "index" / entry.passages_file).stat().st_size == entry.passages_bytes


def test_failed_shard_leaves_no_files(folder: Location) -> None:
    def batches() -> Any:
        yield passages(0, 4), unit_vectors(4)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        build_shard(folder, 0, empty_index("Flat", 16), batches())
    assert list(Path(folder.path).iterdir()) == []


@pytest.mark.parametrize("factory", ["Flatt", "PQ7", "LSH", "IDMap,Flat"])
def test_factory_that_cannot_be_built_is_named(factory: str) -> None:
    with pytest.raises(ValueError, match=f"^factory {factory}: "):
        empty_index(factory, 16)


def test_faiss_reasons_leave_out_source_lines() -> None:
    assert faiss_reason(RuntimeError("Error in x at /a/b.cpp:66: Error: 'n >= k' failed: Too few points")) == (
        "Too few points"
    )
    assert faiss_reason(RuntimeError("Error in x at /a/b.cpp:1228: could not parse Flatt")) == "could not parse Flatt"


def test_too_few_vectors_for_training_are_said() -> None:
    with pytest.raises(ValueError, match="cannot be trained on 5 passages: Number of training points"):
        train(empty_index("IVF8,Flat", 16), unit_vectors(5))


def test_device_gpu_needs_one(saved: Location) -> None:
    if hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus():
        pytest.skip("there is one")
    with pytest.raises(ValueError, match=r"retrieval.device gpu"):
        PassageIndex.open(saved, RetrievalConfig(device="gpu"))
