"""What a Ray cluster was asked for, and GPUs that another job holds there."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

Asked = list[tuple[str, dict[str, float]]]


def asked_of(address: str) -> dict[str, tuple[str, dict[str, float]]]:
    """Read the class and the required resources of every actor that a cluster has had, by the actor's id."""
    from ray._private.state import GlobalStateAccessor
    from ray._raylet import GcsClientOptions  # type: ignore[attr-defined]
    from ray.core.generated.gcs_pb2 import ActorTableData

    accessor = GlobalStateAccessor(
        GcsClientOptions.create(address, None, allow_cluster_id_nil=True, fetch_cluster_id_if_nil=False)
    )
    assert accessor.connect()
    actors = [ActorTableData.FromString(record) for record in accessor.get_actor_table(None, None)]
    return {actor.actor_id.hex(): (actor.class_name, dict(actor.required_resources)) for actor in actors}


@contextmanager
def asked_during(address: str) -> Iterator[Asked]:
    """Collect what actors that start during the body ask for; the list is filled when it ends."""
    before, asked = asked_of(address), Asked()
    yield asked
    asked += sorted((actor for name, actor in asked_of(address).items() if name not in before), key=str)


def workers(asked: Asked, name: str) -> list[dict[str, float]]:
    """Keep the resources of the actors whose class is named so."""
    return [resources for actor, resources in asked if name in actor]


_HOLD = """
import sys, ray
ray.init(address=sys.argv[1], logging_level="ERROR")
class Holder:
    def ready(self): return True
holder = ray.remote(num_cpus=0, num_gpus=float(sys.argv[2]))(Holder).remote()
assert ray.get(holder.ready.remote())
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def gpus_held(address: str, gpus: float) -> Iterator[Any]:
    """Hold GPUs of a cluster in another process while the body runs."""
    with subprocess.Popen(
        [sys.executable, "-c", _HOLD, address, str(gpus)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdin is not None
        assert holder.stdout.readline() == "held\n"
        yield holder
        holder.stdin.close()
