import numpy as np
import pytest

from jobs.benchmark.scripted_model import OTHERS, WRITTEN, Prompter, Script, write_shape
from pipeline.config.sections import DecodingConfig
from pipeline.decoding.profiles import Tasks
from pipeline.decoding.reflection import REFLECTION_TOKENS, IsSup, Retrieve
from pipeline.decoding.reflection_reader import ReflectionCritic
from pipeline.decoding.self_rag import SelfRag
from pipeline.decoding.types import Finish, Generation, Passage, Query
from tests.support.fakes import EOS, word_tokenizer


class Scribbler:
    """Writes as many tokens as it is asked for, control tokens and ends among them."""

    max_model_len = 512

    def __init__(self, prompter):
        self.prompter = prompter

    async def generate(self, prompt, max_tokens, stops):
        length = self.prompter.script.get_length(max_tokens)
        ids = tuple((EOS, self.prompter.tokenizer.reflection[IsSup.NONE])[n % 2] for n in range(length))
        table = np.zeros((length, len(REFLECTION_TOKENS)))
        return self.prompter.apply_script(Generation(ids, np.full(length, -1.0), table, len(prompt)), prompt)


def system(script, **decoding):
    tokenizer = word_tokenizer()
    config = DecodingConfig(passages=2, max_tokens=60, keep_candidates=True, **decoding)
    return SelfRag(Scribbler(Prompter(tokenizer, script)), ReflectionCritic(tokenizer), Tasks(config))


GIVEN = (Passage("a", "", "one"), Passage("b", "", "two"))


async def test_scripted_segment_has_the_set_length_a_critique_and_an_end():
    answer = await system(Script(tokens=8)).answer(Query("q", "what", passages=GIVEN))
    assert (answer.retrieved, answer.finish) == (True, Finish.STOP)
    assert answer.usage.generated_tokens == 1 + 2 * 8
    (segment,) = answer.segments
    assert segment.text.replace(" ", "").isdigit()
    assert len(segment.text.split()) == 4  # of eight tokens, critique and end are four
    assert segment.raw == f"[Retrieval][Relevant] {segment.text} [Fully supported] [Utility:5]"
    assert segment.critique.is_rel == pytest.approx(1 / (1 + np.exp(OTHERS - WRITTEN)))


async def test_answer_has_the_scripted_number_of_segments():
    answer = await system(Script(tokens=6, segments=3), segments=3, beam_width=1).answer(
        Query("q", "x", passages=GIVEN)
    )
    assert len(answer.segments) == 3
    assert answer.finish is Finish.STOP


async def test_beam_paths_have_distinct_texts():
    script = Script(tokens=6, segments=3)
    answer = await system(script, segments=3, beam_width=2, mode="always").answer(Query("q", "x", passages=GIVEN))
    assert answer.usage.generated_tokens == 6 * (2 + 4 + 4)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
async def test_scripted_share_of_queries_retrieves(share):
    script = Script(share, tokens=6)
    answers = [await system(script).answer(Query(str(n), "w " * n, passages=GIVEN)) for n in range(1, 101)]
    assert sum(answer.retrieved for answer in answers) == pytest.approx(100 * share, abs=12)
    assert all(answer.usage.generated_tokens == (1 + 12 if answer.retrieved else 1 + 6) for answer in answers)


def test_decision_does_not_depend_on_the_generated_length():
    prompter = Prompter(word_tokenizer(), Script(0.5, tokens=9))
    tokenizer = prompter.tokenizer
    for n in range(1, 20):
        prompt = tokenizer.encode_prompt("w " * n)
        first = {
            prompter.apply_script(Generation((7,) * length, np.zeros(length), np.empty(0), 1), prompt).token_ids[0]
            for length in (1, 9)
        }
        assert first == {tokenizer.reflection[prompter.decide(prompt)]}
    assert {prompter.decide([n]) for n in range(20)} == {Retrieve.YES, Retrieve.NO}


def test_shape_is_a_model_folder_without_weights(tmp_path, monkeypatch):
    from transformers import AutoConfig

    from pipeline.config.sections import ModelConfig
    from pipeline.decoding.prompts import PromptTokenizer
    from pipeline.engine.models import load_tokenizer

    folder = write_shape("7b", tmp_path / "7b")
    config = AutoConfig.from_pretrained(folder)
    assert (config.num_hidden_layers, config.hidden_size) == (32, 4096)
    tokenizer = PromptTokenizer.of(load_tokenizer(ModelConfig(name=str(folder))), "7b")
    assert max(tokenizer.reflection.control) < config.vocab_size
    assert not list(folder.glob("*.safetensors"))
