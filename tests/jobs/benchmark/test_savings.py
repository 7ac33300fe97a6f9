import asyncio
import json
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from jobs.benchmark.baselines import BareEngine
from jobs.benchmark.compare import MAX_TOKENS
from jobs.benchmark.savings import (
    DEFAULTS,
    SAVINGS,
    Pruning,
    SavingsFigures,
    Setting,
    benchmark_savings,
    build_savings_tables,
    count_prunable,
)
from jobs.benchmark.savings_variants import (
    AskingCritic,
    DictLogprobs,
    ForgetfulCritic,
    Gathered,
    WholeDecisions,
)
from jobs.benchmark.scripted_model import Prompter, Script
from pipeline.config.sections import DecodingConfig, Weights
from pipeline.decoding.prompts import PromptTokenizer
from pipeline.decoding.reflection import REFLECTION_TOKENS, Retrieve
from pipeline.decoding.types import Candidate, Critique, Generation, Passage, Query, Segment
from tests.support.fakes import word_tokenizer

GIVEN = (Passage("a", "", "one"), Passage("b", "", "two"))


def candidate(length: int, score: float, is_rel: float | None) -> Candidate:
    critique = Critique(0.5, is_rel, 0.5, 0.5, score, None, None, None)
    return Candidate(Segment("", "", None, critique, Retrieve.YES, (7,) * length), None, None)


def test_candidates_are_prunable_once_they_cannot_win():
    # 1 + IsRel + 1 + 0.5 is the most that can come: 2.6, 3.4 and 2.5 beside a score of 3.2 after three tokens.
    siblings = [candidate(3, 3.2, 0.9), candidate(10, 1.0, 0.1), candidate(10, 1.0, 0.9), candidate(2, 1.0, 0.0)]
    assert count_prunable(siblings, Weights()) == 7
    assert count_prunable(siblings[1:], Weights()) == 0
    assert count_prunable([candidate(3, 3.2, 0.9), candidate(9, 1.0, None)], Weights()) == 6


class Engine:
    """Writes by a script; remembers what it was asked."""

    max_model_len = 512

    def __init__(self, tokenizer: PromptTokenizer, script: Script) -> None:
        self.prompter = Prompter(tokenizer, script)
        self.asked: list[tuple[tuple[int, ...], int, tuple[int, ...]]] = []

    async def generate(self, prompt, max_tokens, stops):
        self.asked.append((tuple(prompt), max_tokens, tuple(stops)))
        length = self.prompter.script.get_length(max_tokens)
        table = np.zeros((length, len(REFLECTION_TOKENS)))
        blank = Generation((7,) * length, np.full(length, -1.0), table, len(prompt))
        return self.prompter.apply_script(blank, prompt)


def setting(script: Script, **decoding) -> tuple[Setting, Engine]:
    tokenizer = word_tokenizer()
    bench: Any = SimpleNamespace(generator=Engine(tokenizer, script), tokenizer=tokenizer, retriever=None)
    queries = [Query("q", "what", passages=GIVEN), Query("r", "what else then", passages=GIVEN)]
    config = DecodingConfig(passages=2, max_tokens=MAX_TOKENS, **decoding)
    return Setting(bench, queries, config, bench.generator), bench.generator


@pytest.mark.parametrize("name", ["WholeDecisions", "AskingCritic", "ForgetfulCritic"])
async def test_answers_are_the_same_without_each_saving(name):
    found, engine = setting(Script(tokens=6, segments=2), segments=2, beam_width=1)
    without = {
        "WholeDecisions": lambda: found.build_system(WholeDecisions(engine)),
        "AskingCritic": lambda: found.build_system(critic=AskingCritic),
        "ForgetfulCritic": lambda: found.build_system(critic=ForgetfulCritic),
    }[name]()
    assert (await without.answer(found.queries[0])).raw_output == (
        await found.build_system().answer(found.queries[0])
    ).raw_output


async def test_whole_decision_generates_a_complete_answer():
    found, engine = setting(Script(tokens=6))
    await found.build_system(WholeDecisions(engine)).answer(found.queries[0])
    eos = found.bench.tokenizer.eos
    _, most, stops = engine.asked[0]
    assert (most, stops) == (MAX_TOKENS, (eos,))
    assert len(engine.asked) == 3


async def test_asking_critic_adds_one_request_per_continued_path():
    found, engine = setting(Script(tokens=7, segments=3), segments=3, beam_width=2)
    await found.build_system().answer(found.queries[0])
    plain = [most for _, most, _ in engine.asked]
    assert (plain.count(1), plain.count(MAX_TOKENS)) == (1, 2 + 4 + 4)
    engine.asked.clear()
    await found.build_system(critic=AskingCritic).answer(found.queries[0])
    asked = [most for _, most, _ in engine.asked]
    assert (asked.count(1), asked.count(MAX_TOKENS)) == (1 + 2 + 2, 2 + 4 + 4)
    # A question is what the path's last segment was written after, and that segment.
    questions = [prompt for prompt, most, _ in engine.asked if most == 1][1:]
    written = [prompt for prompt, most, _ in engine.asked if most > 1]
    assert all(any(question[: len(prompt)] == prompt for prompt in written) for question in questions)


async def test_forgetful_critic_tokenizes_passages_again(monkeypatch):
    found, _ = setting(Script(tokens=6, segments=2), segments=2, beam_width=1)
    counts = []
    for critic in (ForgetfulCritic, ForgetfulCritic.__mro__[1]):
        bodies: list[str] = []
        monkeypatch.setattr(PromptTokenizer, "encode_text", lambda _self, text, seen=bodies: seen.append(text) or [9])
        await found.build_system(critic=critic).answer(found.queries[0])
        counts.append(sum(text in ("one", "two") for text in bodies))
        monkeypatch.undo()
    assert counts[0] > counts[1] == 2


@pytest.mark.parametrize(("apart", "expected"), [(False, "a0 a1 b0 b1 c0 c1"), (True, "a0 b0 c0 a1 b1 c1")])
async def test_passages_are_submitted_in_the_requested_order(apart, expected):
    _, engine = setting(Script(tokens=6))
    gathered = Gathered(engine, siblings=2, total=6, apart=apart)
    prompts = [(row, sibling) for row in range(3) for sibling in range(2)]
    await asyncio.gather(*(gathered.generate(prompt, 6, ()) for prompt in prompts))
    assert " ".join(f"{'abc'[row]}{sibling}" for (row, sibling), _, _ in engine.asked) == expected


async def test_dict_log_probabilities_equal_flat_ones():
    tokenizer, asked = word_tokenizer(), []
    watched = tokenizer.reflection.reflection
    position = {token: SimpleNamespace(logprob=-float(n)) for n, token in enumerate((999, *watched))}

    async def generate(_prompt, params, _name):
        asked.append(params)
        yield SimpleNamespace(
            outputs=[SimpleNamespace(token_ids=[999], logprobs=[position])], prompt_token_ids=[1], num_cached_tokens=0
        )

    sampling = {"temperature": 0.0, "logprob_token_ids": list(watched), "flat_logprobs": True, "detokenize": False}
    replica: Any = SimpleNamespace(engine=SimpleNamespace(generate=generate), sampling=sampling, watched=watched)
    found = await DictLogprobs(BareEngine(replica)).generate([1], 5, [2])
    assert (found.token_ids, found.logprobs.tolist()) == ((999,), [0.0])
    assert found.reflection_logprobs.tolist() == [[-float(n) for n in range(1, 14)]]
    assert (asked[0].flat_logprobs, asked[0].max_tokens, asked[0].stop_token_ids) == (False, 5, [2])
    assert asked[0].logprob_token_ids == list(watched)


def test_double_queries_have_distinct_ids():
    found, _ = setting(Script())
    assert [(query.id, query.query) for query in found.double_queries()[:2]] == [("0-q", "what"), ("1-q", "what")]


def test_tables_compare_medians():
    figures = SavingsFigures.create_empty(SAVINGS, ["dtype=bfloat16"])
    for rates in figures.rates.values():
        rates |= {"with": [2.0, 4.0, 3.0], "without": [1.0, 2.0, 1.5]}
    figures.engines |= {DEFAULTS: [2.0, 2.0], "dtype=bfloat16": [1.0, 0.5]}
    figures.pruning = Pruning(read=1000, written=200, hopeless=10)
    savings, arguments = build_savings_tables(figures)
    assert list(savings.columns[4].cells) == ["2.00"] * len(SAVINGS)
    assert list(savings.columns[5].cells) == ["1.00 … 4.00"] * len(SAVINGS)
    assert "10 of 200 generated tokens (5.0 %)" in str(savings.caption)
    assert list(arguments.columns[2].cells) == ["1.00", "0.38"]


@pytest.mark.parametrize(
    ("only", "savings", "engines"),
    [("dtype", [], [DEFAULTS, "dtype=bfloat16", "dtype=float16"]), ("later", [SAVINGS[1].name], [])],
)
def test_only_selected_savings_and_engines_are_measured_and_shown(monkeypatch, only, savings, engines):
    asked = []

    def execute(_rows, _repeats, figures):
        asked.append(figures)
        for rates in figures.rates.values():
            rates |= {"with": [2.0], "without": [1.0]}
        figures.engines |= {name: [1.0] for name in figures.engines}
        yield figures

    monkeypatch.setattr("jobs.benchmark.savings.run_savings", execute)
    benchmark_savings(rows=4, repeats=1, only=[only])
    assert (list(asked[0].rates), list(asked[0].engines)) == (savings, engines)
    (table,) = build_savings_tables(asked[0])
    assert list(table.columns[0].cells) == (savings or engines)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--engine", "dtipe=x"], "unknown configuration key model.engine.dtipe"),
        (["--only", "later", "--only", "no such"], "--only 'no such': no name starts with this"),
    ],
)
def test_bad_options_are_refused_before_the_benchmark_starts(options, part):
    app = typer.Typer()
    app.command()(benchmark_savings)
    result = CliRunner().invoke(app, options)
    assert result.exit_code == 2
    assert part in " ".join(result.stderr.split())


@pytest.mark.slow
def test_all_savings_are_measured(tmp_path):
    options = ["--rows", "4", "--repeats", "1", "--engine", "max_num_seqs=8", "--json", str(tmp_path / "s.json")]
    subprocess.run([sys.executable, "-m", "jobs.benchmark.savings", *options], check=True, timeout=580)
    found = json.loads((tmp_path / "s.json").read_text())
    assert all(found["rates"][saving.name]["with"][0] > 0 for saving in SAVINGS)
    assert set(found["engines"]) == {DEFAULTS, "max_num_seqs=8"}
