"""The specification itself: where tokens lie, partials merge."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridgen.kernels import reference
from hybridgen.kernels.attention import AttentionPool, AttentionStep, KVLayout
from tests.kernels.paged import Batch


def test_a_token_lies_where_the_layout_says() -> None:
    k, v = torch.randn(40, 2, 8), torch.randn(40, 2, 8)
    layout = KVLayout(3, 2, 8, 32, torch.float32)
    k_pages, v_pages = torch.zeros(layout.shape(2)), torch.zeros(layout.shape(2))
    reference.store(1, k, v, k_pages, v_pages, query_begin=[0, 40], kv_len=[40], block_table=[[1, 0]])
    assert torch.equal(k_pages[1, 1], k[:32].transpose(0, 1))
    assert torch.equal(v_pages[0, 1, :, :8], v[32:].transpose(0, 1))
    assert not k_pages[:, 0].any()
    assert not v_pages[0, 1, :, 8:].any()


sizes = st.one_of(st.just(-torch.inf), st.floats(-1e4, 1e4))


@given(lse=st.tuples(sizes, sizes, sizes), seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=100)
def test_merge_is_associative_and_has_an_identity(lse: tuple[float, float, float], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    parts = [
        (
            torch.randn(1, 1, 4, generator=generator, dtype=torch.float64) * (size > -torch.inf),
            torch.tensor([[size]], dtype=torch.float64),
        )
        for size in lse
    ]
    a, b, c = parts
    left = reference.merge(*reference.merge(*a, *b), *c)
    right = reference.merge(*a, *reference.merge(*b, *c))
    torch.testing.assert_close(left, right, atol=1e-11, rtol=1e-11)
    empty = torch.zeros_like(a[0]), torch.full_like(a[1], -torch.inf)
    torch.testing.assert_close(reference.merge(*a, *empty), a)
    torch.testing.assert_close(reference.merge(*empty, *a), a)


def test_merging_two_empty_parts_gives_an_empty_part() -> None:
    out, lse = torch.zeros(2, 3, 4), torch.full((2, 3), -torch.inf)
    merged_out, merged_lse = reference.merge(out, lse, out, lse)
    assert torch.equal(merged_out, out)
    assert torch.equal(merged_lse, lse)


def test_partials_over_two_halves_of_the_pages_merge_to_the_whole(pool: AttentionPool) -> None:
    """The last query sees every key of the first half, so each half is an attention of its own."""
    batch = Batch(KVLayout(1, 2, 64, 32, torch.float32), lens=((1056, 1),), group=2)
    whole, whole_lse = batch.step(pool).attend(0, batch.q, return_lse=True)
    halves = []
    for pages, kv_len in ((batch.block_table[0][:20], 640), (batch.block_table[0][20:], 416)):
        step = AttentionStep(
            pool, batch.pages, query_begin=[0, 1], kv_len=[kv_len],
            block_table=[pages], num_heads=4, scale=batch.scale,
        )  # fmt: skip
        halves.append(step.attend(0, batch.q, return_lse=True))
    out, lse = reference.merge(*halves[0], *halves[1])
    torch.testing.assert_close(out, whole, atol=1e-5, rtol=0)
    torch.testing.assert_close(lse, whole_lse, atol=4e-6, rtol=2e-6)
