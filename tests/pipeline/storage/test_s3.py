import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import SecretStr

from pipeline.config.sections import StorageConfig
from pipeline.storage.s3 import open_s3, resolve_storage

KEYS = {"AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "secret"}
PAIR = {"access_key": SecretStr("id"), "secret_key": SecretStr("secret")}


@pytest.fixture(autouse=True)
def without_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in (*KEYS, "AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3", raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_REGION", "eu-west-1")
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.mark.parametrize(
    ("variables", "settings", "expected"),
    [
        ({}, {}, {"region": "eu-west-1"}),
        ({"AWS_REGION": "", "AWS_DEFAULT_REGION": "eu-west-2"}, {}, {"region": "eu-west-2"}),
        ({"AWS_DEFAULT_REGION": "eu-west-2"}, {}, {"region": "eu-west-1"}),
        ({}, {"region": "eu-west-3"}, {"region": "eu-west-3"}),
        ({"AWS_REGION": ""}, {}, {"region": "us-east-1"}),
        ({"AWS_ENDPOINT_URL": "http://a:1"}, {}, {"endpoint_url": "http://a:1"}),
        ({"AWS_ENDPOINT_URL": "http://a:1", "AWS_ENDPOINT_URL_S3": "http://b:1"}, {}, {"endpoint_url": "http://b:1"}),
        ({"AWS_ENDPOINT_URL": "http://a:1"}, {"endpoint_url": "http://c:1"}, {"endpoint_url": "http://c:1"}),
        (KEYS, {}, PAIR),
        ({**KEYS, "AWS_SESSION_TOKEN": "t"}, {}, {**PAIR, "session_token": SecretStr("t")}),
        ({"AWS_SESSION_TOKEN": "t"}, {}, {"session_token": None}),
        ({"AWS_ACCESS_KEY_ID": "id"}, {}, {"access_key": None, "secret_key": None}),
        (
            {**KEYS, "AWS_SESSION_TOKEN": "t"},
            {"access_key": "mine", "secret_key": "own"},
            {"access_key": SecretStr("mine"), "secret_key": SecretStr("own"), "session_token": None},
        ),
        ({}, {"patience_s": 3}, {"patience_s": 3}),
    ],
)
def test_driver_resolves_what_its_variables_say(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], settings: dict, expected: dict
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    found = dict(resolve_storage(StorageConfig.model_validate(settings)))
    assert {key: found[key] for key in expected} == expected


def test_region_of_a_profile_is_resolved_and_its_credentials_are_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """In another process: S3's library reads its files once."""
    monkeypatch.delenv("AWS_REGION")
    (tmp_path / "config").write_text("[profile nightly]\nregion = eu-north-1\n")
    (tmp_path / "credentials").write_text("[nightly]\naws_access_key_id = id\naws_secret_access_key = secret\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_PROFILE", "nightly")
    script = """
from pipeline.config.sections import StorageConfig
from pipeline.storage.s3 import resolve_storage
found = resolve_storage(StorageConfig())
print(found.region, found.access_key, found.secret_key)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "eu-north-1 None None\n"


def test_pickled_file_system_leads_to_the_same_store_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**KEYS, "AWS_ENDPOINT_URL": "http://10.78.0.1:9000"}.items():
        monkeypatch.setenv(name, value)
    sent = pickle.dumps(open_s3(StorageConfig()))
    for name in (*KEYS, "AWS_ENDPOINT_URL", "AWS_REGION"):
        monkeypatch.setenv(name, "http://elsewhere")
    _, (options,) = pickle.loads(sent).__reduce__()
    found = {key: options[key] for key in ("endpoint_override", "scheme", "region", "access_key", "secret_key")}
    assert found == {
        "endpoint_override": "10.78.0.1:9000",
        "scheme": "http",
        "region": "eu-west-1",
        "access_key": "id",
        "secret_key": "secret",
    }


def test_secrets_appear_in_no_text_of_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**KEYS, "AWS_SECRET_ACCESS_KEY": "top-secret"}.items():
        monkeypatch.setenv(name, value)
    assert "top-secret" not in repr(resolve_storage(StorageConfig()))
