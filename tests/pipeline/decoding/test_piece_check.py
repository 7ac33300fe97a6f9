from dataclasses import dataclass, field

import pytest

from pipeline.config.sections import DecodingConfig
from pipeline.decoding.piece_check import SAMPLE_PASSAGES, SAMPLE_QUERY, check_pieces
from pipeline.decoding.protocols import Generator, Reader
from pipeline.decoding.types import Passage, Query

GIVEN = (Passage("p", "", "Al"), Passage("q", "", "Bo"))


@dataclass
class ComparingCritic:
    """Finds a difference in the prompts with some passages; records what is compared."""

    differing: frozenset[str] = frozenset()
    compared: list[tuple[str, str]] = field(default_factory=list)
    watched: tuple[int, ...] = ()

    def reader(self, generator: Generator, config: DecodingConfig, query: Query) -> Reader:
        raise AssertionError("no row is answered")

    def compare_pieces(self, query: Query, passage: Passage) -> str | None:
        self.compared.append((query.id, passage.id))
        return "'▁Al' instead of 'Al' at token 9" if passage.id in self.differing else None


def test_every_query_is_compared_with_its_passages() -> None:
    critic = ComparingCritic()
    assert check_pieces(critic, [Query("a", "Who?", passages=GIVEN), Query("b", "Who?")]) is None
    assert critic.compared == [("a", "p"), ("a", "q"), *(("b", passage.id) for passage in SAMPLE_PASSAGES)]


@pytest.mark.parametrize(("differing", "passage"), [({"p"}, "p"), ({"q"}, "q"), ({"p", "q"}, "p")])
def test_the_first_differing_row_is_named(differing: set[str], passage: str) -> None:
    critic = ComparingCritic(frozenset(differing))
    assert check_pieces(critic, [Query("a", "Who?", passages=GIVEN)]) == (
        f"the prompt of row 'a' with passage '{passage}' has other tokens than the strings on which models are "
        "trained: '▁Al' instead of 'Al' at token 9"
    )


def test_samples_are_passages_of_a_query() -> None:
    assert SAMPLE_QUERY.passages == SAMPLE_PASSAGES
    SAMPLE_QUERY.check()
