import pytest

from pipeline.config.sections import DecodingConfig
from pipeline.decoding.reflection import Retrieve
from pipeline.decoding.types import Boundary, Candidate, Critique, Passage, Path, RetrievedPassage, Segment, Usage
from pipeline.evaluation.rescoring import Recorded
from pipeline.evaluation.sweep import GradedRow, is_for_choosing, sweep

CONFIG = DecodingConfig(keep_candidates=True, explore=True)


def candidate(text: str, sequence: float, relevance: float | None) -> Candidate:
    evidence = RetrievedPassage(Passage(text, "", ""), None, 1) if relevance is not None else None
    opening = Retrieve.YES if evidence else Retrieve.NO
    critique = Critique(sequence, relevance, None, None, sequence + (relevance or 0.0))
    return Candidate(Segment(text, text, evidence, critique, opening), None, None)


def example(id_: str, probability: float = 0.9) -> GradedRow:
    """Its right answer has the relevant passage, its wrong one the likely words; without a passage it guesses."""
    candidates = (candidate("wrong", 0.95, 0.6), candidate("right", 0.1, 0.9), candidate("guess", 0.5, None))
    recorded = Recorded(Path((), Boundary(probability)), candidates, Usage())
    return GradedRow(id_, recorded, {"answers": ["right"]}, "match", (), CONFIG)


def test_settings_are_swept_one_at_a_time() -> None:
    found = sweep([example(str(n)) for n in range(20)], ["weights.relevance", "weights.sequence"])
    # Right is 0.1 s + 0.9 r, wrong is 0.95 s + 0.6 r: right wins where 0.3 r > 0.85 s.
    assert [(p.value, p.score) for p in found.curves["weights.relevance"]] == [
        (0.0, 0.0),
        (0.25, 0.0),
        (0.5, 0.0),
        (1.0, 0.0),
        (2.0, 0.0),
        (4.0, 1.0),
    ]
    assert [p.value for p in found.curves["weights.sequence"] if p.score] == [0.0, 0.25]


def test_recommendation_is_evaluated_on_the_other_half() -> None:
    found = sweep([example(str(n)) for n in range(20)], ["weights.relevance", "weights.sequence"])
    assert found.recommended == {"weights.relevance": 4.0}
    others = sum(not is_for_choosing(str(n)) for n in range(20))
    assert (found.before.mean, found.after.mean, found.after.rows) == (0.0, 1.0, others)
    assert (found.difference.mean, found.difference.rows) == (1.0, others)
    assert found.metric == "match"


def test_higher_threshold_lowers_the_retrieval_rate() -> None:
    examples = [example(str(n), probability=0.3 if n % 2 else 0.8) for n in range(20)]
    rates = {point.value: point.retrieval_rate for point in sweep(examples, ["threshold"]).curves["threshold"]}
    assert (rates[0.0], rates[0.25], rates[0.3], rates[0.75], rates[0.8], rates[1.0]) == (1.0, 1.0, 0.5, 0.5, 0.0, 0.0)


def test_nothing_is_recommended_without_an_improvement() -> None:
    found = sweep([example(str(n)) for n in range(20)], ["constraint"])
    assert found.recommended == {}
    assert found.difference.mean == 0.0


def test_too_few_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="too few"):
        sweep([example("1")], ["constraint"])


def test_halves_are_about_equal_and_deterministic() -> None:
    assert 400 < sum(is_for_choosing(str(n)) for n in range(1000)) < 600
    assert [is_for_choosing(id_) for id_ in ("a", "b", "c", "d")] == [False, True, True, True]
