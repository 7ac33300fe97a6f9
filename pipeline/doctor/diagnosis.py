"""Judges the facts that ``jobs.doctor`` collects as ok, warning or failed, with advice."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from pipeline.decoding.piece_check import PIECES_ADVICE
from pipeline.doctor.device_probe import QUESTION, Answered, Searched
from pipeline.doctor.machine import Machine

GB = 1e9
# Bytes of /dev/shm, through which NCCL and vLLM's worker processes exchange data; containers have 64 MB by default.
LEAST_SHARED = 1 << 30


class Verdict(StrEnum):
    """The result of a check."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"


@dataclass(frozen=True)
class Finding:
    """The outcome of one check.

    Attributes:
        check: Name of the check.
        where: Host name, URI, model or component that was checked.
        verdict: Result of the check.
        found: Observation, in one line.
        advice: Remedy; empty if none is needed.
    """

    check: str
    where: str
    verdict: Verdict
    found: str
    advice: str = ""


def judge_pieces(difference: str | None, model: str) -> Finding:
    """Judge whether a model gets its prompts as it was trained to read them.

    Args:
        difference: outcome of ``check_pieces``.
        model: Name of the model.
    """
    if difference:
        return Finding("tokenizer", model, Verdict.WARNING, difference, PIECES_ADVICE)
    return Finding("tokenizer", model, Verdict.OK, "sample prompts have the tokens of their whole strings")


def judge_versions(machines: Sequence[Machine]) -> Iterator[Finding]:
    """Judge whether the packages on each machine are compatible, and whether all machines have the same versions."""
    first = machines[0]
    for machine in machines:
        names = ", ".join(f"{package} {version}" for package, version in machine.versions.items())
        if machine.misfits:
            advice = "run make setup (EXTRAS=gpu on GPU machines) to install the tested versions in a new environment"
            yield Finding("versions", machine.host, Verdict.WARNING, "; ".join(machine.misfits), advice)
        else:
            yield Finding("versions", machine.host, Verdict.OK, names)
        differing = [p for p in first.versions | machine.versions if first.versions.get(p) != machine.versions.get(p)]
        if differing:
            found = f"differs from {first.host} in {', '.join(differing)}"
            yield Finding(
                "versions", machine.host, Verdict.FAILED, found, "install the same environment on all machines"
            )


def judge_gpus(machine: Machine, declared: float, wanted: bool) -> Finding:
    """Judge whether driver, PyTorch, FAISS and Ray see the same number of GPUs.

    Args:
        machine: Facts about the machine.
        declared: Number of GPUs that Ray has on this machine.
        wanted: Whether the run may use GPUs; if not, failures become warnings.
    """
    counts = (len(machine.cards), machine.torch_gpus, machine.faiss_gpus, int(declared))
    if not any(counts) and machine.torch_cuda is None:
        return Finding("GPUs", machine.host, Verdict.OK, "none; jobs run on the CPU")
    found = "GPUs seen by the driver {}, PyTorch {}, FAISS {}, Ray {}".format(*counts)
    verdict, advice = _compare_counts(machine, declared)
    if verdict is Verdict.FAILED and not wanted:
        verdict = Verdict.WARNING
    return Finding("GPUs", machine.host, verdict, found, advice)


def judge_gpu_memory(machine: Machine, engine_share: float) -> Iterator[Finding]:
    """Judge whether each GPU has enough free memory for an engine.

    Args:
        machine: Facts about the machine.
        engine_share: Share of the GPU's memory that vLLM takes (``gpu_memory_utilization``).
    """
    for number, card in enumerate(machine.cards):
        sizes = f"GPU {number} ({card.name}): {card.free / GB:.1f} of {card.total / GB:.1f} GB free"
        if card.free >= engine_share * card.total:
            yield Finding("GPU memory", machine.host, Verdict.OK, sizes)
            continue
        found = f"{sizes}, but an engine takes {engine_share:g} of the total"
        advice = "end the processes that hold it (nvidia-smi), or lower model.engine.gpu_memory_utilization"
        yield Finding("GPU memory", machine.host, Verdict.FAILED, found, advice)


def _compare_counts(machine: Machine, declared: float) -> tuple[Verdict, str]:
    if not machine.torch_gpus:
        return Verdict.FAILED, _explain_torch(machine)
    if not declared:
        advice = "Ray has none, so jobs would not use them: set ray start --num-gpus, or CUDA_VISIBLE_DEVICES"
        return Verdict.FAILED, advice
    if declared > machine.torch_gpus:
        return (
            Verdict.FAILED,
            "Ray would assign GPUs that do not exist: lower ray start --num-gpus",
        )
    if not machine.faiss_gpus:
        return Verdict.WARNING, "FAISS is a CPU build and searches on the CPU: run make setup EXTRAS=gpu"
    if not machine.cards:
        return (
            Verdict.WARNING,
            "the driver's GPUs cannot be read, so their memory was not checked: run pip install nvidia-ml-py",
        )
    if len({len(machine.cards), machine.torch_gpus, machine.faiss_gpus, declared}) > 1:
        return Verdict.WARNING, "jobs would not use all GPUs: check CUDA_VISIBLE_DEVICES and ray start --num-gpus"
    return Verdict.OK, ""


def _explain_torch(machine: Machine) -> str:
    if machine.torch_cuda is None:
        return "PyTorch is a CPU build: run make setup EXTRAS=gpu; to run on the CPU, set execution.gpus_per_actor=0"
    return (
        f"PyTorch is built for CUDA {machine.torch_cuda}; driver {machine.driver or 'missing'} may be too old for it "
        "(nvidia-smi shows the newest CUDA that it supports), CUDA_VISIBLE_DEVICES may hide the GPUs, or a container "
        "may lack docker run --gpus all; on a machine without a GPU, run make setup EXTRAS=cpu"
    )


def judge_shared_memory(machine: Machine) -> Finding:
    """Judge whether there is enough shared memory for Ray's object store and the workers of one engine."""
    sizes = f"{machine.shared_free / GB:.1f} of {machine.shared_total / GB:.1f} GB of /dev/shm free"
    if machine.shared_free < LEAST_SHARED:
        advice = (
            "give containers more shared memory: docker run --shm-size=8g, or an emptyDir of medium Memory at /dev/shm"
        )
        return Finding("shared memory", machine.host, Verdict.WARNING, sizes, advice)
    return Finding("shared memory", machine.host, Verdict.OK, sizes)


def judge_search(searched: Searched, expected: str, where: str) -> Finding:
    """Judge a search with FAISS and PyTorch in one process.

    Args:
        searched: Outcome of the search.
        expected: Device that follows from ``retrieval.device`` and the assigned GPUs: ``GPU`` or ``CPU``.
        where: Component that was checked, for the finding.
    """
    found = f"FAISS beside PyTorch on the {searched.device}: {1000 * searched.seconds:.1f} ms"
    if not searched.agreed:
        advice = (
            "the CUDA libraries of PyTorch and FAISS may conflict: run make setup EXTRAS=gpu, or set "
            "retrieval.device=cpu"
        )
        return Finding("search", where, Verdict.FAILED, f"{found}, but the neighbors differ from PyTorch's", advice)
    if searched.device != expected:
        advice = "see the warnings above; set retrieval.device=cpu to accept this, or gpu for an error with the reason"
        return Finding("search", where, Verdict.WARNING, f"{found}, not on the {expected}", advice)
    return Finding("search", where, Verdict.OK, found)


def judge_answer(answered: Answered, gpus: float, where: str) -> Finding:
    """Judge the start of an engine and the row that it answered.

    Args:
        answered: Outcome of the row.
        gpus: Number of GPUs of the actor.
        where: Component that was checked, for the finding.
    """
    found = (
        f"vLLM on {answered.device} started in {answered.start_seconds:.0f} s and answered {QUESTION.query!r} in "
        f"{answered.seconds:.1f} s with {answered.answer!r}"
    )
    if not answered.answer.strip():
        return Finding(
            "engine", where, Verdict.FAILED, found, "the embedded model returned an empty answer: report this as a bug"
        )
    if (answered.device == "cpu") == bool(gpus):
        advice = (
            "the installed vLLM does not use the device that Ray assigned: run make setup with EXTRAS=gpu or EXTRAS=cpu"
        )
        return Finding("engine", where, Verdict.FAILED, f"{found}, but the actor has {gpus:g} GPU(s)", advice)
    return Finding("engine", where, Verdict.OK, found)
