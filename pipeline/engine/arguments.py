"""The arguments of vLLM's engine: this project's defaults, checks, and the GPUs and memory that a replica needs."""

import dataclasses
import math
from typing import Any

from pipeline.config.sections import ModelConfig
from pipeline.engine.models import resolve_model_path
from pipeline.gpus import decide_gpu_use

# Tokens of a KV block, the unit that prefix caching shares. vLLM's default is 16 on GPUs. On CPUs it is 128, longer
# than most prefixes shared here; CPUs accept multiples of 32.
CPU_BLOCK_TOKENS = 32
# The values of ``max_lora_rank`` that vLLM accepts (vllm/config/lora.py).
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# The number of GPUs of a replica is the product of these arguments (vllm/config/parallel.py).
PARALLEL_SIZES = (
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "data_parallel_size",
    "prefill_context_parallel_size",
)
# Argument values that keep a replica on one node, in processes that its actor starts.
ONE_NODE: dict[str, tuple[Any, ...]] = {
    "distributed_executor_backend": (None, "mp", "uni"),
    "data_parallel_backend": ("mp",),
    "data_parallel_external_lb": (False,),
    "data_parallel_hybrid_lb": (False,),
    "nnodes": (1,),
}


def check_engine_arguments(model: ModelConfig) -> None:
    """Check the names of the configured engine arguments, and the LoRA adapter.

    Raises:
        ValueError: vLLM has no argument of that name, the arguments would spread a replica over several nodes, a
            parallel size is not a whole number above 0, or vLLM cannot serve the adapter.
    """
    if model.lora:
        choose_lora_rank(model.lora)
    if not model.engine:
        return  # importing vLLM takes seconds
    from vllm import AsyncEngineArgs

    known = {field.name for field in dataclasses.fields(AsyncEngineArgs)}
    for name in model.engine:
        if name not in known:
            raise ValueError(f"unknown configuration key model.engine.{name}: vLLM's engine has no such argument")
    check_one_node(model)
    count_replica_gpus(model)


def check_one_node(model: ModelConfig) -> None:
    """Reject arguments that would spread a replica over nodes, away from the GPUs that Ray assigned to its actor.

    Raises:
        ValueError: an argument has such a value; the message names it.
    """
    all_ranks = (None, model.engine.get("data_parallel_size", 1))
    for name, values in {**ONE_NODE, "data_parallel_size_local": all_ranks}.items():
        if name in model.engine and model.engine[name] not in values:
            raise ValueError(
                f"model.engine.{name}={model.engine[name]}: an actor's GPUs are on one node, and Ray assigns them to "
                "the actor; remove the key"
            )


def count_replica_gpus(model: ModelConfig) -> int:
    """Count the GPUs of one replica of the model: tensor × pipeline × data × prefill-context parallel.

    Raises:
        ValueError: one of the sizes is not a whole number above 0.
    """
    sizes = {name: model.engine.get(name, 1) for name in PARALLEL_SIZES}
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"model.engine.{name}: expected a whole number above 0, found {size!r}")
    return math.prod(sizes.values())


def build_engine_arguments(model: ModelConfig) -> dict[str, Any]:
    """Return the arguments for ``vllm.AsyncEngineArgs``: the defaults here, overridden by the configuration."""
    from vllm.platforms import current_platform

    defaults: dict[str, Any] = {
        "model": resolve_model_path(model.name),
        "revision": model.revision,
        "enable_prefix_caching": True,
        "disable_log_stats": True,
        # Ignore generation settings that ship with a model (temperature, top-p): decoding is greedy.
        "generation_config": "vllm",
    }
    if current_platform.is_cpu():
        # On CPUs without bfloat16 instructions, bfloat16 is five times slower; float32 also separates close scores.
        defaults |= {"enforce_eager": True, "block_size": CPU_BLOCK_TOKENS, "dtype": "float32"}
    if count_replica_gpus(model) > 1:
        # Inside a Ray placement group vLLM would request GPUs from Ray in addition to those of its actor.
        defaults |= {"distributed_executor_backend": "mp"}
    if model.lora:
        defaults |= {"enable_lora": True, "max_lora_rank": choose_lora_rank(model.lora)}
    return defaults | model.engine


def get_gpu_share(model: ModelConfig) -> float:
    """Return the share of a GPU's memory that the engine will take: ``gpu_memory_utilization``, or vLLM's default."""
    from vllm import AsyncEngineArgs

    return float(model.engine.get("gpu_memory_utilization", AsyncEngineArgs.gpu_memory_utilization))


def check_assigned_gpus() -> None:
    """Reject vLLM's GPU build in an actor without a GPU: vLLM would use one that Ray did not assign.

    Raises:
        ValueError: Ray assigned no GPU to this actor; the message names the settings to change.
    """
    from vllm.platforms import current_platform

    if current_platform.is_cuda_alike() and not decide_gpu_use("auto"):
        raise ValueError(
            "vLLM's GPU build is installed, but Ray assigned no GPU to this actor: set execution.gpus_per_actor to the "
            "GPUs of a replica, or install the cpu extra"
        )


def choose_lora_rank(adapter: str) -> int:
    """Return the smallest ``max_lora_rank`` that vLLM accepts and that admits a LoRA adapter.

    Raises:
        ValueError: there is no such adapter, or its rank is too high.
    """
    from peft import PeftConfig

    try:
        rank = int(PeftConfig.from_pretrained(adapter).r)
    except (OSError, ValueError) as error:
        raise ValueError(f"model.lora {adapter}: {' '.join(str(error).split())[:300]}") from None
    fitting = [most for most in LORA_RANKS if most >= rank]
    if not fitting:
        raise ValueError(f"model.lora {adapter}: its rank is {rank}, but vLLM accepts at most {LORA_RANKS[-1]}")
    return fitting[0]
