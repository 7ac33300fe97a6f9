import dataclasses

import pytest

from pipeline.tuning.knobs import KNOBS, choose_knobs, leave_out_gpu_knobs


def test_arguments_are_those_of_the_engine() -> None:
    from vllm import AsyncEngineArgs

    known = {field.name for field in dataclasses.fields(AsyncEngineArgs)}
    assert {knob.argument for knob in KNOBS} <= known


def test_cpus_have_no_knobs_of_gpus() -> None:
    knobs = choose_knobs([], {})
    assert knobs == list(KNOBS)
    names = [knob.name for knob in leave_out_gpu_knobs(knobs, [])]
    assert names == ["slots", "step-tokens", "dtype", "keys", "speculation"]
    with pytest.raises(ValueError, match="--only memory: the actors have no GPU"):
        leave_out_gpu_knobs(choose_knobs(["memory", "dtype"], {}), ["memory", "dtype"])


def test_configured_values_are_left_out() -> None:
    configured = {"max_num_seqs": 256, "dtype": "half", "kv_cache_dtype": "fp8"}
    found = {knob.name: knob.values for knob in choose_knobs(["dtype", "slots", "keys"], configured)}
    assert found == {"slots": (64, 1024), "dtype": ("bfloat16",)}


def test_unknown_knobs_are_refused() -> None:
    with pytest.raises(ValueError, match="--only slot: expected one of slots, step-tokens, "):
        choose_knobs(["slot"], {})
