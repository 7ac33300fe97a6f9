"""Which critic a run has."""

from pipeline.config import RunConfig
from pipeline.engine import load_tokenizer
from pipeline.prompted import PromptedCritic
from pipeline.prompts import PromptTokenizer
from pipeline.reader import Critic, ReflectionCritic


def critic_of(config: RunConfig) -> Critic:
    """The run's critic, from its model's tokenizer alone.

    Raises:
        ValueError: there is no such model, or it cannot be asked in this way.
    """
    tokenizer = load_tokenizer(config.model)
    if config.decoding.critic == "prompted":
        return PromptedCritic(tokenizer, config.model.name)
    return ReflectionCritic(PromptTokenizer.of(tokenizer, config.model.name))
