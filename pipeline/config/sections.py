"""The sections of a configuration: frozen models whose docstrings are the reference of their keys."""

from enum import Enum
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, SecretStr, field_validator, model_validator

from pipeline.config.loading import Frozen, parse_search

Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Name = Annotated[str, Field(min_length=1)]
Weight = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]


class Effect(Enum):
    """Mark of a field: whether it decides the results. A mark holds for all fields of a section that have none.

    ``FIXED`` keys must be the same when a run is resumed, ``FREE`` ones may change. Without any mark a key is fixed.
    """

    FIXED = "fixed"
    FREE = "free"


# How vLLM uses machines and memory: changes answers by rounding at most.
FREE_ENGINE_ARGUMENTS = frozenset(
    {
        "data_parallel_size",
        "data_parallel_size_local",
        "pipeline_parallel_size",
        "prefill_context_parallel_size",
        "tensor_parallel_size",
        "gpu_memory_utilization",
        "kv_cache_memory_bytes",
        "max_num_batched_tokens",
        "max_num_seqs",
    }
)


class Columns(Frozen):
    """Names of the columns of the query set. All columns but those of ``id`` and ``query`` are optional.

    Attributes:
        id: Column of unique ids, without nulls.
        query: Column of the queries.
        input: Column of the text under ``### Input:``.
        task: Column of the task profile of each row.
        choices: Column of closed sets of answers.
        filter: Column of conditions on the passages that a row's searches may find, as ``retrieval.filter``.
        passages: Column of given passages, which are read instead of the index.
    """

    id: str = "id"
    query: str = "query"
    input: str = "input"
    task: str = "task"
    choices: str = "choices"
    filter: str = "filter"
    passages: str = "passages"


class ModelConfig(Frozen):
    """The model, and any argument of vLLM's engine. A string in place of the section is the name.

    Attributes:
        name: Name on the Hugging Face hub, local folder, or ``demo``.
        revision: Branch, tag or commit on the Hugging Face hub.
        lora: Folder or name of a LoRA adapter to serve the model with.
        engine: Arguments of ``vllm.AsyncEngineArgs`` by name, such as ``tensor_parallel_size``,
            ``quantization``, ``dtype``, ``max_model_len`` or ``gpu_memory_utilization``.
    """

    name: Annotated[str, Effect.FREE]
    revision: Annotated[str | None, Effect.FREE] = None
    lora: Annotated[str | None, Effect.FREE] = None
    engine: dict[str, Any] = Field(default_factory=dict)


class Weights(Frozen):
    """Weights of a segment's score (paper, equation 4); the defaults are the paper's.

    Attributes:
        sequence: Weight of the segment's mean token probability.
        relevance: Weight of IsRel.
        support: Weight of IsSup.
        utility: Weight of IsUse.
    """

    sequence: Weight = 1.0
    relevance: Weight = 1.0
    support: Weight = 1.0
    utility: Weight = 0.5


Reading = Literal["each", "together"]


class DecodingConfig(Frozen):
    """Decoding of answers.

    Attributes:
        critic: ``reflection`` reads the reflection tokens of a model trained to write them; ``prompted`` asks any
            instruct model in words.
        mode: ``adaptive`` lets the model decide whether to retrieve; ``always`` and ``never`` decide for it.
        threshold: The paper's δ: retrieve if p(Yes) / (p(Yes) + p(No)) exceeds it.
        passages: Passages read for each segment (the paper's k).
        reading: ``each`` writes a segment from each passage and keeps the best, as the paper does; ``together`` writes
            one from all of them at once.
        max_tokens: Maximum tokens of a segment.
        segments: Maximum segments of an answer (the paper's T); 1 is the short form.
        beam_width: Paths kept after each segment (the paper's B).
        search: Search text of later segments: ``dynamic`` is the query and the last segment, ``static`` the query
            alone.
        citations: End each segment with the number of its passage, as in ``[1]``, or with those of all passages that it
            was written from.
        constraint: Drop segments that contradict their passage (``no_contradiction``), or that it does not fully
            support (``full_support``); a path ends if no segment is left.
        keep_candidates: Write every scored candidate, not only the chosen ones.
        explore: Decode both with and without retrieval at the first decision, so that other thresholds can be tried
            on the candidates; needs ``keep_candidates``.
    """

    critic: Literal["reflection", "prompted"] = "reflection"
    mode: Literal["adaptive", "always", "never"] = "adaptive"
    threshold: Share = 0.2
    passages: Positive = 5
    reading: Reading = "each"
    max_tokens: Positive = 100
    segments: Positive = 1
    beam_width: Positive = 2
    search: Literal["dynamic", "static"] = "dynamic"
    citations: bool = False
    constraint: Literal["none", "no_contradiction", "full_support"] = "none"
    weights: Weights = Weights()
    keep_candidates: bool = False
    explore: bool = False

    @model_validator(mode="after")
    def _explored_candidates_are_kept(self) -> Self:
        if self.explore and not (self.keep_candidates and self.mode == "adaptive"):
            raise ValueError("explore needs keep_candidates=true and mode=adaptive")
        return self


class Profile(Frozen):
    """Prompt, decoding and metric of the rows of a task.

    Attributes:
        instruction: Instruction to the model; ``{query}`` and ``{choices}`` are replaced by those of the row.
        choices: Closed set of answers for rows without their own.
        decoding: Keys of the section ``decoding``; the run's own settings take precedence.
        metric: Headline metric of the task.
    """

    instruction: str = "{query}"
    choices: tuple[str, ...] = ()
    decoding: dict[str, Any] = Field(default_factory=dict)
    metric: Literal["match", "exact_match", "accuracy", "str_em", "rouge_l"] = "match"

    @field_validator("decoding")
    @classmethod
    def _known_settings(cls, decoding: dict[str, Any]) -> dict[str, Any]:
        if whole_run := {"critic", "keep_candidates", "explore"} & decoding.keys():
            raise ValueError(f"{', '.join(sorted(whole_run))} can only be set for the whole run, not in a profile")
        DecodingConfig.model_validate(decoding)
        return decoding

    @field_validator("instruction")
    @classmethod
    def _asks(cls, instruction: str) -> str:
        if "{query}" not in instruction:
            raise ValueError("the instruction must contain {query}")
        return instruction


class RerankConfig(Frozen):
    """Reranking of the passages that a search finds, by a cross-encoder; given passages keep their order.

    Attributes:
        model: Cross-encoder: name on the Hugging Face hub, local folder, or ``demo``; without one, passages stay in the
            order of the search.
        revision: Branch, tag or commit on the Hugging Face hub.
        candidates: Passages that the search finds for the cross-encoder, if ``decoding.passages`` is not more.
        batch_size: Pairs of query and passage in a forward pass.
        dtype: Data type of the weights on a GPU; CPUs compute in float32.
    """

    model: str | None = None
    revision: str | None = None
    candidates: Annotated[Positive, Effect.FIXED] = 50
    batch_size: Positive = 64
    dtype: Annotated[Literal["float32", "float16", "bfloat16"], Effect.FIXED] = "float32"


class RetrievalConfig(Frozen):
    """Search of the index.

    Attributes:
        encoder: Encoder that the index must have been built with; by default the one that the index names is loaded.
        search: FAISS search parameters such as ``nprobe=16`` or ``efSearch=64``, comma-separated.
        fusion: ``dense`` searches by vectors, ``lexical`` by words (BM25), and ``rrf`` by both, whose ranks are fused;
            the last two need an index built with ``--lexical``.
        rrf_k: Constant of the fusion: a passage scores the sum of 1 / (rrf_k + rank).
        filter: Condition that passages must meet to be found, an SQL expression over their columns such as
            ``language = 'en' and year >= 2020``; a row's own condition must be met in addition.
        topology: ``local`` loads all shards in every actor; ``partitioned`` spreads them over shard servers, for an
            index that is larger than one machine or card.
        device: Where FAISS, the encoder and the reranker run: ``auto`` uses the GPU that Ray assigned to the actor or
            shard server if the index fits on it, otherwise the CPU; ``gpu`` fails if it does not.
        float16: Keep the vectors of ``Flat`` shards, and the tables of product quantizers, in half precision on the
            GPU; halves the memory of ``Flat``, and GPUs require it for 49 to 96 subquantizers.
        batch_size: Maximum queries encoded and searched together.
        wait_ms: Milliseconds that the first query of a batch waits for others.
        threads: FAISS threads per actor or shard server.
        verify: Check the digest of every index file before it is opened.
        cache: Local folder for index files from object storage.
        cache_gb: Maximum size of that folder in gigabytes (10^9 bytes); files of other indexes are evicted first, least
            recently used first. Unlimited by default.
    """

    encoder: Annotated[str | None, Effect.FIXED] = None
    search: Annotated[str, Effect.FIXED] = ""
    fusion: Annotated[Literal["dense", "lexical", "rrf"], Effect.FIXED] = "dense"
    rrf_k: Annotated[Positive, Effect.FIXED] = 60
    filter: Annotated[str | None, Effect.FIXED] = None
    topology: Literal["local", "partitioned"] = "local"
    device: Literal["auto", "cpu", "gpu"] = "auto"
    float16: Annotated[bool, Effect.FIXED] = False
    batch_size: Positive = 64
    wait_ms: Annotated[float, Field(ge=0.0)] = 2.0
    threads: Positive = 1
    verify: bool = True
    cache: str = "~/.cache/selfrag/index"
    cache_gb: Annotated[float, Field(gt=0)] | None = None
    rerank: RerankConfig = RerankConfig()

    @field_validator("search")
    @classmethod
    def _parameters(cls, search: str) -> str:
        parse_search(search)
        return search

    @property
    def searches_vectors(self) -> bool:
        """Whether queries are searched for by their vectors."""
        return self.fusion != "lexical"

    @property
    def searches_words(self) -> bool:
        """Whether queries are searched for by their words."""
        return self.fusion != "dense"


class SampleConfig(Frozen):
    """A sample of the query set, which is annotated in place of all rows to forecast what they take.

    Attributes:
        rows: Rows of the sample; without it, all rows are annotated.
        seed: Random seed; the same one draws the same rows of the same query set.
    """

    rows: Positive | None = None
    seed: Annotated[int, Field(ge=0)] = 0


NO_SAMPLE = SampleConfig()


def _read_auto(value: Any) -> Any:
    return None if value == "auto" else value


class ExecutionConfig(Frozen):
    """Placement and pace of the job; does not change the results.

    Attributes:
        actors: Number of actors, each with a replica of the model.
        cpus_per_actor: CPUs of each actor; by default an even share of the machine's.
        gpus_per_actor: GPUs of each actor: those of a replica of the model (tensor × pipeline × data parallel; the
            default if the cluster has GPUs), a share of one below 1, or 0 (the default without GPUs).
        shard_servers: Shard servers of the partitioned topology; by default one per node, at most one per shard.
        cpus_per_server: CPUs of each shard server.
        gpus_per_server: GPU of each shard server: 1 or a share of one; with 0 the servers search on the CPU.
        unit_rows: Rows of a work unit, which is one output file; by default (``auto``) 256 for sets of up to a million
            rows, then up to 8,192, and beyond 164 million rows so many that there are at most 20,000 units.
        units_in_flight: Units that an actor works on at once, from reading to writing, to keep its engine full.
        row_timeout_s: Seconds after which a row goes to ``errors/``; it shares the engine with all rows in flight.
        engine_stall_s: Seconds without a step of the engine, while requests are in flight, after which it counts as
            hung: it is replaced, and its rows are decoded again. The default exceeds any step of a healthy engine: the
            first steps may compile kernels, and a long prefill of a large model on few CPU cores is one step of
            minutes.
        max_error_rate: Share of rows in ``errors/`` above which a finished run counts as failed, and above which (and
            above 100 rows) a run stops early.
        price_per_hour: Price of one actor's machine, or of its share of one, for an hour, in any currency; forecasts
            then name the cost.
        max_hours: Hours from the start of the actors that one call may take: no unit begins that would not end in
            time. The call ends with status 3, and the same command continues the run.
        max_cost: Cost that one call may have, at ``price_per_hour`` for each actor; as ``max_hours``.
        grace_s: Seconds after SIGTERM in which the units in flight may still end. Then the finished rows of the others
            are kept for the next call; this may take ten seconds more.
        lock: URI of a folder that allows one run at a time, whatever their outputs; by default ``skip_annotated``.
        ray_address: Address of a running cluster; by default ``RAY_ADDRESS``, and without it Ray starts locally.
    """

    actors: Positive = 1
    cpus_per_actor: Annotated[float, Field(gt=0)] | None = None
    gpus_per_actor: Annotated[float, Field(ge=0)] | None = None
    shard_servers: Positive | None = None
    cpus_per_server: Annotated[float, Field(ge=0)] = 1.0
    gpus_per_server: Share = 0.0
    unit_rows: Annotated[Positive | None, BeforeValidator(_read_auto), Effect.FIXED] = None
    units_in_flight: Positive = 3
    row_timeout_s: Annotated[float, Field(gt=0)] = 3600.0
    engine_stall_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 900.0
    max_error_rate: Share = 0.01
    price_per_hour: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    max_hours: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    max_cost: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    grace_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 15.0
    lock: str | None = None
    ray_address: str | None = None

    @model_validator(mode="after")
    def _cost_has_a_price(self) -> Self:
        if self.max_cost is not None and not self.price_per_hour:
            raise ValueError("max_cost needs price_per_hour, the price of an actor's machine for an hour")
        return self


class StorageConfig(Frozen):
    """Access to object storage. Unset keys come from the standard variables, files and roles of each cloud.

    Attributes:
        endpoint_url: URL of an S3 store that is not AWS, such as ``http://127.0.0.1:9000``.
        region: Region of the S3 buckets.
        access_key, secret_key, session_token: Credentials of S3; prefer variables, roles or a file, since a command
            line can be read in the process list.
        azure_connection_string: Account, key and, if it is another, endpoint of Azure; by default
            ``AZURE_STORAGE_CONNECTION_STRING``.
        patience_s: Seconds for which transient errors (no connection, errors 500 and 503, throttling) are retried with
            exponential backoff before the job fails.
    """

    endpoint_url: str | None = None
    region: str | None = None
    access_key: SecretStr | None = None
    secret_key: SecretStr | None = None
    session_token: SecretStr | None = None
    azure_connection_string: SecretStr | None = None
    patience_s: Annotated[float, Field(ge=0)] = 120.0


class PublishConfig(Frozen):
    """Tables in which a finished annotated set is registered, once each; its files stay where they are.

    Attributes:
        delta: URI of a Delta table, a folder above the output; folders between them such as ``date={date}`` become
            partition columns.
        iceberg: Iceberg table, as ``CATALOG.NAMESPACE.TABLE``; pyiceberg's configuration names the catalog.
    """

    delta: str | None = None
    iceberg: str | None = None


class TrackingConfig(Frozen):
    """Services in which runs are recorded; none by default. No service that fails ends a run.

    Attributes:
        openlineage: Name of the job in OpenLineage events; ``OPENLINEAGE_URL`` or ``openlineage.yml`` names the server.
        mlflow: Name of the MLflow experiment; ``MLFLOW_TRACKING_URI`` names the server.
    """

    openlineage: Name | None = None
    mlflow: Name | None = None


class OnFailure(Frozen):
    """Notifications of a failed run.

    Attributes:
        command: Program and arguments to run, with a JSON object on stdin.
        webhook: URL that receives the same object by POST.
    """

    command: tuple[str, ...] = ()
    webhook: SecretStr | None = None

    @field_validator("webhook")
    @classmethod
    def _on_the_web(cls, webhook: SecretStr | None) -> SecretStr | None:
        if webhook is not None and not webhook.get_secret_value().startswith(("http://", "https://")):
            raise ValueError("expected http://… or https://…")
        return webhook
