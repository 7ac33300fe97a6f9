"""The arguments of the engine that are tried, in this order, and the values of each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Earlier words of the prompt and the answer are the draft, which can gain where answers copy from a passage. Other
# methods need a draft model: https://docs.vllm.ai/en/latest/features/spec_decode.html
PROMPT_LOOKUP = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4}


@dataclass(frozen=True)
class Knob:
    """An argument of the engine, and the values that are tried.

    Attributes:
        name: name of the knob in the command.
        argument: name of the argument of ``vllm.AsyncEngineArgs``.
        values: values to try, from small to large if they have an order.
        needs_gpu: whether only GPUs have it.
    """

    name: str
    argument: str
    values: tuple[Any, ...]
    needs_gpu: bool = False


# First those that change answers by rounding at most. vLLM's defaults depend on the machine and lie among the values.
KNOBS = (
    Knob("slots", "max_num_seqs", (64, 256, 1024)),
    Knob("step-tokens", "max_num_batched_tokens", (2048, 8192, 32768)),
    Knob("memory", "gpu_memory_utilization", (0.85, 0.95), needs_gpu=True),
    Knob("dtype", "dtype", ("bfloat16", "float16")),
    Knob("weights", "quantization", ("fp8",), needs_gpu=True),
    Knob("keys", "kv_cache_dtype", ("fp8",)),
    Knob("speculation", "speculative_config", (PROMPT_LOOKUP,)),
)
# Other names of the same values.
SYNONYMS = {"half": "float16"}


def choose_knobs(names: Sequence[str], configured: Mapping[str, Any]) -> list[Knob]:
    """Choose the knobs to try, without the values that are configured already.

    Args:
        names: names of the knobs; empty for all.
        configured: configured arguments of the engine.

    Raises:
        ValueError: there is no knob of that name.
    """
    known = {knob.name: knob for knob in KNOBS}
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"--only {unknown[0]}: expected one of {', '.join(known)}")
    wanted = [_leave_out(knob, configured) for knob in KNOBS if not names or knob.name in names]
    return [knob for knob in wanted if knob.values]


def _leave_out(knob: Knob, configured: Mapping[str, Any]) -> Knob:
    now = configured.get(knob.argument)
    values = tuple(value for value in knob.values if value != SYNONYMS.get(str(now), now))
    return Knob(knob.name, knob.argument, values, knob.needs_gpu)


def leave_out_gpu_knobs(knobs: Sequence[Knob], names: Sequence[str]) -> list[Knob]:
    """Return the knobs that actors without a GPU have.

    Raises:
        ValueError: one that is left out was asked for by name.
    """
    if idle := [knob.name for knob in knobs if knob.needs_gpu and knob.name in names]:
        raise ValueError(f"--only {idle[0]}: the actors have no GPU")
    return [knob for knob in knobs if not knob.needs_gpu]
