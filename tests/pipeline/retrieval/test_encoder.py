import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertModel

from pipeline.demo_models import build_demo_encoder
from pipeline.retrieval.encoder import ENCODERS, Encoder, EncoderStyle, resolve_encoder_name
from tests.support.names import ESCAPING_NAMES


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder.load("demo", "cpu")


def test_vectors_have_unit_length_and_rank_by_meaning(encoder: Encoder) -> None:
    vectors = encoder.encode(
        ["Who painted the Mona Lisa?", "Leonardo painted the Mona Lisa.", "Rust is a metal oxide."]
    )
    assert (vectors.shape, vectors.dtype) == ((3, 384), np.float32)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    assert vectors[0] @ vectors[1] > 0.7 > 0.3 > vectors[0] @ vectors[2]


def test_empty_input_gives_no_vectors(encoder: Encoder) -> None:
    assert encoder.encode([]).shape == (0, encoder.dimension) == (0, 384)


def test_model_without_prompts_encodes_queries_like_passages(encoder: Encoder) -> None:
    np.testing.assert_array_equal(encoder.encode_queries(["a cat"]), encoder.encode(["a cat"]))


def test_concurrent_threads_get_their_own_vectors(encoder: Encoder) -> None:
    texts = [f"text number {n} " + "word " * n for n in range(8)]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda text: encoder.encode([text])[0], texts))
    np.testing.assert_allclose(found, [encoder.encode([text])[0] for text in texts], atol=1e-5)


@pytest.mark.parametrize(
    ("texts", "prefix", "truncated"),
    [
        ([], "", 0),
        ([""], "", 0),
        (["word " * 254], "", 0),  # and two special tokens
        (["word " * 255], "", 1),
        (["word " * 250, "word " * 600, "a", "word " * 255 + "end"], "", 2),
        (["word " * 252], "passage: ", 0),
        (["word " * 253], "passage: ", 1),
        (["字" * 254], "", 0),
        (["字" * 255], "", 1),
        (["\n" * 5000], "", 0),
        (["." * 255], "", 1),
        (["[PAD]" * 300], "", 1),
    ],
)
def test_texts_longer_than_the_model_reads_are_counted(
    encoder: Encoder, texts: list[str], prefix: str, truncated: int
) -> None:
    style = EncoderStyle(passage_prefix=prefix)
    styled = Encoder(encoder._model, encoder.name, encoder.revision, encoder.digest, style)
    assert styled.max_tokens == 256
    assert styled.count_truncated(texts) == truncated


def test_prompt_of_the_model_counts_as_part_of_a_passage(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    assert encoder.count_truncated(["word " * 254]) == 0
    monkeypatch.setattr(encoder._model, "prompts", {"query": "a b c: ", "passage": "text: "})
    assert encoder.count_truncated(["word " * 252, "word " * 253]) == 1


@pytest.mark.parametrize("limit", [None, float("inf"), 10**30])
def test_model_without_a_limit_truncates_nothing(encoder: Encoder, limit: float | None) -> None:
    class Unlimited:
        max_seq_length = limit

        def get_embedding_dimension(self) -> int:
            return 4

    unlimited = Encoder(Unlimited(), "x", None, "d", EncoderStyle())
    assert unlimited.max_tokens is None
    assert unlimited.count_truncated(["word " * 9999]) == 0


def test_encoding_prints_nothing(encoder: Encoder, capfd: pytest.CaptureFixture[str]) -> None:
    encoder.encode(["a"] * 40)
    encoder.count_truncated(["word " * 600])
    assert capfd.readouterr() == ("", "")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    (folder / "1_Pooling").mkdir(parents=True)
    (folder / "modules.json").write_text(json.dumps([{"path": ""}, {"path": "1_Pooling"}]))
    for name in ("config.json", "model.safetensors", "1_Pooling/config.json"):
        (folder / name).write_text(name)
    return folder


def test_digest_depends_on_configuration_and_weights_of_every_module(folder: Path) -> None:
    digests = [ENCODERS.hash_present(str(folder))]
    for name in ("config.json", "model.safetensors", "1_Pooling/config.json", "modules.json"):
        (folder / name).write_text((folder / name).read_text() + " ")
        digests.append(ENCODERS.hash_present(str(folder)))
    assert len(set(digests)) == 5


def test_digest_ignores_other_files_and_the_location(folder: Path, tmp_path: Path) -> None:
    before = ENCODERS.hash_present(str(folder))
    (folder / "README.md").write_text("about")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "config.json").write_text("{}")
    (folder / "pytorch_model.bin").write_text("the weights in another format")
    assert ENCODERS.hash_present(str(shutil.move(folder, tmp_path / "elsewhere"))) == before


@pytest.mark.parametrize("name", ESCAPING_NAMES.values(), ids=ESCAPING_NAMES.keys())
def test_a_module_outside_of_the_model_is_refused(folder: Path, name: str) -> None:
    path = name.format("1_Pooling")
    (folder / "modules.json").write_text(json.dumps([{"path": ""}, {"path": path}]))
    with pytest.raises(ValueError, match=r"modules\.json: the path .* is not a folder of the model") as refused:
        ENCODERS.hash_present(str(folder))
    assert repr(path) in str(refused.value)


@pytest.mark.parametrize("content", ["", "{", "{}x", "[1]", '[{"name": "x"}]', "null", '{"path": "x"}'])
def test_a_damaged_list_of_modules_is_named(folder: Path, content: str) -> None:
    (folder / "modules.json").write_text(content)
    with pytest.raises(ValueError, match=r"modules\.json: not a list of modules with a path"):
        ENCODERS.hash_present(str(folder))


def test_loaded_encoder_has_the_digest_of_its_files(encoder: Encoder) -> None:
    assert encoder.digest == ENCODERS.hash_present("demo") == ENCODERS.hash_present(str(build_demo_encoder()))
    assert (encoder.name, encoder.revision) == ("demo", None)


@pytest.mark.parametrize("name", ["/no/such", "file:///no/such", "file:/no/such", "~/no/such", "./no/such"])
def test_missing_folder_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^encoder {name}: no such folder$"):
        Encoder.load(name)


@pytest.mark.parametrize("form", ["{}/my model", "file://{}/my%20model", "file:{}/my%20model"])
def test_folder_of_an_encoder_is_recorded_as_its_path(tmp_path: Path, form: str) -> None:
    (tmp_path / "my model").mkdir()
    assert resolve_encoder_name(form.format(tmp_path)) == str(tmp_path / "my model")


@pytest.mark.parametrize("name", ["demo", "sentence-transformers/all-MiniLM-L6-v2", "s3://bucket/model"])
def test_other_names_of_encoders_are_kept(name: str) -> None:
    assert resolve_encoder_name(name) == name


def test_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a sentence-transformers model"):
        Encoder.load(str(tmp_path))


def test_missing_gpu_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match="set device to auto or cpu"):
        Encoder.load("demo", "gpu")


def test_cpus_compute_in_float32_whatever_the_files_hold(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=30522, **sizes)).bfloat16().save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(build_demo_encoder()).save_pretrained(tmp_path)
    encoder = Encoder.load(str(tmp_path), "cpu", style=EncoderStyle(dtype="float16"))
    assert {weight.dtype for weight in encoder._model.parameters()} == {torch.float32}
