import os
import subprocess
import sys

import pytest
from pydantic import SecretStr

from pipeline.nodes.environment import DECISIVE, Environment, is_sendable

SENT = {
    "AWS_ENDPOINT_URL": "http://10.0.0.1:9000",
    "AWS_ENDPOINT_URL_S3": "https://s3.example.com",
    "AWS_REGION": "eu-west-1",
    "AWS_DEFAULT_REGION": "eu-west-1",
    "AWS_PROFILE": "nightly",
    "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
    "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
    "AWS_MAX_ATTEMPTS": "5",
    "HF_ENDPOINT": "https://hub.example.com/mirror",
    "HF_HUB_OFFLINE": "1",
    "VLLM_LOGGING_LEVEL": "DEBUG",
    "VLLM_ATTENTION_BACKEND": "FLASH_ATTN",
    "SELFRAG_BENCHMARK_LATENCY": "0.1",
}
KEPT = {
    # secrets
    "AWS_ACCESS_KEY_ID": "AKIA",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_SESSION_TOKEN": "token",
    "AWS_CONTAINER_AUTHORIZATION_TOKEN": "token",
    "HF_TOKEN": "hf_secret",
    "VLLM_API_KEY": "secret",
    "SELFRAG_STORE_PASSWORD": "secret",
    "VLLM_KEY": "secret",
    # roles that a machine has
    "AWS_ROLE_ARN": "arn:aws:iam::1:role/driver",
    "AWS_WEB_IDENTITY_TOKEN_FILE": "/var/run/token",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI": "v2/credentials",
    "AWS_EC2_METADATA_DISABLED": "true",
    # places on a disk, by name and by value
    "AWS_CONFIG_FILE": "aws/config",
    "AWS_CA_BUNDLE": "certificates.pem",
    "HF_HOME": "hub",
    "HF_HUB_CACHE": "hub",
    "SELFRAG_CACHE": "cache",
    "VLLM_CACHE_ROOT": "cache",
    "VLLM_PLUGINS": "/opt/plugins",
    "SELFRAG_EXTRA": "~/extra",
    "HF_XET": "../xet",
    # devices and addresses
    "VLLM_TARGET_DEVICE": "cpu",
    "VLLM_HOST_IP": "10.0.0.1",
    "VLLM_PORT": "8000",
    "VLLM_CPU_OMP_THREADS_BIND": "0-3",
    "VLLM_CPU_KVCACHE_SPACE": "40",
    # others' variables
    "PATH": "bin",
    "HOME": "home",
    "CUDA_VISIBLE_DEVICES": "0",
    "RAY_ADDRESS": "10.0.0.1:6379",
    "MY_AWS_REGION": "eu-west-1",
    "aws_region": "eu-west-1",
}


@pytest.mark.parametrize(("name", "value", "expected"), [(*item, True) for item in SENT.items()])
def test_settings_of_libraries_are_sent(name: str, value: str, expected: bool) -> None:
    assert is_sendable(name, value) is expected


@pytest.mark.parametrize(("name", "value"), KEPT.items())
def test_secrets_and_what_differs_between_machines_stay(name: str, value: str) -> None:
    assert not is_sendable(name, value)


def test_tokens_of_the_hub_are_sent_as_secrets() -> None:
    environment = Environment.read({"HF_TOKEN": "hf_secret", "HUGGING_FACE_HUB_TOKEN": "", "HF_HUB_OFFLINE": "0"})
    assert environment.variables == {"HF_HUB_OFFLINE": "0"}
    assert environment.tokens == {"HF_TOKEN": SecretStr("hf_secret")}
    assert "hf_secret" not in repr(environment)


def test_driver_decides_what_workers_have(monkeypatch: pytest.MonkeyPatch) -> None:
    sent = Environment.read({**SENT, "HF_TOKEN": "hf_secret"} | {"AWS_ENDPOINT_URL_S3": "", "HF_HOME": "/driver"})
    for name, value in {**SENT, "AWS_ENDPOINT_URL": "http://elsewhere", "HF_HOME": "/worker"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    sent.apply()
    assert {name: os.environ[name] for name in SENT} == {**SENT, "AWS_ENDPOINT_URL_S3": ""}
    assert (os.environ["HF_TOKEN"], os.environ["HF_HOME"]) == ("hf_secret", "/worker")


def test_store_of_a_worker_is_forgotten_where_the_driver_names_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in DECISIVE:
        monkeypatch.setenv(name, "http://elsewhere")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "its own")
    Environment.read({}).apply()
    assert not set(DECISIVE) & os.environ.keys()
    assert os.environ["AWS_ACCESS_KEY_ID"] == "its own"


def test_libraries_that_read_variables_are_imported_after_an_actor_has_set_them() -> None:
    script = "import sys, pipeline.run.actor, pipeline.indexing.build_pool; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert not {"huggingface_hub", "transformers", "sentence_transformers", "vllm", "torch"} & set(loaded)
