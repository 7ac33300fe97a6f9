import logging

import faiss
import pytest

from pipeline.config import RetrievalConfig
from pipeline.devices import (
    RESERVED_BYTES,
    SHARED_MEMORY,
    WORKING_BYTES,
    Device,
    check_gpu_memory,
    gpu_bytes,
    gpu_form,
)
from pipeline.index import PassageIndex
from pipeline.manifest import IndexManifest, read_manifest
from pipeline.shards import empty_index
from pipeline.storage import Location
from tests.indexes import CPU

CARD = 80_000_000_000


@pytest.mark.parametrize(
    ("factory", "dimension", "expected"),
    [
        ("Flat", 64, (True, True)),
        ("IVF16,Flat", 64, (True, True)),
        ("IVF16,SQ8", 64, (True, True)),
        ("IVF16,PQ32", 64, (True, True)),
        ("OPQ64,IVF16,PQ64", 128, (False, True)),  # 64 tables of 256 numbers: 64 KiB in single precision
        ("PCA32,IVF16,Flat", 64, (True, True)),
        ("IVF16_HNSW8,Flat", 64, (False, False)),
        ("IVF16,PQ16x4", 64, (False, False)),
        ("IVF16,PQ16x4fs", 64, (False, False)),
        ("SQ8", 64, (False, False)),
        ("HNSW8", 64, (False, False)),
        ("IVF16,SQ8,RFlat", 64, (False, False)),
    ],
)
def test_kinds_that_gpus_have(factory: str, dimension: int, expected: tuple[bool, bool]) -> None:
    index = empty_index(factory, dimension)
    assert (gpu_form(index, False), gpu_form(index, True)) == expected
    assert SHARED_MEMORY == 49152


def changed(manifest: IndexManifest, factory: str) -> IndexManifest:
    return manifest.model_copy(update={"factory": factory})


def test_what_shards_take_by_hand(saved: Location) -> None:
    manifest = read_manifest(saved)
    first, second, third = (shard.bytes for shard in manifest.shards)
    assert gpu_bytes(manifest, [0, 1, 2], float16=False) == first + second + third + WORKING_BYTES
    # Half of both, and one and a half of the larger on the way.
    assert third > first
    assert gpu_bytes(manifest, [0, 2], float16=True) == (first + third) // 2 + 3 * third // 2 + WORKING_BYTES
    # Eight lists with 16 places of 16 bytes to spare on average.
    coded = gpu_bytes(changed(manifest, "IVF8,SQ8"), [1], float16=True)
    assert coded == second + 8 * 16 * 16 + WORKING_BYTES


def test_an_index_that_just_fits_beside_the_engine_is_taken() -> None:
    free = 70_000_000_000
    left = free - CARD // 2 - RESERVED_BYTES
    check_gpu_memory(left, free, CARD, 0.5)
    with pytest.raises(ValueError, match=r"needs 28.9 GB .* 80.0 GB, 70.0 GB free, vLLM's share of 0.5 leaves 28.9 GB"):
        check_gpu_memory(left + 1, free, CARD, 0.5)


def test_nothing_is_left_where_the_engine_takes_all() -> None:
    with pytest.raises(ValueError, match="leaves 0.0 GB"):
        check_gpu_memory(1, CARD, CARD, 0.99)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    """What FAISS and torch say where there is a GPU of 8 GB."""
    resources = type("Resources", (), {"setTempMemory": lambda _self, _size: None})
    monkeypatch.setattr(faiss, "StandardGpuResources", resources, raising=False)
    monkeypatch.setattr(faiss, "GpuClonerOptions", type("Options", (), {}), raising=False)
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1, raising=False)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (7_500_000_000, 8_000_000_000))


@pytest.mark.usefixtures("card")
def test_too_little_memory_is_said_before_anything_is_opened(saved: Location) -> None:
    with pytest.raises(ValueError, match=r"needs 0.5 GB .* 8.0 GB, 7.5 GB free, vLLM's share of 0.9 leaves 0.0 GB"):
        PassageIndex.open(saved, RetrievalConfig(), engine_share=0.9)
    assert Device.choose(RetrievalConfig(), read_manifest(saved), [0], 0.0).resources is not None
    assert Device.choose(CPU, read_manifest(saved), [0], 0.9).resources is None


@pytest.mark.usefixtures("card")
def test_an_index_without_a_gpu_form_is_searched_on_the_cpu_unless_a_gpu_is_asked_for(
    saved: Location, caplog: pytest.LogCaptureFixture
) -> None:
    graph = changed(read_manifest(saved), "HNSW8")
    with caplog.at_level(logging.WARNING):
        assert Device.choose(RetrievalConfig(), graph, [0], 0.0).resources is None
    assert "FAISS has no HNSW8 on GPUs; it is searched on the CPU" in caplog.text
    with pytest.raises(ValueError, match="retrieval.device gpu: FAISS has no HNSW8 on GPUs; set auto or cpu"):
        Device.choose(RetrievalConfig(device="gpu"), graph, [0], 0.0)


@pytest.mark.usefixtures("card")
def test_a_card_that_is_full_after_all_is_no_reason_to_go_on_slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise RuntimeError("Error in x at /y.cu:1: Error: 'err == 0' failed: StandardGpuResources: alloc fail")

    monkeypatch.setattr(faiss, "index_cpu_to_gpu", full, raising=False)
    with pytest.raises(ValueError, match=r"no place on the GPU \(StandardGpuResources: alloc fail\); set cpu"):
        Device(object()).place(faiss.IndexFlatIP(4))
