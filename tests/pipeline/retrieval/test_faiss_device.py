import logging
import re

import faiss
import pytest

from pipeline.config.sections import RetrievalConfig
from pipeline.gpus import AssignedGpus
from pipeline.retrieval.faiss_device import (
    RELEASE_SECONDS,
    RESERVED_BYTES,
    SHARED_MEMORY,
    WORKING_BYTES,
    CardMemory,
    Device,
    estimate_gpu_bytes,
    has_gpu,
    supports_gpu,
)
from pipeline.retrieval.index import PassageIndex
from pipeline.retrieval.manifest import IndexManifest, read_manifest
from pipeline.retrieval.shard_files import create_empty_index
from pipeline.storage.location import Location
from tests.support.indexes import CPU, retrieve, unit_vectors

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
def test_gpu_support_depends_on_the_index_type(factory: str, dimension: int, expected: tuple[bool, bool]) -> None:
    index = create_empty_index(factory, dimension)
    assert (supports_gpu(index, False), supports_gpu(index, True)) == expected
    assert SHARED_MEMORY == 49152


def changed(manifest: IndexManifest, factory: str) -> IndexManifest:
    return manifest.model_copy(update={"factory": factory})


def test_gpu_memory_of_shards_matches_worked_examples(saved: Location) -> None:
    manifest = read_manifest(saved)
    first, second, third = (shard.bytes for shard in manifest.shards)
    assert estimate_gpu_bytes(manifest, [0, 1, 2], float16=False) == first + second + third + WORKING_BYTES
    # Half of both, and one and a half of the larger on the way.
    assert third > first
    assert estimate_gpu_bytes(manifest, [0, 2], float16=True) == (first + third) // 2 + 3 * third // 2 + WORKING_BYTES
    # Eight lists with 16 places of 16 bytes to spare on average.
    coded = estimate_gpu_bytes(changed(manifest, "IVF8,SQ8"), [1], float16=True)
    assert coded == second + 8 * 16 * 16 + WORKING_BYTES


def test_index_that_just_fits_beside_the_engine_is_accepted() -> None:
    memory = CardMemory(70_000_000_000, CARD, engine=0.5)
    left = 70_000_000_000 - CARD // 2 - RESERVED_BYTES
    assert memory.left == left
    memory.check(left)
    with pytest.raises(
        ValueError, match=r"needs 28.9 GB on the GPU, but 28.9 GB are left: of 80.0 GB, 70.0 GB are free"
    ):
        memory.check(left + 1)


def test_engine_that_takes_all_memory_leaves_none() -> None:
    with pytest.raises(ValueError, match="0.0 GB are left"):
        CardMemory(CARD, CARD, engine=0.99).check(1)


def test_memory_budget_is_limited_to_the_gpu_share() -> None:
    """Half of the card is 40 GB, of which the engine takes 24; that all of the card is free still does not count."""
    memory = CardMemory(CARD, CARD, share=0.5, engine=0.3)
    assert memory.budget == memory.left == 16_000_000_000 - RESERVED_BYTES
    with pytest.raises(ValueError, match=r"but 14.9 GB are left: .* may use 0.5, and vLLM takes 0.3"):
        memory.check(15_000_000_000)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    """What FAISS and torch say where there is a GPU of 8 GB."""
    resources = type("Resources", (), {"setTempMemory": lambda _self, _size: None})
    monkeypatch.setattr(faiss, "StandardGpuResources", resources, raising=False)
    monkeypatch.setattr(faiss, "GpuClonerOptions", type("Options", (), {}), raising=False)
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1, raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (7_500_000_000, 8_000_000_000))


def assign(monkeypatch: pytest.MonkeyPatch, gpus: AssignedGpus | None) -> None:
    """Let Ray have assigned these GPUs to this process."""
    monkeypatch.setattr("pipeline.gpus.get_assigned_gpus", lambda: gpus)
    monkeypatch.setattr("pipeline.retrieval.faiss_device.get_assigned_gpus", lambda: gpus)


@pytest.mark.usefixtures("card")
def test_index_that_does_not_fit_falls_back_to_the_cpu_unless_a_gpu_is_required(
    saved: Location, caplog: pytest.LogCaptureFixture
) -> None:
    numbers = r"needs 0.5 GB on the GPU, but 0.0 GB are left: of 8.0 GB, 7.5 GB are free, .* takes 0.9"
    with pytest.raises(ValueError, match=numbers):
        PassageIndex.open(saved, RetrievalConfig(device="gpu"), engine_share=0.9)
    with caplog.at_level(logging.WARNING):
        index = PassageIndex.open(saved, RetrievalConfig(), engine_share=0.9)
    assert re.search(f"the index is searched on the CPU: the index {numbers}", caplog.text)
    assert retrieve(index, unit_vectors(3), 5) == retrieve(PassageIndex.open(saved, CPU), unit_vectors(3), 5)
    assert Device.choose(RetrievalConfig(), read_manifest(saved), [0], 0.0).resources is not None
    assert Device.choose(CPU, read_manifest(saved), [0], 0.9).resources is None


@pytest.mark.usefixtures("card")
def test_process_without_an_assigned_gpu_uses_none(saved: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    assign(monkeypatch, AssignedGpus((), 0.0))
    assert Device.choose(RetrievalConfig(), read_manifest(saved), [0], 0.0).resources is None
    with pytest.raises(ValueError, match=r"Ray assigned no GPU to this process: set execution.gpus_per_actor"):
        Device.choose(RetrievalConfig(device="gpu"), read_manifest(saved), [0], 0.0)


@pytest.mark.usefixtures("card")
def test_quarter_gpu_does_not_fit_an_index_beside_an_engine(saved: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    assign(monkeypatch, AssignedGpus(("0",), 0.25))
    manifest = read_manifest(saved)
    with pytest.raises(ValueError, match=r"0.0 GB are left: .* this process may use 0.25, and vLLM takes 0.2"):
        Device.choose(RetrievalConfig(device="gpu"), manifest, [0], 0.2)
    assert Device.choose(RetrievalConfig(device="gpu"), manifest, [0], 0.0).resources is not None


@pytest.mark.usefixtures("card")
def test_device_waits_for_the_memory_of_an_ending_engine(saved: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    free = iter([1_000_000_000, 1_000_000_000, 7_500_000_000])
    waits = list[float]()
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (next(free), 8_000_000_000))
    monkeypatch.setattr("pipeline.retrieval.faiss_device.time.sleep", waits.append)
    assert Device.choose(RetrievalConfig(device="gpu"), read_manifest(saved), [0], 0.3).resources is not None
    assert waits == [1, 1]


@pytest.mark.usefixtures("card")
def test_wait_for_gpu_memory_is_limited(saved: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (1_000_000_000, 8_000_000_000))
    monkeypatch.setattr("pipeline.retrieval.faiss_device.time.monotonic", lambda: clock[0])
    monkeypatch.setattr(
        "pipeline.retrieval.faiss_device.time.sleep", lambda seconds: clock.append(clock.pop() + seconds)
    )
    with pytest.raises(ValueError, match="1.0 GB are free"):
        Device.choose(RetrievalConfig(device="gpu"), read_manifest(saved), [0], 0.3)
    assert clock == [RELEASE_SECONDS]


def test_faiss_is_not_queried_if_pytorch_finds_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faiss, "StandardGpuResources", object, raising=False)
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: pytest.fail("it may abort the process"), raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert not has_gpu()


@pytest.mark.usefixtures("card")
def test_unsupported_index_falls_back_to_the_cpu_unless_a_gpu_is_required(
    saved: Location, caplog: pytest.LogCaptureFixture
) -> None:
    graph = changed(read_manifest(saved), "HNSW8")
    with caplog.at_level(logging.WARNING):
        assert Device.choose(RetrievalConfig(), graph, [0], 0.0).resources is None
    reason = "FAISS does not support HNSW8 on GPUs: set retrieval.device=cpu, or use another factory"
    assert f"the index is searched on the CPU: {reason}" in caplog.text
    with pytest.raises(ValueError, match=reason):
        Device.choose(RetrievalConfig(device="gpu"), graph, [0], 0.0)


@pytest.mark.usefixtures("card")
def test_failed_gpu_allocation_falls_back_to_the_cpu_unless_a_gpu_is_required(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise RuntimeError("Error in x at /y.cu:1: Error: 'err == 0' failed: StandardGpuResources: alloc fail")

    monkeypatch.setattr(faiss, "index_cpu_to_gpu", full, raising=False)
    index = faiss.IndexFlatIP(4)
    with caplog.at_level(logging.WARNING):
        assert Device(object()).place(index)[0] is index
    reason = "StandardGpuResources: alloc fail"
    assert f"a shard is searched on the CPU: it cannot be placed on the GPU ({reason})" in caplog.text
    with pytest.raises(ValueError, match=rf"a shard cannot be placed on the GPU \({reason}\); set auto or cpu"):
        Device(object(), required=True).place(index)
