import pytest

from pipeline.training.recipe import Recipe


def test_learning_rate_warms_up_and_decays_to_a_tenth() -> None:
    recipe = Recipe(learning_rate=1e-3)
    assert recipe.compute_rate(0.0) == pytest.approx(1e-3 * 1e-3 / 0.03)
    assert recipe.compute_rate(0.015) == pytest.approx(0.5e-3)
    assert recipe.compute_rate(0.5) == pytest.approx(0.55e-3)
    assert recipe.compute_rate(1.0) == recipe.compute_rate(1.7) == pytest.approx(0.1e-3)


def test_training_ends_with_its_tokens_or_its_minutes() -> None:
    recipe = Recipe(tokens=1_000, minutes=10)
    assert recipe.compute_done(tokens=250, seconds=0) == 0.25
    assert recipe.compute_done(tokens=250, seconds=300) == 0.5
    assert Recipe(tokens=1_000).compute_done(tokens=1_000, seconds=1e9) == 1.0
