"""``ray job submit``, as in infra/CLUSTER.md, to a cluster with its job server on loopback; the engine is scripted."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.faults.campaign import model_folder
from tests.faults.harness import broken, redone, write_queries, written

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@dataclass(frozen=True)
class Server:
    """A cluster's job server."""

    address: str

    def ask(self, *words: str) -> tuple[int, str]:
        """Status and words of a ``ray job`` command."""
        command = [str(Path(sys.executable).with_name("ray")), "job", words[0], "--address", self.address, *words[1:]]
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=ROOT, env=environment)
        return done.returncode, done.stdout + done.stderr

    def submit(self, folder: Path, *options: str, queries: str = "queries") -> tuple[int, str]:
        """Submit a run; the working folder is the project, of which Ray leaves out what git ignores."""
        settings = ["execution.ray_address=auto", "execution.unit_rows=10", "execution.cpus_per_actor=0.5"]
        run = ["--queries", f"{folder}/{queries}", "--output", f"{folder}/out", "--model", str(folder / "model")]
        run += [word for setting in settings for word in ("--set", setting)]
        return self.ask(
            "submit", "--working-dir", ".", *options, "--", sys.executable, "-m", "tests.faults.scripted", *run
        )


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    from ray.cluster_utils import Cluster

    ports = {"dashboard_port": free_port(), "dashboard_agent_listen_port": free_port()}
    head = {"num_cpus": 2, "include_dashboard": True, "dashboard_host": "127.0.0.1", **ports}
    made = Cluster(initialize_head=True, head_node_args=head)
    found = Server(f"http://127.0.0.1:{ports['dashboard_port']}")
    until = time.monotonic() + 240  # the server answers before it can start anything
    while found.ask("submit", "--", "true")[0] != 0 and time.monotonic() < until:
        time.sleep(1)
    yield found
    made.shutdown()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_queries(tmp_path / "queries", 3000)
    model_folder(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_stopped_run_resumes_when_submitted_again(server: Server, folder: Path) -> None:
    assert server.submit(folder, "--no-wait", "--submission-id", "night")[0] == 0
    until = time.monotonic() + 240
    while len(written(f"{folder}/out")) < 2 and time.monotonic() < until:
        time.sleep(0.05)
    assert server.ask("stop", "night")[0] == 0
    before = written(f"{folder}/out")
    assert 2 <= len(before) < 300
    status, said = server.submit(folder)
    assert status == 0, said[-3000:]
    assert f"{len(before)} of 300 units already done" in said
    assert "3000 of 3000 rows answered, 0 in errors/" in said
    assert redone(before, f"{folder}/out") == []
    assert broken(f"{folder}/out", folder / "queries") == []


def test_refused_run_fails_with_its_error_in_the_log(server: Server, folder: Path) -> None:
    status, said = server.submit(folder, "--submission-id", "refused", queries="nothing")
    assert status == 1
    assert f"error: {folder}/nothing: not found" in said
    assert "exit code 2" in said
    assert "error: " in server.ask("logs", "refused")[1]


def test_job_server_listens_only_on_loopback(server: Server) -> None:
    port = server.address.rsplit(":", 1)[1]
    listening = Path("/proc/net/tcp").read_text().splitlines()
    places = {line.split()[1] for line in listening if line.split()[3] == "0A"}
    assert [place for place in places if place.endswith(f":{int(port):04X}")] == [f"0100007F:{int(port):04X}"]
