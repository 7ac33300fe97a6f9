import asyncio
import random

import pytest

from pipeline.engine.postmortem import Death
from pipeline.run.attempts import MAX_CONSECUTIVE_CRASHES, Attempts, CrashLoopError, SharedExclusiveLock
from pipeline.storage.lease import EXPIRY_S, HEARTBEAT_S


def test_deaths_are_counted_until_the_unit_ends() -> None:
    attempts = Attempts(MAX_CONSECUTIVE_CRASHES, "run")
    for what in ("a", "a", "b"):
        attempts.begin(what)
    assert (attempts.count_deaths("a"), attempts.count_deaths("b"), attempts.count_deaths("c")) == (2, 1, 0)
    attempts.end("a")
    assert (attempts.count_deaths("a"), attempts.count_deaths("b")) == (0, 1)


def test_nothing_is_written_while_the_lease_has_no_heartbeat(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("pipeline.run.attempts.read_clock", lambda: clock[0])
    attempts = Attempts(MAX_CONSECUTIVE_CRASHES, "run")
    assert attempts.begin_writing("u")
    clock[0] = EXPIRY_S - HEARTBEAT_S / 2
    assert [attempts.begin_writing("u") for _ in range(9)] == [False] * 9
    attempts.renew_permit()
    assert attempts.begin_writing("u")


def test_row_counts_are_reset_when_their_unit_ends() -> None:
    attempts = Attempts(MAX_CONSECUTIVE_CRASHES, "run")
    attempts.begin("u")
    attempts.begin("u", 1)
    attempts.begin("u", 10)
    attempts.begin("v", 1)
    attempts.end("u", 1)
    assert [attempts.count_deaths("u", row) for row in (None, 1, 10)] == [1, 0, 1]
    attempts.end("u")
    assert [attempts.count_deaths("u", row) for row in (None, 10)] == [0, 0]
    assert [attempts.count_deaths("v", row) for row in (None, 1)] == [0, 1]


def test_consecutive_deaths_without_progress_end_the_run() -> None:
    attempts = Attempts(max_crashes=3, run="run")
    for _ in range(4):
        attempts.begin("a")
    attempts.begin("b")
    attempts.end("b")
    for _ in range(3):
        attempts.begin("a")
    attempts.record_death(Death("CUDA error: device lost", out_of_memory=False), "a")
    with pytest.raises(
        CrashLoopError,
        match=r"^4 consecutive attempts crashed without progress; last engine failure: CUDA error: device lost$",
    ):
        attempts.begin("a")


def test_units_in_flight_are_those_that_have_begun_and_not_ended() -> None:
    attempts = Attempts(MAX_CONSECUTIVE_CRASHES, "run")
    for unit in ("ended", "dead", "given back", "waits", "runs"):
        assert attempts.may_begin(unit, 10)
        if unit != "waits":  # for a place of its own
            attempts.begin(unit)
    attempts.end("ended")
    attempts.record_death(Death("lost", out_of_memory=False), "dead")
    attempts.withdraw("given back")
    assert attempts.recall(5) == 2
    assert not attempts.may_begin("runs", 10)  # its process was killed, and another one has it now
    assert attempts.recall(5) == 1


def test_start_does_not_count_as_progress() -> None:
    attempts = Attempts(max_crashes=3, run="run")
    attempts.begin("a")
    for _ in range(3):
        attempts.begin_start()
        attempts.end_start()
        attempts.begin("a")
    with pytest.raises(CrashLoopError, match=r"^4 consecutive attempts"):
        attempts.begin("a")


def test_deaths_while_writing_are_counted_until_the_unit_ends() -> None:
    attempts = Attempts(MAX_CONSECUTIVE_CRASHES, "run")
    for _ in range(2):
        for _ in range(3):
            attempts.begin_writing("u")
        attempts.end("u")
    for _ in range(3):
        attempts.begin_writing("u")
        attempts.end("u", 1)
    with pytest.raises(CrashLoopError, match=r"^3 processes died while writing the files of unit u$"):
        attempts.begin_writing("u")


def test_engine_deaths_are_kept_until_their_row_ends() -> None:
    attempts, death = Attempts(MAX_CONSECUTIVE_CRASHES, "run"), Death("killed", out_of_memory=True)
    attempts.begin("a")
    attempts.record_death(death, "a")
    assert (attempts.list_engine_deaths("a"), attempts.list_engine_deaths("b")) == ([death], [])
    attempts.end("a")
    assert attempts.list_engine_deaths("a") == []


def test_unfinished_start_counts_as_a_crash() -> None:
    attempts = Attempts(max_crashes=2, run="run")
    for _ in range(3):
        attempts.begin_start()
    with pytest.raises(CrashLoopError, match=r"^3 consecutive attempts"):
        attempts.begin_start()


class Cluster:
    """Attempts, and the nodes that they see as lost."""

    def __init__(self, max_crashes: int = MAX_CONSECUTIVE_CRASHES) -> None:
        self.lost: set[str] = set()
        self.attempts = Attempts(max_crashes, "run", lambda: frozenset(self.lost))

    def begin(self, nodes: str, row: int | None = None) -> None:
        """Begin an attempt at unit ``u`` on each of the nodes, one letter each; none of them ends."""
        for node in nodes:
            self.attempts.begin("u", row, node)


@pytest.mark.parametrize("row", [None, 3])
@pytest.mark.parametrize(
    ("nodes", "lost", "deaths"),
    [
        ("a", "", 1),
        ("a", "a", 0),
        ("a", "b", 1),
        ("ab", "a", 1),
        ("ab", "ab", 0),
        ("aab", "a", 1),
        ("aab", "b", 2),
        ("abab", "a", 2),
        ("abcdefg", "abcdefg", 0),
        ("abcdefga", "bcdefg", 2),
        ("", "a", 0),
    ],
)
def test_deaths_of_lost_nodes_count_for_nothing(nodes: str, lost: str, deaths: int, row: int | None) -> None:
    cluster = Cluster()
    cluster.begin(nodes, row)
    assert cluster.attempts.count_deaths("u", row) == len(nodes)
    cluster.lost |= set(lost)
    assert cluster.attempts.count_deaths("u", row) == deaths


def test_nodes_are_judged_when_deaths_are_counted() -> None:
    """Ray restarts an actor elsewhere before it notices that the whole node is gone."""
    cluster = Cluster()
    cluster.begin("ab", 1)
    assert cluster.attempts.count_deaths("u", 1) == 2
    cluster.lost.add("a")
    assert cluster.attempts.count_deaths("u", 1) == 1
    cluster.lost.add("b")
    assert cluster.attempts.count_deaths("u", 1) == 0


def test_unknown_nodes_are_never_asked_about() -> None:
    def fail() -> frozenset[str]:
        raise AssertionError

    attempts = Attempts(MAX_CONSECUTIVE_CRASHES, "run", fail)
    attempts.begin("u")
    attempts.begin("u")
    assert attempts.count_deaths("u") == 2


@pytest.mark.parametrize(("lost", "crashes"), [("", 4), ("b", 4), ("a", None), ("ab", None)])
def test_lost_nodes_do_not_end_the_run(lost: str, crashes: int | None) -> None:
    cluster = Cluster(max_crashes=3)
    cluster.lost |= set(lost)
    if crashes is None:
        cluster.begin("a" * 20 + "b")
        return
    with pytest.raises(CrashLoopError, match=f"^{crashes} consecutive attempts"):
        cluster.begin("a" * 20 + "b")


@pytest.mark.parametrize("lost", ["", "a"])
def test_starts_on_a_lost_node_are_no_crashes(lost: str) -> None:
    cluster = Cluster(max_crashes=3)
    cluster.lost |= set(lost)
    for number in range(20):
        if number == 4 and not lost:
            with pytest.raises(CrashLoopError, match="^4 consecutive attempts"):
                cluster.attempts.begin_start("a")
            return
        cluster.attempts.begin_start("a")


def test_writers_that_end_with_their_node_are_not_counted() -> None:
    cluster = Cluster()
    for node in "abcdef":
        cluster.begin(node)
        cluster.attempts.begin_writing("u")
        cluster.lost.add(node)
    for _ in range(3):
        cluster.begin("g")
        cluster.attempts.begin_writing("u")
    with pytest.raises(CrashLoopError, match="^3 processes died while writing the files of unit u$"):
        cluster.attempts.begin_writing("u")


def test_engines_that_end_with_their_node_are_no_cause() -> None:
    cluster, first, second = Cluster(), Death("killed", out_of_memory=False), Death("memory", out_of_memory=True)
    for node, death in (("a", first), ("b", second)):
        cluster.begin(node, 1)
        cluster.attempts.record_death(death, "u", 1)
    cluster.lost.add("a")
    assert cluster.attempts.list_engine_deaths("u", 1) == [second]
    assert cluster.attempts.count_deaths("u", 1) == 1


def test_death_after_the_end_of_its_unit_is_no_attempt() -> None:
    attempts = Attempts(MAX_CONSECUTIVE_CRASHES, "run")
    attempts.begin("u")
    attempts.end("u")
    attempts.record_death(Death("late", out_of_memory=False), "u")
    assert attempts._units == {}


@pytest.mark.parametrize(("nodes", "settled"), [("", True), ("h", True), ("hh", True), ("ha", False), ("a", False)])
def test_deaths_are_final_on_the_node_of_the_run(nodes: str, settled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.run.attempts.get_node", lambda: "h")
    cluster = Cluster()
    cluster.begin(nodes, 1)
    assert cluster.attempts.is_settled("u", 1) == settled


def test_finished_rows_in_sub_files_are_progress_until_their_unit_ends() -> None:
    attempts = Attempts(max_crashes=3, run="run")
    for _ in range(20):
        attempts.begin("u")
        attempts.begin_partial("u")
        assert attempts.has_partial("u")
    assert not attempts.has_partial("v")
    attempts.end("u")
    assert not attempts.has_partial("u")


@pytest.mark.parametrize("seed", range(20))
async def test_exclusive_holders_are_alone_and_all_are_admitted(seed: int) -> None:
    rng, lock = random.Random(seed), SharedExclusiveLock()
    inside: list[str] = []
    passed = 0

    async def visit(name: str, alone: bool) -> None:
        nonlocal passed
        for _ in range(rng.randrange(4)):
            await asyncio.sleep(0)
        async with lock.hold_exclusive() if alone else lock.hold_shared():
            inside.append(name)
            for _ in range(rng.randrange(6)):
                assert "alone" not in inside or inside == ["alone"]
                await asyncio.sleep(0)
            inside.remove(name)
        passed += 1

    visits = [visit("alone" if n % 3 == 0 else f"v{n}", n % 3 == 0) for n in range(30)]
    await asyncio.wait_for(asyncio.gather(*visits), 5)
    assert passed == 30


async def test_shared_holders_run_concurrently() -> None:
    lock, inside, most = SharedExclusiveLock(), 0, 0

    async def visit() -> None:
        nonlocal inside, most
        async with lock.hold_shared():
            inside += 1
            most = max(most, inside)
            await asyncio.sleep(0.01)
            inside -= 1

    await asyncio.gather(*(visit() for _ in range(5)))
    assert most == 5


async def test_canceled_exclusive_wait_admits_shared_holders() -> None:
    lock = SharedExclusiveLock()
    async with lock.hold_shared():
        waiting = asyncio.create_task(lock.hold_exclusive().__aenter__())
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        async with asyncio.timeout(1), lock.hold_shared():
            pass
