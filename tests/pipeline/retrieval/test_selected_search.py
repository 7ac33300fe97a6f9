from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config.sections import RetrievalConfig
from pipeline.retrieval.encoder import Vectors
from pipeline.retrieval.filters import FilterError, RowSelection
from pipeline.retrieval.manifest import IndexManifest
from pipeline.retrieval.selected_search import check_selection, search_selected, supports_selection
from pipeline.retrieval.shard_files import create_empty_index
from pipeline.storage.location import Location
from tests.support.indexes import CPU, save, unit_vectors

ROWS, DIMENSION = 600, 16
VECTORS = unit_vectors(ROWS, seed=1)
QUERIES = unit_vectors(5, seed=2)


def build(factory: str, vectors: Vectors = VECTORS) -> Any:
    index = create_empty_index(factory, DIMENSION)
    index.train(VECTORS)
    index.add(vectors)
    return index


INDEXES = {name: build(name) for name in ("Flat", "SQ8", "IVF16,Flat", "IVF16,SQ8", "HNSW8", "PCA8,IVF16,Flat")}


def set_probes(index: Any, probes: int) -> None:
    faiss.extract_index_ivf(index).nprobe = probes


def search_what_is_left(factory: str, kept: np.ndarray, k: int, tune: Callable[[Any], None]) -> tuple[Any, Any]:
    """Scores and rows of an index of the kept vectors alone."""
    alone = build(factory, VECTORS[kept])
    tune(alone)
    scores, rows = alone.search(QUERIES, k)
    return scores, np.where(rows >= 0, np.flatnonzero(kept)[rows], -1)


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(sorted(INDEXES)), st.floats(0.001, 1), st.integers(1, 40), st.integers(0, 1000))
def test_with_all_lists_selected_search_finds_what_an_index_of_the_rest_finds(
    factory: str, share: float, k: int, seed: int
) -> None:
    kept = np.random.default_rng(seed).random(ROWS) < share
    kept[seed % ROWS] = True
    every: Callable[[Any], None] = (lambda index: set_probes(index, 16)) if "IVF" in factory else lambda index: None
    every(INDEXES[factory])
    scores, rows = search_selected(INDEXES[factory], QUERIES, k, RowSelection(kept))
    if factory == "HNSW8":  # approximate, unless fewer are selected than the graph compares
        assert ((rows >= 0).sum(axis=1) == min(k, kept.sum())).all()
        assert kept[rows[rows >= 0]].all()
        return
    wanted_scores, wanted = search_what_is_left(factory, kept, k, every)
    found = min(k, int(kept.sum()))
    np.testing.assert_array_equal(rows[:, :found], wanted[:, :found])
    np.testing.assert_allclose(scores[:, :found], wanted_scores[:, :found], atol=1e-6)
    assert (rows[:, found:] == -1).all()


@pytest.mark.parametrize("factory", ["IVF16,Flat", "PCA8,IVF16,Flat"])
def test_as_many_vectors_are_compared_as_without_a_filter(factory: str) -> None:
    """One list of sixteen is read usually; of a quarter of the vectors, those in four lists are compared."""
    kept = np.arange(ROWS) % 4 == 0
    set_probes(INDEXES[factory], 1)
    _, rows = search_selected(INDEXES[factory], QUERIES, 3, RowSelection(kept))
    _, wanted = search_what_is_left(factory, kept, 3, lambda index: set_probes(index, 4))
    assert rows.tolist() == wanted.tolist()


def test_lists_are_read_until_enough_are_found() -> None:
    """Half of the vectors, none of which is near the queries' lists, so that two lists hold too few."""
    index = INDEXES["IVF16,Flat"]
    set_probes(index, 1)
    _, lists = index.quantizer.search(VECTORS, 1)
    _, near = index.quantizer.search(QUERIES[:1], 8)
    kept = ~np.isin(lists[:, 0], near)
    _, rows = search_selected(index, QUERIES[:1], 20, RowSelection(kept))
    assert (rows >= 0).all()
    assert kept[rows].all()


def test_graph_compares_few_selected_vectors_exactly() -> None:
    kept = np.zeros(ROWS, bool)
    kept[[3, 77, 300, 301, 599]] = True
    scores, rows = search_selected(INDEXES["HNSW8"], QUERIES, 4, RowSelection(kept))
    wanted_scores, wanted = search_what_is_left("Flat", kept, 4, lambda index: None)
    assert rows.tolist() == wanted.tolist()
    np.testing.assert_allclose(scores, wanted_scores, atol=1e-6)


def test_graph_is_walked_for_many_selected_vectors() -> None:
    vectors = unit_vectors(4000, seed=5)
    graph, flat = build("HNSW8", vectors), build("Flat", vectors)
    kept = np.arange(4000) % 8 > 0
    _, rows = search_selected(graph, QUERIES, 5, RowSelection(kept))
    _, exact = search_selected(flat, QUERIES, 5, RowSelection(kept))
    assert kept[rows].all()
    assert (rows == exact).mean() > 0.6


@pytest.mark.parametrize("factory", ["IVF16,Flat", "HNSW8"])
def test_one_vector_less_changes_no_other_hits(factory: str) -> None:
    index = INDEXES[factory]
    if factory == "IVF16,Flat":
        set_probes(index, 2)
    scores, rows = index.search(QUERIES, 5)
    kept = np.ones(ROWS, bool)
    kept[np.setdiff1d(np.arange(ROWS), rows)[0]] = False
    found_scores, found = search_selected(index, QUERIES, 5, RowSelection(kept))
    assert found.tolist() == rows.tolist()
    np.testing.assert_allclose(found_scores, scores, atol=1e-6)


def test_nothing_selected_finds_nothing() -> None:
    scores, rows = search_selected(INDEXES["Flat"], QUERIES, 2, RowSelection(np.zeros(ROWS, bool)))
    assert (rows == -1).all()
    assert np.isneginf(scores).all()


@pytest.mark.parametrize("k", [1, 3, 20])
def test_vectors_to_find_decide_the_lists_that_are_read(k: int) -> None:
    """Not the vectors to return, of which there may be more if others of the same batch are tied."""
    kept = np.arange(ROWS) % 8 == 0
    set_probes(INDEXES["IVF16,Flat"], 1)
    _, alone = search_selected(INDEXES["IVF16,Flat"], QUERIES, k, RowSelection(kept))
    for width in (k + 1, 2 * k + 7, 70):
        _, rows = search_selected(INDEXES["IVF16,Flat"], QUERIES, width, RowSelection(kept), k)
        assert rows[:, :k].tolist() == alone.tolist()


MORE = ("OPQ4,IVF16,PQ4x4", "HNSW8,SQ8", "IVF16_HNSW8,Flat", "IVF16,PQ4x4fs")
OTHERS = (
    *("PQ4x4", "NSG8,Flat", "IVF16,PQ4x4,RFlat", "IVF16,RQ2x4", "HNSW8,PQ4x4", "OPQ4,HNSW8,PQ4x4", "IVF16,ITQ16,SH"),
    "IVF16,FlatDedup",
)


@pytest.mark.parametrize("factory", [*INDEXES, *MORE])
@pytest.mark.parametrize("share", [0.9, 0.01])
def test_supported_indexes_are_searched(factory: str, share: float) -> None:
    assert supports_selection(create_empty_index(factory, DIMENSION))
    kept = np.random.default_rng(4).random(ROWS) < share
    _, rows = search_selected(build(factory), QUERIES, 3, RowSelection(kept))
    assert (rows >= 0).all()
    assert kept[rows].all()


@pytest.mark.parametrize("factory", OTHERS)
def test_other_indexes_are_not_supported(factory: str) -> None:
    assert not supports_selection(create_empty_index(factory, DIMENSION))


def check(manifest: IndexManifest, **settings: object) -> None:
    check_selection(manifest, CPU.model_copy(update={"filter": "title <> ''", **settings}))


def test_filter_is_checked_against_columns_device_and_index(folder: Location) -> None:
    manifest = save(folder, [VECTORS])
    check(manifest)
    check(manifest, filter=None, device="gpu")
    check(manifest, fusion="lexical", device="gpu")
    with pytest.raises(FilterError, match='"year" not found'):
        check(manifest, filter="year > 1")
    check(manifest.model_copy(update={"metadata": {"year": "integer"}}), filter="year > 1")
    with pytest.raises(ValueError, match=r"device=gpu: FAISS cannot leave out passages on GPUs, .*set auto or cpu"):
        check(manifest, device="gpu")
    with pytest.raises(ValueError, match=r"cannot filter the passages of an index of PQ4x4; use another factory"):
        check(manifest.model_copy(update={"factory": "PQ4x4"}))


def test_device_of_a_filtered_search_is_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.retrieval.faiss_device import Device

    monkeypatch.setattr("pipeline.retrieval.faiss_device.decide_gpu_use", lambda _: True)
    monkeypatch.setattr("pipeline.retrieval.faiss_device.has_gpu", lambda: pytest.fail("asked for a GPU"))
    manifest: Any = SimpleNamespace(shards=())
    assert Device.choose(RetrievalConfig(filter="true"), manifest, [0], 0.0).resources is None
