"""Tokenizers as a run loads them, and the critics that they support."""

from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken

from pipeline.config.run import RunConfig
from pipeline.decoding.piece_check import SAMPLE_QUERY, check_pieces
from pipeline.decoding.reflection import CONTROL_TOKENS, ReflectionIds
from pipeline.demo_models import build_demo_encoder
from pipeline.engine.models import load_critic, resolve_model_path
from tests.support.tokenizers import CHAT, add_control_tokens, load_folder, write_llama


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, ["<s>", "▁Al"]),
        ({"add_bos_token": None}, ["<s>", "▁Al"]),
        ({"add_bos_token": None, "legacy": True}, ["<s>", "▁Al"]),
        ({"add_bos_token": None, "tokenizer_class": "LlamaTokenizerFast"}, ["<s>", "▁Al"]),
        ({"add_bos_token": False}, ["▁Al"]),
        ({"add_bos_token": False, "legacy": True}, ["▁Al"]),
        ({"add_eos_token": True}, ["<s>", "▁Al", "</s>"]),
    ],
)
def test_llama_tokenizers_add_a_beginning_unless_they_are_set_not_to(
    tmp_path: Path, settings: dict[str, Any], expected: list[str]
) -> None:
    tokenizer = load_folder(write_llama(tmp_path, **settings))
    assert tokenizer.convert_ids_to_tokens(tokenizer("Al")["input_ids"]) == expected


def test_a_saved_tokenizer_that_adds_no_beginning_is_left_so(tmp_path: Path) -> None:
    load_folder(write_llama(tmp_path / "a", add_bos_token=False)).save_pretrained(tmp_path / "b")
    assert load_folder(tmp_path / "b")("Al", add_special_tokens=True)["input_ids"] == [976]


@pytest.mark.parametrize("special", [True, False])
def test_control_tokens_are_special_however_they_were_added(tmp_path: Path, special: bool) -> None:
    plain = load_folder(write_llama(tmp_path / "a"))
    plain.add_tokens(list(CONTROL_TOKENS), special_tokens=special)
    plain.save_pretrained(tmp_path / "b")
    tokenizer = load_folder(tmp_path / "b")
    assert dict(ReflectionIds.of(tokenizer, "b").ids) == dict(ReflectionIds.of(plain, "a").ids)
    ids = tokenizer("".join(CONTROL_TOKENS), split_special_tokens=True)["input_ids"]
    assert not set(tokenizer.convert_tokens_to_ids(list(CONTROL_TOKENS))) & set(ids)


@pytest.mark.parametrize("special", [True, False])
def test_control_tokens_keep_the_white_space_that_they_swallow(tmp_path: Path, special: bool) -> None:
    plain = load_folder(write_llama(tmp_path / "a", legacy=False))
    plain.add_tokens([AddedToken(t, special=special, rstrip=True, normalized=False) for t in CONTROL_TOKENS])
    plain.save_pretrained(tmp_path / "b")
    tokenizer = load_folder(tmp_path / "b")
    assert tokenizer.tokenize("[Relevant] Al") == ["[Relevant] ", "Al"]
    assert "[Relevant] " not in tokenizer.tokenize("[Relevant] Al", split_special_tokens=True)


def test_a_tokenizer_without_control_tokens_gets_none(tmp_path: Path) -> None:
    assert len(load_folder(write_llama(tmp_path))) == 32001


@pytest.mark.parametrize("critic", ["reflection", "prompted"])
@pytest.mark.parametrize("legacy", [True, False, None])
def test_critics_of_a_llama_model_give_it_the_tokens_of_whole_prompts(
    tmp_path: Path, critic: str, legacy: bool | None
) -> None:
    write_llama(tmp_path, legacy=legacy, chat_template=CHAT["with <s>"] if critic == "prompted" else None)
    run = {"queries": "", "output": "", "model": {"name": str(add_control_tokens(tmp_path))}}
    config = RunConfig.model_validate({**run, "decoding": {"critic": critic}})
    assert check_pieces(load_critic(config), [SAMPLE_QUERY]) is None


@pytest.mark.parametrize("critic", ["reflection", "prompted"])
def test_a_tokenizer_without_an_end_of_sequence_is_refused(critic: str) -> None:
    run = {"queries": "", "output": "", "model": {"name": str(build_demo_encoder())}, "decoding": {"critic": critic}}
    with pytest.raises(ValueError, match=r"^model .*: its tokenizer has no end-of-sequence token; set its eos_token$"):
        load_critic(RunConfig.model_validate(run))


@pytest.mark.parametrize("form", ["{}/my model", "file://{}/my%20model", "file:{}/my%20model"])
def test_folder_of_a_model_is_passed_on_as_a_path(tmp_path: Path, form: str) -> None:
    (tmp_path / "my model").mkdir()
    assert resolve_model_path(form.format(tmp_path)) == str(tmp_path / "my model")


@pytest.mark.parametrize("name", ["selfrag/selfrag_llama2_7b", "s3://bucket/model", "gpt2"])
def test_other_names_of_models_are_passed_on(name: str) -> None:
    assert resolve_model_path(name) == name
