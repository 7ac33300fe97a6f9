import dataclasses
import json
import math
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from jobs.benchmark.baselines import ABSENT, Outcome, Released, measure_agreement, read_wide
from jobs.benchmark.compare import ComparisonPlan, benchmark
from jobs.benchmark.results import CALL, FILES, STAGES, Measured, Report, Step, compute_load, plot
from jobs.benchmark.workloads import LONG_PASSAGES, SHORT_WORDS, WORKLOADS, Workload, lengthen_passages, trim_passages
from pipeline.config.sections import DecodingConfig, ModelConfig
from pipeline.decoding.reflection import REFLECTION_TOKENS
from pipeline.decoding.types import Passage, Query, RetrievedPassage
from tests.support.fakes import EOS, word_tokenizer


@pytest.mark.parametrize(("questions", "expected"), [(0.0, 0), (0.5, 10), (1.0, 20), (0.25, 5)])
def test_share_of_questions_is_exact_and_spread_evenly(questions, expected):
    rows = Workload("w", questions=questions).build_rows(20)
    asked = [row["id"].startswith("xquad") for row in rows]
    assert len({row["id"] for row in rows}) == 20
    assert sum(asked) == expected
    assert abs(sum(asked[:10]) - expected / 2) < 1


def test_repeated_rows_are_numbered_to_stay_distinct():
    rows = Workload("w", questions=0.0).build_rows(300)
    assert len({row["id"] for row in rows}) == len({row["query"] for row in rows}) == 300
    assert rows[236]["query"] == f"2: {rows[0]['query']}"


def test_closed_set_has_four_choices_with_the_right_answer_first():
    (workload,) = (w for w in WORKLOADS if w.choices)
    for row in workload.build_rows(5):
        assert len(row["choices"]) == 4
        assert row["choices"][0] not in row["choices"][1:]


def test_passages_are_trimmed_and_lengthened():
    passages = [Passage(str(n), "t", f"{n} " * 100) for n in range(5)]
    assert [len(p.text.split()) for p in trim_passages(passages)] == [SHORT_WORDS] * 5
    long = lengthen_passages(passages)
    assert [len(p.text.split()) for p in long] == [100 * LONG_PASSAGES] * 5
    assert long[4].text.split()[::100] == ["4", "0", "1"]


class WordEngine:
    """Answers prompts of words by rules, as vLLM's output with dictionaries; counts what is under way at once."""

    def __init__(self, tokenizer) -> None:
        self.tokenizer = tokenizer
        self.asked: list[tuple[str, dict]] = []

    async def ask(self, prompt, **sampling):
        text = self.tokenizer.decode(list(prompt))
        self.asked.append((text, sampling))
        ids, reflection = self.tokenizer.tokenizer, self.tokenizer.reflection.ids
        if "paragraph" in text:
            good = "gold" in text
            words = ["[Relevant]" if good else "[Irrelevant]", "yes" if good else "no", "[Retrieval]", "more"]
        elif "[No Retrieval]" in text:
            words = ["plain"]
        else:
            words = ["[Retrieval]" if "question" in text else "[No Retrieval]", "on", "and", "on"]
        tokens = [reflection.get(word) or ids.word(word) for word in words] + [EOS]
        positions = [{token: SimpleNamespace(logprob=math.log(0.9))} for token in tokens]
        return SimpleNamespace(
            outputs=[SimpleNamespace(token_ids=tokens, logprobs=positions)], prompt_token_ids=list(prompt)
        )


FOUND = [RetrievedPassage(Passage(name, "", name), None, n) for n, name in enumerate(["other", "gold"], 1)]


@pytest.mark.parametrize("shape", ["answer_serially", "answer_in_waves"])
async def test_released_baseline_decides_reads_and_chooses(shape):
    tokenizer = word_tokenizer()
    engine: Any = WordEngine(tokenizer)
    released = Released(engine, tokenizer, DecodingConfig(max_tokens=9))
    queries = [Query("a", "question one"), Query("b", "task two")]
    outcomes = await getattr(released, shape)(queries, [FOUND, FOUND])
    assert outcomes == [Outcome(True, "yes"), Outcome(False, "plain")]
    decisions = [number for number, (text, _) in enumerate(engine.asked) if text.endswith("Response:")]
    assert decisions == ([0, 3] if shape == "answer_serially" else [0, 1])
    assert [sampling["logprobs"] for _, sampling in engine.asked].count(32_016) == 2
    assert {sampling["max_tokens"] for _, sampling in engine.asked} == {9}  # the decision writes a whole answer


async def test_decisions_can_be_one_token_and_plain_answers_skip_log_probabilities():
    tokenizer = word_tokenizer()
    engine: Any = WordEngine(tokenizer)
    shape = Released(engine, tokenizer, DecodingConfig(max_tokens=9), decision=20, candidate=5, decision_tokens=1)
    queries = [Query("a", "question one"), Query("b", "task two")]
    assert await shape.answer_in_waves(queries, [FOUND, FOUND]) == [Outcome(True, "yes"), Outcome(False, "plain")]
    asked = [(sampling["max_tokens"], sampling["logprobs"]) for _, sampling in engine.asked]
    assert sorted(asked, key=str) == [(1, 20), (1, 20), (9, 5), (9, 5), (9, None)]


def test_missing_log_probabilities_count_as_in_the_released_scripts():
    position = {7: SimpleNamespace(logprob=-0.5), 3: SimpleNamespace(logprob=-2.0)}
    output = SimpleNamespace(outputs=[SimpleNamespace(token_ids=[7], logprobs=[position])], prompt_token_ids=[1, 2])
    read = read_wide(output, range(3, 3 + len(REFLECTION_TOKENS)))
    assert read.logprobs.tolist() == [-0.5]
    assert read.reflection_logprobs[0, :5].tolist() == [-2.0, ABSENT, ABSENT, ABSENT, -0.5]


def test_agreement_counts_decisions_and_answers():
    ours = [Outcome(True, "a"), Outcome(True, "b"), Outcome(False, "c"), Outcome(False, "d")]
    theirs = [Outcome(True, "a"), Outcome(True, "x"), Outcome(True, "c")]
    assert measure_agreement(ours, theirs) == {"decision": pytest.approx(2 / 3), "answer": pytest.approx(1 / 3)}


@pytest.fixture
def report() -> Report:
    ours, bare = Measured(8, [2.0, 4.0, 3.0]), Measured(8, [4.0, 5.0, 6.0])
    return Report({"w": {"ours": ours, "ceiling": bare}}, {"w": {"seconds": 1.0}})


def test_ratios_cover_medians_and_all_pairs(report):
    assert report.compute_ratios("w") == {"ceiling": {"median": 0.6, "min": 2 / 6, "max": 1.0}}


def test_load_is_weighted_by_time_and_separates_steady_from_fed_slots():
    steps = [
        (10.0, 5, 0, 0),
        (11.0, 3, 0, 2),
        (12.0, 3, 2, 0),
        (14.5, 0, 1, 8),
        (15.0, 2, 0, 2),
        (15.0, 0, 0, 2),
        (99.0, 1, 0, 0),
    ]
    assert compute_load([Step(*step) for step in steps], slots=8) == {
        "slots": 8,
        "half_full": (1.0 + 2.5) / 5,
        "steady": (1.0 + 2.5) / 4.5,
        "fed": (1.0 + 1.0 + 2.5) / 5,
        "taken": (5 + 3 + 2.5 * 8 + 0.5 * 4) / 5,
    }
    assert compute_load([Step(1.0, 8, 0, 0), Step(2.0, 8, 0, 0)], slots=8)["steady"] == 0.0
    assert compute_load([], slots=8)["half_full"] == 0.0


def test_report_shows_tokens_load_and_time_per_stage(report):
    whole = {"seconds": 2.0, "decide_seconds": 0.5, "retrieve_seconds": 0.1, "critique_seconds": 0.00025}
    stages = {**dict.fromkeys(STAGES, 0.0), **whole, FILES: 0.001, CALL: 9.0}
    report = dataclasses.replace(report, stages={"w": stages}, tokens={"w": {"prompt": 200.0, "written": 20.0}})
    report.results["w"]["direct"] = Measured(8, [3.0], load={"slots": 8, "half_full": 0.7, "steady": 0.8, "fed": 0.9})
    assert (
        "200 prompt tokens and 20 generated tokens per query: ours processes 600 and generates 60 per second"
        in report.build_caption("w")
    )
    caption = report.build_caption("w")
    assert "70 % of its busy time with more than half of 8 slots in use (80 % before the batch drained)" in caption
    assert "90 % with that or with requests waiting" in caption
    cells = [cell for column in report.build_times_table().columns for cell in column.cells]
    assert cells == ["w", "2", "0.5", "0.1", "0", "0.00025", "0", "0", "0", "0.001", "5.0 %"]


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--only", "long form", "--only", "nothing"], "--only 'nothing': no name starts with this"),
        (["--set", "dtype"], "--set dtype: expected KEY=VALUE"),
        (["--set", "dtipe=x"], "unknown configuration key model.engine.dtipe"),
        (
            ["--without", "naive", "--without", "direct"],
            "error: --without 'direct': expected one of ceiling, scored, released, naive, flashrag",
        ),
    ],
)
def test_bad_options_are_refused_before_the_benchmark_starts(options, part):
    app = typer.Typer()
    app.command()(benchmark)
    result = CliRunner().invoke(app, options)
    assert result.exit_code == 2
    assert part in " ".join(result.stderr.split())


SHORT_FORM, LONG_FORM = WORKLOADS[0], next(w for w in WORKLOADS if not w.short_form)


@pytest.mark.parametrize(
    ("model", "shaped", "expected"),
    [
        ("demo", False, {LONG_FORM.name: (7, 3)}),
        ("own", False, {}),
        ("shape", True, {SHORT_FORM.name: (7, 1), LONG_FORM.name: (7, 3)}),
    ],
)
def test_weightless_models_and_demo_beams_get_scripted_output(tmp_path, model, shaped, expected):
    plan = ComparisonPlan([], 8, 4, 1, ModelConfig(name=model), tmp_path, shaped=shaped, tokens=7)
    scripts = {w.name: plan.build_script(w) for w in (SHORT_FORM, LONG_FORM)}
    assert {name: (s.tokens, s.segments) for name, s in scripts.items() if s} == expected


def test_tables_mark_scripted_output(report):
    assert report.build_table("w").title == "w (8 queries)"
    assert dataclasses.replace(report, scripted=["w"]).build_table("w").title == ("w (8 queries; scripted output)")


def test_plot_is_written_as_png(report, tmp_path):
    plot(report, tmp_path / "b.png")
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_shape_without_weights_is_benchmarked_end_to_end(tmp_path):
    options = ["--shape", "tiny", "--rows", "8", "--repeats", "2", "--tokens", "12", "--json", str(tmp_path / "b.json")]
    chosen = ["--only", "short form, 50", "--only", "long form", "--without", "naive", "--serial-rows", "1"]
    engine = ["--set", "max_num_seqs=16", "--set", "compilation_config={cudagraph_capture_sizes: [1, 8]}"]
    subprocess.run([sys.executable, "-m", "jobs.benchmark", *options, *chosen, *engine], check=True, timeout=580)
    found = json.loads((tmp_path / "b.json").read_text())
    short, long = found["workloads"].values()
    assert set(short["absolute"]) == {"ours", "direct", "ceiling", "scored", "released", "flashrag"}
    assert set(long["absolute"]) == {"ours", "direct", "ceiling", "scored"}
    assert all(len(one["rates"]) == 2 for one in (*short["absolute"].values(), *long["absolute"].values()))
    assert short["absolute"]["released"]["rows"] == 1
    assert short["absolute"]["flashrag"]["agreement"]["decision"] == 1.0
    assert short["absolute"]["direct"]["load"]["slots"] == 16
    # Per query a decision of one token; then a lone answer, or three with a passage, of twelve tokens each.
    retrieved = (short["tokens"]["written"] - 1 - 12) / 24
    assert retrieved * 8 == pytest.approx(round(retrieved * 8))
    assert 0 < retrieved < 1
    # Three passages at first, then three for each of two paths, twice.
    assert long["tokens"]["written"] == 12 * (3 + 6 + 6)


@pytest.mark.slow
def test_demo_model_is_benchmarked_end_to_end(tmp_path):
    command = [
        sys.executable,
        "-m",
        "jobs.benchmark",
        "--quick",
        "--rows",
        "4",
        "--json",
        str(tmp_path / "b.json"),
    ]
    subprocess.run(command, check=True, timeout=580)
    found = json.loads((tmp_path / "b.json").read_text())
    assert found["finished"] is True
    assert set(found["ratios"]) == {"released", "naive", "flashrag", "direct", "ceiling", "scored"}
    assert all(ratio > 0 for ratio in found["ratios"].values())
    (workload,) = found["workloads"].values()
    assert workload["absolute"]["released"]["agreement"]["decision"] == 1.0
    assert workload["stages"]["seconds"] > workload["stages"]["decide_seconds"] > 0
    assert 0 < workload["stages"]["critique_seconds"] < 0.1
    assert 0 < workload["stages"]["files_seconds"] < 1
