"""The card, or the reason why there is none, and runs of the job on it."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import faiss
import pyarrow.dataset as ds
import pytest
import torch

from jobs.demo import QUERIES
from pipeline.config.sections import RetrievalConfig
from pipeline.doctor.machine import read_cards
from tests.gpu.cpu_answers import DECODING, SETTINGS, first_queries

REHEARSAL = bool(os.environ.get("SELFRAG_GPU_REHEARSAL"))
# Set where a card must be there: a suite that skips everything has shown nothing.
REQUIRED = bool(os.environ.get("SELFRAG_GPU_REQUIRED"))
# Rows of a rehearsal, and share of the card that the engine takes: the rest is for the index and shard servers.
FEW_ROWS, ENGINE_SHARE = 16, 0.4
# Compilation takes a minute and is shown by the first run.
QUICK_START = "model.engine.enforce_eager=true"


def why_not() -> str | None:
    """Say what is missing for the suite; None on a machine with a GPU that PyTorch and FAISS can use."""
    driver, cards = read_cards()
    if not cards:
        return "no GPU: the NVIDIA driver shows none (nvidia-smi), or nvidia-ml-py is not installed"
    if not torch.cuda.is_available():
        return f"no GPU: PyTorch {torch.__version__} can use none with driver {driver}"
    if not hasattr(faiss, "StandardGpuResources") or not faiss.get_num_gpus():
        return f"no GPU: FAISS {faiss.__version__} is a CPU build, or sees none"
    return None


@pytest.fixture(scope="session", autouse=True)
def card() -> None:
    """Skip every test here where there is no card, with the reason; fail them where one is required."""
    if (reason := why_not()) and not REHEARSAL:
        (pytest.fail if REQUIRED else pytest.skip)(reason)


@pytest.fixture
def real_card() -> None:
    """Skip what a rehearsal cannot show."""
    if REHEARSAL:
        pytest.skip("a rehearsal has no card")


@pytest.fixture(scope="session")
def on_gpu() -> RetrievalConfig:
    """Insist on the card; a rehearsal searches on the CPU."""
    return RetrievalConfig(device="auto" if REHEARSAL else "gpu")


def used_memory() -> int:
    """Read how many bytes of the card are in use, by all processes."""
    _, cards = read_cards()
    return cards[0].total - cards[0].free if cards else 0


@dataclass
class Run:
    """A call of ``jobs.annotate`` on the card.

    Attributes:
        rows: Queries of the demo; all by default.
        options: Settings behind those that all runs have.
    """

    folder: Path
    index: Path
    rows: int | None = None
    options: list[str] = field(default_factory=list)

    @property
    def output(self) -> Path:
        """Folder of the annotated set."""
        return self.folder / "out"

    def start(self) -> "subprocess.Popen[str]":
        """Start the command; its log is ``log`` in the folder."""
        self.folder.mkdir(parents=True, exist_ok=True)
        queries = first_queries(QUERIES, self.rows, self.folder / "queries.parquet")
        settings = [*SETTINGS, "execution.gpus_per_actor=1", f"model.engine.gpu_memory_utilization={ENGINE_SHARE}"]
        settings += [f"decoding.{key}={value}" for key, value in DECODING.items()]
        settings += [f"retrieval.device={'auto' if REHEARSAL else 'gpu'}", *self.options]
        command = [sys.executable, "-m", "jobs.annotate", "--queries", queries, "--index", self.index]
        command += ["--output", self.output, "--model", "demo", *(w for s in settings for w in ("--set", s))]
        declared = {"RAY_OVERRIDE_RESOURCES": json.dumps({"GPU": 1, "CPU": 2})} if REHEARSAL else {}
        with (self.folder / "log").open("w") as log:
            return subprocess.Popen(
                list(map(str, command)), stdout=log, stderr=log, text=True, env={**os.environ, **declared}
            )

    def finish(self, status: int = 0, seconds: float = 240) -> "Run":
        """Run to the end, which must have this status."""
        with self.start() as process:
            try:
                assert process.wait(seconds) == status, self.log()
            finally:
                process.kill()
        return self

    def log(self) -> str:
        """Read what the command said."""
        return (self.folder / "log").read_text()

    def answers(self) -> dict[str, tuple[bool, str]]:
        """Read whether each row retrieved, and its answer, by id."""
        rows = ds.dataset(self.output / "data").to_table(columns=["id", "retrieved", "answer"]).to_pylist()
        assert len({row["id"] for row in rows}) == len(rows)
        return {row["id"]: (row["retrieved"], row["answer"]) for row in rows}


Runs = Callable[..., Run]


@pytest.fixture
def run(tmp_path: Path, demo_index: Path) -> Runs:
    """Make a run of few rows in a folder of its own."""
    return lambda *options, rows=FEW_ROWS: Run(tmp_path / "run", demo_index, rows, [QUICK_START, *options])


@pytest.fixture(scope="session")
def demo_index(card: None) -> Path:
    from jobs.demo import get_demo_index

    return get_demo_index()


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory, demo_index: Path) -> Run:
    """All demo queries, with the engine compiled as by default."""
    return Run(tmp_path_factory.mktemp("whole"), demo_index, FEW_ROWS if REHEARSAL else None).finish(seconds=300)
