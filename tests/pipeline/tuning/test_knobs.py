import dataclasses

import pytest

from pipeline.tuning.knobs import KNOBS, choose_knobs


def test_arguments_are_those_of_the_engine() -> None:
    from vllm import AsyncEngineArgs

    known = {field.name for field in dataclasses.fields(AsyncEngineArgs)}
    assert {knob.argument for knob in KNOBS} <= known


def test_cpus_have_no_knobs_of_gpus() -> None:
    names = [knob.name for knob in choose_knobs([], {}, 0)]
    assert names == ["slots", "step-tokens", "dtype", "keys", "speculation"]
    assert [knob.name for knob in choose_knobs([], {}, 1)] == [knob.name for knob in KNOBS]


def test_configured_values_are_left_out() -> None:
    configured = {"max_num_seqs": 256, "dtype": "half", "kv_cache_dtype": "fp8"}
    found = {knob.name: knob.values for knob in choose_knobs(["dtype", "slots", "keys"], configured, 0)}
    assert found == {"slots": (64, 1024), "dtype": ("bfloat16",)}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("slot", "--only slot: expected one of slots, step-tokens, "),
        ("memory", "--only memory: the actors have no GPU"),
    ],
)
def test_unknown_and_idle_knobs_are_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose_knobs([name], {}, 0)
