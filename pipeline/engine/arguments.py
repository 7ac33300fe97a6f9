"""The arguments of vLLM's engine: their defaults here, their checks, and the GPUs and memory that follow from them."""

import dataclasses
import math
from typing import Any

from pipeline.config.sections import ModelConfig
from pipeline.engine.models import model_path
from pipeline.gpus import choose_gpu

# KV blocks are what prefix caching shares. GPUs have 16 tokens by default; the CPU's 128 are longer than
# most of our shared prefixes, and it takes multiples of 32.
CPU_BLOCK_TOKENS = 32
# The values of ``max_lora_rank`` that vLLM knows (vllm/config/lora.py).
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# The GPUs of a replica are the product of these arguments (vllm/config/parallel.py).
PARALLEL_SIZES = (
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "data_parallel_size",
    "prefill_context_parallel_size",
)
# The values of arguments with which a replica stays on one machine, in the processes of its actor.
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
        ValueError: vLLM has no argument of that name, would spread over several nodes, or cannot serve the adapter.
    """
    if model.lora:
        lora_rank(model.lora)
    if not model.engine:
        return  # importing vLLM takes seconds
    from vllm import AsyncEngineArgs

    known = {field.name for field in dataclasses.fields(AsyncEngineArgs)}
    for name in model.engine:
        if name not in known:
            raise ValueError(f"unknown configuration key model.engine.{name}: vLLM's engine has no such argument")
    check_one_node(model)
    replica_gpus(model)


def check_one_node(model: ModelConfig) -> None:
    """Refuse arguments that would spread a replica over nodes, away from the GPUs that Ray assigned to its actor.

    Raises:
        ValueError: names the argument.
    """
    all_ranks = (None, model.engine.get("data_parallel_size", 1))
    for name, values in {**ONE_NODE, "data_parallel_size_local": all_ranks}.items():
        if name in model.engine and model.engine[name] not in values:
            raise ValueError(
                f"model.engine.{name}={model.engine[name]}: an actor's GPUs are on one node, and Ray assigns them to "
                "the actor; leave the key out"
            )


def replica_gpus(model: ModelConfig) -> int:
    """Count the GPUs of one replica of the model: tensor × pipeline × data × prefill-context parallel.

    Raises:
        ValueError: one of the sizes is not a whole number above 0.
    """
    sizes = {name: model.engine.get(name, 1) for name in PARALLEL_SIZES}
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"model.engine.{name}: expected a whole number above 0, found {size!r}")
    return math.prod(sizes.values())


def engine_arguments(model: ModelConfig) -> dict[str, Any]:
    """Arguments for ``vllm.AsyncEngineArgs``: our defaults, then the configuration's own."""
    from vllm.platforms import current_platform

    defaults: dict[str, Any] = {
        "model": model_path(model.name),
        "revision": model.revision,
        "enable_prefix_caching": True,
        "disable_log_stats": True,
        # Generation settings that ship with a model (temperature, top-p) must not change what greedy means.
        "generation_config": "vllm",
    }
    if current_platform.is_cpu():
        # Without bfloat16 instructions bfloat16 is five times slower; float32 also tells close scores apart.
        defaults |= {"enforce_eager": True, "block_size": CPU_BLOCK_TOKENS, "dtype": "float32"}
    if replica_gpus(model) > 1:
        # Inside a Ray placement group vLLM would ask Ray for GPUs beside those of its actor.
        defaults |= {"distributed_executor_backend": "mp"}
    if model.lora:
        defaults |= {"enable_lora": True, "max_lora_rank": lora_rank(model.lora)}
    return defaults | model.engine


def gpu_share(model: ModelConfig) -> float:
    """Share of a GPU's memory that the engine will take: ``gpu_memory_utilization``, vLLM's own default otherwise."""
    from vllm import AsyncEngineArgs

    return float(model.engine.get("gpu_memory_utilization", AsyncEngineArgs.gpu_memory_utilization))


def check_assigned_gpus() -> None:
    """Refuse to start vLLM's GPU build in an actor that has no GPU: it would take one all the same.

    Raises:
        ValueError: says what to set.
    """
    from vllm.platforms import current_platform

    if current_platform.is_cuda_alike() and not choose_gpu("auto"):
        raise ValueError(
            "vLLM's GPU build is installed, but Ray assigned no GPU to this actor: set execution.gpus_per_actor to the "
            "GPUs of a replica, or install the cpu extra"
        )


def lora_rank(adapter: str) -> int:
    """The least rank that vLLM can be started with for a LoRA adapter.

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
        raise ValueError(f"model.lora {adapter}: its rank is {rank}, vLLM takes {LORA_RANKS[-1]} at most")
    return fitting[0]
