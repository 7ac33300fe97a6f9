"""Tests a run's device in a Ray actor, with the steps of a run: search, start of the engine, one answer."""

import tempfile
import time
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
import pyarrow as pa

from pipeline.config.run import RunConfig
from pipeline.config.sections import ModelConfig, StorageConfig
from pipeline.decoding.profiles import Tasks
from pipeline.decoding.self_rag import SelfRag
from pipeline.decoding.types import Passage, Query
from pipeline.engine.arguments import get_gpu_share
from pipeline.engine.models import load_critic
from pipeline.engine.vllm import VllmGenerator, prepare_environment
from pipeline.gpus import decide_gpu_use, lock_gpus
from pipeline.retrieval.index import PassageIndex
from pipeline.retrieval.manifest import EncoderEntry, IndexManifest, write_manifest
from pipeline.retrieval.passage_columns import PASSAGE_SCHEMA
from pipeline.retrieval.shard_files import build_shard, create_empty_index
from pipeline.storage.location import Location, locate

VECTORS, DIMENSION, NEIGHBORS = 1000, 64, 5
QUESTION = Query(
    "doctor",
    "Which river flows through Cologne?",
    passages=(Passage("1", "Cologne", "Cologne is a city in Germany. The river Rhine flows through it."),),
)


@dataclass(frozen=True)
class Searched:
    """The outcome of a search on the device.

    Attributes:
        device: ``GPU`` or ``CPU``.
        agreed: Whether FAISS found the neighbors that PyTorch computed on the same device.
        seconds: Duration of the second search; the first one prepares the device.
    """

    device: str
    agreed: bool
    seconds: float


@dataclass(frozen=True)
class Answered:
    """The outcome of a row that the embedded model answered.

    Attributes:
        device: Device of the engine, as vLLM names it.
        answer: Text of the answer.
        start_seconds, seconds: Durations of the engine's start and of the row.
    """

    device: str
    answer: str
    start_seconds: float
    seconds: float


class DeviceProbe:
    """Uses the CPUs and GPUs that Ray assigned to it in the same way as an actor of a run.

    Args:
        config: Configuration of the run. Its model is replaced by the embedded one, and of the engine's arguments only
            ``gpu_memory_utilization`` is kept.
    """

    def __init__(self, config: RunConfig) -> None:
        memory = {k: v for k, v in config.model.engine.items() if k == "gpu_memory_utilization"}
        self._config = config.model_copy(update={"model": ModelConfig(name="demo", engine=memory)})

    def search(self) -> Searched:
        """Search a small index with FAISS and compare with PyTorch in the same process.

        Raises:
            ValueError: ``retrieval.device`` requires a GPU that cannot be used.
        """
        import torch

        random = np.random.default_rng(0)
        vectors = random.normal(size=(VECTORS, DIMENSION)).astype(np.float32)
        queries = random.normal(size=(8, DIMENSION)).astype(np.float32)
        device = "cuda" if decide_gpu_use(self._config.retrieval.device) and torch.cuda.is_available() else "cpu"
        scores = torch.from_numpy(queries).to(device) @ torch.from_numpy(vectors).to(device).T
        exact = scores.topk(NEIGHBORS).indices.cpu().tolist()
        with tempfile.TemporaryDirectory() as folder:
            index = self._open(locate(folder, StorageConfig()), vectors)
            index.search(queries, NEIGHBORS)
            began = time.monotonic()
            found = index.search(queries, NEIGHBORS)
            seconds = time.monotonic() - began
        neighbors = [[hit.row for hit in hits] for hits in found]
        kind = type(faiss.downcast_index(index.shards[0].index)).__name__
        return Searched("GPU" if kind.startswith("Gpu") else "CPU", neighbors == exact, seconds)

    def _open(self, folder: Location, vectors: np.ndarray[Any, np.dtype[np.float32]]) -> PassageIndex:
        names = [str(n) for n in range(len(vectors))]
        batch = pa.record_batch([names, names, names], schema=PASSAGE_SCHEMA)
        entry = build_shard(folder, 0, create_empty_index("Flat", DIMENSION), [(batch, vectors)])
        encoder = EncoderEntry(name="none", revision=None, digest="0" * 64)
        manifest = IndexManifest(
            encoder=encoder, dimension=DIMENSION, factory="Flat", passages=len(vectors), shards=(entry,)
        )
        write_manifest(folder, manifest)
        return PassageIndex.open(folder, self._config.retrieval, engine_share=get_gpu_share(self._config.model))

    async def answer(self) -> Answered:
        """Start the engine with the embedded model, and answer one row.

        Raises:
            RuntimeError: The embedded model is not available, or the engine does not start.
        """
        prepare_environment()
        from vllm.platforms import current_platform

        config = self._config
        critic = load_critic(config)
        began = time.monotonic()
        with lock_gpus():
            generator = VllmGenerator.start(config.model, critic.watched)
        try:
            started = time.monotonic()
            answer = await SelfRag(generator, critic, Tasks(config.decoding)).answer(QUESTION)
            seconds = time.monotonic() - started
        finally:
            generator.shutdown()
        return Answered(current_platform.device_name, answer.answer, started - began, seconds)
