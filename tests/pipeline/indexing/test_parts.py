import re

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.indexing.parts import describe_truncation, estimate_words, split_passages, split_text
from pipeline.retrieval.manifest import IndexManifest, ShardEntry
from pipeline.retrieval.passage_columns import PASSAGE_SCHEMA
from pipeline.retrieval.shard_files import name_shard_files
from tests.support.indexes import ENCODER


@pytest.mark.parametrize(
    ("text", "most", "parts"),
    [
        ("One two. Three four.", 4, ["One two. Three four."]),
        ("One two. Three four.", 3, ["One two.", "Three four."]),
        ("One. Two. Three. Four.", 2, ["One. Two.", "Three. Four."]),
        ("One two three four five.", 2, ["One two", "three four", "five."]),
        ("Yes. One two three four five.", 3, ["Yes.", "One two three", "four five."]),
        ("Is it? It is! And so on…  End.", 2, ["Is it?", "It is!", "And so", "on…  End."]),
        ('She said: "Go." He went.', 4, ['She said: "Go."', "He went."]),
        ("Yes. It was J. Smith.", 4, ["Yes.", "It was J. Smith."]),
        ("Yes. In the U.S. Army he rose.", 4, ["Yes.", "In the U.S. Army", "he rose."]),
        ("Go to NASA. Then home.", 4, ["Go to NASA.", "Then home."]),
        ("It cost 3.50 dollars then. Now more.", 5, ["It cost 3.50 dollars then.", "Now more."]),
        ("He left at 5 p.m. on foot. Then he ran.", 7, ["He left at 5 p.m. on foot.", "Then he ran."]),
        ("a title\n\nits first line\n\nits second", 4, ["a title", "its first line", "its second"]),
        ("one\ntwo three. Four", 3, ["one\ntwo three.", "Four"]),
        ("  One two.\t\n Three.  ", 2, ["One two.", "Three."]),
        ("你好世界。今天天气很好！我们去公园。", 8, ["你好世界。", "今天天气很好！", "我们去公园。"]),
        ("你好世界今天天气", 3, ["你好世", "界今天", "天气"]),
        ("これはペンです。それは本です。", 7, ["これはペンです。", "それは本です。"]),
        ("สวัสดี", 3, ["สวัส", "ดี"]),
        ("मैं घर गया। वह आया।", 3, ["मैं घर गया।", "वह आया।"]),
        ("هل أنت هنا؟ نعم أنا هنا.", 4, ["هل أنت هنا؟", "نعم أنا هنا."]),
        ("나는 갔다. 그는 왔다.", 3, ["나는 갔다.", "그는 왔다."]),
        ("x" * 5000, 1, ["x" * 5000]),
        (" \n", 1, [" \n"]),
        ("One two. three four. Five", 4, ["One two. three four.", "Five"]),
    ],
)
def test_text_is_split_at_sentence_ends(text: str, most: int, parts: list[str]) -> None:
    assert split_text(text, most) == parts


@given(st.text("ab .?!。你\n", max_size=80), st.integers(1, 9))
def test_parts_hold_the_whole_text_and_are_never_blank_or_too_long(text: str, most: int) -> None:
    parts = split_text(text, most)
    assert re.sub(r"\s", "", "".join(parts)) == re.sub(r"\s", "", text)
    assert len(parts) == 1 or all(part.strip() for part in parts)
    assert all(split_text(part, most) == [part] for part in parts)


def test_parts_keep_their_title_and_have_ids_of_their_own() -> None:
    rows = [("a", "A", "One two. Three."), ("b", "", "Four."), ("c#1", "C", "Five six seven.")]
    parts, positions = split_passages(pa.record_batch(list(zip(*rows, strict=True)), schema=PASSAGE_SCHEMA), 2)
    assert [tuple(part.values()) for part in parts.to_pylist()] == [
        ("a#1", "A", "One two."),
        ("a#2", "A", "Three."),
        ("b", "", "Four."),
        ("c#1#1", "C", "Five six"),
        ("c#1#2", "C", "seven."),
    ]
    assert parts.schema == PASSAGE_SCHEMA
    assert positions.tolist() == [0, 0, 1, 2, 2]


@pytest.mark.parametrize(("tokens", "words"), [(256, 150), (512, 300), (8192, 4910)])
def test_words_for_an_encoder_are_estimated_in_tens(tokens: int, words: int) -> None:
    assert estimate_words(tokens) == words


@pytest.mark.parametrize(
    ("truncated", "max_words", "line"),
    [
        ([0, 0], None, None),
        ([None, None], None, None),
        ([3, None], None, None),
        ([3, 4], None, "7 of 20 passages are longer .*, build the index with --max-words"),
        ([3, 0], 150, "3 of 20 passages are longer .*, build the index with a smaller --max-words"),
    ],
)
def test_truncated_passages_are_reported_with_advice(
    truncated: list[int | None], max_words: int | None, line: str | None
) -> None:
    files = {"bytes": 1, "sha256": "a" * 64, "passages_bytes": 1, "passages_sha256": "b" * 64}
    shards = []
    for number, count in enumerate(truncated):
        names = dict(zip(("file", "passages_file"), name_shard_files(number), strict=True))
        entry = ShardEntry.model_validate({**names, "rows": 10, **files})
        shards.append(entry.model_copy(update={"truncated_passages": count}))
    manifest = IndexManifest(
        encoder=ENCODER, dimension=16, factory="Flat", passages=20, shards=tuple(shards), max_words=max_words
    )
    found = describe_truncation(manifest)
    assert found is None if line is None else re.fullmatch(line, found or "")
