"""The file ``tuning.json``: the finished trials of a tuning, and what they have in common."""

from collections.abc import Mapping
from typing import Any

from pipeline.cluster import Resources
from pipeline.config.loading import Frozen, flatten
from pipeline.config.run import RunConfig
from pipeline.storage.location import Location
from pipeline.storage.records import read_record
from pipeline.tuning.search import EngineTrial
from pipeline.versions import read_versions


class TuningLog(Frozen):
    """The content of the file.

    Attributes:
        basis: everything that trials must have in common to be compared, by dotted key.
        trials: finished trials, in the order in which they ran.
    """

    basis: dict[str, Any]
    trials: tuple[EngineTrial, ...] = ()

    @staticmethod
    def is_in(folder: Location) -> bool:
        """Whether a folder holds the file.

        Raises:
            StorageError: the storage cannot be reached.
        """
        return _locate(folder).exists()

    @classmethod
    def read(cls, folder: Location) -> "TuningLog | None":
        """Read the file in a folder of trials; None if there is none.

        Raises:
            ValueError: the file is damaged; names it.
            StorageError: it cannot be read.
        """
        return read_record(cls, _locate(folder)) if cls.is_in(folder) else None

    def write(self, folder: Location) -> None:
        """Write the file into a folder of trials.

        Raises:
            StorageError: it cannot be written.
        """
        _locate(folder).write(self.model_dump_json(indent=1).encode())

    def find(self, settings: Mapping[str, Any], limit: float | None, repetition: int) -> EngineTrial | None:
        """Return a trial of these settings, the first one for 0; None if it must still run.

        Trials that failed run again, since their cause may be gone; so do those that were stopped after less time than
        a unit may take now.
        """
        same = [trial for trial in self.trials if trial.settings == settings]
        done = [trial for trial in same if trial.rate or (limit and (trial.stopped_after or 0.0) >= limit)]
        return done[repetition] if repetition < len(done) else None


def _locate(folder: Location) -> Location:
    return folder / "tuning.json"


def describe_basis(config: RunConfig, resources: Resources, run: str) -> dict[str, Any]:
    """Describe what trials must have in common.

    Args:
        config: configuration of the run.
        resources: resources of an actor.
        run: digest of the first trial's identity.
    """
    record = config.to_record()
    shared = {"cpus": resources.cpus, "gpus": resources.gpus, "units_in_flight": config.execution.units_in_flight}
    parts = {"model": {"engine": record["model"]["engine"]}, "retrieval": record["retrieval"], "execution": shared}
    basis = flatten({**parts, "versions": read_versions(), "run": run})
    return {key: value for key, value in basis.items() if value not in (None, {})}
