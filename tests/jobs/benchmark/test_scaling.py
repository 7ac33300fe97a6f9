import math

import pytest

from jobs.benchmark.scaling import FIVE_TOKENS, Run, WaitingEngine, build_scaling_tables, compute_steady_rate
from jobs.benchmark.scripted_model import Prompter
from pipeline.config.sections import DecodingConfig
from pipeline.decoding.profiles import Tasks
from pipeline.decoding.reflection_reader import ReflectionCritic
from pipeline.decoding.self_rag import SelfRag
from pipeline.decoding.types import Passage, Query
from tests.support.fakes import word_tokenizer


def test_waiting_engine_reads_all_passages_of_every_query():
    import asyncio

    tokenizer = word_tokenizer()
    config = DecodingConfig(passages=3, keep_candidates=True)
    system = SelfRag(WaitingEngine(Prompter(tokenizer, FIVE_TOKENS), 0.0), ReflectionCritic(tokenizer), Tasks(config))
    passages = tuple(Passage(str(n), "", "text") for n in range(3))
    answer = asyncio.run(system.answer(Query("a", "what", passages=passages)))
    assert answer.retrieved
    assert (answer.usage.engine_requests, len(answer.candidates)) == (4, 3)


def test_steady_rate_excludes_late_starts_and_the_end():
    # Two slots; the second comes up ten seconds late; each takes two seconds for a unit.
    begins = [*range(0, 30, 2), *range(10, 30, 2)]
    assert compute_steady_rate(begins, 2) == pytest.approx(1.0, rel=0.15)
    aligned = [second for second in range(0, 40, 4) for _ in range(3)]
    assert compute_steady_rate(aligned, 3) == pytest.approx(3 / 4)
    assert math.isnan(compute_steady_rate([1.0], 2))


def test_efficiency_is_the_rate_per_actor_relative_to_one_actor():
    runs = [Run(10, actors, 1.0, 2.0, 3.0, steady) for actors, steady in ((1, 4.0), (8, 24.0))]
    table = build_scaling_tables(runs[:1], runs, 2.0)[1]
    assert list(table.columns[2].cells) == ["1.000", "0.750"]
