from dataclasses import replace

import pytest

from pipeline.doctor.device_probe import Answered, Searched
from pipeline.doctor.diagnosis import (
    Verdict,
    judge_answer,
    judge_gpu_memory,
    judge_gpus,
    judge_pieces,
    judge_search,
    judge_shared_memory,
    judge_versions,
)
from pipeline.doctor.machine import Card, Machine

GPU = Machine(
    host="a",
    versions={"vllm": "0.32.0"},
    misfits=(),
    cards=(Card("H100", 79_000_000_000, 80_000_000_000),),
    driver="580.1",
    torch_gpus=1,
    torch_cuda="13.0",
    faiss_gpus=1,
    shared_free=8 << 30,
    shared_total=8 << 30,
)
CPU = replace(GPU, cards=(), driver=None, torch_gpus=0, torch_cuda=None, faiss_gpus=0)


def test_equal_versions_on_all_machines_are_ok():
    findings = list(judge_versions([GPU, replace(GPU, host="b")]))
    assert [(finding.where, finding.verdict) for finding in findings] == [("a", Verdict.OK), ("b", Verdict.OK)]


def test_machines_with_different_versions_fail():
    _, _, differing = judge_versions([GPU, replace(GPU, host="b", versions={"vllm": "0.31.0", "ray": "2.60.0"})])
    assert (differing.where, differing.verdict, differing.found) == ("b", Verdict.FAILED, "differs from a in vllm, ray")


@pytest.mark.parametrize(
    ("difference", "verdict", "advice"),
    [(None, Verdict.OK, ""), ("'▁Al' instead of 'Al' at token 9", Verdict.WARNING, "set model.engine.tokenizer")],
)
def test_prompts_with_other_tokens_than_their_string_are_a_warning(difference, verdict, advice):
    finding = judge_pieces(difference, "llama")
    assert (finding.check, finding.where, finding.verdict) == ("tokenizer", "llama", verdict)
    assert finding.found == (difference or "sample prompts have the tokens of their whole strings")
    assert advice in finding.advice


def test_untested_versions_are_a_warning():
    (finding,) = judge_versions([replace(GPU, misfits=("vllm 0.23.0, expected ==0.32.0",))])
    assert (finding.verdict, finding.found) == (Verdict.WARNING, "vllm 0.23.0, expected ==0.32.0")
    assert "make setup" in finding.advice


@pytest.mark.parametrize(
    ("machine", "declared", "verdict", "advice"),
    [
        (GPU, 1.0, Verdict.OK, ""),
        (CPU, 0.0, Verdict.OK, ""),
        (replace(GPU, cards=()), 1.0, Verdict.WARNING, "memory was not checked: run pip install nvidia-ml-py"),
        (replace(GPU, cards=2 * GPU.cards), 1.0, Verdict.WARNING, "jobs would not use all GPUs"),
        (replace(GPU, torch_gpus=2, faiss_gpus=2, cards=2 * GPU.cards), 1.0, Verdict.WARNING, "would not use all GPUs"),
        (replace(CPU, torch_cuda="13.0"), 0.0, Verdict.FAILED, "on a machine without a GPU, run make setup EXTRAS=cpu"),
        (replace(GPU, faiss_gpus=0), 1.0, Verdict.WARNING, "FAISS is a CPU build"),
        (GPU, 0.0, Verdict.FAILED, "Ray has none"),
        (GPU, 2.0, Verdict.FAILED, "Ray would assign GPUs that do not exist"),
        (replace(GPU, torch_gpus=0, torch_cuda=None), 1.0, Verdict.FAILED, "PyTorch is a CPU build"),
        (replace(GPU, torch_gpus=0), 1.0, Verdict.FAILED, "built for CUDA 13.0; driver 580.1 may be too old"),
        (CPU, 1.0, Verdict.FAILED, "PyTorch is a CPU build"),
    ],
)
def test_gpus_missing_from_one_layer_are_diagnosed(machine, declared, verdict, advice):
    finding = judge_gpus(machine, declared, wanted=True)
    assert finding.verdict is verdict
    assert advice in finding.advice
    counts = (len(machine.cards), machine.torch_gpus, machine.faiss_gpus, int(declared))
    seen = "GPUs seen by the driver {}, PyTorch {}, FAISS {}, Ray {}".format(*counts)
    assert finding.found == ("none; jobs run on the CPU" if machine == CPU and not declared else seen)


def test_problems_of_unused_gpus_are_only_warnings():
    assert judge_gpus(GPU, 0.0, wanted=False).verdict is Verdict.WARNING
    assert judge_gpus(replace(GPU, torch_gpus=0, torch_cuda=None), 1.0, wanted=False).verdict is Verdict.WARNING


def test_too_little_free_gpu_memory_fails_with_both_numbers():
    (memory,) = judge_gpu_memory(GPU, 0.92)
    assert (memory.verdict, memory.found) == (Verdict.OK, "GPU 0 (H100): 79.0 of 80.0 GB free")
    (memory,) = judge_gpu_memory(replace(GPU, cards=(Card("H100", 10_000_000_000, 80_000_000_000),)), 0.92)
    assert memory.verdict is Verdict.FAILED
    assert memory.found == "GPU 0 (H100): 10.0 of 80.0 GB free, but an engine takes 0.92 of the total"


def test_small_shared_memory_is_a_warning():
    assert judge_shared_memory(GPU).verdict is Verdict.OK
    finding = judge_shared_memory(replace(GPU, shared_free=64_000_000, shared_total=64_000_000))
    assert (finding.verdict, finding.found) == (Verdict.WARNING, "0.1 of 0.1 GB of /dev/shm free")
    assert "--shm-size" in finding.advice


@pytest.mark.parametrize(
    ("searched", "expected", "verdict"),
    [
        (Searched("GPU", True, 0.001), "GPU", Verdict.OK),
        (Searched("CPU", True, 0.001), "CPU", Verdict.OK),
        (Searched("CPU", True, 0.001), "GPU", Verdict.WARNING),
        (Searched("GPU", False, 0.001), "GPU", Verdict.FAILED),
    ],
)
def test_search_results_and_device_are_checked(searched, expected, verdict):
    assert judge_search(searched, expected, "actor").verdict is verdict


@pytest.mark.parametrize(
    ("answered", "gpus", "verdict"),
    [
        (Answered("cuda", "Rhine", 75, 0.1), 1.0, Verdict.OK),
        (Answered("cpu", "Rhine", 30, 1), 0.0, Verdict.OK),
        (Answered("cpu", "Rhine", 30, 1), 1.0, Verdict.FAILED),
        (Answered("cuda", " ", 75, 0.1), 1.0, Verdict.FAILED),
    ],
)
def test_engine_device_must_match_its_actor(answered, gpus, verdict):
    assert judge_answer(answered, gpus, "actor").verdict is verdict
