import faiss
import pytest

from pipeline.config import RetrievalConfig
from pipeline.devices import RESERVED_BYTES, WORKING_BYTES, Device, check_gpu_memory, gpu_bytes
from pipeline.index import PassageIndex
from pipeline.manifest import read_manifest
from pipeline.storage import Location
from tests.indexes import CPU

CARD = 80_000_000_000


def test_shards_take_their_bytes_and_working_memory(saved: Location) -> None:
    manifest = read_manifest(saved)
    first, second, third = (shard.bytes for shard in manifest.shards)
    assert gpu_bytes(manifest, [0, 1, 2], float16=False) == first + second + third + WORKING_BYTES
    assert gpu_bytes(manifest, [0, 2], float16=True) == (first + third) // 2 + WORKING_BYTES
    coded = manifest.model_copy(update={"factory": "IVF8,SQ8"})
    assert gpu_bytes(coded, [1], float16=True) == second + WORKING_BYTES


def test_an_index_that_just_fits_beside_the_engine_is_taken() -> None:
    left = int(CARD * 0.5) - RESERVED_BYTES
    check_gpu_memory(left, CARD, 0.5)
    with pytest.raises(ValueError, match=r"needs 38.4 GB .* of its 80.0 GB vLLM's share of 0.5 leaves 38.4"):
        check_gpu_memory(left + 1, CARD, 0.5)


def test_an_index_alone_on_a_card_has_all_but_the_reserve() -> None:
    check_gpu_memory(CARD - RESERVED_BYTES, CARD, 0.0)
    with pytest.raises(ValueError, match="leaves 0.0 GB"):
        check_gpu_memory(1, CARD, 0.99)


class Card:
    """What FAISS and torch say where there is a GPU of 8 GB."""

    @staticmethod
    def install(monkeypatch: pytest.MonkeyPatch) -> None:
        resources = type("Resources", (), {"setTempMemory": lambda _self, _size: None})
        monkeypatch.setattr(faiss, "StandardGpuResources", resources, raising=False)
        monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1, raising=False)
        monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (7_000_000_000, 8_000_000_000))


def test_too_little_memory_is_said_before_anything_is_opened(saved: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    Card.install(monkeypatch)
    with pytest.raises(ValueError, match=r"needs 0.5 GB .* of its 8.0 GB vLLM's share of 0.9 leaves 0.0 GB"):
        PassageIndex.open(saved, RetrievalConfig(), engine_share=0.9)
    assert Device.choose(RetrievalConfig(), read_manifest(saved), [0], 0.0).resources is not None
    assert Device.choose(CPU, read_manifest(saved), [0], 0.9).resources is None


def test_an_index_without_a_gpu_form_is_searched_on_the_cpu_unless_a_gpu_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_form(*_: object) -> None:
        raise RuntimeError("Error in x at /y.cpp:1: This index type is not implemented on the GPU")

    monkeypatch.setattr(faiss, "GpuClonerOptions", type("Options", (), {}), raising=False)
    monkeypatch.setattr(faiss, "index_cpu_to_gpu", no_form, raising=False)
    index = faiss.IndexHNSWFlat(4, 8)
    placed, space = Device(object(), required=False, float16=False).place(index)
    assert placed is index
    assert isinstance(space, faiss.ParameterSpace)
    with pytest.raises(ValueError, match="retrieval.device gpu: This index type is not implemented.*set auto or cpu"):
        Device(object(), required=True, float16=False).place(index)
