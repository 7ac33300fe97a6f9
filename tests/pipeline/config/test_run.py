from datetime import date
from pathlib import Path

import pytest

from pipeline.config.loading import flatten
from pipeline.config.run import RunConfig, get_cache_folder, load_config, load_storage, make_paths_absolute

NEEDED = {"queries": "q", "output": "o", "model.name": "m"}


def test_flags_override_settings_and_settings_override_the_file(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("queries: file\noutput: file\nmodel: file\ndecoding: {threshold: 0.5, passages: 2}\n")
    config = load_config(str(file), ["output=set", "decoding.threshold=0.3"], {"model.name": "flag", "index": None})
    assert (config.queries, config.output, config.model.name) == ("file", "set", "flag")
    assert (config.decoding.threshold, config.decoding.passages) == (0.3, 2)


def test_setting_values_are_parsed_as_yaml():
    settings = ["model.engine.max_model_len=2048", "decoding.keep_candidates=true", "model.engine.dtype=half"]
    config = load_config(None, settings, NEEDED)
    assert config.model.engine == {"max_model_len": 2048, "dtype": "half"}
    assert config.decoding.keep_candidates is True


@pytest.mark.parametrize("text", ["- a list", "a: [", "just words"])
def test_file_that_is_not_a_mapping_is_named(tmp_path, text):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match="run.yaml: "):
        load_config(str(file), [], NEEDED)


def test_missing_file_is_named():
    with pytest.raises(ValueError, match="configuration /nowhere/run.yaml"):
        load_config("/nowhere/run.yaml", [], NEEDED)


def test_all_problems_are_reported_in_one_line():
    with pytest.raises(ValueError) as caught:
        load_config(None, ["decoding.passages=0", "color=red"], NEEDED)
    assert "unknown configuration key color" in str(caught.value)
    assert "decoding.passages" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_credentials_are_never_recorded():
    settings = ["storage.access_key=KEY-ID", "storage.secret_key=SECRET", "storage.endpoint_url=http://127.0.0.1:9"]
    config = load_config(None, settings, NEEDED)
    assert config.storage.secret_key is not None
    assert config.storage.secret_key.get_secret_value() == "SECRET"
    for text in (str(config), repr(config), str(config.to_record()), str(config.get_fixed_settings())):
        assert "SECRET" not in text
        assert "KEY-ID" not in text
    assert config.to_record()["storage"]["endpoint_url"] == "http://127.0.0.1:9"


def test_secrets_are_kept_out_of_records_and_messages():
    config = load_config(None, ["model.engine.hf_token=hf_abc", "model.engine.max_num_batched_tokens=64"], NEEDED)
    assert config.to_record()["model"]["engine"] == {"max_num_batched_tokens": 64}
    with pytest.raises(ValueError, match="storage.secret_key") as caught:
        load_config(None, ["storage.secret_key=12345678"], NEEDED)
    assert "12345678" not in str(caught.value)


def test_local_paths_are_made_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    flags = {"queries": "q", "output": "s3://bucket/o", "index": "~/i", "model.name": "model"}
    flags |= {"retrieval.encoder": "model", "retrieval.rerank.model": "model"}
    config = make_paths_absolute(load_config(None, [], flags))
    assert (config.queries, config.output) == (str(tmp_path / "q"), "s3://bucket/o")
    assert config.index == str(Path.home() / "i")
    named = (config.model.name, config.retrieval.encoder, config.retrieval.rerank.model)
    assert named == (str(tmp_path / "model"),) * 3
    hub = load_config(None, [], {**flags, "model.name": "selfrag/selfrag_llama2_7b"})
    assert make_paths_absolute(hub).model.name == "selfrag/selfrag_llama2_7b"


def test_recorded_configuration_can_be_read_back():
    config = load_config(None, ["decoding.mode=always"], NEEDED)
    assert RunConfig.model_validate(config.to_record()) == config


def test_deployment_settings_are_not_fixed_settings():
    one = load_config(None, [], NEEDED).get_fixed_settings()
    elsewhere = [
        "execution.actors=8",
        "index=moved",
        "storage.region=eu-west-1",
        "retrieval.threads=4",
        "retrieval.cache=/tmp/x",
    ]
    assert load_config(None, elsewhere, NEEDED).get_fixed_settings() == one
    for setting in ("decoding.threshold=0.3", "execution.unit_rows=10", "retrieval.search=nprobe=4"):
        assert load_config(None, [setting], NEEDED).get_fixed_settings() != one, setting


def test_configuration_is_frozen():
    config = load_config(None, [], NEEDED)
    with pytest.raises(ValueError, match="frozen"):
        config.decoding.threshold = 0.9


def test_storage_is_loaded_from_the_run_file_and_settings(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("queries: q\nstorage: {region: eu-1, secret_key: hush}\n")
    storage = load_storage(str(file), ["storage.endpoint_url=http://127.0.0.1:9000"])
    assert (storage.region, storage.endpoint_url) == ("eu-1", "http://127.0.0.1:9000")
    assert storage.secret_key is not None
    assert storage.secret_key.get_secret_value() == "hush"


@pytest.mark.parametrize(
    ("setting", "problem"),
    [
        ("decoding.threshold=1", r"only storage.\* can be set here"),
        ("storage.regoin=x", "unknown configuration key storage.regoin; did you mean storage.region?"),
        ("storage.region", "expected KEY=VALUE"),
    ],
)
def test_wrong_storage_settings_are_named(setting, problem):
    with pytest.raises(ValueError, match=problem):
        load_storage(None, [setting])


@pytest.mark.parametrize(
    ("setting", "problem"),
    [
        ("decoding.treshold=0.3", "decoding.treshold; did you mean decoding.threshold?"),
        ("threshold=0.3", "threshold; did you mean decoding.threshold?"),
        ("execution.actor=3", "execution.actor; did you mean execution.actors?"),
        ("decoding.temperature=0", "decoding.temperature"),
        ("storage.bucket=b", "storage.bucket"),
        ("retrieval.top_k=3", "retrieval.top_k"),
        ("execution.gpus=1", "execution.gpus"),
    ],
)
def test_only_a_misspelled_key_gets_a_suggestion(setting, problem):
    with pytest.raises(ValueError, match="unknown configuration key") as caught:
        load_config(None, [setting], NEEDED)
    assert str(caught.value) == f"unknown configuration key {problem}"


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"model.name": "/elsewhere/model"}, True),
        ({"model.engine.gpu_memory_utilization": 0.7, "model.engine.max_num_seqs": 8}, True),
        ({"model.engine.tensor_parallel_size": 2, "execution.actors": 4, "storage.region": "eu-1"}, True),
        ({"queries": "r", "output": "s", "index": "t", "skip_annotated": "u", "execution.lock": "v"}, True),
        ({"model.engine.dtype": "half"}, False),
        ({"model.engine.max_model_len": 512}, False),
        ({"execution.unit_rows": 7}, False),
        ({"decoding.weights.support": 2}, False),
        ({"retrieval.search": "nprobe=4"}, False),
        ({"retrieval.rerank.candidates": 7, "retrieval.rerank.dtype": "float16"}, True),
    ],
)
def test_fixed_settings_include_only_what_a_resumed_run_must_keep(changes, same):
    changed = load_config(None, [], NEEDED | changes)
    assert (changed.get_fixed_settings() == load_config(None, [], NEEDED).get_fixed_settings()) == same


def test_candidates_of_a_reranker_are_fixed_settings():
    ranked = {**NEEDED, "retrieval.rerank.model": "demo"}
    fixed = load_config(None, [], ranked).get_fixed_settings()
    assert (fixed["retrieval.rerank.candidates"], fixed["retrieval.rerank.dtype"]) == (50, "float32")
    assert "retrieval.rerank.model" not in fixed
    elsewhere = {**ranked, "retrieval.rerank.model": "/elsewhere", "retrieval.rerank.batch_size": 8}
    assert load_config(None, [], elsewhere).get_fixed_settings() == fixed


def test_constant_of_a_fusion_is_a_fixed_setting_of_a_fusion():
    assert "retrieval.rrf_k" not in load_config(None, [], NEEDED).get_fixed_settings()
    assert load_config(None, ["retrieval.fusion=rrf"], NEEDED).get_fixed_settings()["retrieval.rrf_k"] == 60


def test_profile_with_dots_in_its_name_is_fixed():
    tree = {**NEEDED, "profiles": {"nq.v2": {"metric": "match"}}}
    assert load_config(None, [], tree).get_fixed_settings()["profiles.nq.v2.metric"] == "match"


def test_local_replicas_are_not_fixed_settings():
    replicas = ["model.engine.data_parallel_size=2", "model.engine.data_parallel_size_local=2"]
    assert (
        load_config(None, replicas, NEEDED).get_fixed_settings() == load_config(None, [], NEEDED).get_fixed_settings()
    )


@pytest.mark.parametrize("key", ["queries", "index", "output", "skip_annotated", "model.name", "model.lora"])
@pytest.mark.parametrize("form", ["file://{}", "file:{}", "file://localhost{}"])
def test_file_uris_become_paths(tmp_path, key, form):
    (tmp_path / "my set 2026-01-31").mkdir()
    flags = {**NEEDED, key: form.format(f"{tmp_path}/my%20set%202026-01-31")}
    record = flatten(make_paths_absolute(load_config(None, [], flags)).to_record())
    assert record[key] == str(tmp_path / "my set 2026-01-31")


def test_date_of_a_table_is_filled_in():
    flags = {**NEEDED, "publish.delta": "s3://bucket/{date:%Y}/answers"}
    assert load_config(None, [], flags, date(2026, 1, 31)).publish.delta == "s3://bucket/2026/answers"
    assert load_config(None, [], NEEDED).publish.delta is None


def test_date_of_a_file_uri_is_filled_in(tmp_path):
    flags = {**NEEDED, "output": f"file://{tmp_path}/a%20{{date:%Y}}"}
    config = make_paths_absolute(load_config(None, [], flags, date(2026, 1, 31)))
    assert config.output == str(tmp_path / "a 2026")


def test_configuration_is_read_from_a_file_uri(tmp_path):
    (tmp_path / "my run.yaml").write_text("task: popqa\n")
    assert load_config(f"file://{tmp_path}/my%20run.yaml", [], NEEDED).task == "popqa"


@pytest.mark.parametrize(
    ("value", "folder"),
    [(None, "/home/me/.cache/selfrag"), ("", "/home/me/.cache/selfrag"), ("~/c", "/home/me/c"), ("/c d", "/c d")],
)
def test_cache_folder_is_the_one_that_is_set(monkeypatch, value, folder):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.delenv("SELFRAG_CACHE", raising=False)
    if value is not None:
        monkeypatch.setenv("SELFRAG_CACHE", value)
    assert get_cache_folder() == Path(folder)
