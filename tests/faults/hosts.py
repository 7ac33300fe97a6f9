"""Two hosts on this machine that share nothing but a network and what is installed: each is a set of namespaces.

A host's processes are all in its own namespaces of processes, mounts, network and names, none of which has a name
outside. When its first process ends, the kernel ends the others and removes everything that was made; it ends with the
tests, since it reads from a pipe of theirs.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from tests.faults.harness import Job, Running
from tests.support.s3 import S3Server, create_server, prepare_rclone

ROOT = Path(__file__).parents[2]
RAY = str(Path(sys.executable).with_name("ray"))
HEAD, WORKER = "10.78.0.1", "10.78.0.2"
RAY_PORT, S3_PORT = 6379, 9000
# Bytes of Ray's object store on each host.
STORE_BYTES = 100_000_000
# What processes of the hosts inherit. Ray's own token lies in a home folder that they do not have.
ENVIRONMENT = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "HF_HUB_OFFLINE": "1"}
_FIRST_PROCESS = """
set -e
hostname {name}
ip link set lo up
ip addr add {address}/32 dev lo
mount --bind {own} {disk}
echo ready
exec cat
"""


def find_obstacle() -> str | None:
    """Return the reason why no hosts can be made here, if any."""
    missing = [name for name in ("ip", "unshare", "nsenter", "mount") if shutil.which(name) is None]
    if os.geteuid() != 0 or missing:
        return f"needs root and {', '.join(missing)}" if missing else "needs root"
    tried = subprocess.run([*_UNSHARE, "ip", "link", "set", "lo", "up"], capture_output=True, text=True, check=False)
    return f"namespaces cannot be made: {tried.stderr.strip()}" if tried.returncode else None


_UNSHARE = ["unshare", "--fork", "--kill-child", "--pid", "--mount-proc", "--mount", "--net", "--uts", "--ipc"]


@dataclass
class Host:
    """A running host.

    Attributes:
        own: its disk, as this machine sees it.
        disk: path of every host's disk, as the host itself sees it.
        started: processes that were started in it from here.
    """

    name: str
    address: str
    own: Path
    disk: Path
    first: subprocess.Popen[str]
    started: list[subprocess.Popen[Any]] = field(default_factory=list)
    ray: subprocess.Popen[Any] | None = None

    @classmethod
    def boot(cls, name: str, address: str, folder: Path) -> "Host":
        """Start a host with an empty disk."""
        own, disk = folder / name, folder / "disk"
        shutil.rmtree(own, ignore_errors=True)
        for made in (own / "home", own / "tmp", disk):
            made.mkdir(parents=True, exist_ok=True)
        script = _FIRST_PROCESS.format(name=name, address=address, own=own, disk=disk)
        first = subprocess.Popen(
            [*_UNSHARE, "sh", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert first.stdout is not None
        host = cls(name, address, own, disk, first)
        if first.stdout.readline() != "ready\n":
            host.kill()
            raise AssertionError(f"{name} does not start")
        return host

    @property
    def pid(self) -> int:
        """Its first process, as this machine sees it."""
        children = Path(f"/proc/{self.first.pid}/task/{self.first.pid}/children").read_text().split()
        return int(children[0])

    def command(self, *words: str) -> list[str]:
        """Return the command that runs another one in the host."""
        return ["nsenter", "--target", str(self.pid), "--pid", "--mount", "--net", "--uts", "--ipc", "--", *words]

    def environment(self, **more: str) -> dict[str, str]:
        """Return the environment of its processes, whose home folder, caches and temporary files are on its disk."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "RAY_", "SELFRAG_", "XDG_"))}
        places = {"HOME": str(self.disk / "home"), "TMPDIR": str(self.disk / "tmp"), "PYTHONPATH": str(ROOT)}
        return {**kept, **ENVIRONMENT, **places, **more}

    def start(self, *words: str, log: IO[Any] | None = None, **more: str) -> subprocess.Popen[Any]:
        """Start a command in the host, with more variables."""
        out = log or subprocess.DEVNULL
        process = subprocess.Popen(
            self.command(*words),
            stdout=out,
            stderr=out,
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # its process group reaches into the host
            env=self.environment(**more),
        )
        self.started.append(process)
        return process

    def run(self, *words: str, timeout: float = 120.0, **more: str) -> subprocess.CompletedProcess[str]:
        """Run a command in the host to its end."""
        return subprocess.run(
            self.command(*words),
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
            env=self.environment(**more),
        )

    def kill(self) -> None:
        """End all its processes at once, as a power cut does."""
        self.first.kill()
        self.first.wait()
        for process in self.started:
            process.kill()  # one that was stopped would not notice that its command has ended
            process.wait()

    def start_ray(self, *options: str, **more: str) -> None:
        """Start its part of the cluster."""
        fixed = [f"--node-ip-address={self.address}", f"--object-store-memory={STORE_BYTES}", "--block"]
        with (self.own / "ray.log").open("w") as log:
            self.ray = self.start(RAY, "start", *fixed, *options, log=log, **more)


@dataclass
class Hosts:
    """A Ray cluster on two hosts, with an S3 store on an address that both reach; the head's host takes no actors.

    Attributes:
        folder: everything of theirs, as this machine sees it.
        worker_environment: variables of the worker's Ray alone.
    """

    folder: Path
    head: Host
    worker: Host
    s3: S3Server
    worker_environment: dict[str, str] = field(default_factory=dict)

    @property
    def disk(self) -> Path:
        """Path of a disk that is another one on each host."""
        return self.head.disk

    @property
    def bucket(self) -> Path:
        """Folder of the store's bucket, as this machine sees it."""
        return self.folder / "store" / self.s3.bucket

    @property
    def shared(self) -> Path:
        """A folder that is the same on both hosts."""
        return self.folder / "shared"

    @property
    def address(self) -> str:
        """Address of the cluster."""
        return f"{HEAD}:{RAY_PORT}"

    def run(self, module: str, *options: str, **more: str) -> tuple[int, str]:
        """Run a module in the head's host: exit status and what it said."""
        done = self.head.run(sys.executable, "-m", module, *options, timeout=240.0, RAY_ADDRESS=self.address, **more)
        return done.returncode, done.stderr

    def start(self, job: Job, host: Host | None = None) -> Running:
        """Start a job in a host, by default the head's."""
        settings = [*job.settings, f"execution.ray_address={self.address}"]
        return HostedJob(**{**vars(job), "settings": settings}, host=host or self.head).start()

    def add_worker(self, **environment: str) -> None:
        """Boot the worker's host, link it to the head's, and let it join the cluster."""
        self.worker = Host.boot("worker-host", WORKER, self.folder)
        link(self.head, self.worker)
        self.join(**environment)

    def join(self, **environment: str) -> None:
        """Let the worker's host join the cluster."""
        self.worker_environment = environment
        self.worker.start_ray(f"--address={self.address}", "--num-cpus=2", **environment)
        self.await_nodes(2)

    def replace_worker(self) -> None:
        """End the worker's host at once, and boot another one, with an empty disk."""
        self.worker.kill()
        self.add_worker(**self.worker_environment)

    def tend_worker(self) -> None:
        """Boot another host for the worker if Ray has left this one, as it does after a long cut of the link."""
        if self.worker.ray is None or self.worker.ray.poll() is not None:
            self.replace_worker()

    def await_end(self, running: Running, timeout: float = 300.0) -> tuple[int, str]:
        """Wait for the end of a job, with a worker's host all the while: exit status and what it said."""
        until = time.monotonic() + timeout
        while running.process.poll() is None and time.monotonic() < until:
            self.tend_worker()
            time.sleep(1)
        return running.ended(1.0)

    def cut_link(self, seconds: float) -> None:
        """Cut the link between the hosts for some seconds."""
        self.head.run("ip", "link", "set", "eth0", "down")
        time.sleep(seconds)
        self.head.run("ip", "link", "set", "eth0", "up")

    def await_nodes(self, count: int) -> None:
        """Wait until so many nodes are alive.

        Raises:
            AssertionError: they are not in time.
        """
        counted = self.head.run(sys.executable, "-c", _AWAIT_NODES, self.address, str(count))
        assert counted.returncode == 0, f"not {count} nodes: {counted.stderr[-2000:]}"


_AWAIT_NODES = """
import sys, time
from ray._private.state import GlobalStateAccessor
from ray._raylet import GcsClientOptions
until = time.monotonic() + 60
options = GcsClientOptions.create(sys.argv[1], None, allow_cluster_id_nil=True, fetch_cluster_id_if_nil=False)
accessor, alive = GlobalStateAccessor(options), -1
while alive != int(sys.argv[2]):
    assert time.monotonic() < until, alive
    time.sleep(0.5)
    if accessor.connect():
        alive = sum(node["Alive"] for node in accessor.get_node_table())
"""


@dataclass
class HostedJob(Job):
    """A job that runs in a host."""

    host: Host | None = None

    def start(self) -> Running:
        """Start the command in the host."""
        assert self.host is not None
        log = tempfile.TemporaryFile("w+")  # noqa: SIM115  closed with the object that holds it
        return Running(self.host.start(*self.list_words(), log=log, **self.environment), log)


def link(one: Host, other: Host) -> None:
    """Join two hosts by a cable; it is gone when one of them ends."""
    words = ["ip", "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", str(other.pid)]
    # Network devices are made from here, where the other host's first process has its number.
    inside = ["nsenter", "--target", str(one.pid), "--net", "--"]
    # The kernel removes that of a host that has ended after a while.
    subprocess.run([*inside, "ip", "link", "delete", "eth0"], check=False, capture_output=True)
    subprocess.run([*inside, *words], check=True)
    for host in (one, other):
        for step in (["addr", "add", f"{host.address}/24", "dev", "eth0"], ["link", "set", "eth0", "up"]):
            subprocess.run(host.command("ip", *step), check=True)


_DASHBOARD = {False: ["--include-dashboard=false"], True: [f"--dashboard-host={HEAD}"]}


@contextmanager
def two_hosts(worker_environment: Mapping[str, str] | None = None, dashboard: bool = False) -> Iterator[Hosts]:
    """Run a cluster on two hosts while the body runs.

    Args:
        worker_environment: variables of the worker's Ray alone.
        dashboard: whether jobs can be submitted.
    """
    # Ray's sockets have short paths.
    folder = Path(tempfile.mkdtemp(prefix="hosts"))
    head = Host.boot("head-host", HEAD, folder)
    hosts = Hosts(folder, head, head, create_server(HEAD, S3_PORT))
    try:
        for made in (folder / "store", hosts.shared):
            made.mkdir()
        command, variables = prepare_rclone(hosts.s3, folder / "store")
        head.start(*command, log=None, **variables)
        head.start_ray("--head", f"--port={RAY_PORT}", "--num-cpus=0", *_DASHBOARD[dashboard])
        hosts.await_nodes(1)
        hosts.add_worker(**(worker_environment or {}))
        yield hosts
    finally:
        hosts.worker.kill()
        head.kill()
        shutil.rmtree(folder, ignore_errors=True)
