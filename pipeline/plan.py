"""Everything that can be checked before an engine starts, and the plan that comes out of it."""

from dataclasses import dataclass
from typing import Any

from pipeline.config import RunConfig
from pipeline.engine import check_engine_arguments, model_path, prompt_tokenizer
from pipeline.index import check_index
from pipeline.output import OutputFolder
from pipeline.provenance import model_identity
from pipeline.query_set import QuerySet, Unit, inspect_queries
from pipeline.storage import locate


@dataclass(frozen=True)
class Plan:
    """A checked run.

    Attributes:
        done: units that an earlier run finished.
        model, index: what they are, for the manifest; index is None where none is used.
        finished: whether the output is complete already.
    """

    config: RunConfig
    queries: QuerySet
    output: OutputFolder
    done: frozenset[str]
    model: dict[str, Any]
    index: dict[str, Any] | None
    finished: bool

    @property
    def todo(self) -> list[Unit]:
        """Units that are left."""
        return [unit for unit in self.queries.units if unit.id not in self.done]

    def identity(self) -> dict[str, Any]:
        """What decides the results: an output holds rows of one identity only."""
        return {
            "configuration": self.config.recorded(),
            "queries": {"files": self.queries.files, "rows": self.queries.rows, "digest": self.queries.digest},
            "model": self.model,
            "index": self.index,
        }

    def lines(self) -> list[str]:
        """The plan in words."""
        config, todo = self.config, self.todo
        rows = sum(unit.rows for unit in todo)
        return [
            f"queries  {config.queries}: {self.queries.rows} rows in {self.queries.files} files",
            f"index    {config.index or 'none'}" + (f": {self.index['passages']} passages" if self.index else ""),
            f"model    {config.model.name}",
            f"decoding {config.decoding.mode}, δ = {config.decoding.threshold}, k = {config.decoding.passages}",
            f"output   {config.output}: {len(self.done)} of {len(self.queries.units)} units done before",
            f"to do    {rows} rows in {len(todo)} units on {config.execution.actors} actor(s)",
        ]


def check(config: RunConfig, overwrite: bool = False) -> Plan:
    """Check a run, cheapest things first.

    Raises:
        ValueError: bad input or configuration; one line that names it.
        StorageError: a URI cannot be read.
    """
    output = OutputFolder(locate(config.output, config.storage))
    if config.output.rstrip("/") == config.queries.rstrip("/"):
        raise ValueError(f"--output {config.output} is the query set itself; choose another folder")
    queries = inspect_queries(locate(config.queries, config.storage), config.columns, config.execution.unit_rows)
    index = _check_retrieval(config, queries)
    check_engine_arguments(config.model)
    prompt_tokenizer(config.model)
    model = model_identity(config.model.name, model_path(config.model.name), config.model.revision)
    plan = Plan(config, queries, output, frozenset(), model, index, finished=False)
    if overwrite:
        return plan
    _check_resumable(plan)
    known = {unit.id for unit in queries.units}
    return Plan(config, queries, output, output.done_units() & known, model, index, output.finished())


def _check_retrieval(config: RunConfig, queries: QuerySet) -> dict[str, Any] | None:
    if config.decoding.mode == "never":
        return None
    if config.index is None:
        if not queries.given:
            raise ValueError(
                f"--index is missing: {config.queries} has no column {config.columns.passages!r} of given passages, "
                f"and decoding.mode is {config.decoding.mode}"
            )
        return None
    manifest = check_index(locate(config.index, config.storage), config.retrieval)
    return {"uri": config.index, "passages": manifest.passages, "digest": manifest.digest()}


def _check_resumable(plan: Plan) -> None:
    """An output may be continued by the same run only.

    Raises:
        ValueError: another run's rows, or somebody else's files, are there; names what differs.
    """
    manifest = plan.output.manifest()
    if manifest is None:
        if foreign := plan.output.foreign():
            raise ValueError(f"--output {plan.config.output} holds files of something else ({foreign}); choose another")
        return
    before = RunConfig.model_validate(manifest["configuration"]).decisive()
    now = plan.config.decisive()
    differing = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    differing += [part for part in ("queries", "model", "index") if manifest[part] != plan.identity()[part]]
    if differing:
        raise ValueError(
            f"--output {plan.config.output} holds a run that differs in {', '.join(dict.fromkeys(differing))}; "
            "choose another output, or replace it with --overwrite"
        )
