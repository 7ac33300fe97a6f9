"""The command: an annotated set in, a page out. What the page says is read from its text."""

import html
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from jobs.report import report
from pipeline.output.folder import OutputFolder
from pipeline.report import units
from pipeline.report.write import leave_report
from tests.support.reports import Row, answered, at, failed, segment, unread, write_set

APP = typer.Typer()
APP.command()(report)
VOID = {"meta", "input", "br", "hr", "link", "img"}
HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'&</title></style></textarea>"


class Page(HTMLParser):
    """A page's elements, texts of its sections by id, and the rows of its tables."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.sections: dict[str, str] = {"": ""}
        self.section = ""
        self.rows: list[list[str]] = []
        self.marked: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "section":
            self.section = dict(attrs)["id"] or ""
            self.sections[self.section] = ""
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag == "section":
            self.section = ""

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.sections[self.section] += data
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data
        if "mark" in self.open:
            self.marked.append(data)

    def said(self, section: str = "") -> str:
        """A section's text in one line."""
        return " ".join(self.sections[section].split())

    def row(self, first: str) -> list[str]:
        """The cells of the table row that begins with these words."""
        (found,) = (cells for cells in self.rows if cells[0].strip() == first)
        return [" ".join(cell.split()) for cell in found[1:]]


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(APP, list(map(str, arguments)))


def page(folder: Path, *arguments: str | Path) -> Page:
    result = call("--annotations", folder, *arguments)
    assert result.exit_code == 0, result.output
    return Page((folder / "report.html").read_text())


def usual(folder: Path, **settings: Row) -> Path:
    """Two units of two tasks, an hour apart, each begun and done in a hundred seconds."""
    one = [answered("a", 3.0, task="qa"), unread("b", task="qa"), failed("c", task="qa")]
    two = [answered("d", 1.0), answered("e", 2.0)]
    times = [(1_750_000_000.0, 1_750_000_100.0), (1_750_003_700.0, 1_750_003_800.0)]
    write_set(folder, one, two, times=times, settings=settings)
    return folder


def test_run_section_describes_the_run(tmp_path: Path) -> None:
    found = page(usual(tmp_path, model={"name": "llama", "engine": {"dtype": "half"}}))
    said = found.said("run")
    for fact in ("Name llama", "Digest 0123456789ab", "dtype half", "Encoder MiniLM", "Passages 1,271", "Shards 2"):
        assert fact.replace(" ", "") in said.replace(" ", "")
    assert "2025-06-15 15:06:40 UTC" in said
    assert "1, 1 h 0 min in total" in said  # the pause
    assert "ray2.60.0" in said
    assert "threshold0.2" in said
    assert "citationsno" in said


def test_headline_holds_the_main_figures(tmp_path: Path) -> None:
    head = page(usual(tmp_path)).said()
    assert "Complete" in head
    for figure in ("Rows5", "Used a passage75.0 %", "Errors20.0 %", "Rows per second0.025"):
        assert figure in head
    assert "Generated tokens per second0.2" in head  # 4 answered rows of 10 tokens in 200 s
    assert "Cost" not in head


def test_pauses_are_drawn_and_active_periods_are_listed(tmp_path: Path) -> None:
    found = page(usual(tmp_path))
    bars = [element for tag, element in found.elements if tag == "rect"]
    assert sum(element.get("class") == "pause" for element in bars) == 2  # one for rows, one for tokens
    assert found.row("2025-06-15 16:08:20 UTC") == ["1 min 40 s", "1 h 0 min", "2", "0.02", "0.2"]


def test_stage_times_are_shown_as_totals_shares_and_quantiles(tmp_path: Path) -> None:
    found = page(usual(tmp_path))
    assert found.row("From first step to last") == ["16 s", "100 %", "4 s", "4 s", "4 s", "4 s"]
    assert found.row("Waiting for the search")[:2] == ["1.5 s", "9.38 %"]
    assert found.row("Generating tokens (decode)")[:2] == ["20 s", "62.5 %"]
    assert "add up to more than the latency of the row" in found.said("time")
    assert "Waiting for the reranker" not in found.said("time")


def test_tables_show_tasks_and_errors(tmp_path: Path) -> None:
    found = page(usual(tmp_path))
    assert found.row("qa") == ["3", "1", "50.0 %", "0.500", "0.900", "0.800", "0.500", "2.000"]
    assert found.row("(all)") == ["5", "1", "75.0 %", "0.700", "0.900", "0.800", "0.500", "1.750"]
    assert found.row("ValueError") == ["qa", "1", "the query is empty"]


def test_charts_mark_the_thresholds_of_each_task(tmp_path: Path) -> None:
    found = page(usual(tmp_path, profiles={"qa": {"decoding": {"threshold": 0.4}}}))
    lines = [element["x1"] or "" for tag, element in found.elements if tag == "line"]
    assert sorted(lines, key=float) == ["4.0", "4.0", "8.0", "8.0"]  # both for all, then each for its task
    charts = [element["aria-label"] or "" for tag, element in found.elements if tag == "svg" and "role" in element]
    assert any(label.startswith("Histogram of IsRel in 20 bars from 0 to 1: 3 values") for label in charts)


def test_examples_show_evidence_and_a_task_filter(tmp_path: Path) -> None:
    found = page(usual(tmp_path))
    assert set(found.marked) == {"Frank Herbert"}
    said = found.said("examples")
    assert "Highest scores" in said
    assert "[1] Dune · rank 2, retrieval score 0.700" in said
    shown = [element["class"] for tag, element in found.elements if tag == "details" and "class" in element]
    assert {name.split()[1] for name in shown if name} == {"task-1", "task-2"}
    assert [e["id"] for tag, e in found.elements if tag == "input"] == ["task-0", "task-1", "task-2"]


def test_cost_is_based_on_machines_and_busy_hours(tmp_path: Path) -> None:
    folder = usual(tmp_path, execution={"actors": 3})
    assert "cost" not in page(folder).sections
    found = page(folder, "--price-per-hour", "4.5")
    # 200 s x 3 machines x 4.50 an hour = 0.75, for 5 rows
    assert "150.00 per 1,000 queries, 0.75 in total: 0.0556 hours × 3 machines × 4.50 per hour" in found.said("cost")
    assert "without pauses" in found.said("cost")
    assert "Cost of 1,000 queries150.00" in found.said().replace("queries ", "queries")


def test_baseline_is_compared_and_changed_answers_are_counted(tmp_path: Path) -> None:
    folder, before = usual(tmp_path / "now"), tmp_path / "before"
    one = [answered("a", task="qa", answer="Herbert"), answered("b", task="qa", answer="Frank Herbert")]
    write_set(before, one, [answered("d"), failed("e"), answered("x")])
    found = page(folder, "--baseline", before)
    assert "1 of 3 answers changed (33.3 %), among the ids that both sets answered." in found.said("comparison")
    assert found.row("Used a passage")[-3:] == ["75.0 %", "100.0 %", "-25.0 points"]
    assert found.row("Mean score") == ["1.750", "2.000", "-0.250"]
    assert found.row("Rows") == ["5", "5", "+0.0 %"]
    assert found.row("Rows per second") == ["0.025", "–", "–"]


SAMPLED = "a sample: 3 of 5 rows, in the 1 of 2 units with the smallest ids"


def test_report_of_a_large_set_says_which_figures_are_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "MOST_ROWS", 4)
    found = page(usual(tmp_path))
    for section in ("time", "scores", "tasks", "examples"):
        assert found.said(section).count(SAMPLED) == 1
    for section in ("", "run", "throughput", "errors"):
        assert "sample" not in found.said(section)
    head = found.said()
    for figure in ("Rows5", "Used a passage75.0 %", "Errors20.0 %", "Rows per second0.025"):
        assert figure in head
    assert found.row("From first step to last") == ["100 %", "4 s", "4 s", "4 s", "4 s"]
    assert "6 requests per row and 0.5 searches per row; 400 prompt tokens, 25 % of them" in found.said("time")
    assert "40 generated tokens" in found.said("time")
    assert found.row("qa") == ["100.0 %", "33.3 %", "50.0 %", "0.500", "0.900", "0.800", "0.500", "2.000"]
    assert "No row of these tasks is in the sample: (none)." in found.said("tasks")
    assert found.row("ValueError") == ["(all)", "1", "the query is empty"]
    assert "values" not in found.said("scores").split("sample", 1)[1]
    assert "mean 0.900; 50.0 % missing" in found.said("scores")
    charts = [element["aria-label"] or "" for tag, element in found.elements if tag == "svg" and "role" in element]
    assert any(re.search(r"IsRel in 20 bars .*: mean 0\.900; .* holds 100\.0 %\.", label) for label in charts)


def test_totals_of_a_sampled_set_with_tasks_are_those_of_all_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(units, "MOST_ROWS", 4)
    one = [answered("a", task="qa"), answered("b", task="qa"), answered("c", task="qa"), unread("d")]
    write_set(tmp_path, one, [unread("e"), failed("f"), failed("g", task="qa"), failed("h")])
    found = page(tmp_path)
    assert found.row("qa")[:3] == ["75.0 %", "0.0 %", "100.0 %"]
    assert found.row("(none)")[:3] == ["25.0 %", "0.0 %", "0.0 %"]
    assert found.row("(all)")[:3] == ["100.0 %", "37.5 %", "60.0 %"]
    assert found.row("ValueError") == ["(all)", "3", "the query is empty"]


def test_comparison_of_large_sets_covers_the_answers_of_all_units(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(units, "MOST_ROWS", 4)
    folder, before = usual(tmp_path / "now"), tmp_path / "before"
    write_set(before, [answered("a", 1.0, task="qa", answer="Herbert"), answered("b"), answered("d"), answered("e")])
    found = page(folder, "--baseline", before)
    said = found.said("comparison")
    assert "1 of 4 answers changed (25.0 %), among the ids that both sets answered." in said
    assert f"Latencies, searches per row and mean scores of this run are from {SAMPLED}" in said
    assert "of the earlier run" not in said  # it was read as a whole
    assert found.row("Rows") == ["5", "4", "+25.0 %"]
    assert found.row("Generated tokens per row") == ["10", "10", "+0.0 %"]
    assert found.row("Searches per row") == ["0.5", "1", "-50.0 %"]


def test_unfinished_run_is_labeled(tmp_path: Path) -> None:
    write_set(tmp_path, [answered("a")], [answered("b"), answered("c")], times=[(1, 2), (2, 3)], finished=False)
    (tmp_path / "data" / f"part-{1:020x}.parquet").unlink()
    head = page(tmp_path).said()
    assert "Unfinished: 1 of 3 rows are done." in head
    assert "Complete" not in head


def test_report_of_a_run_without_finished_units(tmp_path: Path) -> None:
    write_set(tmp_path, finished=False)
    found = page(tmp_path)
    assert list(found.sections) == ["", "run"]
    assert "Unfinished: 0" in found.said()


def test_report_of_a_run_without_retrieval(tmp_path: Path) -> None:
    rows = [unread(n, retrieve_probability=None) for n in "abcd"]
    write_set(tmp_path, rows, settings={"decoding": {"mode": "never"}})
    found = page(tmp_path)
    assert "Used a passage0.0 %" in found.said()
    assert "IsRel" not in found.said("scores")
    assert "p(Retrieve)" not in found.said("scores").split(".", 1)[1]
    assert not [tag for tag, _ in found.elements if tag in ("mark", "line")]
    assert "tasks" in found.sections


def test_report_of_a_run_with_only_errors(tmp_path: Path) -> None:
    write_set(tmp_path, [failed("a"), failed("b", "TimeoutError", "slow")], times=[(1.0, 2.0)])
    found = page(tmp_path)
    assert list(found.sections) == ["", "run", "throughput", "tasks", "errors"]
    assert "Errors100.0 %" in found.said()
    assert found.row("TimeoutError") == ["(none)", "1", "slow"]


def test_null_scores_have_no_chart(tmp_path: Path) -> None:
    nothing = segment(1.0, is_rel=None, is_sup=None, is_use=None)
    write_set(tmp_path, [answered("a", retrieve_probability=None, segments=[nothing])])
    found = page(tmp_path)
    assert sum(tag == "figure" for tag, _ in found.elements) == 1  # the score itself
    assert found.row("(none)") == ["1", "0", "100.0 %", "1.000"]


def test_user_content_is_escaped(tmp_path: Path) -> None:
    passage = {"id": HOSTILE, "title": HOSTILE, "text": HOSTILE, "retrieval_score": 1.0, "rank": 1}
    row = answered(HOSTILE, query=HOSTILE, task=HOSTILE, answer=HOSTILE, passages=[passage], finish_reason=HOSTILE)
    row["segments"] = [segment(1.0, HOSTILE)]
    errors = [failed("x", HOSTILE, HOSTILE, task=HOSTILE), failed("y", HOSTILE, HOSTILE)]
    write_set(tmp_path, [row, answered("z")], errors, settings={"model": {"name": HOSTILE}})
    found = page(tmp_path)
    tags = {tag for tag, _ in found.elements}
    assert not tags & {"script", "img", "textarea", "iframe", "object", "link", "base", "form"}
    assert [tag for tag, _ in found.elements].count("title") - sum(tag == "rect" for tag, _ in found.elements) <= 3
    assert not [name for _, attributes in found.elements for name in attributes if name.startswith("on")]
    assert "<script" not in (tmp_path / "report.html").read_text()
    assert found.said("examples").count("alert(1)") >= 5
    assert "".join(found.marked).count("script") > 0


def test_page_loads_nothing_and_its_policy_forbids_loading(tmp_path: Path) -> None:
    found = page(usual(tmp_path))
    targets = [e[name] or "" for _, e in found.elements for name in ("src", "href", "data", "action") if name in e]
    assert targets
    assert all(target.startswith("#") for target in targets)
    assert not [1 for _, attributes in found.elements if "style" in attributes]  # the policy would refuse them
    text = (tmp_path / "report.html").read_text()
    assert "url(" not in text
    assert "@import" not in text
    (policy,) = (e["content"] for tag, e in found.elements if tag == "meta" and "http-equiv" in e)
    assert re.fullmatch(
        r"default-src 'none'; style-src 'sha256-[\w+/=]{44}'; base-uri 'none'; form-action 'none'", policy or ""
    )


def test_page_structure_is_accessible_to_screen_readers(tmp_path: Path) -> None:
    found = page(usual(tmp_path), "--price-per-hour", "1", "--baseline", usual(tmp_path / "before"))
    elements = found.elements
    assert ("html", {"lang": "en"}) in elements
    assert {"header", "main", "nav", "footer"} <= {tag for tag, _ in elements}
    ids = [e["id"] for _, e in elements if "id" in e]
    assert len(ids) == len(set(ids))
    named = [e["aria-labelledby"] for _, e in elements if "aria-labelledby" in e]
    assert set(named) <= set(ids)
    tables = sum(tag == "table" for tag, _ in elements)
    assert tables == sum(tag == "caption" for tag, _ in elements) > 5
    assert all("scope" in e for tag, e in elements if tag == "th")
    assert all("aria-label" in e or e.get("aria-hidden") == "true" for tag, e in elements if tag == "svg")


def test_page_stays_small_with_long_texts(tmp_path: Path) -> None:
    long = "<&word> " * 20_000
    passages = [{"id": "p", "title": "t", "text": long, "retrieval_score": 1.0, "rank": n} for n in range(7)]
    rows = [
        answered(f"{t}-{n}", query=long, answer=long, task=f"t{t}", passages=passages)
        for t in range(40)
        for n in range(4)
    ]
    write_set(tmp_path, rows, [failed("x", "ValueError", long, task=f"t{t}") for t in range(40)])
    page(tmp_path)
    assert (tmp_path / "report.html").stat().st_size < 3_000_000


def test_page_is_written_to_the_given_output(tmp_path: Path) -> None:
    usual(tmp_path / "set")
    result = call("--annotations", tmp_path / "set", "--output", tmp_path / "pages" / "x.html")
    assert (result.exit_code, result.stdout) == (0, "")
    assert (tmp_path / "pages" / "x.html").read_text().startswith("<!doctype html>")
    assert not (tmp_path / "set" / "report.html").exists()


def test_report_reads_from_and_writes_to_object_storage(s3, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    folder = at(f"s3://{s3.bucket}/annotated")
    write_set(folder, [answered("a"), failed("b")])
    result = call("--annotations", folder.uri, "--set", "storage.patience_s=5")
    assert result.exit_code == 0, result.output
    assert folder.uri in Page((folder / "report.html").read().decode()).said("run")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--annotations", "nowhere"], "nowhere: not an annotated set (no _manifest.json); pass the --output"),
        (["--annotations", "SET", "--baseline", "nowhere"], "nowhere: not an annotated set"),
        (["--annotations", "SET", "--set", "decoding.mode=never"], "only storage.* can be set here"),
        (["--annotations", "nothing://x"], "nothing://x: "),
    ],
)
def test_bad_input_gives_one_line_and_status_2(tmp_path: Path, arguments: list[str], complaint: str) -> None:
    usual(tmp_path)
    result = call(*[word.replace("SET", str(tmp_path)) for word in arguments])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert complaint in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "report.html").exists()


def test_negative_price_is_refused(tmp_path: Path) -> None:
    assert call("--annotations", tmp_path, "--price-per-hour", "-1").exit_code == 2


def test_failed_report_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    usual(tmp_path)
    next((tmp_path / "data").iterdir()).write_bytes(b"PAR1")
    leave_report(at(tmp_path))
    assert "no report was written" in caplog.text
    assert f"python -m jobs.report --annotations {tmp_path}" in caplog.text


def test_report_is_deleted_when_the_set_is_overwritten(tmp_path: Path) -> None:
    leave_report(at(usual(tmp_path)))
    assert (tmp_path / "report.html").exists()
    OutputFolder(at(tmp_path)).clear()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_figures_missing_from_the_manifest_are_omitted(tmp_path: Path) -> None:
    """As of a set that was made by other means, or by an earlier version."""
    usual(tmp_path)
    (tmp_path / "_manifest.json").write_text(json.dumps({"format_version": 1}))
    found = page(tmp_path)
    assert html.escape(str(tmp_path)) in (tmp_path / "report.html").read_text()
    assert "Model" not in found.said("run")
