from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from bench.embedded import tasks
from bench.record_kv import KINDS, MODEL, NUM_QUERIES, Recording, load_or_record, token_ids, tokens_of_mass


@pytest.mark.parametrize("kind", KINDS)
def test_a_sequence_has_the_length_asked_for_and_ends_with_the_answer(kind: str) -> None:
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    ids = token_ids(tokenizer, kind, 512, seed=7)
    assert len(ids) == 512
    if kind in tasks.KINDS:
        text = tokenizer.decode(ids[-40:], skip_special_tokens=False)
        assert text.endswith((".", "times."))


def test_recorded_queries_see_the_recorded_keys_as_the_model_does(tmp_path: Path) -> None:
    recordings = load_or_record(tmp_path, 64)
    again = load_or_record(tmp_path, 64)
    assert [one.kind for one in recordings] == list(KINDS)
    for one, other in zip(recordings, again, strict=True):
        assert one.k.shape == one.v.shape == (4, 64, 2, 64)
        assert one.q.shape == (4, NUM_QUERIES, 8, 64)
        assert torch.equal(one.k, other.k)
        assert torch.equal(one.q, other.q)
    # Keys are rotated: the same token at two places has the same value and different keys in the first layer.
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    ids = token_ids(tokenizer, "common_word", 64, seed=1)
    first, second = next((i, ids.index(ids[i], i + 1)) for i in range(64) if ids[i] in ids[i + 1 :])
    common = recordings[KINDS.index("common_word")]
    assert torch.equal(common.v[0, first], common.v[0, second])
    assert not torch.equal(common.k[0, first], common.k[0, second])


def test_one_loud_key_holds_the_mass_and_equal_keys_share_it() -> None:
    k = torch.zeros(1, 100, 2, 64)
    k[0, 10, 0] = 8.0  # KV head 0 looks at token 10; KV head 1 sees nothing but equal keys
    q = torch.ones(1, NUM_QUERIES, 4, 64)
    shares = tokens_of_mass(Recording("made up", k, k, q), 0, 0.99)
    assert shares[-1, 0] == pytest.approx(1 / 100)
    assert shares[-1, 1] == pytest.approx(0.99, abs=0.011)
