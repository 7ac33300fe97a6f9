import pytest

from jobs.cluster import Resources, beside_servers, connect, reason, server_count, share_of
from pipeline.config import RunConfig

LAPTOP = [{"CPU": 2.0}]
GPU_NODES = [{"CPU": 0.0}, {"CPU": 16.0, "GPU": 2.0}, {"CPU": 16.0, "GPU": 2.0}]


def config(engine=None, **execution) -> RunConfig:
    model = {"name": "m", "engine": engine or {}}
    return RunConfig.model_validate({"queries": "q", "output": "o", "model": model, "execution": execution})


@pytest.mark.parametrize(
    ("nodes", "run", "expected"),
    [
        (LAPTOP, config(), (2.0, 0.0)),
        (LAPTOP, config(actors=2), (1.0, 0.0)),
        (GPU_NODES, config(actors=4), (8.0, 1.0)),
        (GPU_NODES, config(actors=1), (16.0, 1.0)),
        (GPU_NODES, config({"tensor_parallel_size": 2}, actors=2), (16.0, 2.0)),
        (GPU_NODES, config(actors=8, gpus_per_actor=0.5), (4.0, 0.5)),
    ],
)
def test_actors_share_the_nodes(nodes, run, expected):
    assert share_of(nodes, run) == Resources(*expected)


@pytest.mark.parametrize(
    ("nodes", "run"),
    [
        (LAPTOP, config(actors=3)),
        (LAPTOP, config(gpus_per_actor=1)),
        (GPU_NODES, config({"tensor_parallel_size": 4})),
        (GPU_NODES, config(actors=5)),
    ],
)
def test_actors_that_do_not_fit_are_refused(nodes, run):
    with pytest.raises(ValueError, match="execution.actors is"):
        share_of(nodes, run)


def partitioned(shard_servers=None, **execution) -> RunConfig:
    run = config(shard_servers=shard_servers, **execution)
    return run.model_copy(update={"retrieval": run.retrieval.model_copy(update={"topology": "partitioned"})})


@pytest.mark.parametrize(
    ("run", "shards", "expected"),
    [
        (config(shard_servers=3), 8, 0),
        (partitioned(), 8, 2),
        (partitioned(), 1, 1),
        (partitioned(5), 8, 5),
        (partitioned(5), 3, 3),
        (partitioned(5), 0, 0),
    ],
)
def test_there_is_a_server_for_each_node_with_cpus_unless_told_otherwise(run, shards, expected):
    assert server_count(GPU_NODES, run, shards) == expected


def test_there_is_a_server_where_all_nodes_are_still_to_come():
    assert server_count([{"CPU": 0.0}], partitioned(), 8) == 1


def test_servers_leave_the_rest_to_the_actors():
    run = partitioned(3, cpus_per_server=3, gpus_per_server=1, actors=1)
    left, homes = beside_servers(GPU_NODES, run.execution, 3)
    assert left == [{"CPU": 0.0}, {"CPU": 10.0, "GPU": 0.0}, {"CPU": 13.0, "GPU": 1.0}]
    assert homes == [1, 2, 1]
    assert GPU_NODES[1] == {"CPU": 16.0, "GPU": 2.0}
    assert share_of(left, run) == Resources(13.0, 1.0)


def test_servers_are_spread_over_the_nodes_that_hold_them():
    nodes = [{"CPU": 4.0}, {"CPU": 2.5, "GPU": 1.0}, {"CPU": 0.5}]
    left, homes = beside_servers(nodes, partitioned(3).execution, 3)
    assert homes == [0, 1, 0]
    assert [node["CPU"] for node in left] == [2.0, 1.5, 0.5]


@pytest.mark.parametrize("needs", [{"cpus_per_server": 9}, {"gpus_per_server": 2, "cpus_per_server": 0}])
def test_servers_that_do_not_fit_are_refused(needs):
    run = partitioned(3, **needs)
    with pytest.raises(ValueError, match="3 shard servers, each with .* do not fit on the cluster's 3 node"):
        beside_servers(GPU_NODES, run.execution, 3)


@pytest.mark.parametrize(
    ("setting", "variable", "expected"),
    [(None, None, "local"), (None, "10.0.0.1:6379", "10.0.0.1:6379"), ("auto", "10.0.0.1:6379", "auto")],
)
def test_ray_of_another_run_is_not_joined_unasked(setting, variable, expected, monkeypatch):
    asked = []
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", lambda address, **_: asked.append(address))
    monkeypatch.delenv("RAY_ADDRESS")
    if variable:
        monkeypatch.setenv("RAY_ADDRESS", variable)
    connect(config(ray_address=setting).execution)
    assert asked == [expected]


RAY_SAYS = """\x1b[36mray::MapBatches(F)()\x1b[39m (pid=1, ip=10.0.0.1)
  File "x.py", line 7, in __call__
    raise KINDError("shard-00001.faiss: missing")
KINDError: shard-00001.faiss: missing

The above exception was the direct cause of the following exception:

ray.exceptions.UserCodeException: UDF failed to process a data block.
To change retry attempts, configure `ray.data.DataContext.get_current()` (any task)."""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (RAY_SAYS.replace("KINDError", "ValueError"), "shard-00001.faiss: missing"),
        (RAY_SAYS.replace("KINDError", "pipeline.storage.StorageError"), "shard-00001.faiss: missing"),
        (RAY_SAYS.replace("KINDError", "KeyError"), "KeyError: shard-00001.faiss: missing"),
        ("s3://b/x: access denied", "s3://b/x: access denied"),
        ("OSError: status 503\n\npipeline.storage.StorageError: s3://b/x: status 503", "s3://b/x: status 503"),
        (
            "ray.exceptions.ActorUnavailableError: no route\nray.exceptions.UserCodeException: failed\nTo change",
            "ray.exceptions.ActorUnavailableError: no route",
        ),
        ("The actor died.\n\tIts node was removed.", "Its node was removed."),
        ("", "RuntimeError('')"),
    ],
)
def test_the_reason_is_the_first_error_in_one_line(text, expected):
    assert reason(RuntimeError(text)) == expected
