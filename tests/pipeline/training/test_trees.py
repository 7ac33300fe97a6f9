import numpy as np
from hypothesis import given as hypothesis_given
from hypothesis import strategies as st

from pipeline.training.trees import Branch, TokenTree, join_trees, lay_out, make_given, make_taught, pack_trees

TOKENS = st.lists(st.integers(0, 50_000), min_size=1, max_size=4)
TREES = st.recursive(
    TOKENS.map(lambda ids: make_taught(ids, 1.0)),
    lambda children: st.tuples(TOKENS, st.lists(children, max_size=3)).map(
        lambda parts: make_taught(parts[0], 1.0).with_children(*parts[1])
    ),
    max_leaves=8,
)


def paths(branch: Branch, past: tuple[int, ...] = ()) -> list[tuple[int, ...]]:
    """The sequences that a tree stands for, one for each leaf."""
    here = past + branch.ids
    return [path for child in branch.children for path in paths(child, here)] or [here]


def find_visible(tree: TokenTree) -> np.ndarray:
    """Which tokens each token attends to: bool [L, L]."""
    places = np.arange(len(tree))
    return (places <= places[:, None]) & (places[:, None] < tree.ends)


def test_tree_layout_matches_a_worked_example() -> None:
    root = make_given([1]) + make_taught([2], 1.0)
    tree = lay_out(root.with_children(make_taught([3], 0.5), make_given([4]) + make_taught([5], 2.0)))
    assert tree.ids.tolist() == [1, 2, 3, 4, 5]
    assert tree.positions.tolist() == [0, 1, 2, 2, 3]
    assert tree.ends.tolist() == [5, 5, 3, 5, 5]
    assert find_visible(tree).astype(int).tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 0, 1, 0],
        [1, 1, 0, 1, 1],
    ]
    assert tree.sources.tolist() == [0, 1, 3]
    assert tree.targets.tolist() == [2, 3, 5]
    assert tree.weights.tolist() == [1.0, 0.5, 2.0]
    assert tree.branches.tolist() == [0, 1, 2]


def test_alternatives_are_predicted_from_the_same_position() -> None:
    tree = lay_out(
        make_given([7, 8]).with_children(make_taught([1], 1.0), make_taught([2], 1.0), make_taught([3], 1.0))
    )
    assert tree.sources.tolist() == [1, 1, 1]
    assert tree.targets.tolist() == [1, 2, 3]


def test_joined_trees_do_not_attend_to_each_other() -> None:
    first, second = lay_out(make_taught([1, 2], 1.0)), lay_out(make_taught([3, 4, 5], 1.0))
    tree = join_trees([first, second])
    assert tree.ids.tolist() == [1, 2, 3, 4, 5]
    assert tree.positions.tolist() == [0, 1, 0, 1, 2]
    assert not find_visible(tree)[2:, :2].any()
    assert tree.targets.tolist() == [2, 4, 5]  # nothing comes before a first token, so nothing predicts it
    assert tree.sources.tolist() == [0, 2, 3]
    assert tree.branches.tolist() == [0, 1, 1]


@hypothesis_given(TREES)
def test_every_token_sees_only_its_ancestors(root: Branch) -> None:
    tree = lay_out(make_given([0]).with_children(root))
    visible = find_visible(tree)
    seen = [tuple(tree.ids[row].tolist()) for row in visible]
    expected = paths(make_given([0]).with_children(root))
    assert all(path in seen for path in expected)
    assert all(any(path[: len(sequence)] == sequence for path in expected) for sequence in seen)
    assert (visible.sum(1) == tree.positions + 1).all()
    assert np.diag(visible).all()
    assert not np.triu(visible, 1).any()


@hypothesis_given(TREES)
def test_prediction_sees_everything_before_its_target(root: Branch) -> None:
    tree = lay_out(make_given([0]).with_children(root))
    assert len(tree.targets) == len(root)
    visible = find_visible(tree)
    predictions = zip(tree.sources, tree.targets, strict=True)
    sequences = {(*tree.ids[visible[source]].tolist(), int(target)) for source, target in predictions}
    expected = {path[: end + 1] for path in paths(make_given([0]).with_children(root)) for end in range(1, len(path))}
    assert sequences == expected


def test_length_counts_each_shared_token_once() -> None:
    assert (
        len(make_given([1, 2]).with_children(make_given([3]), make_given([4, 5]).with_children(make_given([6])))) == 6
    )


def test_concatenation_keeps_the_children_of_the_last_branch() -> None:
    joined = make_given([1]) + make_taught([2], 3.0).with_children(make_given([4]))
    assert (joined.ids, joined.weights) == ((1, 2), (0.0, 3.0))
    assert joined.children == (make_given([4]),)


def test_packing_fills_sequences_with_the_longest_first() -> None:
    trees = [lay_out(make_taught([n] * length, 1.0)) for n, length in enumerate((3, 9, 4, 2, 5))]
    packs = pack_trees(trees, tokens=8)
    assert [pack.ids.tolist() for pack in packs] == [[1] * 9, [4] * 5 + [0] * 3, [2] * 4 + [3] * 2]


@hypothesis_given(st.lists(TREES.filter(lambda tree: len(tree) > 1), min_size=1, max_size=8), st.integers(1, 40))
def test_packing_keeps_every_tree_within_the_limit(roots: list[Branch], tokens: int) -> None:
    trees = [lay_out(root) for root in roots]
    packs = pack_trees(trees, tokens)
    assert sum(map(len, packs)) == sum(map(len, trees))
    assert all(len(pack) <= max(tokens, *map(len, trees)) for pack in packs)
    assert sorted(target for pack in packs for target in pack.targets) == sorted(
        t for tree in trees for t in tree.targets
    )
