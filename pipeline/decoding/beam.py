"""Segment beam search (Asai et al. 2023, algorithm 1 and section 3.3).

Each step expands every live path of the beam and keeps the best B of all paths, finished ones included. With at most
one segment this is the short form. The search is pure: the caller passes the function that expands a path.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from itertools import chain
from typing import Any, TypeVar

from pipeline.config.sections import DecodingConfig
from pipeline.decoding.reflection import IsSup, Retrieve
from pipeline.decoding.types import Finish, Path, Segment

T = TypeVar("T")
Expand = Callable[[Path], Awaitable[Sequence[Path]]]


async def gather_all(*steps: Coroutine[Any, Any, T]) -> list[T]:
    """Run steps concurrently and return their results in order; if one fails, cancel the others."""
    tasks = [asyncio.ensure_future(step) for step in steps]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()


def decide_opening(path: Path, config: DecodingConfig) -> Retrieve:
    """Decide what opens the next segment of a live path: the mode, or the model's probability against δ.

    ``[Continue to Use Evidence]`` keeps the last passage, if the path has one.
    """
    assert path.boundary is not None
    if config.mode != "adaptive" or path.boundary.probability is None:
        return Retrieve.YES if config.mode == "always" else Retrieve.NO
    if path.boundary.keep and path.evidence is not None:
        return Retrieve.CONTINUE
    return Retrieve.YES if path.boundary.probability > config.threshold else Retrieve.NO


def is_permitted(segment: Segment, constraint: str) -> bool:
    """Whether a hard constraint allows a segment; a segment without a passage is always allowed."""
    if constraint == "none" or segment.evidence is None:
        return True
    support = segment.critique.support
    if constraint == "full_support":
        return support is IsSup.FULLY
    return support is not IsSup.NONE


def rank_key(path: Path) -> tuple[bool, float, tuple[str, ...]]:
    """Sort key: paths with text first, then the highest score.

    Bare reflection tokens can score higher than words with a bad critique, but are no answer. Ties are broken by
    passage ids, so that the order of the input does not matter.
    """
    has_text = any(segment.text for segment in path.segments)
    return not has_text, -path.score, tuple(segment.passage_id or "" for segment in path.segments)


def drop_duplicates(paths: Iterable[Path]) -> list[Path]:
    """Sort paths best first and keep the best of those with equal texts; duplicates would fill the beam."""
    best: dict[tuple[str, ...], Path] = {}
    for path in sorted(paths, key=rank_key):
        best.setdefault(tuple(segment.text for segment in path.segments), path)
    return list(best.values())


def prune_children(path: Path, children: Sequence[Path], config: DecodingConfig, childless: Finish) -> list[Path]:
    """Keep the children on the decided branch that the constraint allows; if none is left, end the path.

    Args:
        childless: finish reason of a path that has no children on that branch.
    """
    opening = decide_opening(path, config)
    branch = [child for child in children if child.segments[-1].opening is opening]
    allowed = [child for child in branch if is_permitted(child.segments[-1], config.constraint)]
    if allowed:
        return allowed
    return [path.end(Finish.CONSTRAINT if branch else childless)]


async def search(root: Path, expand: Expand, config: DecodingConfig, childless: Finish = Finish.ROOM) -> list[Path]:
    """Grow an answer segment by segment.

    Args:
        root: the empty path with the first decision's boundary.
        expand: returns the one-segment continuations of a live path, at least those on the branch that was decided
            for; empty if the path cannot grow.
        childless: finish reason of a path that cannot grow.

    Returns:
        All paths that compete to be the answer: the continuations of the last step, and finished paths.
    """

    async def grow(path: Path) -> list[Path]:
        if path.finished:
            return [path]
        return prune_children(path, await expand(path), config, childless)

    paths = [root]
    for _ in range(config.segments):
        beam = drop_duplicates(paths)[: config.beam_width]
        if all(path.finished for path in beam):
            return beam
        children = await gather_all(*(grow(path) for path in beam))
        paths = list(chain.from_iterable(children))
    return paths
