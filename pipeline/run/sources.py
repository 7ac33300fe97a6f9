"""List the files of a run that every machine must read."""

from collections.abc import Iterator

from pipeline.config.paths import find_local_folder
from pipeline.nodes.places import Source
from pipeline.retrieval.manifest import MANIFEST
from pipeline.run.earlier_set import list_earlier_files
from pipeline.run.plan import RunPlan


def list_sources(plan: RunPlan) -> list[Source]:
    """List the queries, the index and the local folders of models of a checked run."""
    stamps = plan.queries.listing.stamps
    uris = (part.uri for unit in plan.todo for part in unit.parts)
    sources = [Source("--queries", {uri: stamps[uri].size for uri in uris})]
    if plan.index is not None and plan.config.index is not None:
        sources.append(Source.list_folder("--index", plan.config.index, MANIFEST))
    if plan.config.stale is not None:
        sources.append(list_earlier_files(plan.config.stale, plan.config.storage))
    for option, name in _list_models(plan):
        if (folder := find_local_folder(name)) is not None:
            sources.append(Source.list_folder(option, str(folder), ""))
    return sources


def _list_models(plan: RunPlan) -> Iterator[tuple[str, str]]:
    """Yield the names of everything that actors load, with the options or settings that name it."""
    model = plan.config.model
    yield "--model", model.name
    if model.lora:
        yield "model.lora", model.lora
    for argument in ("tokenizer", "hf_config_path"):
        if name := model.engine.get(argument):
            yield f"model.engine.{argument}", str(name)
    if plan.encoder is not None:
        yield "encoder", plan.config.retrieval.encoder or str(plan.encoder["name"])
    if plan.reranker is not None:
        yield "retrieval.rerank.model", str(plan.config.retrieval.rerank.model)
