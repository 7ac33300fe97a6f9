import pytest

from pipeline.cluster import Room
from pipeline.indexing.actor_pool import choose_cpu_pool, choose_pool

LAPTOP = [Room(8.0)]
GPU_NODES = [Room(64.0), Room(96.0, (1.0,) * 8), Room(32.0, (1.0,) * 2)]


@pytest.mark.parametrize(
    ("nodes", "asked", "pieces", "expected"),
    [
        (LAPTOP, None, 4, (1, 8, 0)),
        (LAPTOP, 3, 4, (3, 2, 0)),
        (LAPTOP, 16, 16, (16, 1, 0)),
        (LAPTOP * 3, None, 2, (2, 8, 0)),
        ([Room(16.0), Room(4.0)], None, 10, (2, 4, 0)),  # one for each machine, not both on the larger one
        ([Room(0.0), *LAPTOP], None, 9, (1, 8, 0)),
        (GPU_NODES, None, 32, (10, 12, 1)),  # ten of 13 would not fit on 96 and 32
        (GPU_NODES, None, 4, (4, 32, 1)),
        (GPU_NODES, 20, 32, (20, 6, 0.5)),
    ],
)
def test_default_builder_count_is_one_per_gpu_or_machine(nodes, asked, pieces, expected):
    assert choose_pool(nodes, asked, pieces) == expected


@pytest.mark.parametrize(("asked", "pieces", "actors"), [(None, 100, 12), (None, 5, 5), (3, 100, 3), (None, 0, 1)])
def test_work_without_an_encoder_takes_a_cpu_and_no_gpu(asked: int | None, pieces: int, actors: int) -> None:
    rooms = [Room.of({"CPU": 8.0, "GPU": 2.0}), Room.of({"CPU": 4.0})]
    assert choose_cpu_pool(rooms, asked, pieces) == (actors, 1.0, 0.0)
