from pathlib import Path
from typing import Any

import pytest
import ray

from pipeline.config.sections import StorageConfig
from pipeline.nodes import check
from pipeline.nodes.access import Access, NodeAccessError, Packed
from pipeline.nodes.environment import Environment
from pipeline.nodes.places import Output, Refusal, Source

NAMES = {"a": "host-a (10.0.0.1)", "b": "host-b (10.0.0.2)"}
REFUSAL = Refusal("--output", "/disk/out", "does not see this folder", "share it")


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Play the trials of two nodes: those that are alive, and their answers; others stay out."""

    def start(alive: str, answers: dict[str, Any]) -> list[tuple[str, Refusal | None]]:
        def get(reference: str) -> Any:
            if isinstance(answers[reference], Exception):
                raise answers[reference]
            return answers[reference]

        monkeypatch.setattr("ray.nodes", lambda: [{"NodeID": node, "Alive": node in alive} for node in NAMES])
        monkeypatch.setattr("ray.wait", lambda waiting, timeout: ([one for one in waiting if one in answers], []))
        monkeypatch.setattr("ray.get", get)
        monkeypatch.setattr(check, "PATIENCE_S", 0.0)
        return sorted(check._collect_answers({node: f"reference-{node}" for node in NAMES}, NAMES))

    return start


@pytest.mark.parametrize(
    ("alive", "answers", "expected"),
    [
        ("ab", {"reference-a": None, "reference-b": REFUSAL}, [("a", None), ("b", REFUSAL)]),
        ("a", {"reference-a": None}, [("a", None)]),
        ("", {}, []),
        ("b", {"reference-a": None, "reference-b": None}, [("b", None)]),
        ("ab", {"reference-a": None, "reference-b": ray.exceptions.WorkerCrashedError()}, [("a", None)]),
        ("ab", {"reference-a": None, "reference-b": ray.exceptions.TaskUnschedulableError("gone")}, [("a", None)]),
    ],
)
def test_answers_of_living_nodes_count(play: Any, alive: str, answers: dict[str, Any], expected: list[Any]) -> None:
    assert play(alive, answers) == expected


def test_silent_node_is_named(play: Any) -> None:
    with pytest.raises(NodeAccessError, match=r"^node host-b \(10\.0\.0\.2\) does not answer within 0 s"):
        play("ab", {"reference-a": None})


def test_argument_is_unpickled_only_in_the_environment_of_the_driver(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("ray.get_runtime_context", lambda: type("Context", (), {"get_node_id": lambda _: "home"})())
    environment = Environment({"SELFRAG_TRIED": "yes"})
    monkeypatch.delenv("SELFRAG_TRIED", raising=False)
    access = Access((Source("--queries", {"/away": 1}),), Output(str(tmp_path)), StorageConfig(), environment, "home")
    assert Packed.pack(Witness(), access).unpack().seen == "yes"


class Witness:
    """Notes the environment in which it is unpickled."""

    seen: str | None = None

    def __setstate__(self, _: dict[str, Any]) -> None:
        import os

        self.seen = os.environ.get("SELFRAG_TRIED")

    def __getstate__(self) -> dict[str, Any]:
        return {"any": "state"}


def test_access_of_a_shard_server_is_the_index_alone(tmp_path: Path) -> None:
    sources = (Source("--queries", {"/q": 1}), Source("--index", {"/i": 1}))
    access = Access(sources, Output(str(tmp_path)), StorageConfig(), Environment())
    assert access.narrow("--index") == Access(sources[1:], None, StorageConfig(), Environment())
