import pytest

from pipeline.training.recipe import Recipe


def test_learning_rate_warms_up_and_decays_to_a_tenth() -> None:
    recipe = Recipe(learning_rate=1e-3)
    assert recipe.compute_rate(0.0) == pytest.approx(1e-3 * 1e-3 / 0.03)
    assert recipe.compute_rate(0.015) == pytest.approx(0.5e-3)
    assert recipe.compute_rate(0.5) == pytest.approx(0.55e-3)
    assert recipe.compute_rate(1.0) == recipe.compute_rate(1.7) == pytest.approx(0.1e-3)


def test_windows_lengthen_during_the_first_two_thirds_of_training() -> None:
    recipe = Recipe(first_words=70, last_words=180)
    assert [recipe.compute_longest_window(done) for done in (0.0, 1 / 3, 2 / 3, 1.0)] == [70, 125, 180, 180]
