"""Batches of trees give the losses and gradients of the trees one by one."""

import numpy as np
import pytest
import torch

from pipeline.training.batches import compute_logits, compute_loss, group_trees, pad_trees
from pipeline.training.student import Student
from pipeline.training.trees import TokenTree, join_trees, lay_out, make_given, make_taught
from tests.support.students import build_trees, load_student, write_base

# Float32 sums in another order: the largest difference seen is some 1e-6 of a loss of 60.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Student:
    return load_student(write_base(tmp_path_factory.mktemp("base")))


@pytest.fixture(scope="module")
def trees(student: Student) -> list[TokenTree]:
    return [*build_trees(student.prompts), lay_out(make_given([5, 6]) + make_taught([7, 8, 9], 0.5))]


def compute_gradients(student: Student, losses: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    student.model.zero_grad()
    torch.stack(losses).sum().backward()
    return {name: weight.grad.clone() for name, weight in student.trainable.items() if weight.grad is not None}


def test_batch_matches_a_worked_example() -> None:
    first = lay_out(make_given([1]).with_children(make_taught([2], 1.0), make_taught([3], 0.5)))
    batch = pad_trees([first, lay_out(make_taught([7, 8, 9, 10], 2.0))], multiple=4)
    assert batch.ids.tolist() == [[1, 2, 3, 0], [7, 8, 9, 10]]
    assert batch.positions.tolist() == [[0, 1, 1, 0], [0, 1, 2, 3]]
    assert batch.build_mask().int().tolist() == [
        [[[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 1]]],
        [[[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]],
    ]
    assert batch.sources.tolist() == [0, 0, 4, 5, 6]
    assert batch.targets.tolist() == [2, 3, 8, 9, 10]
    assert batch.weights.tolist() == [1.0, 0.5, 2.0, 2.0, 2.0]


def test_a_batch_has_the_loss_and_gradients_of_its_trees(student: Student, trees: list[TokenTree]) -> None:
    alone = [compute_loss(student.model, pad_trees([tree])) for tree in trees]
    expected = compute_gradients(student, alone)
    packed = pad_trees([join_trees(trees[:2]), trees[2]], multiple=64)
    loss = compute_loss(student.model, packed)
    found = compute_gradients(student, [loss])
    assert float(loss) == pytest.approx(sum(map(float, alone)), rel=TOLERANCE)
    assert found.keys() == expected.keys()
    assert any(gradient.abs().max() > 0.01 for gradient in expected.values())
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, rtol=1e-3, atol=TOLERANCE), name


@pytest.mark.parametrize("multiple", [1, 7, 64])
def test_padding_and_neighbours_change_no_prediction(student: Student, trees: list[TokenTree], multiple: int) -> None:
    with torch.no_grad():
        alone = torch.cat([compute_logits(student.model, pad_trees([tree])) for tree in trees])
        joined = compute_logits(student.model, pad_trees([join_trees(trees)], multiple))
        beside = compute_logits(student.model, pad_trees(trees, multiple))
    assert torch.allclose(joined, alone, atol=TOLERANCE)
    assert torch.allclose(beside, alone, atol=TOLERANCE)


def test_logits_are_those_of_the_whole_sequence(student: Student) -> None:
    """A tree of one branch is an ordinary sequence, for which the model needs no mask."""
    tree = lay_out(make_given([5, 6, 7]) + make_taught([8, 9], 1.0))
    with torch.no_grad():
        plain = student.model(input_ids=torch.from_numpy(tree.ids)[None]).logits[0]
        found = compute_logits(student.model, pad_trees([tree], 8))
    assert torch.allclose(found, plain[[2, 3]], atol=TOLERANCE)


def test_groups_stay_within_their_tokens() -> None:
    trees = [lay_out(make_taught([n] * length, 1.0)) for n, length in enumerate((3, 9, 4, 2, 5))]
    groups = [[len(tree) for tree in group] for group in group_trees(trees, 10)]
    assert groups == [[9], [5, 4], [3, 2]]
    assert [len(group) for group in group_trees(trees, 1)] == [1] * 5
    assert np.concatenate([[len(t) for t in g] for g in group_trees(trees, 100)]).tolist() == [9, 5, 4, 3, 2]
