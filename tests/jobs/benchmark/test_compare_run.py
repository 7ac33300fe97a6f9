import json
from types import SimpleNamespace
from typing import cast

import pytest
import typer
from typer.testing import CliRunner

from jobs.benchmark.baselines import BareEngine, Bench, Outcome, Released
from jobs.benchmark.compare import WARM_ROWS, ComparisonPlan, benchmark, build_model_config, prepare_inputs
from jobs.benchmark.job_run import Job
from jobs.benchmark.results import CALL, FILES, STAGES, write_record
from jobs.benchmark.workloads import WORKLOADS, lengthen_passages
from pipeline.config.sections import ModelConfig
from pipeline.decoding.types import Passage, Retrieved, RetrievedPassage
from pipeline.engine.arguments import build_engine_arguments
from tests.support.fakes import word_tokenizer

SHORT_FORM = WORKLOADS[0]


class OwnPassages:
    """Finds for each query passages that say whose they are."""

    async def retrieve(self, query, k, condition=None):
        return Retrieved([RetrievedPassage(Passage(str(n), "", f"{query} {n}"), 0.5, n) for n in range(k)])


@pytest.mark.parametrize(("rows", "warm"), [(4, 4), (WARM_ROWS, WARM_ROWS), (WARM_ROWS + 30, WARM_ROWS)])
@pytest.mark.parametrize("workload", [SHORT_FORM, next(w for w in WORKLOADS if w.body is lengthen_passages)])
async def test_queries_do_not_repeat_in_a_run(tmp_path, rows, warm, workload):
    plan = ComparisonPlan([], rows, 4, 3, ModelConfig(name="demo"), tmp_path, passages=2)
    bench = cast("Bench", SimpleNamespace(retriever=OwnPassages()))
    prepared = await prepare_inputs(bench, workload, plan)
    assert [len(part) for part in (prepared.warming, *prepared.repeats)] == [warm, rows, rows, rows]
    everything = [row for part in (prepared.warming, *prepared.repeats) for row in part]
    assert len({row["query"] for row in everything}) == len({row["id"] for row in everything}) == warm + 3 * rows
    texts = [[[one.passage.text for one in of] for of in found] for found in prepared.found]
    if workload.body is None:
        assert texts == [[[f"{row['query']} {n}" for n in (0, 1)] for row in part] for part in prepared.repeats]
        assert not any("passages" in row for row in everything)
    else:
        given = [[[passage["text"] for passage in row["passages"]] for row in part] for part in prepared.repeats]
        assert texts == given
        query = prepared.repeats[2][1]["query"]
        assert given[2][1] == [f"{query} 0 {query} 1", f"{query} 1 {query} 0"]


MAPPING = {"compilation_config": {"cudagraph_capture_sizes": [1, 8, 64]}}


@pytest.mark.parametrize(
    "setting",
    [
        "compilation_config={cudagraph_capture_sizes: [1, 8, 64]}",
        "compilation_config.cudagraph_capture_sizes=[1, 8, 64]",
    ],
)
def test_engine_arguments_can_be_mappings(tmp_path, setting):
    from vllm import AsyncEngineArgs

    model = build_model_config(None, "demo", [setting, "max_num_seqs=16"], tmp_path)
    assert model.engine == {**MAPPING, "max_num_seqs": 16}
    arguments = AsyncEngineArgs(**build_engine_arguments(model))
    assert arguments.compilation_config.cudagraph_capture_sizes == [1, 8, 64]
    assert arguments.max_num_seqs == 16


def test_shared_engine_gets_the_engine_arguments(monkeypatch):
    seen = []
    tokenizer = SimpleNamespace(of=lambda *_: word_tokenizer())
    monkeypatch.setattr("jobs.benchmark.baselines.PromptTokenizer", tokenizer)
    monkeypatch.setattr("jobs.benchmark.baselines.load_tokenizer", lambda _: None)
    monkeypatch.setattr("jobs.benchmark.baselines.get_demo_index", lambda: "index")
    monkeypatch.setattr("jobs.benchmark.baselines.IndexRetriever.open", lambda *_: None)
    monkeypatch.setattr("jobs.benchmark.baselines.VllmGenerator.start", lambda model, _: seen.append(model.engine))
    Bench.open(ModelConfig(name="demo", engine={**MAPPING, "max_num_seqs": 16}))
    assert seen == [{**MAPPING, "max_num_seqs": 16, "max_logprobs": -1}]


class Rehearsal:
    """Stands in for engine and jobs; notes what happens, and what the record says after each variant.

    Attributes:
        dies: whether the jobs do.
    """

    def __init__(self, monkeypatch, file) -> None:
        self.file, self.dies = file, False
        self.events: list[str] = []
        self.records: list[dict] = []
        self.asked: list[list[str]] = []
        self.jobs: list[Job] = []
        monkeypatch.setattr("jobs.benchmark.compare.Bench.open", self.open)
        monkeypatch.setattr("jobs.benchmark.compare.Job.run", lambda job: self.run(job))
        monkeypatch.setattr("jobs.benchmark.baselines.answer_directly", self.direct)
        monkeypatch.setattr("jobs.benchmark.baselines.make_endless", lambda replica: replica)
        monkeypatch.setattr(BareEngine, "replay", self.replay)
        for name in ("answer_serially", "answer_in_waves"):
            monkeypatch.setattr(Released, name, self.shape)
        monkeypatch.setattr("jobs.benchmark.compare.write_record", self.keep)

    def open(self, model):
        self.events.append("start")
        load = SimpleNamespace(slots=8, on_step=None)
        generator = SimpleNamespace(load=load, engine=SimpleNamespace(reset_prefix_cache=self.forget))
        return SimpleNamespace(
            generator=generator, tokenizer=word_tokenizer(), retriever=OwnPassages(), memory={}, close=self.close
        )

    def close(self):
        self.events.append("end")

    async def forget(self):
        self.events.append("forget")

    async def direct(self, system, queries):
        self.events.append("direct")
        self.asked.append([query.id for query in queries])
        system.generator.work.extend([((1, 2, 3), 5)] * len(queries))
        return [SimpleNamespace(retrieved=False, segments=[SimpleNamespace(text="a", evidence=None)]) for _ in queries]

    async def replay(self, work, watched=()):
        self.events.append("scored" if watched else "ceiling")

    async def shape(self, queries, found):
        self.events.append(f"shape of {len(queries)}")
        return [Outcome(False, "a" if number else "b") for number, _ in enumerate(queries)]

    def run(self, job):
        self.events.append("job")
        self.jobs.append(job)
        if self.dies:
            raise RuntimeError("the card is gone")
        return [1.0, 3.0][: len(job.repeats)], {**dict.fromkeys((*STAGES, FILES, CALL), 2.0)}

    def keep(self, record, file):
        write_record(record, file)
        self.records.append(json.loads(file.read_text()))


@pytest.fixture
def rehearsal(monkeypatch, tmp_path) -> Rehearsal:
    return Rehearsal(monkeypatch, tmp_path / "b.json")


def called(rehearsal, *options):
    app = typer.Typer()
    app.command()(benchmark)
    return CliRunner().invoke(app, ["--json", str(rehearsal.file), "--rows", "6", *options])


def test_engines_start_once_and_every_repeat_has_its_own_rows(rehearsal):
    result = called(rehearsal, "--repeats", "2", "--only", "short form, 50", "--only", "short form, 0")
    assert result.exit_code == 0, result.output
    shapes = ["forget", "shape of 6"] * 3
    forth = ["direct", "forget", "direct", "forget", "ceiling", "forget", "scored", *shapes]
    back = ["direct", "forget", "scored", "forget", "ceiling", "forget", "direct", *shapes]
    assert rehearsal.events == ["start", *forth * 2, *back * 2, "end", "job", "job"]
    ids = [[[row["id"] for row in rows] for rows in job.repeats] for job in rehearsal.jobs]
    once, again = rehearsal.asked[::2], rehearsal.asked[1::2]
    assert once == again == [ids[0][0], ids[1][0], ids[0][1], ids[1][1]]


def test_record_is_saved_after_each_measurement(rehearsal):
    called(rehearsal, "--repeats", "2", "--only", "short form, 50", "--without", "naive", "--without", "scored")
    counts = [
        {name: len(one["rates"]) for name, one in record["workloads"][SHORT_FORM.name]["absolute"].items()}
        for record in rehearsal.records
    ]
    first = {"direct": 1, "ceiling": 1, "released": 1, "flashrag": 1}
    assert counts == [
        {"direct": 1},
        {"direct": 1, "ceiling": 1},
        {"direct": 1, "ceiling": 1, "released": 1},
        first,
        {**first, "ceiling": 2},
        {**first, "ceiling": 2, "direct": 2},
        {**first, "ceiling": 2, "direct": 2, "released": 2},
        dict.fromkeys(first, 2),
        *[{"ours": 2, **dict.fromkeys(first, 2)}] * 2,
    ]
    assert [record["finished"] for record in rehearsal.records] == [False] * 9 + [True]
    assert [record["ratios"] for record in rehearsal.records[:8]] == [{}] * 8
    last = rehearsal.records[-1]
    assert set(last["ratios"]) == set(first)
    assert last["absolute"]["ours"] == 2.0
    assert last["workloads"][SHORT_FORM.name]["tokens"] == {"prompt": 3.0, "written": 5.0}
    shares = last["workloads"][SHORT_FORM.name]["absolute"]["released"]["agreement"]
    assert shares == {"decision": 1.0, "answer": pytest.approx(5 / 6)}
    assert set(last) == {
        *("finished", "ratios", "workloads", "absolute", "machine", "versions", "memory", "model"),
    }
    assert {"ray", "torch"} < set(last["versions"])
    assert set(last["machine"]) == {"processor", "cpus", "device"}


def test_failed_run_leaves_its_measurements(rehearsal):
    rehearsal.dies = True
    result = called(rehearsal, "--repeats", "1", "--only", "short form, 50", "--without", "naive")
    assert str(result.exception) == "the card is gone"
    found = json.loads(rehearsal.file.read_text())
    assert found["finished"] is False
    assert set(found["absolute"]) == {"direct", "ceiling", "scored", "released", "flashrag"}
    assert list(rehearsal.file.parent.iterdir()) == [rehearsal.file]


@pytest.mark.parametrize(
    ("options", "expected"),
    [([], 6), (["--quick"], 4), (["--shape", "tiny"], 3), (["--shape", "tiny", "--serial-rows", "5"], 5)],
)
def test_serial_rows_limit_only_the_released_baseline(rehearsal, monkeypatch, tmp_path, options, expected):
    monkeypatch.setattr("jobs.benchmark.compare.write_shape", lambda name, folder: folder)
    called(rehearsal, "--repeats", "1", "--only", "short form, 50", *options)
    (workload,) = rehearsal.records[-1]["workloads"].values()
    assert workload["absolute"]["released"]["rows"] == expected
    assert workload["absolute"]["flashrag"]["rows"] == 6
