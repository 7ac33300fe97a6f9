"""Task profiles: a row's ``task`` decides how it is prompted and decoded.

The built-in profiles are in ``profiles.yaml``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import yaml

from pipeline.config.loading import assign, flatten, hash_tree, validate_section
from pipeline.config.sections import DecodingConfig, Profile
from pipeline.decoding.types import Query

BUILT_IN = Path(__file__).with_suffix(".yaml")


@cache
def load_built_in_profiles() -> dict[str, Profile]:
    """Read the built-in profiles, by name."""
    return {name: Profile.model_validate(tree) for name, tree in yaml.safe_load(BUILT_IN.read_text("utf-8")).items()}


def hash_built_in_profiles() -> str:
    """Return a digest of the built-in profiles: a run can only be resumed with the same ones."""
    return hash_tree({name: tree.model_dump(exclude_unset=True) for name, tree in load_built_in_profiles().items()})


@dataclass(frozen=True)
class Tasks:
    """The prompts and decoding settings of each task.

    Attributes:
        decoding: decoding settings of the run; those that it sets explicitly take precedence over a profile.
        profiles: profiles of the configuration by name; they replace built-in profiles of the same name.
        default: task of the rows without one.

    Raises:
        ValueError: there is no profile for the default task.
    """

    decoding: DecodingConfig
    profiles: Mapping[str, Profile] = field(default_factory=dict)
    default: str | None = None

    def __post_init__(self) -> None:
        if self.default is not None and self.default not in self.known:
            raise ValueError(
                f"configuration key task: no profile {self.default!r}; expected one of {', '.join(self.known)}"
            )

    @cached_property
    def known(self) -> dict[str, Profile]:
        """All profiles by name, built-in and configured."""
        return {**load_built_in_profiles(), **self.profiles}

    @cached_property
    def _settled(self) -> dict[str, DecodingConfig]:
        return {}

    def _get_settings(self, name: str) -> DecodingConfig:
        if name not in self._settled:
            self._settled[name] = merge_settings(name, self.known[name], self.decoding)
        return self._settled[name]

    def apply(self, query: Query) -> tuple[Query, DecodingConfig]:
        """Return the query with the instruction and choices of its task, and its decoding settings.

        Without a profile for its task, a query is left as it is and decoded with the settings of the run. In both
        cases a closed set is decoded as one segment.
        """
        name = self._find_profile(query.task)
        if name is None:
            return query, limit_segments(self.decoding, query.choices)
        profile = self.known[name]
        choices = query.choices or profile.choices
        instruction = profile.instruction.replace("{choices}", ", ".join(choices)).replace("{query}", query.query)
        decoding = limit_segments(self._get_settings(name), choices)
        return replace(query, choices=choices, instruction=instruction), decoding

    def _find_profile(self, task: str | None) -> str | None:
        name = task or self.default
        return name if name in self.known else None

    def describe(self, task: str) -> dict[str, Any]:
        """Describe a task for the manifest of a run: profile, metric, choices and all decoding settings.

        Raises:
            ValueError: the settings of the profile and of the run contradict each other.
        """
        name = self._find_profile(task)
        decoding = self._get_settings(name) if name else self.decoding
        profile = self.known[name] if name else Profile()
        return {
            "profile": name,
            "metric": profile.metric,
            "choices": list(profile.choices),
            "decoding": decoding.model_dump(mode="json"),
        }


def merge_settings(name: str, profile: Profile, decoding: DecodingConfig) -> DecodingConfig:
    """Merge decoding settings: the defaults, then those of the profile, then those that the run sets explicitly.

    Raises:
        ValueError: the merged settings contradict each other; the message names the profile.
    """
    tree: dict[str, Any] = {}
    for settings in (profile.decoding, decoding.model_dump(exclude_unset=True)):
        for key, value in flatten(settings).items():
            assign(tree, key, value)
    return validate_section(DecodingConfig, tree, f"decoding (with profile {name})")


def limit_segments(decoding: DecodingConfig, choices: Sequence[str]) -> DecodingConfig:
    """Limit answers from a closed set to one segment: a choice is scored by the one-segment answers that name it."""
    if choices and decoding.segments > 1:
        return decoding.model_copy(update={"segments": 1})
    return decoding
