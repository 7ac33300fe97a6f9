import pytest

from jobs.cluster import Resources, share_of
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
