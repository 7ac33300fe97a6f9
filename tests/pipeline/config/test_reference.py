from pathlib import Path

from pipeline.config.reference import describe_keys, format_reference
from pipeline.config.run import is_fixed

FILE = Path(__file__).parents[3] / "infra" / "CONFIGURATION.md"
KEYS = {key.name: key for key in describe_keys()}


def test_committed_reference_is_up_to_date():
    assert FILE.read_text("utf-8") == format_reference(), (
        "run: python -m pipeline.config.reference > infra/CONFIGURATION.md"
    )


def test_every_key_has_a_description():
    silent = [name for name, key in KEYS.items() if not key.meaning]
    assert silent == [], "complete the docstrings in pipeline/config/run.py: python -m pipeline.config.reference"


def test_types_limits_and_defaults_match_the_models():
    assert (KEYS["decoding.threshold"].kind, KEYS["decoding.threshold"].default) == ("number ≥ 0, ≤ 1", "0.2")
    assert (KEYS["retrieval.cache_gb"].kind, KEYS["retrieval.cache_gb"].default) == ("number > 0", "null")
    assert (KEYS["model.name"].kind, KEYS["model.name"].default) == ("text", None)
    assert (KEYS["model.engine"].kind, KEYS["model.engine"].default) == ("mapping", "{}")
    assert (KEYS["on_failure.command"].kind, KEYS["on_failure.command"].default) == ("list of texts", "[]")
    assert KEYS["storage.secret_key"].kind == "secret text"
    assert KEYS["decoding.mode"].kind == "`adaptive` or `always` or `never`"


def test_engine_arguments_are_fixed_except_for_parallel_sizes():
    assert is_fixed("model.engine.dtype")
    assert not is_fixed("model.engine.tensor_parallel_size")


def test_every_description_is_a_complete_phrase():
    pieces = ("of ", "by ", "where ", "such as ", "gets ", "or ", "and ", "so ")
    assert [name for name, key in KEYS.items() if key.meaning.startswith(pieces)] == []


def test_multi_line_and_shared_descriptions_are_complete():
    assert KEYS["storage.session_token"].meaning.startswith("Credentials of S3; prefer variables")
    assert KEYS["decoding.critic"].meaning == (
        "`reflection` reads the reflection tokens of a model trained to write them; "
        "`prompted` asks any instruct model in words."
    )


def test_only_keys_that_affect_results_are_fixed():
    fixed = {"decoding.weights.support", "execution.unit_rows", "model.engine", "profiles.NAME.metric", "columns.id"}
    free = {"execution.actors", "retrieval.threads", "storage.region", "on_failure.webhook", "queries", "index"}
    assert {name: KEYS[name].fixed for name in fixed | free} == dict.fromkeys(fixed, True) | dict.fromkeys(free, False)
