"""The segment beam (Asai et al. 2023, algorithm 1 and section 3.3). Pure: how a path grows is a function given.

At every step each live path of the beam is continued in all ways that the decision at its end asks for, and the
best B of all paths, finished ones among them, go on. With one segment at most this is the short form.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from typing import Any, TypeVar

from pipeline.config.run import DecodingConfig
from pipeline.decoding.reflection import IsSup, Retrieve
from pipeline.decoding.types import Finish, Path, Segment

T = TypeVar("T")
Expand = Callable[[Path], Awaitable[Sequence[Path]]]


async def together(*steps: Coroutine[Any, Any, T]) -> list[T]:
    """Results of concurrent steps, in their order; when one fails, the others are cancelled."""
    tasks = [asyncio.ensure_future(step) for step in steps]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()


def decision(path: Path, config: DecodingConfig) -> Retrieve:
    """What opens the next segment of a live path: by the mode, or by the model's word and the threshold δ.

    ``[Continue to Use Evidence]`` keeps the last passage where there is one.
    """
    assert path.boundary is not None
    if config.mode != "adaptive" or path.boundary.probability is None:
        return Retrieve.YES if config.mode == "always" else Retrieve.NO
    if path.boundary.keep and path.evidence is not None:
        return Retrieve.CONTINUE
    return Retrieve.YES if path.boundary.probability > config.threshold else Retrieve.NO


def permitted(segment: Segment, constraint: str) -> bool:
    """Whether a hard constraint lets a segment pass; one without a passage has nothing to contradict."""
    if constraint == "none" or segment.evidence is None:
        return True
    support = segment.critique.support
    return support is IsSup.FULLY if constraint == "full_support" else support is not IsSup.NONE


def order(path: Path) -> tuple[float, tuple[str, ...]]:
    """Sorting key: best first; of equal scores the lower passage ids, so that their order given does not matter."""
    return -path.score, tuple(s.evidence.passage.id if s.evidence else "" for s in path.segments)


def merged(paths: Iterable[Path]) -> list[Path]:
    """Paths best first; of those with equal texts the best alone, or twins would fill the beam."""
    best: dict[tuple[str, ...], Path] = {}
    for path in sorted(paths, key=order):
        best.setdefault(tuple(segment.text for segment in path.segments), path)
    return list(best.values())


def continued(path: Path, children: Sequence[Path], config: DecodingConfig, barren: Finish) -> list[Path]:
    """A path's children on the branch decided for, constraints kept; without any, the path ends where it is.

    Args:
        barren: why it ends where it has no children on that branch.
    """
    opening = decision(path, config)
    branch = [child for child in children if child.segments[-1].opening is opening]
    allowed = [child for child in branch if permitted(child.segments[-1], config.constraint)]
    return allowed or [path.ended(Finish.CONSTRAINT if branch else barren)]


async def search(root: Path, expand: Expand, config: DecodingConfig, barren: Finish = Finish.ROOM) -> list[Path]:
    """Grow an answer segment by segment.

    Args:
        root: the empty path with the first decision's boundary.
        expand: all one-segment continuations of a live path, at least those on the branch decided for; none where
            it cannot grow.
        barren: why a path ends that cannot grow.

    Returns:
        Everything that competes to be the answer: all continuations of the last step, and finished paths.
    """

    async def grown(path: Path) -> list[Path]:
        return [path] if path.finished else continued(path, await expand(path), config, barren)

    paths = [root]
    for _ in range(config.segments):
        beam = merged(paths)[: config.beam_width]
        if all(path.finished for path in beam):
            return beam
        families = await together(*(grown(path) for path in beam))
        paths = [path for family in families for path in family]
    return paths
