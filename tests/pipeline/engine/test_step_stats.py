from types import SimpleNamespace

from pipeline.engine.step_stats import EngineLoad

CONFIG = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=8))


def test_each_step_is_passed_to_the_callback():
    load, told = EngineLoad(CONFIG, 0), []

    def step(running: int, waiting: int, ended: int) -> None:
        load.record(
            scheduler_stats=SimpleNamespace(num_running_reqs=running, num_waiting_reqs=waiting),
            iteration_stats=SimpleNamespace(finished_requests=[None] * ended),
            engine_idx=0,
        )

    step(1, 0, 0)
    load.on_step = lambda *counts: told.append(counts)
    step(2, 1, 3)
    load.record(scheduler_stats=None, iteration_stats=None)
    load.record(scheduler_stats=SimpleNamespace(num_running_reqs=4, num_waiting_reqs=0), iteration_stats=None)
    step(0, 0, 2)
    assert load.slots == 8
    assert told == [(2, 1, 3), (4, 0, 0), (0, 0, 2)]
