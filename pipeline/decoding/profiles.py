"""Task profiles: a row's ``task`` decides how it is asked and decoded. The built-in ones are in ``profiles.yaml``."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import yaml

from pipeline.config.loading import assign, flatten, validated
from pipeline.config.sections import DecodingConfig, Profile
from pipeline.decoding.types import Query

BUILT_IN = Path(__file__).with_suffix(".yaml")


@cache
def built_in_profiles() -> dict[str, Profile]:
    """The profiles that come with the project, by name."""
    return {name: Profile.model_validate(tree) for name, tree in yaml.safe_load(BUILT_IN.read_text("utf-8")).items()}


def built_in_digest() -> str:
    """Digest of the built-in profiles: a run is not continued with others."""
    return hashlib.sha256(BUILT_IN.read_bytes()).hexdigest()[:12]


@dataclass(frozen=True)
class Tasks:
    """How each task is asked and decoded.

    Attributes:
        decoding: of the run; what it sets itself goes before what a profile says.
        profiles: the configuration's own, by name; they go before built-in ones of that name.
        default: task of the rows that name none.

    Raises:
        ValueError: no profile has the default's name.
    """

    decoding: DecodingConfig
    profiles: Mapping[str, Profile] = field(default_factory=dict)
    default: str | None = None

    def __post_init__(self) -> None:
        if self.default is not None and self.default not in self.known:
            raise ValueError(f"configuration key task: no profile {self.default!r}; there are {', '.join(self.known)}")

    @cached_property
    def known(self) -> dict[str, Profile]:
        """All profiles by name."""
        return {**built_in_profiles(), **self.profiles}

    @cached_property
    def _settled(self) -> dict[str, DecodingConfig]:
        return {}

    def _settings(self, name: str) -> DecodingConfig:
        if name not in self._settled:
            self._settled[name] = merge_settings(name, self.known[name], self.decoding)
        return self._settled[name]

    def apply(self, query: Query) -> tuple[Query, DecodingConfig]:
        """The query as its task asks it, and the settings to decode it with; as they are where no profile fits."""
        name = self._profile(query.task)
        if name is None:
            return query, for_choices(self.decoding, query.choices)
        profile = self.known[name]
        choices = query.choices or profile.choices
        instruction = profile.instruction.replace("{choices}", ", ".join(choices)).replace("{query}", query.query)
        return replace(query, choices=choices, instruction=instruction), for_choices(self._settings(name), choices)

    def _profile(self, task: str | None) -> str | None:
        name = task or self.default
        return name if name in self.known else None

    def described(self, task: str) -> dict[str, Any]:
        """What a run's manifest says of a task: its profile, metric and choices, and all its settings.

        Raises:
            ValueError: the profile and the run contradict each other.
        """
        name = self._profile(task)
        decoding = self._settings(name) if name else self.decoding
        profile = self.known[name] if name else Profile()
        return {
            "profile": name,
            "metric": profile.metric,
            "choices": list(profile.choices),
            "decoding": decoding.model_dump(mode="json"),
        }


def merge_settings(name: str, profile: Profile, decoding: DecodingConfig) -> DecodingConfig:
    """The defaults, then what the profile says, then what the run sets itself.

    Raises:
        ValueError: the result contradicts itself; names the profile.
    """
    tree: dict[str, Any] = {}
    for settings in (profile.decoding, decoding.model_dump(exclude_unset=True)):
        for key, value in flatten(settings).items():
            assign(tree, key, value)
    return validated(DecodingConfig, tree, f"decoding (with profile {name})")


def for_choices(decoding: DecodingConfig, choices: Sequence[str]) -> DecodingConfig:
    """The settings for a closed set, whose votes are counted over answers of one segment."""
    return decoding.model_copy(update={"segments": 1}) if choices and decoding.segments > 1 else decoding
