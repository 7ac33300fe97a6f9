"""Runs one of whose machines will be reclaimed."""

import subprocess
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.faults.campaign import model_folder
from tests.faults.harness import Job, wait_for, write_queries
from tests.faults.hosts import RAY
from tests.faults.series import cluster, on

# Seconds from the notice until the machine is gone.
NOTICE_S = 20
PREEMPTION = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]


@pytest.mark.slow
def test_node_that_is_drained_gives_back_its_units_and_others_continue_them(tmp_path: Path) -> None:
    write_queries(tmp_path / "queries", 60, {57: "WAITS"})
    (tmp_path / "waits").touch()
    job = Job(str(tmp_path / "queries"), str(tmp_path / "out"), model_folder(tmp_path))
    pids, partial = tmp_path / "pids", tmp_path / "out" / "_partial"
    with cluster(tmp_path, cpus=0, nodes=1) as made:
        (reclaimed,) = made.worker_nodes
        running = on(made, job).start()
        wait_for(lambda: len(list((tmp_path / "out").glob("data/*.parquet"))) == 5)
        made.add_node(num_cpus=1)
        deadline = ["--deadline-remaining-seconds", str(NOTICE_S)]
        node = ["--address", made.address, "--node-id", reclaimed.node_id]
        subprocess.run([RAY, "drain-node", *node, *PREEMPTION, *deadline], check=True, capture_output=True)
        noticed = time.monotonic()
        wait_for(lambda: list(partial.glob("*.parquet")), NOTICE_S)
        kept = pq.read_table(partial, columns=["row"])["row"].to_pylist()
        wait_for(lambda: len(list(pids.iterdir())) == 2)  # an actor starts on the other node
        assert time.monotonic() - noticed < NOTICE_S
        made.remove_node(reclaimed, False)
        (tmp_path / "waits").unlink()
        status, said = running.ended()
    assert job.problems(tmp_path / "queries", status, said) == []
    assert sorted(kept) == [row for row in range(10) if row != 7]
    assert "nodes that are being drained gave back 1 unit(s); 1 begin again" in said
