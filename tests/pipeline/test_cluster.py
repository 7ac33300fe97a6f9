import contextlib
import os
import select
import signal
import sys
from collections.abc import Iterator

import pytest

from pipeline.cluster import (
    Resources,
    Room,
    check_device,
    check_sharing,
    check_temporary_folders,
    choose_actor_gpus,
    connect,
    count_servers,
    extract_cause,
    fit_actors,
    place_servers,
)
from pipeline.config.run import RunConfig

# Bytes of the path of a temporary folder that leave room for the names of the sockets in it.
RAY_LIMIT, ENGINE_LIMIT = 46 - len(str(os.getpid())), 70
LAPTOP = [Room(2.0)]
GPU_NODES = [Room(0.0), Room(16.0, (1.0, 1.0)), Room(16.0, (1.0, 1.0))]
# A head that searches and writes nothing, as in ray_cluster.yaml, beside two machines of one GPU.
BIG_HEAD = [Room(64.0), Room(8.0, (1.0,)), Room(8.0, (1.0,))]
UNEVEN = [Room(16.0, (1.0, 1.0)), Room(4.0, (1.0,))]


def config(engine=None, **execution) -> RunConfig:
    model = {"name": "m", "engine": engine or {}}
    return RunConfig.model_validate({"queries": "q", "output": "o", "model": model, "execution": execution})


def resources(rooms: list[Room], run: RunConfig) -> Resources:
    return fit_actors(rooms, run, choose_actor_gpus(rooms, run))


def test_node_resources_are_read_from_ray():
    assert Room.of({"CPU": 8.0, "GPU": 2.0, "memory": 1e9}) == Room(8.0, (1.0, 1.0))
    assert Room.of({"memory": 1e9}) == Room(0.0)


@pytest.mark.parametrize(
    ("rooms", "run", "expected"),
    [
        (LAPTOP, config(), (2.0, 0.0)),
        (LAPTOP, config(actors=2), (1.0, 0.0)),
        (GPU_NODES, config(actors=4), (8.0, 1.0)),
        (GPU_NODES, config(actors=1), (16.0, 1.0)),
        (GPU_NODES, config({"tensor_parallel_size": 2}, actors=2), (16.0, 2.0)),
        (GPU_NODES, config(actors=8, gpus_per_actor=0.5), (4.0, 0.5)),
        (BIG_HEAD, config(actors=2), (8.0, 1.0)),
        (BIG_HEAD, config(actors=2, gpus_per_actor=0), (32.0, 0.0)),
        (UNEVEN, config(actors=3), (4.0, 1.0)),
        ([Room(12.0, (1.0, 1.0))], config(actors=6, gpus_per_actor=0.3333), (2.0, 0.3333)),
    ],
)
def test_actors_share_the_nodes_that_can_hold_them(rooms, run, expected):
    assert resources(rooms, run) == Resources(*expected)


@pytest.mark.parametrize(
    ("rooms", "run", "held"),
    [
        (LAPTOP, config(actors=3), "each with 1 CPUs and 0 GPUs, but the cluster's 1 node(s) have room for 2"),
        (LAPTOP, config(gpus_per_actor=1), "have room for 0"),
        (
            GPU_NODES,
            config({"tensor_parallel_size": 4}),
            "each with 1 CPUs and 4 GPUs, but the cluster's 3 node(s) have room for 0",
        ),
        (GPU_NODES, config(actors=5), "have room for 4"),
        # Two cards have 2.0 GPUs, and hold one share of 0.6 each.
        ([Room(8.0, (1.0, 1.0))], config(actors=3, gpus_per_actor=0.6), "have room for 2"),
        ([Room(8.0, (0.5, 0.5))], config(), "each with 1 CPUs and 1 GPUs, but the cluster's 1 node(s) have room for 0"),
    ],
)
def test_actors_that_do_not_fit_are_refused(rooms, run, held):
    with pytest.raises(ValueError, match="execution.actors is") as refusal:
        resources(rooms, run)
    assert held in str(refusal.value)


@pytest.mark.parametrize(
    ("engine", "asked", "expected"),
    [
        ({}, None, 1.0),
        ({"tensor_parallel_size": 2, "pipeline_parallel_size": 2, "data_parallel_size": 2}, None, 8.0),
        ({"pipeline_parallel_size": 2}, 2.0, 2.0),
        ({}, 0.5, 0.5),
        ({"tensor_parallel_size": 2}, 0.0, 0.0),
    ],
)
def test_actor_has_the_gpus_of_a_replica(engine, asked, expected):
    assert choose_actor_gpus(GPU_NODES, config(engine, gpus_per_actor=asked)) == expected


def test_actor_has_no_gpu_if_no_node_has_one():
    assert choose_actor_gpus(LAPTOP, config({"tensor_parallel_size": 2})) == 0.0


@pytest.mark.parametrize(
    ("engine", "asked", "line"),
    [
        ({"tensor_parallel_size": 2}, 1.0, "execution.gpus_per_actor is 1, but a replica of the model takes 2 GPU(s)"),
        (
            {"pipeline_parallel_size": 2},
            0.5,
            "execution.gpus_per_actor is 0.5, but a replica of the model takes 2 GPU(s)",
        ),
        ({}, 1.5, "execution.gpus_per_actor is 1.5, but a replica of the model takes 1 GPU(s)"),
        ({}, 2.0, "set it to 1, or below 1 to share a GPU"),
    ],
)
def test_gpu_count_other_than_that_of_a_replica_is_refused(engine, asked, line):
    with pytest.raises(ValueError, match="execution.gpus_per_actor is") as refusal:
        choose_actor_gpus(GPU_NODES, config(engine, gpus_per_actor=asked))
    assert line in str(refusal.value)


@pytest.mark.parametrize(
    ("run", "gpus"),
    [
        (config(actors=2), 1.0),
        (config(actors=2), 0.0),
        (config({"gpu_memory_utilization": 0.45}, actors=2), 0.5),
        (config({"gpu_memory_utilization": 0.2833}, actors=3), 1 / 3),
        (config({"gpu_memory_utilization": 0.7}, gpus_per_server=0.25), 0.75),
    ],
)
def test_engines_that_fit_into_their_shares_are_accepted(run, gpus):
    check_sharing(run, gpus)


@pytest.mark.parametrize(
    ("run", "gpus", "line"),
    [
        (config(actors=2), 0.5, "(0.92 + 0.05 = 0.97); set model.engine.gpu_memory_utilization to 0.45 or less"),
        # The first engine's contexts leave less than half to the second.
        (
            config({"gpu_memory_utilization": 0.5}, actors=2),
            0.5,
            "is 0.5, but the engine takes 0.5 of the GPU's memory and its processes 0.05 (0.5 + 0.05 = 0.55)",
        ),
        (
            config({"gpu_memory_utilization": 0.4}, actors=9),
            0.25,
            "(0.4 + 0.05 = 0.45); set model.engine.gpu_memory_utilization to 0.20 or less",
        ),
        (config({"gpu_memory_utilization": 0.9}, gpus_per_server=0.25), 0.75, "utilization to 0.70 or less"),
        (config(), 0.5, "to 0.45 or less"),  # the other half belongs to another process
        (config(), 0.04, "is 0.04, but an actor's processes alone need 0.05; increase it"),
    ],
)
def test_engines_that_exceed_the_memory_of_their_gpus_are_refused(run, gpus, line):
    with pytest.raises(ValueError, match="execution.gpus_per_actor is") as refusal:
        check_sharing(run, gpus)
    assert line in str(refusal.value)


def searching(device: str, **execution) -> RunConfig:
    run = config(**execution)
    retrieval = run.retrieval.model_copy(update={"device": device})
    return run.model_copy(update={"index": "i", "retrieval": retrieval})


def test_gpu_search_requires_a_gpu_from_ray():
    with pytest.raises(ValueError, match="retrieval.device is gpu, but the actors get no GPU"):
        check_device(searching("gpu"), 0.0, 0)
    with pytest.raises(ValueError, match="retrieval.device is gpu, but execution.gpus_per_server is 0"):
        check_device(searching("gpu"), 1.0, 2)
    check_device(searching("gpu", gpus_per_server=0.5), 1.0, 2)
    check_device(searching("auto"), 0.0, 2)


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
def test_default_server_count_is_one_per_node_with_cpus(run, shards, expected):
    assert count_servers(GPU_NODES, run, shards) == expected


def test_server_count_is_at_least_one_before_nodes_join():
    assert count_servers([Room(0.0)], partitioned(), 8) == 1


def test_servers_leave_remaining_resources_to_the_actors():
    run = partitioned(3, cpus_per_server=3, gpus_per_server=1, actors=1)
    left, homes = place_servers(GPU_NODES, run.execution, 3)
    assert left == [Room(0.0), Room(10.0, (0.0, 0.0)), Room(13.0, (1.0, 0.0))]
    assert homes == [1, 2, 1]
    assert fit_actors(left, run, 1.0) == Resources(13.0, 1.0)


def test_server_shares_fill_one_gpu_before_using_another():
    left, homes = place_servers([Room(4.0, (1.0, 1.0))], partitioned(3, gpus_per_server=0.4).execution, 3)
    assert [[round(card, 4) for card in room.cards] for room in left] == [[0.2, 0.6]]
    assert homes == [0, 0, 0]
    assert left[0].cpus == 1.0
    assert fit_actors(left, config(), 0.5).gpus == 0.5
    with pytest.raises(ValueError, match="have room for 0"):
        fit_actors(left, config(), 1.0)


def test_servers_are_spread_over_nodes_that_can_hold_them():
    rooms = [Room(4.0), Room(2.5, (1.0,)), Room(0.5)]
    left, homes = place_servers(rooms, partitioned(3).execution, 3)
    assert homes == [0, 1, 0]
    assert [room.cpus for room in left] == [2.0, 1.5, 0.5]


def test_servers_may_require_no_resources():
    left, homes = place_servers(LAPTOP, partitioned(2, cpus_per_server=0).execution, 2)
    assert (left, homes) == (LAPTOP, [0, 0])


@pytest.mark.parametrize("needs", [{"cpus_per_server": 9}, {"gpus_per_server": 0.6, "cpus_per_server": 0}])
def test_servers_that_do_not_fit_are_refused(needs):
    run = partitioned(5, **needs)
    with pytest.raises(ValueError, match=r"5 shard servers, each with .* do not fit on the cluster's 3 node"):
        place_servers(GPU_NODES, run.execution, 5)


@pytest.mark.parametrize(
    ("setting", "variable", "expected"),
    [(None, None, "local"), (None, "10.0.0.1:6379", "10.0.0.1:6379"), ("auto", "10.0.0.1:6379", "auto")],
)
def test_existing_ray_cluster_is_joined_only_if_configured(setting, variable, expected, monkeypatch):
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
        (RAY_SAYS.replace("KINDError", "pipeline.storage.location.StorageError"), "shard-00001.faiss: missing"),
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
def test_cause_is_the_first_error_in_one_line(text, expected):
    assert extract_cause(RuntimeError(text)) == expected


@pytest.mark.parametrize(
    ("ray", "temporary", "named"),
    [
        (None, 1, None),
        (None, RAY_LIMIT, None),
        (None, RAY_LIMIT + 1, "/tttt"),
        (None, 200, "/tttt"),
        (RAY_LIMIT, 1, None),
        (RAY_LIMIT + 1, 1, "/rrrr"),
        (RAY_LIMIT, ENGINE_LIMIT, None),
        (RAY_LIMIT, ENGINE_LIMIT + 1, "/tttt"),
        (1, 200, "/tttt"),
        (200, 200, "/rrrr"),
    ],
)
def test_temporary_folders_must_leave_room_for_sockets(monkeypatch, ray, temporary, named):
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    if ray is not None:
        monkeypatch.setenv("RAY_TMPDIR", "/" + "r" * (ray - 1))
    folder = "/" + "t" * (temporary - 1)
    monkeypatch.setenv("TMPDIR", folder)
    monkeypatch.setattr("tempfile.tempdir", folder)
    monkeypatch.setattr("pipeline.cluster.is_writable", lambda _: True)
    if named is None:
        check_temporary_folders()
        return
    with pytest.raises(ValueError, match=rf"^temporary folder {named}\w+: .*set TMPDIR and RAY_TMPDIR to a folder"):
        check_temporary_folders()


@pytest.mark.parametrize("variable", ["TMPDIR", "RAY_TMPDIR"])
@pytest.mark.parametrize("folder", ["/dev/null", "/dev/null/a"])
def test_temporary_folder_of_ray_must_be_writable(monkeypatch, variable, folder):
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv(variable, folder)
    with pytest.raises(ValueError, match=f"^temporary folder {folder}: .*set TMPDIR and RAY_TMPDIR to another one$"):
        check_temporary_folders()


@pytest.fixture
def handled() -> Iterator[list[int]]:
    """Signals that this program's handler of SIGTERM has received."""
    numbers: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: numbers.append(number))
    yield numbers
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("end", [lambda: sys.exit(15), lambda: sys.exit(1), lambda: None])
def test_signal_that_arrives_while_ray_starts_is_handled_afterwards(handled, monkeypatch, end):
    def start(**_: object) -> None:
        signal.signal(signal.SIGTERM, lambda *_: end())  # as Ray does
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", start)
    with contextlib.suppress(SystemExit):
        connect(config().execution)
    assert handled == [signal.SIGTERM]
    os.kill(os.getpid(), signal.SIGTERM)
    assert handled == [signal.SIGTERM] * 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_watcher_of_signals_receives_those_that_arrive_while_ray_starts(handled, monkeypatch, number):
    received, noting = os.pipe()
    os.set_blocking(noting, False)
    seen = []

    def start(**_: object) -> None:
        os.kill(os.getpid(), number)
        if select.select([received], [], [], 10)[0]:
            seen.append(os.read(received, 1)[0])

    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", start)
    before = signal.set_wakeup_fd(noting), signal.signal(signal.SIGINT, lambda *_: None)
    try:
        connect(config().execution)
        assert (seen, signal.set_wakeup_fd(-1)) == ([number], noting)
    finally:
        signal.set_wakeup_fd(before[0])
        signal.signal(signal.SIGINT, before[1])
        os.close(received)
        os.close(noting)


def test_program_without_a_handler_keeps_that_of_ray(monkeypatch):
    def theirs(*_: object) -> None:
        """Stands for Ray's."""

    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", lambda **_: signal.signal(signal.SIGTERM, theirs))
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        connect(config().execution)
        assert signal.getsignal(signal.SIGTERM) is theirs
    finally:
        signal.signal(signal.SIGTERM, before)
