import pytest
from pydantic import ValidationError

from pipeline.config.sections import DecodingConfig, Profile, Weights
from pipeline.decoding.profiles import Tasks, load_built_in_profiles
from pipeline.decoding.types import Query


def test_built_in_profiles_cover_the_tasks_of_the_paper() -> None:
    profiles = load_built_in_profiles()
    expected = {"popqa", "triviaqa", "nq", "arc_challenge", "pubhealth", "fever", "asqa", "eli5", "biography"}
    assert profiles.keys() == expected
    long = {name for name, profile in profiles.items() if profile.decoding.get("segments", 1) > 1}
    assert long == {"asqa", "eli5", "biography"}


def test_asqa_always_retrieves_and_cites() -> None:
    query, config = Tasks(DecodingConfig()).apply(Query("q", "Who won?", task="asqa"))
    assert (config.threshold, config.segments, config.beam_width, config.citations) == (0.0, 7, 2, True)
    assert query.instruction is not None
    assert query.instruction.startswith("Answer the following question. The question may be ambiguous")
    assert query.instruction.endswith("\n\n## Input:\n\nWho won?")
    assert query.query == "Who won?"


def test_run_settings_override_profile_settings() -> None:
    tasks = Tasks(DecodingConfig(threshold=0.5, keep_candidates=True))
    config = tasks.apply(Query("q", "?", task="asqa"))[1]
    assert (config.threshold, config.keep_candidates, config.segments) == (0.5, True, 7)


def test_weights_of_profile_and_run_are_merged() -> None:
    tasks = Tasks(
        DecodingConfig(weights=Weights(relevance=2.0)), {"law": Profile(decoding={"weights": {"support": 3.0}})}
    )
    weights = tasks.apply(Query("q", "?", task="law"))[1].weights
    assert (weights.relevance, weights.support, weights.utility) == (2.0, 3.0, 0.5)


def test_closed_set_answers_have_one_segment() -> None:
    tasks = Tasks(DecodingConfig(segments=7))
    assert tasks.apply(Query("q", "?", choices=("A", "B")))[1].segments == 1
    assert tasks.apply(Query("q", "?", task="pubhealth"))[1].segments == 1
    assert tasks.apply(Query("q", "?", task="popqa"))[1].segments == 7


def test_profile_that_contradicts_the_run_is_named() -> None:
    run = DecodingConfig(explore=True, keep_candidates=True)
    tasks = Tasks(run, {"law": Profile(decoding={"mode": "always"})})
    assert tasks.describe("")["decoding"]["explore"] is True  # rows of other tasks are not concerned
    with pytest.raises(ValueError, match=r"with profile law\): explore needs"):
        tasks.describe("law")


def test_explicit_setting_equal_to_the_default_overrides_the_profile() -> None:
    assert Tasks(DecodingConfig(threshold=0.2)).apply(Query("q", "?", task="asqa"))[1].threshold == 0.2


@pytest.mark.parametrize("task", [None, "qa"])
def test_rows_without_a_profile_are_unchanged(task: str | None) -> None:
    query = Query("q", "Who won?", task=task)
    assert Tasks(DecodingConfig()).apply(query) == (query, DecodingConfig())


def test_rows_without_a_task_use_the_default_task() -> None:
    tasks = Tasks(DecodingConfig(), default="pubhealth")
    assert tasks.apply(Query("q", "Water is wet."))[0].choices == ("true", "false")
    assert tasks.apply(Query("q", "Water is wet.", task="qa"))[0].choices == ()


def test_choices_of_a_row_override_those_of_its_task() -> None:
    query, _ = Tasks(DecodingConfig()).apply(Query("q", "It rains.", task="fever", choices=("yes", "no")))
    assert query.choices == ("yes", "no")
    assert query.instruction is not None
    assert "Answer with one of: yes, no." in query.instruction


def test_query_that_looks_like_a_placeholder_is_plain_text() -> None:
    query, _ = Tasks(DecodingConfig()).apply(Query("q", "What is {choices}?", task="fever"))
    assert query.instruction is not None
    assert query.instruction.endswith("What is {choices}?")


def test_user_profile_can_replace_a_built_in_one() -> None:
    tasks = Tasks(DecodingConfig(), {"nq": Profile(instruction="Q: {query}")})
    assert tasks.apply(Query("q", "Who?", task="nq"))[0].instruction == "Q: Who?"


@pytest.mark.parametrize(
    ("tree", "problem"),
    [
        ({"instruction": "Answer."}, "must contain {query}"),
        ({"decoding": {"explore": True}}, "explore can only be set for the whole run"),
        ({"decoding": {"treshold": 0.1}}, "treshold"),
        ({"metric": "bleu"}, "metric"),
    ],
)
def test_bad_profiles_are_refused(tree: dict[str, object], problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        Profile.model_validate(tree)
