import asyncio
import random
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config.sections import DecodingConfig
from pipeline.decoding.beam import decide_opening, drop_duplicates, gather_all, is_permitted, prune_children, search
from pipeline.decoding.choose import choose
from pipeline.decoding.reflection import IsSup, Retrieve
from pipeline.decoding.types import Boundary, Critique, Finish, Passage, Path, RetrievedPassage, Segment

ASKS, REFUSES, KEEPS = Boundary(0.9), Boundary(0.1), Boundary(0.1, keep=True)


def segment(
    text: str, score: float, passage: str | None = "p", support: IsSup | None = None, opening: Retrieve = Retrieve.YES
) -> Segment:
    evidence = RetrievedPassage(Passage(passage, "", ""), None, 1) if passage else None
    return Segment(text, text, evidence, Critique(score, None, None, None, score, support=support), opening)


def path(*segments: Segment, boundary: Boundary | None = ASKS) -> Path:
    return Path(segments, boundary, Finish.STOP if boundary is None else None)


def texts(paths: Sequence[Path]) -> list[str]:
    return [" ".join(s.text for s in p.segments) for p in paths]


@pytest.mark.parametrize(
    ("boundary", "last", "expected"),
    [
        (ASKS, None, Retrieve.YES),
        (REFUSES, None, Retrieve.NO),
        (Boundary(0.2), None, Retrieve.NO),  # not above δ = 0.2
        (KEEPS, segment("a", 1.0), Retrieve.CONTINUE),
        (KEEPS, segment("a", 1.0, passage=None), Retrieve.NO),  # nothing to keep
        (KEEPS, None, Retrieve.NO),
    ],
)
def test_boundary_decides_the_next_opening(boundary: Boundary, last: Segment | None, expected: Retrieve) -> None:
    assert decide_opening(path(*[last] if last else [], boundary=boundary), DecodingConfig()) is expected


@pytest.mark.parametrize(("mode", "expected"), [("always", Retrieve.YES), ("never", Retrieve.NO)])
def test_mode_overrides_every_boundary(mode: str, expected: Retrieve) -> None:
    config = DecodingConfig.model_validate({"mode": mode})
    for boundary in (ASKS, REFUSES, KEEPS):
        assert decide_opening(path(segment("a", 1.0), boundary=boundary), config) is expected


@pytest.mark.parametrize(
    ("support", "evidence", "no_contradiction", "full_support"),
    [
        (IsSup.FULLY, "p", True, True),
        (IsSup.PARTIALLY, "p", True, False),
        (IsSup.NONE, "p", False, False),
        (None, "p", True, False),
        (None, None, True, True),
    ],
)
def test_hard_constraints_filter_segments_by_support(
    support: IsSup | None, evidence: str | None, no_contradiction: bool, full_support: bool
) -> None:
    judged = segment("a", 1.0, evidence, support)
    assert is_permitted(judged, "none")
    assert is_permitted(judged, "no_contradiction") is no_contradiction
    assert is_permitted(judged, "full_support") is full_support


def test_path_ends_if_the_constraint_drops_all_children() -> None:
    config = DecodingConfig(constraint="no_contradiction")
    parent = path(segment("a", 1.0))
    dropped = path(*parent.segments, segment("b", 3.0, support=IsSup.NONE))
    (ended,) = prune_children(parent, [dropped], config, Finish.ROOM)
    assert (ended.finished, ended.finish, texts([ended])) == (True, Finish.CONSTRAINT, ["a"])
    (ended,) = prune_children(parent, [], config, Finish.ROOM)
    assert ended.finish is Finish.ROOM


def test_only_the_chosen_branch_continues() -> None:
    yes, no = path(segment("yes", 1.0)), path(segment("no", 2.0, None, opening=Retrieve.NO))
    assert prune_children(path(boundary=ASKS), [yes, no], DecodingConfig(), Finish.ROOM) == [yes]
    assert prune_children(path(boundary=REFUSES), [yes, no], DecodingConfig(), Finish.ROOM) == [no]
    (ended,) = prune_children(path(boundary=ASKS), [no], DecodingConfig(), Finish.PRUNED)
    assert ended.finish is Finish.PRUNED


def test_equal_texts_are_merged_into_the_best() -> None:
    low, high, other = path(segment("a", 1.0, "p1")), path(segment("a", 2.0, "p2")), path(segment("b", 1.5))
    assert drop_duplicates([low, other, high]) == [high, other]


# A tree of three levels, worked out by hand, B = 2, k = 2. Scores of the segments; path scores are means.
#   a 2.0 ┬ ad 1.0 (mean 1.5) ─ pruned: third of the second level
#         └ ae 1.4 (mean 1.7, ended)
#   b 1.8 ┬ bf 2.2 (mean 2.0) ┬ bfg 0.8 (mean 1.6)
#         └ bh 0.2 (mean 1.0) └ bfi 2.3 (mean 2.1)
#   c 1.0  pruned at the first level, though cj would have won with 3.0 at the next (mean 2.0, then 9.0)
TREE: dict[str, list[tuple[str, float, Boundary | None]]] = {
    "": [("a", 2.0, ASKS), ("b", 1.8, ASKS), ("c", 1.0, ASKS)],
    "a": [("d", 1.0, ASKS), ("e", 1.4, None)],
    "b": [("f", 2.2, ASKS), ("h", 0.2, ASKS)],
    "b f": [("g", 0.8, None), ("i", 2.3, ASKS)],
    "c": [("j", 9.0, None)],
}


def expander(tree: dict[str, list[tuple[str, float, Boundary | None]]], asked: list[str], rng: random.Random):
    async def expand(parent: Path) -> list[Path]:
        (name,) = texts([parent])
        asked.append(name)
        for _ in range(rng.randrange(4)):  # siblings end in any order
            await asyncio.sleep(0)
        return [path(*parent.segments, segment(t, score), boundary=b) for t, score, b in tree[name]]

    return expand


@pytest.mark.parametrize("seed", range(5))
async def test_beam_of_width_two_searches_three_levels(seed: int) -> None:
    asked: list[str] = []
    config = DecodingConfig(segments=3, beam_width=2)
    found = await search(path(), expander(TREE, asked, random.Random(seed)), config)
    assert sorted(asked) == ["", "a", "b", "b f"]  # c is pruned, a e has ended, a d and b h are pruned
    assert sorted(texts(found)) == ["a e", "b f g", "b f i"]
    best, _ = choose(found)
    assert texts([best]) == ["b f i"]
    assert best.score == pytest.approx((1.8 + 2.2 + 2.3) / 3)


async def test_finished_path_can_win_over_longer_ones() -> None:
    tree: dict[str, list[tuple[str, float, Boundary | None]]] = {**TREE, "b f": [("g", 0.8, None), ("i", 0.3, None)]}
    tree["a"] = [("d", 1.0, ASKS), ("e", 1.9, None)]
    found = await search(path(), expander(tree, [], random.Random(0)), DecodingConfig(segments=7, beam_width=2))
    assert texts([choose(found)[0]]) == ["a e"]  # 1.95 against (1.8 + 2.2 + 0.8) / 3 = 1.6


async def test_search_stops_when_the_whole_beam_is_finished() -> None:
    asked: list[str] = []
    tree: dict[str, list[tuple[str, float, Boundary | None]]] = {"": [("a", 2.0, None), ("b", 1.0, ASKS)]}
    found = await search(path(), expander(tree, asked, random.Random(0)), DecodingConfig(segments=7, beam_width=1))
    assert (asked, texts(found)) == ([""], ["a"])


async def test_short_form_returns_all_candidates() -> None:
    found = await search(path(), expander(TREE, [], random.Random(0)), DecodingConfig(segments=1, beam_width=1))
    assert texts(found) == ["a", "b", "c"]


LEVELS = st.lists(st.lists(st.floats(-0.5, 3.5), min_size=1, max_size=4), min_size=1, max_size=4)


@given(st.lists(st.floats(-0.5, 3.5), min_size=1, max_size=5))
def test_beam_of_width_one_with_one_passage_is_greedy(scores: list[float]) -> None:
    async def expand(parent: Path) -> list[Path]:
        depth = len(parent.segments)
        end = None if depth == len(scores) - 1 else ASKS
        return [path(*parent.segments, segment(str(depth), scores[depth]), boundary=end)]

    (only,) = asyncio.run(search(path(), expand, DecodingConfig(segments=7, beam_width=1)))
    assert texts([only]) == [" ".join(str(n) for n in range(len(scores)))]


@given(LEVELS, st.integers(1, 3), st.randoms(use_true_random=False))
def test_sibling_order_does_not_change_the_winner(levels: list[list[float]], width: int, rng: random.Random) -> None:
    def expander(shuffled: bool):
        async def expand(parent: Path) -> list[Path]:
            depth = len(parent.segments)
            end = None if depth == len(levels) - 1 else ASKS
            drawn = list(enumerate(levels[depth]))
            if shuffled:
                rng.shuffle(drawn)
            return [path(*parent.segments, segment(f"{depth}{n}", s, f"p{n}"), boundary=end) for n, s in drawn]

        return expand

    config = DecodingConfig(segments=7, beam_width=width)
    one, other = (asyncio.run(search(path(), expander(shuffled), config)) for shuffled in (False, True))
    assert texts([choose(one)[0]]) == texts([choose(other)[0]])


async def test_failed_step_cancels_the_others() -> None:
    canceled = asyncio.Event()

    async def slow() -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            canceled.set()
            raise

    async def fails() -> None:
        await asyncio.sleep(0)
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await gather_all(slow(), fails())
    await asyncio.wait_for(canceled.wait(), 1)
