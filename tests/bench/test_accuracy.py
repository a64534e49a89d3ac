import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from bench.accuracy import (
    CONFIGURATIONS,
    MODEL,
    Engine,
    Job,
    Row,
    TaskScore,
    TextScore,
    markdown,
    parse,
    text_contexts,
)
from hybridgen.engine.kv_store import RetainedMass


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(MODEL, max_num_seqs=4)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(MODEL / "tokenizer.json"))


def test_the_logits_of_given_tokens_are_the_models(engine: Engine, tokenizer: Tokenizer) -> None:
    ids: list[int] = tokenizer.encode("Once upon a time there was a painter named Noah who lived near").ids
    job = Job(ids[:6], ids[6:], num_free=3, keep_logits=True)
    decoded = engine.decode([job])[0]
    network = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    with torch.inference_mode():
        expected = network(torch.tensor([ids])).logits[0]
    assert decoded.logits is not None
    assert decoded.logits.shape == (len(ids) - 7, expected.shape[1])
    # Row i is what follows given[i]; the model runs in bfloat16.
    assert (decoded.logits - expected[6 : len(ids) - 1]).abs().max() < 0.25
    assert decoded.free[0] == expected[-1].argmax()
    assert len(decoded.free) == 3


def test_jobs_of_one_batch_keep_their_own_tokens(engine: Engine, tokenizer: Tokenizer) -> None:
    context = tokenizer.encode("The pass key is 48213. Remember it. The grass is green. The sky is blue.").ids
    questions = ["\nWhat is the pass key? The pass key is", "\nThe sky is"]
    jobs = [Job(context, tokenizer.encode(question).ids, 8) for question in questions]
    engine.prefill([context])
    together = [one.free for one in engine.decode(jobs)]
    alone = [engine.decode([job])[0].free for job in jobs]
    assert together == alone
    assert tokenizer.decode(together[0]).startswith(" 48213.")


def test_text_is_of_the_length_asked_for_and_no_sample_repeats_another(tokenizer: Tokenizer) -> None:
    documents = {"stories": [f"Once upon a time there was a painter, number {i}." for i in range(40)]}
    contexts = text_contexts(tokenizer, documents, 300, 3, seed=1)
    assert [len(ids) for ids in contexts["stories"]] == [300] * 3
    assert len({tuple(ids) for ids in contexts["stories"]}) == 3


def test_every_configuration_has_a_name_of_its_own_and_exact_is_the_first() -> None:
    names = [configuration.name for configuration in CONFIGURATIONS]
    assert len(set(names)) == len(names)
    assert names[0] == "exact"
    chosen = parse(["--only", "mass 0.99"]).configurations
    assert [one.name for one in chosen] == ["exact", "mass 0.99"]


def test_the_table_adds_lengths_up_and_shows_what_changed() -> None:
    exact = Row()
    lossy = Row(retained=[RetainedMass(10, 9.95, 0.9901, 400, 80), RetainedMass(30, 29.79, 0.9812, 400, 40)])
    exact.tasks = {"needle": {2048: TaskScore(9, 10), 4096: TaskScore(8, 10)}}
    lossy.tasks = {"needle": {2048: TaskScore(9, 10, lost=1, won=1), 4096: TaskScore(7, 10, lost=1)}}
    for row, loss in ((exact, 1.0), (lossy, 1.25)):
        row.text = {"stories": {2048: TextScore(loss, 1.0, 0.5, 64), 4096: TextScore(loss + 1, 0.5, 2.0, 64)}}
    text = markdown({"exact": exact, "mass 0.99": lossy})
    assert "| exact | 85.0 | 85.0 | - | - |" in text
    assert "| mass 0.99 | 80.0 (2 / 1) | 80.0 (2 / 1) | 0.9935 (0.9812) | 15 % |" in text
    assert "| mass 0.99 | 1.750 (+0.2500) | 75.00 % | 2.00 |" in text
