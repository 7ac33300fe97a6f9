"""The manifests for KubeRay fit its published schemas, each other, the image and the project.

``SELFRAG_CRDS`` names a folder with KubeRay's ``ray.io_*.yaml`` (ray-operator/config/crd/bases in
https://github.com/ray-project/kuberay); without it the tests against the schemas are skipped.
"""

import copy
import importlib.util
import json
import os
import re
import subprocess
import tomllib
from collections.abc import Iterator
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray._private.ray_constants import DEFAULT_OBJECT_STORE_MEMORY_PROPORTION

from pipeline.config.run import RunConfig, load_config
from pipeline.config.sections import StorageConfig
from pipeline.run.driver import Summary

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "infra" / "kuberay"
RAY_FILES = ["rayjob.yaml", "raycluster.yaml", "raycronjob.yaml"]
GIBI = 2**30

needs_crds = pytest.mark.skipif("SELFRAG_CRDS" not in os.environ, reason="SELFRAG_CRDS names no folder of CRDs")


def manifests(file: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / file).read_text()))


def manifest(file: str) -> dict[str, Any]:
    (only,) = manifests(file)
    return only


JOB = manifest("rayjob.yaml")["spec"]
CLUSTER = JOB["rayClusterSpec"]
(WORKERS,) = CLUSTER["workerGroupSpecs"]


def pods() -> list[dict[str, Any]]:
    """The Pods of a run: head, worker and submitter."""
    head, submitter = CLUSTER["headGroupSpec"]["template"], JOB["submitterPodTemplate"]
    return [template["spec"] for template in (head, WORKERS["template"], submitter)]


def run_config() -> RunConfig:
    return load_config(str(FOLDER / "run.yaml"), [], {})


def nodes(tree: Any) -> Iterator[dict[str, Any]]:
    """All mappings of a tree."""
    if isinstance(tree, dict):
        yield tree
    for child in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else []:
        yield from nodes(child)


def closed(schema: Any) -> Any:
    """A schema that refuses the fields it does not know, which Kubernetes would drop without a word."""
    for node in nodes(schema):
        if isinstance(node.get("properties"), dict) and not node.get("x-kubernetes-preserve-unknown-fields"):
            node.setdefault("additionalProperties", False)
    return schema


def published_schema(kind: str) -> dict[str, Any]:
    file = Path(os.environ["SELFRAG_CRDS"]) / f"ray.io_{kind.lower()}s.yaml"
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    versions = yaml.load(file.read_text(), loader)["spec"]["versions"]
    (schema,) = [version["schema"]["openAPIV3Schema"] for version in versions if version["name"] == "v1"]
    return closed(schema)


def paths(tree: dict[str, Any], kind: str) -> dict[str, dict[str, Any]]:
    """Where a misspelt field must be found, in each kind of manifest."""
    job = {"RayJob": tree["spec"], "RayCronJob": tree["spec"].get("jobTemplate")}.get(kind)
    cluster = job["rayClusterSpec"] if job else tree["spec"]
    pod = cluster["workerGroupSpecs"][0]["template"]["spec"]
    found = {"spec": tree["spec"], "cluster": cluster, "pod": pod, "container": pod["containers"][0]}
    return {**found, "volume": pod["volumes"][0]["emptyDir"], "security": pod["containers"][0]["securityContext"]}


@needs_crds
@pytest.mark.parametrize("file", RAY_FILES)
def test_published_schema_accepts_manifests_and_rejects_misspelled_fields(file: str) -> None:
    tree = manifest(file)
    validator = jsonschema.Draft202012Validator(published_schema(tree["kind"]))
    validator.validate(tree)
    for place in paths(tree, tree["kind"]):
        spoilt = copy.deepcopy(tree)
        paths(spoilt, tree["kind"])[place]["misspelled"] = 1
        with pytest.raises(jsonschema.ValidationError, match="'misspelled' was unexpected"):
            validator.validate(spoilt)


@needs_crds
def test_published_schema_rejects_a_value_of_the_wrong_type() -> None:
    tree = manifest("rayjob.yaml")
    tree["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] = 0
    with pytest.raises(jsonschema.ValidationError, match="0 is not of type 'string'"):
        jsonschema.validate(tree, published_schema("RayJob"))


def test_nightly_run_and_shared_cluster_repeat_the_job() -> None:
    assert manifest("raycronjob.yaml")["spec"]["jobTemplate"] == JOB
    assert manifest("raycluster.yaml")["spec"] == CLUSTER


def test_configmap_holds_the_files_of_the_entry_point_and_the_cronjob() -> None:
    kustomization = manifest("kustomization.yaml")
    (generator,) = kustomization["configMapGenerator"]
    assert generator == {"name": "selfrag-run", "files": ["run.yaml", "run.sh", "rayjob.yaml"]}
    assert kustomization["generatorOptions"] == {"disableNameSuffixHash": True}
    assert JOB["entrypoint"] == "bash /etc/selfrag/run.sh"
    cronjob = manifests("cronjob.yaml")[-1]["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    assert cronjob["containers"][0]["args"] == ["create", "--filename", "/etc/selfrag/rayjob.yaml"]
    for pod in (pods()[0], cronjob):
        assert {"name": "run", "configMap": {"name": "selfrag-run"}} in pod["volumes"]
        assert {"name": "run", "mountPath": "/etc/selfrag"} in pod["containers"][0]["volumeMounts"]


def test_configured_actors_fit_the_workers() -> None:
    execution, limits = run_config().execution, WORKERS["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert execution.actors == WORKERS["maxReplicas"]
    assert execution.gpus_per_actor == limits["nvidia.com/gpu"]
    assert execution.cpus_per_actor == limits["cpu"]


def test_cache_limit_leaves_space_for_the_model() -> None:
    (volume,) = [volume for volume in WORKERS["template"]["spec"]["volumes"] if volume["name"] == "cache"]
    assert run_config().retrieval.cache_gb == 100
    assert volume["emptyDir"]["sizeLimit"] == "150Gi"


def test_termination_grace_period_covers_the_storage_patience() -> None:
    (drain,) = WORKERS["template"]["spec"]["containers"][0]["env"]
    assert drain["name"] == "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
    assert int(drain["value"]) == StorageConfig().patience_s == 120
    assert WORKERS["template"]["spec"]["terminationGracePeriodSeconds"] == 120 + 30


def test_object_store_fits_into_shared_memory() -> None:
    for pod in pods()[:2]:
        (volume,) = [volume["emptyDir"] for volume in pod["volumes"] if volume["name"] == "shm"]
        memory = int(pod["containers"][0]["resources"]["limits"]["memory"].removesuffix("Gi"))
        assert volume["medium"] == "Memory"
        assert int(volume["sizeLimit"].removesuffix("Gi")) >= DEFAULT_OBJECT_STORE_MEMORY_PROPORTION * memory
        assert {"name": "shm", "mountPath": "/dev/shm"} in pod["containers"][0]["volumeMounts"]


def test_head_has_neither_actors_nor_a_gpu() -> None:
    assert CLUSTER["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0"}
    assert not [pod for pod in (pods()[0], pods()[2]) if "nvidia.com/gpu" in str(pod["containers"])]


def test_pods_run_as_the_unprivileged_user_of_the_image() -> None:
    dockerfile = (ROOT / "infra" / "docker" / "Dockerfile").read_text()
    for pod in pods():
        security = pod["securityContext"]
        assert security["runAsNonRoot"]
        assert f"USER {security['runAsUser']}:{security['runAsGroup']}\n" in dockerfile
    containers = [pod["containers"][0] for pod in pods()]
    for context in [CLUSTER["autoscalerOptions"]["securityContext"], *(c["securityContext"] for c in containers)]:
        assert context == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def test_all_files_name_the_image_of_the_project_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    launcher = [ROOT / "ray_cluster.yaml", ROOT / "infra" / "ray_cluster_local.yaml"]
    for file in [*(FOLDER / name for name in RAY_FILES), *launcher]:
        images = set(re.findall(r"\S+/selfrag-batch:\S+", file.read_text()))
        assert images == {f"registry.example.com/selfrag-batch:{version}-gpu"}, file


def test_cluster_and_image_have_the_same_ray_version() -> None:
    lock = (ROOT / "infra" / "locks" / "gpu.txt").read_text().splitlines()
    assert f"ray=={CLUSTER['rayVersion']}" in lock


def test_cronjob_may_only_create_rayjobs() -> None:
    account, role, binding, cronjob = manifests("cronjob.yaml")
    assert role["rules"] == [{"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["create"]}]
    assert [binding["roleRef"]["kind"], binding["roleRef"]["name"]] == ["Role", role["metadata"]["name"]]
    assert binding["subjects"] == [{"kind": "ServiceAccount", "name": account["metadata"]["name"]}]
    pod = cronjob["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    assert pod["serviceAccountName"] == account["metadata"]["name"]
    assert pod["securityContext"]["runAsNonRoot"]


def test_schedules_agree_and_all_attempts_start_on_one_day() -> None:
    cron, night = manifests("cronjob.yaml")[-1]["spec"], manifest("raycronjob.yaml")["spec"]
    assert (cron["schedule"], cron["timeZone"]) == (night["schedule"], night["timeZone"]) == ("0 1 * * *", "Etc/UTC")
    last_start = 1 * 3600 + JOB["backoffLimit"] * JOB["activeDeadlineSeconds"]
    assert last_start < 24 * 3600


def test_no_manifest_holds_a_secret() -> None:
    for file in FOLDER.glob("*.yaml"):
        for tree in manifests(file.name):
            assert tree.get("kind") != "Secret"
            for node in nodes(tree):
                assert "value" not in node or not re.search("KEY|TOKEN|SECRET|PASSWORD", node["name"])
    storage = run_config().storage
    assert storage == StorageConfig()


@pytest.mark.parametrize(("job", "left", "told"), [(0, 0, 0), (3, 0, 0), (3, 20, 3), (1, 0, 1), (2, 0, 2)])
def test_entry_point_runs_the_job_and_accepts_some_error_rows(tmp_path: Path, job: int, left: int, told: int) -> None:
    summary = Summary("out", 100, 1, {}, 50, 1, 1, 80, 0, 1.0, 0.5, left)
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f"#!/bin/bash\necho \"$@\"\necho '{json.dumps(asdict(summary))}'\nexit {job}\n")
    python.chmod(0o755)
    command = ["bash", str(FOLDER / "run.sh")]
    environment = {"PATH": f"{python.parent}:{os.environ['PATH']}"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=60)
    assert done.returncode == told, done.stderr
    first = done.stdout.splitlines()[0]
    assert first == f"-m jobs.annotate --config {FOLDER}/run.yaml --set execution.ray_address=auto --json"
    assert importlib.util.find_spec("jobs.annotate")


def test_each_night_has_its_own_folders() -> None:
    tonight = load_config(str(FOLDER / "run.yaml"), [], {}, date(2026, 1, 31))
    assert tonight.queries == "s3://my-bucket/queries/2026-01-31/"
    assert tonight.output == "s3://my-bucket/annotated/2026-01-31/"
