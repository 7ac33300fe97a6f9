import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import fs

from pipeline.config.sections import RetrievalConfig
from pipeline.retrieval.index import PassageIndex
from pipeline.retrieval.index_cache import obtain_file, reserve_room
from pipeline.retrieval.manifest import read_manifest
from pipeline.storage.location import Location
from tests.support.flaky import FlakyFiles
from tests.support.indexes import CPU, retrieve, save, unit_vectors


def test_remote_files_are_fetched_once_and_checked(remote: Location, saved: Location, tmp_path: Path) -> None:
    cached = RetrievalConfig(device="cpu", cache=str(tmp_path / "cache"))
    expected = retrieve(PassageIndex.open(saved, CPU), unit_vectors(3), 5)
    assert retrieve(PassageIndex.open(remote, cached), unit_vectors(3), 5) == expected
    (tmp_path / "index" / "shard-00000.faiss").unlink()
    assert retrieve(PassageIndex.open(remote, cached), unit_vectors(3), 5) == expected


def test_wrong_remote_file_never_enters_the_cache(remote: Location, tmp_path: Path) -> None:
    file = tmp_path / "index" / "shard-00000.faiss"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    cached = RetrievalConfig(device="cpu", cache=str(tmp_path / "cache"), verify=False)
    with pytest.raises(ValueError, match=r"mem://index/shard-00000.faiss: its SHA-256"):
        PassageIndex.open(remote, cached)
    assert [file.suffix for file in (tmp_path / "cache").iterdir()] == [".lock"]


class CountingFiles(FlakyFiles):
    """Notes what is opened in a file that processes share, one line for each."""

    def __init__(self, root: str, log: str) -> None:
        super().__init__(Path(root), [])
        self.log = log

    def open_input_file(self, path: str) -> pa.NativeFile:
        self._note(path)
        return super().open_input_file(path)

    def open_input_stream(self, path: str) -> pa.NativeFile:
        self._note(path)
        return super().open_input_stream(path)

    def _note(self, path: str) -> None:
        with Path(self.log).open("a") as file:
            file.write(f"{path}\n")


def _fetch(root: str, log: str, cache: str, file: tuple[str, int, str]) -> bytes:
    source = Location(f"count://{file[0]}", fs.PyFileSystem(CountingFiles(root, log)), file[0])
    return obtain_file(source, file[1], file[2], RetrievalConfig(cache=cache)).read_bytes()


def test_concurrent_readers_fetch_a_file_once(saved: Location, tmp_path: Path) -> None:
    file = read_manifest(saved).shards[0].list_files()[0]
    log, cache = tmp_path / "log", tmp_path / "cache"
    with ProcessPoolExecutor(4, mp_context=multiprocessing.get_context("fork")) as readers:
        fetches = [readers.submit(_fetch, saved.path, str(log), str(cache), file) for _ in range(12)]
        contents = {fetch.result() for fetch in fetches}
    assert contents == {(Path(saved.path) / file[0]).read_bytes()}
    assert log.read_text().splitlines() == [file[0]]


def test_changed_index_is_fetched_again(remote: Location, saved: Location, tmp_path: Path) -> None:
    cached = RetrievalConfig(device="cpu", cache=str(tmp_path / "cache"))
    PassageIndex.open(remote, cached)
    changed = unit_vectors(60, seed=9)
    save(saved, [changed])
    (hits,) = retrieve(PassageIndex.open(remote, cached), changed[7:8], 1)
    assert hits[0].passage.id == "7"
    assert hits[0].score == pytest.approx(1.0)


def copy(cache: Path, digit: str, size: int, used: int) -> Path:
    file = cache / f"{digit * 64}-shard-00000.faiss"
    file.write_bytes(bytes(size))
    os.utime(file, (used, used))
    return file


OWN = ("shard-00000.faiss", 400, "c" * 64)
MISSING = ("shard-00001.faiss", 100, "d" * 64)


def limited(cache: Path, size: int | None) -> RetrievalConfig:
    return RetrievalConfig(cache=str(cache), cache_gb=size and size / 1e9)


def test_least_recently_used_copies_of_other_indexes_are_evicted(tmp_path: Path) -> None:
    old, older, own = (copy(tmp_path, *what) for what in (("a", 400, 30), ("b", 400, 20), ("c", 400, 10)))
    note = tmp_path / "note.txt"
    note.write_bytes(bytes(5000))
    with reserve_room(limited(tmp_path, 1000), [OWN, MISSING], []):
        assert (old.exists(), older.exists(), own.exists(), note.exists()) == (True, False, True, True)


def test_files_of_the_same_index_count_toward_the_limit_and_are_kept(tmp_path: Path) -> None:
    siblings, other = copy(tmp_path, "c", 400, 10), copy(tmp_path, "a", 400, 30)
    with reserve_room(limited(tmp_path, 899), [MISSING], [OWN]):
        assert (siblings.exists(), other.exists()) == (True, False)
    with (
        pytest.raises(ValueError, match="the files of this index on this machine take 0.00 GB"),
        reserve_room(limited(tmp_path, 499), [MISSING], [OWN]),
    ):
        pass
    assert siblings.exists()


def test_copies_of_an_updates_files_are_those_of_their_index(tmp_path: Path) -> None:
    own, other = copy(tmp_path, "c", 400, 30), copy(tmp_path, "a", 400, 10)
    with reserve_room(limited(tmp_path, 899), [MISSING], [("update-00001/shard-00000.faiss", 400, "c" * 64)]):
        assert (own.exists(), other.exists()) == (True, False)


def test_nothing_is_evicted_without_a_limit(tmp_path: Path) -> None:
    kept = copy(tmp_path, "a", 400, 30)
    with reserve_room(limited(tmp_path, None), [("shard-00000.faiss", 10**15, "c" * 64)], []):
        assert kept.exists()


def _evict(cache: str, done: str) -> None:
    with reserve_room(limited(Path(cache), 1000), [("shard-00000.faiss", 900, "e" * 64)], []):
        Path(done).touch()


def test_nothing_is_evicted_while_another_index_is_being_opened(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    own, done = copy(tmp_path / "cache", "c", 400, 10), tmp_path / "done"
    with reserve_room(limited(tmp_path / "cache", 1000), [OWN], []):
        other = multiprocessing.get_context("spawn").Process(target=_evict, args=(str(tmp_path / "cache"), str(done)))
        other.start()
        other.join(4)
        assert (own.exists(), done.exists(), other.is_alive()) == (True, False, True)
    other.join(30)
    assert (own.exists(), done.exists(), other.exitcode) == (False, True, 0)


def test_index_larger_than_the_limit_is_refused(remote: Location, tmp_path: Path) -> None:
    small = limited(tmp_path / "cache", 1000)
    with pytest.raises(ValueError, match=r"retrieval.cache_gb 1e-06: the files of this index .* 0.00 GB; raise it"):
        PassageIndex.open(remote, small)
    assert len(PassageIndex.open(remote, small, numbers=[]).shards) == 0


def test_mapped_copy_is_readable_after_eviction(remote: Location, tmp_path: Path) -> None:
    cached = RetrievalConfig(device="cpu", cache=str(tmp_path / "cache"))
    index = PassageIndex.open(remote, cached)
    expected = PassageIndex.open(remote, CPU.model_copy(update={"cache": str(tmp_path / "other")}))
    for file in (tmp_path / "cache").iterdir():
        file.unlink()
    assert retrieve(index, unit_vectors(3), 5) == retrieve(expected, unit_vectors(3), 5)
