import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from jobs.benchmark.words import benchmark_words, draw_texts
from tests.conftest import DEMO


def test_texts_are_stretches_of_real_ones() -> None:
    real = [[f"{letter}{n}" for n in range(30)] for letter in "ab"] + [["short"]]
    texts = draw_texts(real, 50, seed=1)
    assert texts == draw_texts(real, 50, seed=1) != draw_texts(real, 50, seed=2)
    assert len(set(texts)) > 45
    for text in texts:
        words = text.split()
        letters = {word[0] for word in words}
        assert letters <= {"a", "b", "s"}
        assert len(words) == 20 * (3 - words.count("short")) + words.count("short")


@pytest.mark.slow
def test_words_benchmark_compares_equal_work(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(benchmark_words)
    file = tmp_path / "figures.json"
    sizes = ["--worded", "2000", "--shards", "2", "--repeats", "1", "--json", str(file), "--scratch", str(tmp_path)]
    result = CliRunner().invoke(app, ["--passages", str(DEMO / "passages.parquet"), *sizes])
    assert result.exit_code == 0, result.output
    words, fused = json.loads(file.read_text())["figures"]
    assert words["note"] == "2 shards vs. one; same scores for 100 % of queries"
    assert all(figure["ours"][0] > 0 and figure["bare"][0] > 0 for figure in (words, fused))
