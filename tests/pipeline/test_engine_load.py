from types import SimpleNamespace

from pipeline.engine_load import EngineLoad

CONFIG = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=8))


def test_a_step_lasts_from_the_one_before_it_and_idle_time_counts_for_none(monkeypatch):
    load, told = EngineLoad(CONFIG, 0), []
    load.watcher = lambda running, waiting: told.append((running, waiting))
    for now, running, waiting in [(10.0, 2, 1), (10.5, 2, 0), (11.5, 2, 0), (11.75, 0, 0), (90.0, 1, 0), (90.25, 1, 0)]:
        monkeypatch.setattr("time.monotonic", lambda now=now: now)
        load.record(SimpleNamespace(num_running_reqs=running, num_waiting_reqs=waiting))
        load.record(None)
    assert load.slots == 8
    assert load.seconds == {(2, False): 1.5, (0, False): 0.25, (1, False): 0.25}
    assert told == [(2, 1), (2, 0), (2, 0), (0, 0), (1, 0), (1, 0)]
