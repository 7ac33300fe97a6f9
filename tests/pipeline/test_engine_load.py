from types import SimpleNamespace

from pipeline.engine_load import EngineLoad

CONFIG = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=8))


def test_each_step_is_told_to_who_watches():
    load, told = EngineLoad(CONFIG, 0), []
    load.record(SimpleNamespace(num_running_reqs=1, num_waiting_reqs=0))
    load.watcher = lambda running, waiting: told.append((running, waiting))
    load.record(SimpleNamespace(num_running_reqs=2, num_waiting_reqs=1))
    load.record(None)
    load.record(SimpleNamespace(num_running_reqs=0, num_waiting_reqs=0))
    assert load.slots == 8
    assert told == [(2, 1), (0, 0)]
