from pipeline.run.driver import Summary
from pipeline.tracking.experiments import KEY_CHARACTERS, VALUE_CHARACTERS, compute_figures, list_tracked_parameters

SUMMARY = Summary(
    output="out",
    rows=8,
    errors=2,
    error_types={"Value Error!": 2},
    retrieved=3,
    prompt_tokens=100,
    generated_tokens=20,
    annotated=5,
    carried=1,
    seconds=2.5,
    max_error_rate=0.5,
)


def test_parameters_are_texts_by_dotted_key() -> None:
    manifest = {
        "configuration": {"model": {"name": "m" * 600, "engine": {}}, "columns": {"id": "id"}, "index": None},
        "queries": {"rows": 8},
        "index": None,
        "tasks": {"": {"rows": 8}},
        "versions": {"ray": "2.60"},
    }
    found = list_tracked_parameters(manifest)
    run = found.pop("run")
    assert len(run) > 8
    assert found == {
        "configuration.model.name": "m" * VALUE_CHARACTERS,
        "configuration.columns.id": "id",
        "queries.rows": "8",
        "versions.ray": "2.60",
    }


def test_characters_that_mlflow_refuses_are_replaced() -> None:
    manifest = {"configuration": {"profiles": {"q&a//long": {"metric": "match"}, "x" * 300: {"metric": "match"}}}}
    found = list_tracked_parameters(manifest)
    assert found["configuration.profiles.q_a__long.metric"] == "match"
    assert max(map(len, found)) == KEY_CHARACTERS


def test_figures_are_counts_and_rates() -> None:
    found = compute_figures(SUMMARY)
    assert found["errors.Value Error_"] == 2
    assert (found["rows_per_second"], found["retrieved_share"], found["error_share"]) == (2.0, 0.5, 0.25)
    assert (found["carried"], found["left"]) == (1, 0)
    assert not {"output", "budget", "max_error_rate"} & found.keys()
