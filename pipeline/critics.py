"""Which critic a run has."""

from pipeline.config.run import RunConfig
from pipeline.decoding.prompted_reader import PromptedCritic
from pipeline.decoding.prompts import PromptTokenizer
from pipeline.decoding.protocols import Critic
from pipeline.decoding.reflection_reader import ReflectionCritic
from pipeline.engine.vllm import load_tokenizer


def critic_of(config: RunConfig) -> Critic:
    """The run's critic, from its model's tokenizer alone.

    Raises:
        ValueError: there is no such model, or it cannot be asked in this way.
    """
    tokenizer = load_tokenizer(config.model)
    if config.decoding.critic == "prompted":
        return PromptedCritic(tokenizer, config.model.name)
    return ReflectionCritic(PromptTokenizer.of(tokenizer, config.model.name))
