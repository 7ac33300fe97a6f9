"""The dashboard asks for what a run counts, and for all of it."""

import json
import re
from pathlib import Path

import pipeline.run.telemetry
from pipeline.run.telemetry import ActorTelemetry, DeathTelemetry, RunTelemetry

BOARD = json.loads((Path(__file__).parents[2] / "infra" / "grafana" / "selfrag.json").read_text())
ASKED = [target["expr"] for panel in BOARD["panels"] for target in panel["targets"]]


def counted(monkeypatch) -> dict[str, type]:
    """Names of all metrics, and their kinds."""
    made = {}
    for kind in ("Counter", "Gauge", "Histogram"):
        original = getattr(pipeline.run.telemetry, kind)

        def make(name, *arguments, original=original):
            made[f"ray_{name}"] = original
            return original(name, *arguments)

        monkeypatch.setattr(pipeline.run.telemetry, kind, make)
    ActorTelemetry("run")
    RunTelemetry("run", rows=1)
    DeathTelemetry("run")
    return {name: kind.__name__ for name, kind in made.items()}


def test_dashboard_queries_exactly_the_exported_metrics(monkeypatch):
    metrics = counted(monkeypatch)
    asked = {name for expression in ASKED for name in re.findall(r"ray_selfrag_\w+", expression)}
    assert {re.sub("_(bucket|count)$", "", name) for name in asked} == set(metrics)
    assert {name for name in asked if name.endswith("_total")} == {n for n, k in metrics.items() if k == "Counter"}


def test_every_query_filters_by_run():
    for expression in ASKED:
        assert expression.count("ray_selfrag_") == expression.count('run=~"$run"'), expression
        assert expression.count("(") == expression.count(")"), expression


def test_panels_do_not_overlap():
    places = [panel["gridPos"] for panel in BOARD["panels"]]
    cells = [(x, y) for p in places for x in range(p["x"], p["x"] + p["w"]) for y in range(p["y"], p["y"] + p["h"])]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24
    assert len({panel["id"] for panel in BOARD["panels"]}) == len(places)
