import json
from pathlib import Path

import jsonschema
import ray.autoscaler
import yaml

CLUSTER = yaml.safe_load((Path(__file__).parents[2] / "ray_cluster.yaml").read_text())


def test_cluster_file_fits_rays_own_schema():
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    jsonschema.validate(CLUSTER, schema)


def test_cluster_file_passes_rays_own_checks():
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(CLUSTER))


def test_actors_stay_off_the_head():
    assert CLUSTER["available_node_types"][CLUSTER["head_node_type"]]["resources"]["CPU"] == 0
