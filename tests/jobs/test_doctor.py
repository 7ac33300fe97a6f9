"""The command on this machine: with the real engine once, and with an engine that costs nothing for its verdicts."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import typer
from pyarrow import fs
from ray.cluster_utils import Cluster
from typer.testing import CliRunner, Result

from jobs.doctor import doctor, use_storage
from pipeline.config.run import RunConfig
from pipeline.config.sections import StorageConfig
from pipeline.doctor.device_probe import Answered, Searched
from tests.support.s3 import S3Server

APP = typer.Typer()
APP.command()(doctor)


@pytest.mark.slow
def test_doctor_passes_on_this_machine(s3: S3Server) -> None:
    uri = f"s3://{s3.bucket}"
    done = subprocess.run(
        [sys.executable, "-m", "jobs.doctor", "--json", "--uri", uri],
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
        env=os.environ | s3.environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads(done.stdout)
    found = {(finding["check"], finding["verdict"]) for finding in record["findings"]}
    checks = {
        "model",
        "tokenizer",
        "node",
        "versions",
        "GPUs",
        "shared memory",
        "storage",
        "actors",
        "search",
        "engine",
    }
    assert found == {(check, "ok") for check in checks}
    assert record["ok"]
    (engine,) = (finding["found"] for finding in record["findings"] if finding["check"] == "engine")
    assert engine.startswith("vLLM on cpu started in ")
    left = s3.filesystem().get_file_info(fs.FileSelector(s3.bucket, recursive=True))
    assert [file.path for file in left if "selfrag-doctor" in file.path] == []


class QuickProbe:
    """Answers at once, as a machine without a GPU does."""

    def __init__(self, config: RunConfig) -> None:
        self.device = config.retrieval.device

    def search(self) -> Searched:
        if self.device == "gpu":
            raise ValueError("retrieval.device gpu: FAISS finds no GPU; install the gpu extra, or set auto or cpu")
        return Searched("CPU", True, 0.001)

    def answer(self) -> Answered:
        return Answered("cpu", "Rhine", 1.0, 0.1)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Two nodes, one of them with a declared GPU, of which nothing but Ray knows."""
    if ray.is_initialized():
        ray.shutdown()
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "num_gpus": 1, "include_dashboard": False})
    made.add_node(num_cpus=1)
    ray.init(address=made.address, logging_level="ERROR")
    yield
    ray.shutdown()
    made.shutdown()


@pytest.fixture
def quick(cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.doctor.DeviceProbe", QuickProbe)


def call(*arguments: str) -> Result:
    return CliRunner().invoke(APP, list(arguments))


def failed(result: Result) -> dict[str, dict[str, Any]]:
    """The findings that failed, by their check."""
    record = json.loads(result.stdout)
    findings = {finding["check"]: finding for finding in record["findings"] if finding["verdict"] == "failed"}
    assert (result.exit_code, record["ok"]) == (1, False) if findings else (0, True)
    return findings


@pytest.mark.usefixtures("quick")
def test_gpus_known_only_to_ray_fail() -> None:
    findings = failed(call("--json"))
    assert findings.keys() == {"GPUs", "engine"}
    assert findings["GPUs"]["found"] == "GPUs seen by the driver 0, PyTorch 0, FAISS 0, Ray 1"
    assert findings["engine"]["found"].endswith("but the actor has 1 GPU(s)")


@pytest.mark.usefixtures("quick")
def test_doctor_repeats_the_error_of_a_refused_run(tmp_path: Path) -> None:
    settings = ["execution.actors=3", "execution.cpus_per_actor=1", f"index={tmp_path / 'none'}"]
    findings = failed(call("--json", "--model", "/no/such", *(word for s in settings for word in ("--set", s))))
    assert {"model", "index", "actors"} <= findings.keys()
    assert "/no/such: its tokenizer cannot be loaded" in findings["model"]["found"]
    settings = settings[:2]
    findings = failed(call("--json", *(word for s in settings for word in ("--set", s))))
    assert "execution.actors is 3, each with 1 CPUs and 1 GPUs" in findings["actors"]["found"]


@pytest.mark.usefixtures("quick")
def test_missing_required_gpu_fails_with_advice() -> None:
    findings = failed(call("--json", "--set", "retrieval.device=gpu"))
    assert findings["search"]["found"].startswith("retrieval.device gpu: FAISS finds no GPU")
    assert findings["search"]["advice"] == "set retrieval.device=cpu to search without the GPU"


@pytest.mark.usefixtures("quick")
def test_unusable_storage_fails_and_folders_are_left_unchanged(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    findings = failed(call("--json", "--uri", str(tmp_path / "file" / "below"), "--set", "execution.gpus_per_actor=0"))
    assert str(tmp_path / "file") in findings["storage"]["found"]
    result = call(
        "--uri", str(tmp_path), "--uri", str(tmp_path / "new" / "below"), "--set", "execution.gpus_per_actor=0"
    )
    assert result.exit_code == 0, result.output
    assert "GPUs seen by the driver 0, PyTorch 0, FAISS 0, Ray 1" in result.stderr  # a warning, where none is wanted
    found = result.stderr.count("written, listed, read, deleted")
    assert found == 2 * 3  # both folders, from the driver and from each node
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_unshared_folder_of_the_same_name_is_detected(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="this machine does not see the driver's files; use object storage or a shared"):
        use_storage(str(tmp_path), StorageConfig(), f"{tmp_path}/selfrag-doctor-of-the-driver")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("quick")
def test_every_node_is_listed_with_its_resources() -> None:
    record = json.loads(call("--json").stdout)
    nodes = [finding["found"].partition(": ")[2] for finding in record["findings"] if finding["check"] == "node"]
    assert sorted(nodes) == ["1 CPUs, 0 GPUs", "2 CPUs, 1 GPUs"]
    assert sum(finding["check"] == "versions" for finding in record["findings"]) == 2


def test_misspelled_key_is_bad_usage() -> None:
    result = call("--set", "execution.actor=2")
    assert result.exit_code == 2
    assert result.stderr == "error: unknown configuration key execution.actor; did you mean execution.actors?\n"


def test_run_file_is_read_and_may_be_incomplete(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("execution: {actors: nine}\n")
    result = call("--config", str(tmp_path / "run.yaml"))
    assert result.exit_code == 2
    assert "execution.actors" in result.stderr
