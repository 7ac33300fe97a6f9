import re
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest

from pipeline.indexing.sizing import (
    SearchCost,
    choose_list_count,
    compute_index_size,
    compute_room_beside_7b,
    compute_share_beside,
    count_cards,
    count_machines,
    estimate_search_cost,
    find_gpu_setting,
    plan_sizes,
)
from pipeline.retrieval.shard_files import create_empty_index

VECTORS = np.random.default_rng(0).normal(size=(3000, 64)).astype(np.float32)


@pytest.mark.parametrize(
    "factory",
    ["Flat", "SQ8", "SQfp16", "PQ16x4", "IVF16,Flat", "IVF16,SQ8", "IVF16,PQ16x4", "OPQ16,IVF16,PQ16x4", "HNSW32"],
)
def test_computed_sizes_match_real_indexes(factory: str) -> None:
    index = create_empty_index(factory, 64)
    index.train(VECTORS)
    index.add(VECTORS)
    real = len(faiss.serialize_index(index))
    assert compute_index_size(factory, 64).compute_total(len(VECTORS)) == pytest.approx(real, rel=0.02)


def test_bytes_per_vector_match_worked_examples() -> None:
    assert compute_index_size("Flat", 768).per_vector == 768 * 4
    assert compute_index_size("IVF4096,PQ64", 768).per_vector == 64 + 8
    assert compute_index_size("IVF4096,PQ64", 768).fixed == 4096 * 768 * 4 + 256 * 768 * 4
    # Level 0 has 64 links; one vector in 32 has 32 more on level 1, and so on: 64 + 32 / 31.
    assert compute_index_size("HNSW32", 768).per_vector == pytest.approx(768 * 4 + 4 * (64 + 32 / 31) + 12, rel=1e-3)


def test_plan_counts_centroids_once_per_shard() -> None:
    (line,) = plan_sizes(1_000_000, 384, 4, ["IVF{lists},SQ8"])
    assert line.factory == "IVF2048,SQ8"  # 4 √250,000 = 2,000
    assert line.index == 1_000_000 * (384 + 8) + 4 * 2048 * 384 * 4
    assert line.largest_shard == 250_000 * (384 + 8) + 2048 * 384 * 4


@pytest.mark.parametrize(("passages", "lists"), [(1, 16), (1_000_000, 4096), (21_000_000, 16384)])
def test_default_list_count_is_a_power_of_two(passages: int, lists: int) -> None:
    assert choose_list_count(passages) == lists


def test_unknown_index_types_are_refused() -> None:
    with pytest.raises(ValueError, match="the size of a IndexNSG"):
        compute_index_size("NSG32", 64)


def test_default_factories_that_do_not_fit_the_dimension_are_omitted() -> None:
    assert [line.factory for line in plan_sizes(1000, 100, 1)][-1] == "IVF128,SQ8"  # 100 is no multiple of 64
    with pytest.raises(ValueError, match="factory PQ64"):
        plan_sizes(1000, 100, 1, ["PQ64"])


@pytest.mark.parametrize(
    ("factory", "expected"),
    [
        ("Flat", SearchCost(1_000_000, 3_072_000_000)),
        # 4,096 centroids of 768 floats, and 32 of 4,096 lists with codes of 768 bytes and ids of 8.
        ("IVF4096,SQ8", SearchCost(4096 + 7812, 4096 * 768 * 4 + 7812 * 776)),
        ("IVF16,Flat", SearchCost(16 + 1_000_000, 16 * 768 * 4 + 1_000_000 * 3080)),
        ("OPQ64_256,IVF4096,PQ64", SearchCost(4096 + 7812, 4096 * 256 * 4 + 7812 * 72)),
    ],
)
def test_search_cost_matches_worked_examples(factory: str, expected: SearchCost) -> None:
    assert estimate_search_cost(factory, 768, 1_000_000) == expected


def test_hnsw_cost_is_an_upper_bound() -> None:
    cvar: Any = faiss.cvar
    index: Any = faiss.index_factory(64, "HNSW32", faiss.METRIC_INNER_PRODUCT)
    index.add(VECTORS)
    index.hnsw.efSearch = 16
    cvar.hnsw_stats.reset()
    index.search(VECTORS[:100], 10)
    compared = cvar.hnsw_stats.ndis / 100
    assert compared <= estimate_search_cost("HNSW32", 64, 3000, ef_search=16).compared == 16 * 64
    assert estimate_search_cost("HNSW32", 64, 10).compared == 10


def test_memory_left_beside_a_7b_model_matches_a_worked_example() -> None:
    # 40 GB less weights, 8,192 tokens of half a mebibyte, activations, and the index's own working memory.
    left = 40_000_000_000 - 13_480_000_000 - 8192 * 524_288 - 1_500_000_000 - 2048 * 2**20
    assert compute_room_beside_7b(40_000_000_000) == left == 18_577_549_056
    assert compute_room_beside_7b(16_000_000_000) == 0


def test_gpu_shares_and_machine_counts_match_worked_examples() -> None:
    reserve = (512 + 1024 + 512) * 2**20
    assert compute_share_beside(20_000_000_000 - reserve, 80_000_000_000) == 0.75
    assert count_cards(10 * (80_000_000_000 - reserve), 80_000_000_000) == 10
    assert count_cards(10 * (80_000_000_000 - reserve) + 1, 80_000_000_000) == 11
    assert count_machines(204_800_000_000, 256_000_000_000) == 1
    assert count_machines(204_800_000_001, 256_000_000_000) == 2


def documented() -> list[list[str]]:
    """The cells of the large table of the sizing document."""
    lines = (Path(__file__).parents[3] / "infra" / "SIZING.md").read_text().splitlines()
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in lines if re.match(r"\| [\d,]+ M in", line)
    ]


def test_sizing_document_matches_the_plan() -> None:
    rows = documented()
    assert len(rows) == 18
    for corpus, factory, per_vector, index, shard, *cards, card_servers, servers, compared, read in rows:
        passages, shards = (int(number.replace(",", "")) for number in re.findall(r"[\d,]+", corpus))
        (line,) = plan_sizes(passages * 10**6, 768, shards, [factory])
        cost = estimate_search_cost(factory, 768, -(-passages * 10**6 // shards))
        assert (per_vector, index) == (f"{line.per_vector:,.0f}", f"{line.index / 1e9:,.1f}")
        assert shard == f"{line.largest_shard / 1e9:.1f}"
        sizes = (24_000_000_000, 40_000_000_000, 80_000_000_000)
        need = find_gpu_setting(factory, 768)
        shares = [f"{compute_share_beside(line.index, card):.2f} {need}".strip() for card in sizes]
        room = [shares[n] if line.index <= compute_room_beside_7b(card) else "no" for n, card in enumerate(sizes)]
        on_cards = [*room, str(count_cards(line.index, sizes[-1]))]
        assert [*cards, card_servers] == (["–"] * 4 if need == "none" else on_cards)
        assert servers == str(count_machines(line.index, 256_000_000_000))
        assert compared == f"{shards * cost.compared / 1e6:,.2f} M"
        assert read == f"{shards * cost.bytes / 1e9:,.2f} GB"
