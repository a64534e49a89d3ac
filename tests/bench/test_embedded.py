"""Facts about the embedded model's texts, tasks, training rows, trainer and checkpoint."""

import json
import math
import random
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from bench.embedded import tasks, texts
from bench.embedded.export import export
from bench.embedded.model import Llama, ModelShape
from bench.embedded.ngram import NGram
from bench.embedded.rows import RowMaker
from bench.embedded.train import MIXED, STAGES, Part, Stage, Trainer

CHECKPOINT = Path(__file__).parents[2] / "configs" / "embedded"
SMALL = ModelShape(vocab_size=300, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=1, head_dim=8)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))


@pytest.fixture(scope="module")
def maker(tokenizer: Tokenizer) -> RowMaker:
    return RowMaker(tokenizer, seed=3)


def count_with(tokenizer: Tokenizer) -> tasks.CountTokens:
    return lambda text: len(tokenizer.encode(text).ids)


@pytest.mark.parametrize("kind", tasks.KINDS)
def test_an_example_is_a_pure_function_of_its_seed(kind: str) -> None:
    assert tasks.make(kind, 5, 4000, len) == tasks.make(kind, 5, 4000, len)
    assert tasks.make(kind, 5, 4000, len) != tasks.make(kind, 6, 4000, len)


@pytest.mark.parametrize("kind", tasks.KINDS)
def test_training_and_benchmark_never_share_an_example(kind: str) -> None:
    training = {tasks.make(kind, seed, 4000, len).context for seed in range(20)}
    benchmark = {tasks.make(kind, seed, 4000, len, split="bench").context for seed in range(20)}
    assert not training & benchmark


@pytest.mark.parametrize("kind", [kind for kind in tasks.KINDS if kind != "counting"])
def test_every_answer_stands_in_its_context(kind: str) -> None:
    for seed in range(10):
        example = tasks.make(kind, seed, 6000, len)
        for question in example.questions:
            for word in question.answer.strip(" .").split(" = "):
                assert word in example.context


def test_a_count_is_the_number_of_marks_in_the_context() -> None:
    example = tasks.make("counting", 4, 6000, len)
    for question in example.questions:
        mark = question.prompt.split()[-3]
        assert question.answer == f" {example.context.count(f'A {mark} was seen.')} times."


def test_the_common_word_is_the_most_common_one() -> None:
    example = tasks.make("common_word", 1, 6000, len)
    words = example.context.removeprefix("Words: ").split()
    assert example.questions[0].answer == f" {max(set(words), key=words.count)}."


@pytest.mark.parametrize("kind", tasks.KINDS)
@pytest.mark.parametrize("length", [1024, 2048, 4096])
def test_a_task_tokenizes_to_within_two_percent_of_its_length(
    kind: str, length: int, tokenizer: Tokenizer
) -> None:
    count = count_with(tokenizer)
    example = tasks.make(kind, 2, length, count)
    longest = max(count(example.context + q.prompt + q.answer) for q in example.questions)
    assert 0.98 * length <= longest <= length


def test_every_task_word_is_one_token_after_a_space(tokenizer: Tokenizer) -> None:
    assert all(len(tokenizer.encode(f" {word}").ids) == 1 for word in tasks.WORDS)


def test_digits_are_tokens_of_their_own(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode(" 48213").ids) == 5


@pytest.mark.parametrize("text", ["", "naïve\n\tcafé — 12", "日本語 <|im_start|>", "a  b   c\n\n"])
def test_the_tokenizer_gives_every_text_back(text: str, tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_the_chat_template_renders_what_training_showed() -> None:
    from transformers import AutoTokenizer

    turns = texts.chat(random.Random(1))
    messages = [{"role": role, "content": content} for role, content in turns]
    rendered = AutoTokenizer.from_pretrained(CHECKPOINT).apply_chat_template(
        messages[:-1], tokenize=False, add_generation_prompt=True
    )
    assert rendered == texts.render_chat(turns[:-1], generation_prompt=True)


def test_held_out_modules_never_train() -> None:
    held_out = set(texts.HELD_OUT_MODULES)
    assert not held_out & set(texts.library_modules())
    assert not held_out & set(texts.TOKENIZER_MODULES)
    pieces = {text for text in texts.library_documents(texts.HELD_OUT_MODULES) if len(text) == texts.PIECE}
    assert pieces
    assert not pieces & set(texts.training_library())


def test_most_of_the_standard_library_trains() -> None:
    # Distributions leave out tkinter, idlelib and the like: a third of it.
    modules = texts.library_modules()
    assert len(modules) > 250
    assert {"argparse", "asyncio/events", "pydoc"} <= set(modules)
    assert sum(map(len, texts.training_library())) > 4_000_000


def library_of(tokenizer: Tokenizer, library_read: int = 0) -> RowMaker:
    """A row maker whose library is five documents of 3 to 43 tokens."""
    maker = RowMaker(tokenizer, seed=1, library_read=library_read)
    maker.library = tuple(
        f"{word} " * (10 * i + 1) + "end" for i, word in enumerate(("a", "b", "c", "d", "e"))
    )
    return maker


def test_a_pass_reads_every_document_of_the_library_once(tokenizer: Tokenizer) -> None:
    maker = library_of(tokenizer)
    for number in range(3):
        places = [maker.library_place(5 * number + i) for i in range(5)]
        assert sorted(places) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("length", [2, 7, 64])
def test_rows_of_library_text_overlap_by_one_token_and_lose_none(length: int, tokenizer: Tokenizer) -> None:
    maker = library_of(tokenizer)
    ids, _ = maker.library_text(length)
    while maker.library_read < 6:
        row, _ = maker.library_text(length)
        assert row[0] == ids[-1]
        ids += row[1:]
    order = [maker.library[maker.library_place(i)] for i in range(5)]
    read = tokenizer.encode("".join(f"{text}<|eos|>" for text in order)).ids
    assert ids[: len(read)] == read


def test_a_run_that_goes_on_reads_documents_that_it_has_not_read(tokenizer: Tokenizer) -> None:
    first = library_of(tokenizer)
    first.library_text(2)
    second = library_of(tokenizer, first.library_read)
    second.library_text(2)
    assert first.library_read == 1
    assert second.library_read == 2


@pytest.mark.parametrize("kind", [*MIXED, "codes"])
@pytest.mark.parametrize("length", [128, 513])
def test_a_row_of_every_kind_is_full_and_has_targets(kind: str, length: int, maker: RowMaker) -> None:
    for _ in range(5):
        batch = maker.batch({kind: 1.0}, 1, length, skip=0.5)
        assert batch.ids.shape == (1, length + 1)
        assert batch.weights.shape == batch.positions.shape == (1, length)
        assert batch.weights.max() >= 1.0


def test_the_targets_of_a_pairs_row_follow_their_key_earlier_in_the_row(maker: RowMaker) -> None:
    ids, weights = maker.pairs(129)
    for i, weight in enumerate(weights):
        if weight:
            first = ids.index(ids[i - 1])
            assert first < i - 1
            assert ids[first + 1] == ids[i]


def test_positions_rise_and_stay_within_the_context(maker: RowMaker) -> None:
    for _ in range(50):
        positions = maker.positions(256, jump=True)
        assert positions[0] >= 0
        assert positions[-1] < 8192
        assert (positions[1:] > positions[:-1]).all()


def test_hidden_states_do_not_depend_on_how_the_row_is_cut() -> None:
    model = Llama(SMALL)
    ids = torch.randint(0, 300, (2, 300))
    positions = torch.arange(300).expand(2, -1)
    whole, _ = model(ids, positions)
    _, past = model(ids[:, :170], positions[:, :170])
    rest, _ = model(ids[:, 170:], positions[:, 170:], past)
    torch.testing.assert_close(rest, whole[:, 170:], atol=1e-4, rtol=1e-4)


def test_the_exported_checkpoint_has_the_trainers_logits(tmp_path: Path, tokenizer: Tokenizer) -> None:
    from transformers import AutoModelForCausalLM

    model = Llama(SMALL)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    export(model, tokenizer, tmp_path, torch.float32)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = torch.randint(0, 300, (1, 200))
    with torch.inference_mode():
        hidden, _ = model(ids, torch.arange(200)[None])
        # float32 throughout; the two sum in different orders
        torch.testing.assert_close(model.logits(hidden), loaded(ids).logits, atol=2e-3, rtol=1e-3)


def test_a_stopped_run_goes_on_from_its_state(tmp_path: Path, tokenizer: Tokenizer) -> None:
    mix = {"repeat": 0.5, "library": 0.5}
    stage = Stage("test", 0.0004, (1e-3, 1e-3), (Part(1.0, 2, 64, mix),))
    first = Trainer(tmp_path, tokenizer, "cpu")
    first.run(stage)
    second = Trainer(tmp_path, tokenizer, "cpu")
    assert second.tokens_done == first.tokens_done == {"test": 512}
    assert second.library_read == first.library_read > 0
    for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_model_that_knows_nothing_loses_the_logarithm_of_the_vocabulary(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    trainer = Trainer(tmp_path, tokenizer, "cpu")
    torch.nn.init.zeros_(trainer.model.embed_tokens.weight)
    losses = trainer.held_out_losses()
    assert set(losses) == {"stories", "chat", "library"}
    assert all(loss == pytest.approx(math.log(2048), abs=1e-4) for loss in losses.values())


def test_the_last_stage_of_training_ends_near_a_rate_of_zero() -> None:
    assert STAGES[-1].rates[1] < 0.1 * STAGES[-1].rates[0]


def test_ngram_probabilities_sum_to_one() -> None:
    rng = random.Random(0)
    model = NGram([[rng.randrange(6) for _ in range(200)]], 4, 6)
    for context in [(0, 1, 2), (5, 5, 5), (-1, -1, -1)]:
        assert sum(model.probability(context, token) for token in range(6)) == pytest.approx(1.0)


def test_ngram_predicts_what_it_has_seen_often() -> None:
    model = NGram([[1, 2, 3, 4] * 50], 4, 6)
    assert model.probability((1, 2, 3), 4) > 0.9


@pytest.mark.skipif(not (CHECKPOINT / "model.safetensors").exists(), reason="weights not there yet")
def test_the_checkpoint_is_a_small_grouped_query_llama() -> None:
    config = json.loads((CHECKPOINT / "config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == "llama"
    assert config["num_attention_heads"] == 4 * config["num_key_value_heads"]
    assert config["head_dim"] == 64
    assert config["max_position_embeddings"] == 8192
    assert sum(file.stat().st_size for file in CHECKPOINT.iterdir()) <= 40_000_000
