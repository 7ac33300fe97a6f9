"""Commands on a cluster of two hosts that share nothing but a store, and a folder where a case says so."""

import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline.config.run import get_cache_folder
from tests.faults.campaign import model_folder
from tests.faults.harness import Job, Running, broken, write_queries
from tests.faults.hosts import HEAD, RAY, Host, Hosts, find_obstacle, two_hosts
from tests.support.building import given_vectors

pytestmark = pytest.mark.skipif(find_obstacle() is not None, reason=str(find_obstacle()))

# Variables of the worker that would lead it to another store.
ASTRAY = {"AWS_ENDPOINT_URL_S3": "http://10.78.0.9:9000", "AWS_REGION": "eu-west-9"}
WORKER = "node worker-host (10.78.0.2)"
SHARE = "use a folder that all machines share, or an object store such as s3://"
COPY = "copy the same files to every machine, or use a shared folder or an object store"


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    with two_hosts(ASTRAY) as made:
        write_queries(made.shared / "queries", 40)
        shutil.copytree(made.shared / "queries", made.bucket / "queries")
        model_folder(made.shared)
        pq.write_table(given_vectors(40)[0], made.shared / "passages.parquet")
        yield made


@pytest.fixture
def job(hosts: Hosts, request: pytest.FixtureRequest) -> Job:
    """From the store to the store, with a new output."""
    name = request.node.name.replace("[", "-").rstrip("]")
    return Job("s3://bucket/queries", f"s3://bucket/{name}", hosts.shared / "model", [], [], hosts.s3.environment)


def list_problems(hosts: Hosts, job: Job) -> list[str]:
    """List what does not hold of a finished run."""
    output = Path(job.output.replace("s3://bucket", str(hosts.bucket)))
    unmarked = [] if (output / "_SUCCESS").exists() else ["no _SUCCESS"]
    return [*unmarked, *broken(str(output), hosts.shared / "queries")]


def read_last_line(said: str) -> str:
    """Return the error line; workers may speak after it."""
    return next(line for line in reversed(said.splitlines()) if line.startswith("error: "))


def test_run_with_an_output_on_its_own_disk_stops_before_an_engine_starts(hosts: Hosts, job: Job) -> None:
    status, said = hosts.start(replace(job, output=f"{hosts.disk}/out")).ended()
    assert (status, read_last_line(said)) == (
        2,
        f"error: --output {hosts.disk}/out: {WORKER} does not see this folder, or sees another one; {SHARE}",
    )
    assert "starting engines" not in said
    assert list((hosts.head.own / "out").iterdir()) == []
    assert not (hosts.worker.own / "out").exists()


def build(hosts: Hosts, output: str, *options: str) -> tuple[int, str]:
    vectors = ["--embeddings", "vector", "--shards", "2"]
    words = ["--passages", f"{hosts.shared}/passages.parquet", "--output", output, *vectors, *options]
    # The demo encoder takes long to make; the worker does not need it, since the vectors are given.
    variables = {**hosts.s3.environment, "SELFRAG_CACHE": str(get_cache_folder())}
    return hosts.run("jobs.build_index", *words, **variables)


def test_index_on_its_own_disk_is_refused_and_an_older_one_there_is_kept(hosts: Hosts) -> None:
    older = hosts.head.own / "index"
    older.mkdir()
    (older / "index.json").write_text("{}")
    status, said = build(hosts, f"{hosts.disk}/index", "--overwrite")
    assert (status, read_last_line(said)) == (
        2,
        f"error: --output {hosts.disk}/index: {WORKER} does not see this folder, or sees another one; {SHARE}",
    )
    assert [path.name for path in older.iterdir()] == ["index.json"]


def test_variables_and_credentials_of_the_driver_reach_the_worker_and_no_file(hosts: Hosts, job: Job) -> None:
    """The worker's own variables lead to another store."""
    secret = {**job.environment, "HF_TOKEN": "hf_of_the_driver"}
    status, said = hosts.start(replace(job, environment=secret)).ended()
    assert status == 0, said[-3000:]
    assert list_problems(hosts, job) == []
    written = [file for file in hosts.folder.rglob("*") if file.is_file() and not file.is_symlink()]
    assert len([file for file in written if "logs" in file.parts]) > 10
    texts = [said.encode(), *(file.read_bytes() for file in written)]
    for word in (hosts.s3.access_key, hosts.s3.secret_key, "hf_of_the_driver"):
        assert not any(word.encode() in text for text in texts), word


@pytest.mark.slow
def test_index_in_a_shared_folder_and_in_a_store_is_complete(hosts: Hosts) -> None:
    for output, folder in ((f"{hosts.shared}/index", hosts.shared), ("s3://bucket/index", hosts.bucket)):
        status, said = build(hosts, output, "--factory", "IVF2,Flat")
        assert status == 0, said[-3000:]
        names = {path.name for path in (folder / "index").iterdir()}
        assert {"index.json", "shard-00000.faiss", "shard-00001.passages.arrow"} < names
        assert not [name for name in names if name.startswith(".")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("option", "place", "file"),
    [
        ("--queries", "queries", "a.parquet"),
        ("--model", "model", "config.json"),
        ("model.lora", "adapter", "adapter_config.json"),
        ("model.engine.tokenizer", "words", "tokenizer.json"),
    ],
)
def test_inputs_on_the_disk_of_the_driver_are_refused(
    hosts: Hosts, job: Job, option: str, place: str, file: str
) -> None:
    shutil.rmtree(hosts.head.own / place, ignore_errors=True)
    if option == "--queries":
        shutil.copytree(hosts.shared / "queries", hosts.head.own / place)
        job.queries = f"{hosts.disk}/{place}"
    else:
        (hosts.head.own / place).mkdir()
        (hosts.head.own / place / file).write_text('{"peft_type": "LORA", "r": 8}')
        job.settings.append(f"{option}={hosts.disk}/{place}" if option != "--model" else "decoding.passages=3")
    if option == "--model":
        job.model = hosts.disk / place
    status, said = hosts.start(job).ended()
    problem = "does not see this file (No such file or directory)"
    assert (status, read_last_line(said)) == (
        2,
        f"error: {option} {hosts.disk}/{place}/{file}: {WORKER} {problem}; {COPY}",
    )
    assert "starting engines" not in said


@pytest.mark.slow
def test_identical_copies_of_a_model_on_every_disk_are_enough(hosts: Hosts, job: Job) -> None:
    for host in (hosts.head, hosts.worker):
        (host.own / "copied").mkdir()
        (host.own / "copied" / "config.json").write_text("{}")
    status, said = hosts.start(replace(job, model=hosts.disk / "copied")).ended()
    assert status == 0, said[-3000:]
    (hosts.worker.own / "copied" / "config.json").write_text("{ }")
    status, said = hosts.start(replace(job, model=hosts.disk / "copied", output=f"{job.output}-other")).ended()
    assert status == 2
    assert "sees another file there, of 3 instead of 2 bytes" in read_last_line(said)


@pytest.mark.slow
def test_run_in_a_shared_folder_leaves_no_trace_of_the_check(hosts: Hosts, job: Job) -> None:
    job.output = f"{hosts.shared}/out"
    status, said = hosts.start(job).ended()
    assert status == 0, said[-3000:]
    assert list_problems(hosts, job) == []
    assert not [path.name for path in (hosts.shared / "out").iterdir() if path.name.startswith(".")]


@pytest.mark.slow
def test_worker_without_the_profile_of_the_driver_is_named_at_once(hosts: Hosts, job: Job) -> None:
    (hosts.head.own / "home" / ".aws").mkdir(exist_ok=True)
    keys = f"aws_access_key_id = {hosts.s3.access_key}\naws_secret_access_key = {hosts.s3.secret_key}\n"
    (hosts.head.own / "home" / ".aws" / "credentials").write_text(f"[nightly]\n{keys}")
    job.environment = {name: value for name, value in job.environment.items() if "KEY" not in name}
    job.environment |= {"AWS_PROFILE": "nightly", "AWS_EC2_METADATA_DISABLED": "true"}
    began = time.monotonic()
    status, said = hosts.start(job).ended()
    line = read_last_line(said)
    assert (status, line.startswith(f"error: --queries s3://bucket/queries/a.parquet: {WORKER} cannot read it (")) == (
        2,
        True,
    )
    assert time.monotonic() - began < 60
    assert not (hosts.bucket / Path(job.output).name / "data").exists()


@pytest.mark.slow
def test_machine_that_joins_later_is_checked_too(hosts: Hosts, job: Job) -> None:
    hosts.worker.kill()
    hosts.await_nodes(1)
    running = hosts.start(replace(job, output=f"{hosts.disk}/later"))
    while not (hosts.head.own / "later" / "_manifest.json").exists():
        assert running.process.poll() is None, running.ended()
        time.sleep(0.2)
    hosts.add_worker(**ASTRAY)
    status, said = running.ended()
    assert (status, read_last_line(said)) == (
        1,
        f"error: --output {hosts.disk}/later: {WORKER} does not see this folder, or sees another one; {SHARE}",
    )


@pytest.mark.slow
def test_run_outlasts_the_loss_of_its_worker_and_a_cut_of_the_link(hosts: Hosts, job: Job) -> None:
    for number, disturb in enumerate((hosts.replace_worker, lambda: hosts.cut_link(5.0))):
        run = replace(job, output=f"{job.output}-{number}")
        running = hosts.start(run)
        data = hosts.bucket / Path(run.output).name / "data"
        while not list(data.glob("*.parquet")):
            assert running.process.poll() is None, running.ended()
            time.sleep(0.1)
        disturb()
        status, said = running.ended()
        assert status == 0, said[-3000:]
        assert list_problems(hosts, run) == []


@pytest.mark.slow
def test_stopped_driver_ends_once_another_run_has_taken_over(hosts: Hosts, job: Job) -> None:
    """The rows wait until the second run has begun; the actors of the first one must not write them."""
    write_queries(hosts.bucket / "waiting", 40, dict.fromkeys(range(40), "WAITS"))
    (hosts.shared / "waits").touch()
    job.queries = "s3://bucket/waiting"
    output = hosts.bucket / Path(job.output).name
    first = hosts.start(job)
    begun = await_manifest(output, first)
    os.killpg(first.process.pid, signal.SIGSTOP)
    second = hosts.start(job, hosts.worker)
    await_manifest(output, second, begun)
    (hosts.shared / "waits").unlink()
    status, said = second.ended()
    assert status == 0, said[-3000:]
    assert "waiting 50 s for its heartbeat" in said
    assert broken(str(output), hosts.bucket / "waiting") == []
    files = {file: file.read_bytes() for file in output.rglob("*") if file.is_file()}
    os.killpg(first.process.pid, signal.SIGCONT)
    status, said = first.ended()
    assert (status, "another run has taken over, since this one was stopped" in read_last_line(said)) == (1, True)
    assert {file: file.read_bytes() for file in output.rglob("*") if file.is_file()} == files


def await_manifest(output: Path, running: Running, before: bytes = b"") -> bytes:
    """Wait until a run has written its manifest in place of another one, and return it."""
    file = output / "_manifest.json"
    while not file.exists() or (found := file.read_bytes()) in (b"", before):
        assert running.process.poll() is None, running.ended()
        time.sleep(0.2)
    return found


@pytest.mark.slow
def test_rescored_set_on_its_own_disk_is_refused(hosts: Hosts, job: Job) -> None:
    job.output = f"{hosts.shared}/candidates"
    job.settings.append("decoding.keep_candidates=true")
    status, said = hosts.start(job).ended()
    assert status == 0, said[-3000:]
    words = ["--annotations", job.output, "--set", "decoding.weights.support=2", "--output"]
    status, said = hosts.run("jobs.rescore", *words, f"{hosts.disk}/rescored")
    assert (status, read_last_line(said)) == (
        2,
        f"error: --output {hosts.disk}/rescored: {WORKER} does not see this folder, or sees another one; {SHARE}",
    )
    status, said = hosts.run("jobs.rescore", *words, f"{hosts.shared}/rescored")
    assert status == 0, said[-3000:]
    assert broken(f"{hosts.shared}/rescored", hosts.shared / "queries") == []


@pytest.mark.slow
def test_submitted_job_with_variables_of_its_own_reaches_the_store() -> None:
    """``ray job submit`` sets a ``runtime_env`` for the whole job, secrets apart: these come from the configuration."""
    with two_hosts(ASTRAY, dashboard=True) as hosts:
        write_queries(hosts.bucket / "queries", 40)
        shared = hosts.shared
        job = Job("s3://bucket/queries", "s3://bucket/out", model_folder(shared))
        keys = f"access_key: {hosts.s3.access_key}\n  secret_key: {hosts.s3.secret_key}"
        (shared / "run.yaml").write_text(f"storage:\n  {keys}\n")
        job.options = ["--config", f"{shared}/run.yaml"]
        variables = {key: value for key, value in hosts.s3.environment.items() if "KEY" not in key}
        words = ["--runtime-env-json", f'{{"env_vars": {str(variables).replace(chr(39), chr(34))}}}', "--"]
        submit = [RAY, "job", "submit", "--address", f"http://{HEAD}:8265", *words, *job.list_words()]
        done = hosts.head.run(*submit, timeout=300)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
        assert broken(str(hosts.bucket / "out"), hosts.bucket / "queries") == []


def test_nothing_is_left_of_a_host_that_ends(tmp_path: Path) -> None:
    host = Host.boot("host", "10.78.0.3", tmp_path)
    inside = host.start(sys.executable, "-c", "import time; time.sleep(600)")
    assert host.run("hostname").stdout == "host\n"
    assert (tmp_path / "disk").is_dir()
    assert not list((tmp_path / "disk").iterdir())  # its disk is mounted for itself alone
    host.kill()
    assert inside.poll() is not None
    assert "10.78.0.3" not in Path("/proc/net/fib_trie").read_text()
