"""The files for Ray's cluster launcher pass Ray's own checks and fit the image."""

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray.autoscaler
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[2]
FILES = ["ray_cluster.yaml", "infra/ray_cluster_local.yaml"]
SCHEMA = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())


def cluster(file: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / file).read_text())


@pytest.mark.parametrize("file", FILES)
def test_cluster_file_matches_the_ray_schema(file: str) -> None:
    jsonschema.validate(cluster(file), SCHEMA)


@pytest.mark.parametrize("file", FILES)
def test_ray_schema_rejects_a_misspelled_key(file: str) -> None:
    with pytest.raises(jsonschema.ValidationError, match="max_worker"):
        jsonschema.validate({**cluster(file), "max_worker": 1}, SCHEMA)


@pytest.mark.parametrize("file", FILES)
def test_cluster_file_passes_ray_validation(file: str) -> None:
    validate_config(prepare_config(cluster(file)))


@pytest.mark.parametrize("file", FILES)
def test_nothing_is_installed_on_the_machines(file: str) -> None:
    prepared = prepare_config(cluster(file))
    commands = [prepared[f"{place}setup_commands"] for place in ("", "head_", "worker_")]
    assert [*commands, prepared["initialization_commands"]] == [[], [], [], []]


@pytest.mark.parametrize("file", FILES)
def test_edit_marks_match_their_stated_number(file: str) -> None:
    text = (ROOT / file).read_text()
    assert "the five places marked EDIT" in text
    assert len(re.findall("# EDIT", text)) == 5


@pytest.mark.parametrize("file", FILES)
def test_dashboard_is_on_loopback_and_nodes_require_the_token(file: str) -> None:
    config = cluster(file)
    (start,) = [command for command in config["head_start_ray_commands"] if "ray start" in command]
    assert "--dashboard-host=127.0.0.1" in start
    assert "--env=RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert config["file_mounts"] == {"/home/selfrag/.ray/auth_token": "~/.ray/auth_token"}


def test_actors_stay_off_the_head() -> None:
    config = cluster("ray_cluster.yaml")
    assert config["available_node_types"][config["head_node_type"]]["resources"]["CPU"] == 0


def test_gpu_machines_are_spot_and_limited_by_one_setting() -> None:
    gpu = prepare_config(cluster("ray_cluster.yaml"))["available_node_types"]["gpu"]
    assert gpu["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert (gpu["min_workers"], gpu["max_workers"]) == (0, cluster("ray_cluster.yaml")["max_workers"])


def test_all_local_machines_are_in_the_cluster() -> None:
    config = cluster("infra/ray_cluster_local.yaml")
    (node,) = prepare_config(config)["available_node_types"].values()
    assert node["min_workers"] == node["max_workers"] == len(config["provider"]["worker_ips"])
