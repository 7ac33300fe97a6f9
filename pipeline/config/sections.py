"""The sections of a configuration: frozen models whose docstrings are the reference of their keys."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, SecretStr, field_validator, model_validator

from pipeline.config.loading import Frozen, parse_search

Positive = Annotated[int, Field(ge=1)]


Share = Annotated[float, Field(ge=0.0, le=1.0)]


Weight = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]


class Columns(Frozen):
    """Which column of the query set holds what. All but ``id`` and ``query`` may be missing there.

    Attributes:
        id: unique, not null.
        query: what is asked.
        input: text under ``### Input:``.
        task: which profile the row is asked with.
        choices: closed set of answers.
        passages: given passages, read instead of the index.
    """

    id: str = "id"
    query: str = "query"
    input: str = "input"
    task: str = "task"
    choices: str = "choices"
    passages: str = "passages"


class ModelConfig(Frozen):
    """The model, and any argument of vLLM's engine. A text in the section's place is the name.

    Attributes:
        name: Hugging Face name, local folder, or ``demo``.
        revision: of the Hugging Face repository.
        lora: folder or name of a LoRA adapter to serve the model with.
        engine: arguments of ``vllm.AsyncEngineArgs`` by name, such as ``tensor_parallel_size``,
            ``quantization``, ``dtype``, ``max_model_len`` or ``gpu_memory_utilization``.
    """

    name: str
    revision: str | None = None
    lora: str | None = None
    engine: dict[str, Any] = Field(default_factory=dict)


class Weights(Frozen):
    """Weights of a segment's score (paper, equation 4); the defaults are the paper's.

    Attributes:
        sequence: weight of the segment's mean token probability.
        relevance: weight of IsRel.
        support: weight of IsSup.
        utility: weight of IsUse.
    """

    sequence: Weight = 1.0
    relevance: Weight = 1.0
    support: Weight = 1.0
    utility: Weight = 0.5


class DecodingConfig(Frozen):
    """How an answer is found.

    Attributes:
        critic: ``reflection`` reads the tokens of a model that was taught them; ``prompted`` asks any instruct model
            in words.
        mode: ``adaptive`` lets the model decide whether to retrieve; ``always`` and ``never`` do not ask it.
        threshold: the paper's delta; retrieve where p(Yes) / (p(Yes) + p(No)) is above it.
        passages: passages read for each segment (the paper's k).
        max_tokens: longest segment, in tokens.
        segments: most segments of an answer (the paper's T); 1 is the short form.
        beam_width: paths that go on after each segment (the paper's B).
        search: what later segments ask the index: ``dynamic`` is the query and the last segment, ``static`` the
            query alone.
        citations: end each segment with the number of its passage, as in ``[1]``.
        constraint: drop segments that contradict their passage, or all that it does not fully support; a path
            ends where nothing else is left.
        keep_candidates: write every scored candidate, not only the chosen ones.
        explore: write both what retrieval and what its absence leads to, whatever is decided at first, so that
            other thresholds can be tried on the candidates; needs ``keep_candidates``.
    """

    critic: Literal["reflection", "prompted"] = "reflection"
    mode: Literal["adaptive", "always", "never"] = "adaptive"
    threshold: Share = 0.2
    passages: Positive = 5
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
    """How the rows of a task are asked, decoded and judged.

    Attributes:
        instruction: what the model is asked; ``{query}`` and ``{choices}`` stand for the row's own.
        choices: closed set of rows that bring none.
        decoding: keys of the section ``decoding``; the run's own settings go before them.
        metric: the figure that the task is known by.
    """

    instruction: str = "{query}"
    choices: tuple[str, ...] = ()
    decoding: dict[str, Any] = Field(default_factory=dict)
    metric: Literal["match", "exact_match", "accuracy", "str_em", "rouge_l"] = "match"

    @field_validator("decoding")
    @classmethod
    def _known_settings(cls, decoding: dict[str, Any]) -> dict[str, Any]:
        if whole_run := {"critic", "keep_candidates", "explore"} & decoding.keys():
            raise ValueError(f"{', '.join(sorted(whole_run))} is the run's to say, not a profile's")
        DecodingConfig.model_validate(decoding)
        return decoding

    @field_validator("instruction")
    @classmethod
    def _asks(cls, instruction: str) -> str:
        if "{query}" not in instruction:
            raise ValueError("the instruction must hold {query}")
        return instruction


class RetrievalConfig(Frozen):
    """How the index is searched.

    Attributes:
        encoder: refuse an index that was not built with this one; by default the index says which it needs.
        search: FAISS search parameters such as ``nprobe=16`` or ``efSearch=64``, comma-separated.
        topology: ``local`` gives every actor all shards; ``partitioned`` spreads them over shard servers, for an
            index that is larger than one machine or card.
        device: where FAISS and the encoder run; ``auto`` takes the GPU that Ray assigned to the actor or shard server
            where the index fits on it, otherwise the CPU; ``gpu`` insists.
        float16: keep the vectors of ``Flat`` shards, and the tables of product quantisers, in half precision on the
            GPU: halves what ``Flat`` needs, and GPUs need it for 49 to 96 parts.
        batch_size: most queries encoded and searched together.
        wait_ms: how long the first of them waits for others.
        threads: of FAISS, per actor or shard server.
        verify: check the digest of every index file before it is opened.
        cache: folder for index files that come from object storage.
        cache_gb: most gigabytes (10^9 bytes) of that folder; files of other indexes go first, the longest unused
            ones before others. No limit by default.
    """

    encoder: str | None = None
    search: str = ""
    topology: Literal["local", "partitioned"] = "local"
    device: Literal["auto", "cpu", "gpu"] = "auto"
    float16: bool = False
    batch_size: Positive = 64
    wait_ms: Annotated[float, Field(ge=0.0)] = 2.0
    threads: Positive = 1
    verify: bool = True
    cache: str = "~/.cache/selfrag/index"
    cache_gb: Annotated[float, Field(gt=0)] | None = None

    @field_validator("search")
    @classmethod
    def _parameters(cls, search: str) -> str:
        parse_search(search)
        return search


class ExecutionConfig(Frozen):
    """Where and how the job runs; changes nothing in the results.

    Attributes:
        actors: actors at work, each with a replica of the model.
        cpus_per_actor: by default all of the machine's for one actor, an even share for several.
        gpus_per_actor: GPUs of each actor: those of a replica of the model (tensor × pipeline × data parallel; the
            default where the cluster has GPUs), a share of one below 1, or 0 (the default elsewhere).
        shard_servers: of the partitioned topology; by default one for each node, at most one for each shard.
        cpus_per_server: CPUs of each shard server.
        gpus_per_server: 1 or a share of a GPU for each shard server; with 0 the servers search on the CPU.
        unit_rows: rows of a work unit, which is one output file.
        units_in_flight: units that an actor has in hand at once, from reading to writing; they keep its engine full.
        row_timeout_s: rows that take longer go to ``errors/``; a row shares the engine with all others in flight.
        max_error_rate: share of rows in ``errors/`` above which a finished run counts as failed, and above which
            (and above 100 rows) one that is at work stops.
        lock: URI of a folder in which only one run at a time may be at work, whatever their outputs; by default
            ``skip_annotated``.
        ray_address: of a running cluster; by default ``RAY_ADDRESS``, and without it Ray starts in this process.
    """

    actors: Positive = 1
    cpus_per_actor: Annotated[float, Field(gt=0)] | None = None
    gpus_per_actor: Annotated[float, Field(ge=0)] | None = None
    shard_servers: Positive | None = None
    cpus_per_server: Annotated[float, Field(ge=0)] = 1.0
    gpus_per_server: Share = 0.0
    unit_rows: Positive = 256
    units_in_flight: Positive = 3
    row_timeout_s: Annotated[float, Field(gt=0)] = 3600.0
    max_error_rate: Share = 0.01
    lock: str | None = None
    ray_address: str | None = None


class StorageConfig(Frozen):
    """Access to object storage. What is not set comes from the standard AWS variables, files and roles.

    Attributes:
        endpoint_url: of a store that is not AWS, such as ``http://127.0.0.1:9000``.
        region: of the buckets.
        access_key, secret_key, session_token: credentials; better as variables, roles or a file, since a command line
            can be read in the process list.
        patience_s: how long faults that pass (no connection, errors 500 and 503, throttling) are waited for, with
            longer and longer pauses, before the job gives up.
    """

    endpoint_url: str | None = None
    region: str | None = None
    access_key: SecretStr | None = None
    secret_key: SecretStr | None = None
    session_token: SecretStr | None = None
    patience_s: Annotated[float, Field(ge=0)] = 120.0


class OnFailure(Frozen):
    """Who is told when a run fails (``pipeline.run.notices``).

    Attributes:
        command: program and arguments; gets a JSON object on its stdin.
        webhook: gets the same by POST.
    """

    command: tuple[str, ...] = ()
    webhook: SecretStr | None = None

    @field_validator("webhook")
    @classmethod
    def _on_the_web(cls, webhook: SecretStr | None) -> SecretStr | None:
        if webhook is not None and not webhook.get_secret_value().startswith(("http://", "https://")):
            raise ValueError("expected http://… or https://…")
        return webhook
