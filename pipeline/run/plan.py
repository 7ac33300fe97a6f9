"""Checks a run before any engine starts, and plans the units that are left to annotate."""

import atexit
import logging
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from pipeline.config.loading import find_differing
from pipeline.config.run import RunConfig, make_paths_absolute
from pipeline.config.sections import StorageConfig
from pipeline.decoding.profiles import Tasks, hash_built_in_profiles
from pipeline.decoding.prompted_reader import hash_prompts
from pipeline.engine.arguments import check_engine_arguments
from pipeline.engine.models import identify_model, load_critic, resolve_model_path
from pipeline.nodes.access import Access
from pipeline.nodes.spread import ClusterSpread
from pipeline.output.compacted import count_compacted
from pipeline.output.folder import IDENTITY, OutputFolder, hash_identity
from pipeline.output.inventory import EMPTY, Inventory, take_inventory
from pipeline.output.schema import hash_columns
from pipeline.output.unit_files import UnitSummary
from pipeline.output.unit_log import read_units
from pipeline.queries.inspection import QueryFile
from pipeline.queries.kept_inspection import read_inspection
from pipeline.queries.partitions import warn_of_columns_above
from pipeline.queries.query_set import QuerySet, inspect_queries
from pipeline.queries.sampling import choose_sample_unit_rows
from pipeline.queries.selection import Earlier, Selection
from pipeline.queries.units import Unit
from pipeline.retrieval.manifest import IndexManifest, check_index_manifest, has_earlier_version
from pipeline.retrieval.reranker import find_reranker
from pipeline.retrieval.selected_search import check_selection
from pipeline.run.closing import Budget
from pipeline.run.earlier_set import identify_earlier
from pipeline.storage.location import Location, check_apart, check_writable, locate

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunPlan:
    """A checked run.

    Attributes:
        config: configuration with absolute paths and the model's commit.
        queries: query set, without the queries that are skipped.
        output: folder of the annotated set.
        model: identity of the model, for the manifest.
        index: identity of the index, for the manifest; None if no index is used.
        encoder: encoder that the index was built with; None if no index is used.
        reranker: identity of the reranker, for the manifest; None if none is used.
        stale: identity of the earlier set that answers are carried over from, for the manifest; None if there is none.
        overwrite: whether an earlier run in the output is deleted.
        manifest: manifest in the output, by which a run that has used it since is noticed; None if there is none.
        inventory: units that the output holds.
        succeeded: whether the output has its success marker and the list of all units.
        known: number of queries that are skipped, since earlier sets cover them.
        population: number of queries that the run's sample was drawn from; None if it annotates all of them.
        chosen: selection of the remaining queries while it is stored on this machine only; otherwise None.
        access: what every machine must read and write, once that has been checked.
    """

    config: RunConfig
    queries: QuerySet
    output: OutputFolder
    model: dict[str, Any]
    index: dict[str, Any] | None
    encoder: dict[str, Any] | None = None
    reranker: dict[str, Any] | None = None
    stale: dict[str, Any] | None = None
    overwrite: bool = False
    manifest: dict[str, Any] | None = None
    inventory: Inventory = EMPTY
    succeeded: bool = False
    known: int = 0
    population: int | None = None
    chosen: Selection | None = None
    access: Access | None = None

    @cached_property
    def done(self) -> dict[str, UnitSummary]:
        """The units that an earlier run finished."""
        return {unit.unit: unit for unit in self.inventory.whole}

    @cached_property
    def todo(self) -> list[Unit]:
        """The units that are left to annotate."""
        if self.finished:  # the files of a compacted set hold several units each
            return []
        return [unit for unit in self.queries.units if unit.id not in self.done]

    @cached_property
    def rows(self) -> dict[str, int]:
        """The number of rows of every unit, by unit id."""
        return {unit.id: unit.rows for unit in self.queries.units}

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do."""
        return self.succeeded and self.inventory.complete

    def compute_identity(self) -> dict[str, Any]:
        """Return everything that decides the results; an output holds rows of one identity only."""
        return {
            "settings": {
                **self.config.get_fixed_settings(),
                "output.columns": hash_columns(),
                "profiles.built_in": hash_built_in_profiles(),
                **self._hash_prompts(),
            },
            "queries": {"files": self.queries.files, "rows": self.queries.rows, "digest": self.queries.digest},
            "model": self.model,
            "index": self.index,
            "reranker": self.reranker,
            "stale": self.stale,
        }

    @cached_property
    def digest(self) -> str:
        """The digest of the identity, which the files of the run's units carry."""
        return hash_identity(self.compute_identity())

    def describe(self) -> list[str]:
        """Describe the plan in lines of text."""
        config, rows = self.config, sum(unit.rows for unit in self.todo)
        filtered = f", filter {config.retrieval.filter}" if config.retrieval.filter else ""
        search = f"{config.retrieval.fusion} search{filtered}"
        passages = f": {self.index['passages']} passages, {search}" if self.index else ""
        lines = [f"queries  {config.queries}: {self.queries.rows} rows in {self.queries.files} files"]
        if self.queries.partitions:
            lines.append(f"columns  {', '.join(self.queries.partitions)}: read from the folders' names")
        if config.skip_annotated:
            lines.append(f"skipped  {self.known} rows already answered or failed below {config.skip_annotated}")
        if self.population:
            lines.append(f"sample   {self.queries.rows} of {self.population} rows, seed {config.sample.seed}")
        if config.stale:
            lines.append(f"stale    answers of {config.stale} are carried over if their searches find the same")
        return [
            *lines,
            f"index    {config.index or 'none'}{passages}",
            *self._format_reranker(),
            f"model    {config.model.name}",
            self._format_decoding(),
            *self._format_tasks(),
            f"output   {config.output}: {len(self.done)} of {len(self.queries.units)} units already done",
            f"to do    {rows} rows in {len(self.todo)} units on {config.execution.actors} actor(s)",
            *self._format_budget(),
        ]

    def _hash_prompts(self) -> dict[str, str]:
        return {"critic.prompts": hash_prompts()} if self.config.decoding.critic == "prompted" else {}

    def describe_tasks(self) -> dict[str, dict[str, Any]]:
        """Describe each task: rows, profile, metric, choices, decoding settings; ``""`` stands for rows without one."""
        tasks = Tasks(self.config.decoding, self.config.profiles, self.config.task)
        rows = {"": self.queries.rows - sum(self.queries.tasks.values()), **self.queries.tasks}
        return {name: {"rows": count, **tasks.describe(name)} for name, count in rows.items() if count}

    def _format_reranker(self) -> list[str]:
        rerank = self.config.retrieval.rerank
        return [f"reranker {rerank.model}: orders the best {rerank.candidates}"] if self.reranker else []

    def _format_budget(self) -> list[str]:
        budget = Budget.of(self.config.execution)
        return (
            [f"budget   {budget.seconds / 3600:.3g} h from the start of the actors ({budget.setting})"]
            if budget
            else []
        )

    def _format_decoding(self) -> str:
        decoding = self.config.decoding
        reading = " read together" if decoding.reading == "together" else ""
        return f"decoding {decoding.mode}, δ = {decoding.threshold}, k = {decoding.passages}{reading}"

    def _format_tasks(self) -> list[str]:
        lines = []
        for name, task in self.describe_tasks().items():
            profile = f"profile {task['profile']}" if task["profile"] else "no profile"
            lines.append(f"task     {name or '(none)'}: {task['rows']} rows, {profile}")
        return lines


def check_run(config: RunConfig, overwrite: bool = False) -> RunPlan:
    """Check a run, cheapest checks first, without writing to the output.

    Raises:
        NothingNewError: earlier sets cover all queries.
        ValueError: bad input or configuration; the message is one line that names it.
        StorageError: a URI cannot be read.
        RuntimeError: the embedded model is not available.
    """
    config = make_paths_absolute(config)
    queries_location, output = locate(config.queries, config.storage), locate(config.output, config.storage)
    check_apart(queries_location, output)
    selects = config.skip_annotated is not None or config.sample.rows is not None
    selection = Selection.load(output, config.queries, config.sample) if selects and not overwrite else None
    config = _divide_alike(config, selection)
    asked = selection.folder if selection else queries_location
    kept = {} if overwrite else read_inspection(output, config.columns)
    queries = _inspect(config, asked, kept)
    warn_of_columns_above(queries_location, queries.schema.names)
    check_writable(output)
    config = _allow_filters(config, queries)
    begun = None if overwrite else OutputFolder(output).read_manifest()
    manifest = _check_retrieval(config, queries, begun)
    index = encoder = reranker = None
    if manifest is not None:
        index = {"passages": manifest.passages, "shards": len(manifest.shards), "digest": manifest.compute_digest()}
        encoder = manifest.encoder.model_dump()
        config, reranker = _identify_reranker(config)
    check_engine_arguments(config.model)
    load_critic(config)
    model = identify_model(config.model, resolve_model_path(config.model.name))
    if commit := model.get("commit"):  # every actor must load the commit that the manifest records
        config = config.model_copy(update={"model": config.model.model_copy(update={"revision": commit})})
    plan = RunPlan(config, queries, OutputFolder(output), model, index, encoder, reranker, overwrite=overwrite)
    if selection is not None:
        plan = replace(plan, known=selection.known, population=selection.population)
    if config.stale is not None:
        plan = replace(plan, stale=identify_earlier(config, plan.compute_identity(), plan.rows))
    plan.describe_tasks()  # a profile may contradict the run
    plan = inspect_output(plan)
    return plan if selection or begun is not None or not selects else _select(plan)


def _inspect(config: RunConfig, location: Location, kept: Mapping[str, QueryFile]) -> QuerySet:
    spread = ClusterSpread.of(config.execution)
    return inspect_queries(location, config.columns, config.execution.unit_rows, kept, spread)


def _select(plan: RunPlan) -> RunPlan:
    config, earlier = plan.config, None
    if config.skip_annotated is not None:
        folder = locate(config.skip_annotated, config.storage)
        earlier = Earlier(folder, plan.output.location, config.columns.id)
    chosen = Selection.choose(plan.queries, earlier, config.storage, _make_scratch(), config.sample)
    if config.sample.rows is not None:
        rows = min(config.sample.rows, chosen.population or 0)
        chosen = replace(chosen, unit_rows=choose_sample_unit_rows(rows, config.execution))
    return replace(_adopt(plan, chosen), chosen=chosen)


def _adopt(plan: RunPlan, selection: Selection) -> RunPlan:
    """Return the plan for the selected queries."""
    config = _divide_alike(plan.config, selection)
    queries = _inspect(config, selection.folder, {})
    return replace(plan, config=config, queries=queries, known=selection.known, population=selection.population)


def _divide_alike(config: RunConfig, selection: Selection | None) -> RunConfig:
    """Return the configuration with the units of a sample as they were chosen, whatever the number of actors now."""
    if selection is None or selection.unit_rows is None:
        return config
    execution = config.execution.model_copy(update={"unit_rows": selection.unit_rows})
    return config.model_copy(update={"execution": execution})


def _make_scratch() -> Location:
    """Make a temporary folder that is deleted when this process exits."""
    folder = tempfile.mkdtemp(prefix="selfrag-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return locate(folder, StorageConfig())


def store_selection(plan: RunPlan) -> RunPlan:
    """Store the plan's selection of queries in the output, where all machines can read it, and return the new plan.

    A selection that another run has stored there meanwhile is used instead; :func:`inspect_output` then compares the
    runs.

    Raises:
        ValueError: that selection was made from another query set, or is another sample.
        StorageError: the storage cannot be reached.
    """
    if plan.chosen is None:
        return plan
    config, output = plan.config, plan.output.location
    there = None if plan.overwrite else Selection.load(output, config.queries, config.sample)
    selection = there or plan.chosen.keep(output, config.queries)
    return replace(_adopt(plan, selection), chosen=None)


def inspect_output(plan: RunPlan) -> RunPlan:
    """Return the plan with the current state of its output, which another run may have changed since the check.

    Raises:
        ValueError: the output contains files that no run wrote, or rows of a run with another identity.
        StorageError: the storage cannot be reached.
    """
    manifest = plan.output.read_manifest()
    if plan.manifest is not None and manifest == plan.manifest:
        return plan
    _check_output(plan, manifest)
    if plan.overwrite or manifest is None:
        return replace(plan, manifest=manifest)
    if manifest.get("compacted"):
        inventory = count_compacted(plan.output, plan.queries.rows, plan.digest)
        return replace(plan, manifest=manifest, inventory=inventory, succeeded=True)
    logged = read_units(plan.output.location)
    inventory = take_inventory(plan.output, plan.rows, plan.digest, logged)
    succeeded = plan.output.is_finished() and logged.keys() == plan.rows.keys()
    return replace(plan, manifest=manifest, inventory=inventory, succeeded=succeeded)


def _check_retrieval(config: RunConfig, queries: QuerySet, begun: Mapping[str, Any] | None) -> IndexManifest | None:
    if config.decoding.mode == "never":
        return None
    if config.index is None:
        if not queries.given:
            raise ValueError(
                f"--index is missing: {config.queries} has no column {config.columns.passages!r} with given passages, "
                f"and decoding.mode is {config.decoding.mode}"
            )
        return None
    manifest = _choose_version(config, locate(config.index, config.storage), begun)
    check_selection(manifest, config.retrieval)
    return manifest


def _choose_version(config: RunConfig, folder: Location, begun: Mapping[str, Any] | None) -> IndexManifest:
    """Return the manifest of the index, or that of the earlier version that the output was begun with."""
    current = check_index_manifest(folder, config.retrieval)
    digest = ((begun or {}).get("index") or {}).get("digest")
    if digest in (None, current.compute_digest()) or not has_earlier_version(folder, digest):
        return current
    log.warning("%s has been updated since the output was begun, which goes on with the earlier version", folder.uri)
    return check_index_manifest(folder, config.retrieval, digest)


def _allow_filters(config: RunConfig, queries: QuerySet) -> RunConfig:
    """Return the configuration with a filter that every passage meets if only the rows have filters.

    The index is then opened so that its searches can be filtered.
    """
    column = config.columns.filter
    if config.index is None or config.retrieval.filter is not None or column not in queries.schema.names:
        return config
    log.info("rows have filters in the column %r, so vectors are searched on the CPU", column)
    return config.model_copy(update={"retrieval": config.retrieval.model_copy(update={"filter": "true"})})


def _identify_reranker(config: RunConfig) -> tuple[RunConfig, dict[str, Any] | None]:
    """Return the configuration with the reranker's commit, which every actor must load, and the reranker's identity."""
    retrieval = config.retrieval
    if retrieval.rerank.model is None:
        return config, None
    _, found = find_reranker(retrieval.rerank)
    rerank = retrieval.rerank.model_copy(update={"revision": found.revision})
    retrieval = retrieval.model_copy(update={"rerank": rerank})
    return config.model_copy(update={"retrieval": retrieval}), {"digest": found.digest}


def _check_output(plan: RunPlan, manifest: dict[str, Any] | None) -> None:
    """Check that the output is free, has the same identity as the run, or is overwritten.

    Raises:
        ValueError: the output contains files that no run wrote, or rows of a run with another identity; the message
            names the differing keys.
    """
    if manifest is None and (foreign := plan.output.find_foreign_file()):
        raise ValueError(
            f"--output {plan.config.output} contains files that are not part of an annotated set ({foreign}); "
            "choose another"
        )
    if manifest is None:
        return
    if plan.overwrite:
        plan.output.check_replaceable()
        return
    identity = plan.compute_identity()
    differing = find_differing(manifest.get("settings", {}), identity["settings"])
    differing += [part for part in IDENTITY[1:] if manifest.get(part) != identity[part]]
    if differing:
        raise ValueError(
            f"--output {plan.config.output} contains a run that differs in {', '.join(differing)}; "
            "choose another output, or replace it with --overwrite"
        )
