"""Paged attention on every instruction set of this machine against the float64 reference.

Tolerances: a float32 logit of size 10 is off by some 2e-6 after 256 products, and so is its weight; hence
1e-5 for a mean of values of size 1 to 5, and 4e-6 with 2e-6 of its size for lse. `avx512_bf16` and `amx` round each
weight to bfloat16: at most 2^-9 of the largest |v|, which is below 5 here.
"""

import math
import os
import threading
from functools import cache

import pytest
import torch
from torch import Tensor

from hybridgen.kernels import reference
from hybridgen.kernels.attention import (
    AttentionPool,
    AttentionStep,
    KVLayout,
    KVPages,
    allocate_pages,
    copy_pages,
)
from hybridgen.kernels.isa import supported_isas
from tests.kernels.paged import Batch

SHAPES = (
    (8, 1),
    (16, 2),
    (24, 2),
    (32, 4),
    (64, 3),
    (64, 4),
    (80, 5),
    (96, 7),
    (128, 1),
    (128, 8),
    (256, 16),
    (26, 20),
)


# Paths that round softmax weights to bfloat16 when KV is bfloat16.
ROUNDING_ISAS = ("avx512_bf16", "amx", "amx_model")


def out_tolerance(isa: str, dtype: torch.dtype) -> float:
    return 5 * 2**-9 if isa in ROUNDING_ISAS and dtype == torch.bfloat16 else 1e-5


@cache
def batch_and_expected(
    layout: KVLayout, group: int, layer: int, logit_size: float, sliding_window: int, soft_cap: float
) -> tuple[Batch, Tensor, Tensor]:
    """Every instruction set is compared with the same reference, computed once."""
    batch = Batch(layout, group=group, layer=layer, logit_size=logit_size)
    return batch, *batch.expected(sliding_window=sliding_window, soft_cap=soft_cap)


def assert_matches(
    pool: AttentionPool,
    layout: KVLayout,
    *,
    group: int,
    layer: int = 0,
    logit_size: float = 2.0,
    sliding_window: int = 0,
    soft_cap: float = 0.0,
) -> None:
    batch, expected_out, expected_lse = batch_and_expected(
        layout, group, layer, logit_size, sliding_window, soft_cap
    )
    out, lse = batch.step(pool).attend(
        layer, batch.q, sliding_window=sliding_window, soft_cap=soft_cap, return_lse=True
    )
    # tanh has an absolute error of some 1e-7, hence soft_cap times that in a logit and its weight.
    tolerance = out_tolerance(pool.isa, layout.dtype) + 1e-6 * soft_cap
    torch.testing.assert_close(out.double(), expected_out, atol=tolerance, rtol=0)
    torch.testing.assert_close(lse.double(), expected_lse, atol=4e-6, rtol=2e-6)


@pytest.mark.parametrize(("head_dim", "group"), SHAPES, ids=lambda n: str(n))
def test_a_mixed_batch_matches_the_reference(
    pool: AttentionPool, dtype: torch.dtype, head_dim: int, group: int
) -> None:
    layout = KVLayout(2, 1 if group > 4 else 3, head_dim, 32, dtype)
    assert_matches(pool, layout, group=group, layer=1)


@pytest.mark.parametrize("page_size", [16, 32, 48, 128])
def test_any_page_size_gives_the_same_result(pool: AttentionPool, page_size: int) -> None:
    assert_matches(pool, KVLayout(2, 2, 64, page_size, torch.bfloat16), group=2, layer=1)


@pytest.mark.parametrize("sliding_window", [1, 16, 17, 511, 5000])
def test_a_sliding_window_hides_older_keys(
    pool: AttentionPool, dtype: torch.dtype, sliding_window: int
) -> None:
    assert_matches(pool, KVLayout(1, 2, 32, 32, dtype), group=2, sliding_window=sliding_window)


def test_pages_before_the_sliding_window_are_not_read_as_values(
    pool: AttentionPool, dtype: torch.dtype
) -> None:
    batch = Batch(KVLayout(1, 1, 64, 16, dtype), lens=((1001, 1), (1001, 3)), group=2)
    expected, _ = batch.expected(sliding_window=101)
    for seq, first_used in ((0, 900), (1, 898)):
        for page in batch.block_table[seq][: first_used // 16]:
            batch.k_pages[page] = torch.nan
            batch.v_pages[page] = torch.nan
        page, offset = batch.block_table[seq][first_used // 16], first_used % 16
        for older in range(offset):
            batch.v_pages[page, :, :, older] = torch.nan
    out, _ = batch.step(pool).attend(0, batch.q, sliding_window=101, return_lse=True)
    torch.testing.assert_close(out.double(), expected, atol=out_tolerance(pool.isa, dtype), rtol=0)


@pytest.mark.parametrize("soft_cap", [0.5, 50.0])
def test_a_soft_cap_bounds_the_logits(pool: AttentionPool, dtype: torch.dtype, soft_cap: float) -> None:
    layout = KVLayout(1, 2, 64, 32, dtype)
    assert_matches(pool, layout, group=2, logit_size=4, soft_cap=soft_cap, sliding_window=300)


def test_huge_logits_neither_overflow_nor_lose_the_maximum(pool: AttentionPool, dtype: torch.dtype) -> None:
    # Logits reach 4e4, where a unit in the last place is 4e-3; some of those, times a value of up to 5.
    # In lse a small sum of products of that size keeps their error.
    batch = Batch(KVLayout(1, 2, 64, 32, dtype), group=2, logit_size=1e4, seed=3)
    out, lse = batch.step(pool).attend(0, batch.q, return_lse=True)
    expected, expected_lse = batch.expected()
    torch.testing.assert_close(out.double(), expected, atol=0.1, rtol=0)
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-2, rtol=2e-6)


def test_ties_share_the_weight_equally(pool: AttentionPool, dtype: torch.dtype) -> None:
    batch = Batch(KVLayout(1, 1, 64, 32, dtype), lens=((1024, 1),), padding=0.0)
    batch.k_pages.zero_()
    out, lse = batch.step(pool).attend(0, batch.q, return_lse=True)
    assert lse.item() == pytest.approx(math.log(1024), rel=1e-6)
    torch.testing.assert_close(
        out.double(), batch.expected()[0], atol=1e-6, rtol=0
    )  # equal weights are exact


def test_queries_without_keys_give_zero_and_minus_infinity(pool: AttentionPool, dtype: torch.dtype) -> None:
    batch = Batch(KVLayout(1, 2, 64, 32, dtype), lens=((0, 2), (3, 5), (0, 0)), group=2)
    out, lse = batch.step(pool).attend(0, batch.q, return_lse=True)
    unseeing = [0, 1, 2, 3]  # both of the first sequence, and the two that lie before the second one's keys
    assert torch.equal(out[unseeing], torch.zeros(4, 4, 64))
    assert torch.equal(lse[unseeing], torch.full((4, 4), -torch.inf))
    assert lse[4:].isfinite().all()


def test_a_batch_without_tokens_gives_an_empty_result(pool: AttentionPool) -> None:
    layout = KVLayout(1, 2, 64, 32, torch.float32)
    step = AttentionStep(
        pool, allocate_pages(layout, 1), query_begin=[0], kv_len=[], block_table=[], num_heads=2, scale=1.0
    )
    assert step.attend(0, torch.empty(0, 2, 64)).shape == (0, 2, 64)


def test_the_result_has_the_dtype_of_q_and_is_rounded_once(pool: AttentionPool, dtype: torch.dtype) -> None:
    batch = Batch(KVLayout(1, 2, 80, 32, dtype), group=3)
    step = batch.step(pool)
    wide, _ = step.attend(0, batch.q, return_lse=True)
    out = torch.empty_like(batch.q)
    assert step.attend(0, batch.q, out=out) is out
    assert torch.equal(out, wide.to(dtype))


def test_rows_of_a_fused_projection_are_read_and_written_in_place(
    pool: AttentionPool, dtype: torch.dtype
) -> None:
    layout = KVLayout(3, 2, 64, 32, dtype)
    lens = ((70, 70), (5, 5), (33, 1))
    batch = Batch(layout, lens=lens, group=4, layer=2)
    qkv = torch.randn(76, (8 + 2 + 2) * 64).to(dtype)
    q = qkv[:, : 8 * 64].view(76, 8, 64)
    k = qkv[:, 8 * 64 : 10 * 64].view(76, 2, 64)
    v = qkv[:, 10 * 64 :].view(76, 2, 64)
    expected_k, expected_v = batch.k_pages.clone(), batch.v_pages.clone()
    tables = {"query_begin": batch.query_begin, "kv_len": batch.kv_len, "block_table": batch.block_table}
    reference.store(2, k, v, expected_k, expected_v, **tables)

    step = batch.step(pool)
    step.store(2, k, v)
    assert torch.equal(batch.k_pages.nan_to_num(7), expected_k.nan_to_num(7))
    assert torch.equal(batch.v_pages.nan_to_num(7), expected_v.nan_to_num(7))
    fused_out = torch.zeros(76, 9 * 64, dtype=dtype)
    step.attend(2, q, out=fused_out[:, : 8 * 64].view(76, 8, 64))
    assert torch.equal(fused_out[:, : 8 * 64].view(76, 8, 64), step.attend(2, q.contiguous()))
    assert not fused_out[:, 8 * 64 :].any()


@pytest.mark.parametrize("sliding_window", [0, 101])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_the_parts_of_two_tiers_merge_to_the_whole(
    pool: AttentionPool, dtype: torch.dtype, share: float, sliding_window: int
) -> None:
    batch = Batch(KVLayout(1, 2, 64, 32, dtype), group=3)
    split = round(share * batch.pages.num_pages)
    tiers = (0, split), (split, batch.pages.num_pages)
    tables = {"query_begin": batch.query_begin, "kv_len": batch.kv_len, "block_table": batch.block_table}
    parts = []
    for first, end in tiers:
        pages = KVPages(batch.layout, batch.k_pages[first:end].clone(), batch.v_pages[first:end].clone())
        step = AttentionStep(
            pool, pages, **tables, num_heads=6, scale=batch.scale,
            first_page=first, total_pages=batch.pages.num_pages,
        )  # fmt: skip
        part = step.attend(0, batch.q, sliding_window=sliding_window, return_lse=True)
        expected = reference.attend(
            0, batch.q, pages.k, pages.v, **tables, scale=batch.scale,
            first_page=first, sliding_window=sliding_window,
        )  # fmt: skip
        torch.testing.assert_close(part[0].double(), expected[0], atol=out_tolerance(pool.isa, dtype), rtol=0)
        torch.testing.assert_close(part[1].double(), expected[1], atol=4e-6, rtol=2e-6)
        parts.append(part)
    out, lse = reference.merge(*parts[0], *parts[1])
    expected_out, expected_lse = batch.expected(sliding_window=sliding_window)
    torch.testing.assert_close(out.double(), expected_out, atol=out_tolerance(pool.isa, dtype), rtol=0)
    torch.testing.assert_close(lse.double(), expected_lse, atol=4e-6, rtol=2e-6)


def test_a_step_stores_only_what_lies_on_its_tier(pool: AttentionPool) -> None:
    layout = KVLayout(1, 2, 8, 16, torch.float32)
    pages = allocate_pages(layout, 2)
    k, v = torch.randn(40, 2, 8), torch.randn(40, 2, 8)
    step = AttentionStep(
        pool, pages, query_begin=[0, 40], kv_len=[40], block_table=[[6, 2, 5]], num_heads=2, scale=1.0,
        first_page=5, total_pages=9,
    )  # fmt: skip
    step.store(0, k, v)
    assert torch.equal(pages.k[1, 0], k[:16].transpose(0, 1))
    assert torch.equal(pages.v[0, 0, :, :8], v[32:].transpose(0, 1))
    assert not pages.k[0, 0, :, 8:].any()


def attend_all(batch: Batch, pool: AttentionPool) -> tuple[Tensor, Tensor]:
    return batch.step(pool).attend(batch.layer, batch.q, return_lse=True)


@pytest.mark.parametrize("num_threads", [1, 5])
def test_the_number_of_threads_does_not_change_a_bit(
    pool: AttentionPool, dtype: torch.dtype, num_threads: int
) -> None:
    batch = Batch(KVLayout(1, 2, 64, 32, dtype), lens=((1600, 1), (1030, 9), (200, 200), (9, 9)), group=3)
    with AttentionPool(num_threads, isa=pool.isa) as other:
        for ours, theirs in zip(attend_all(batch, pool), attend_all(batch, other), strict=True):
            assert torch.equal(ours, theirs)


def test_the_rest_of_the_batch_does_not_change_a_bit(pool: AttentionPool, dtype: torch.dtype) -> None:
    together = Batch(KVLayout(1, 2, 96, 32, dtype), lens=((1100, 1), (600, 33), (40, 40), (550, 2)), group=3)
    out, lse = attend_all(together, pool)
    for seq, kv_len in enumerate(together.kv_len):
        begin, end = together.query_begin[seq], together.query_begin[seq + 1]
        alone = AttentionStep(
            pool, together.pages, query_begin=[0, end - begin],
            kv_len=[kv_len], block_table=[together.block_table[seq]], num_heads=6, scale=together.scale,
        )  # fmt: skip
        alone_out, alone_lse = alone.attend(0, together.q[begin:end], return_lse=True)
        assert torch.equal(alone_out, out[begin:end])
        assert torch.equal(alone_lse, lse[begin:end])


@pytest.mark.parametrize("sliding_window", [0, 101])
@pytest.mark.parametrize("chunk", [7, 64])
def test_the_chunks_of_a_prompt_do_not_change_a_bit(
    pool: AttentionPool, dtype: torch.dtype, chunk: int, sliding_window: int
) -> None:
    whole = Batch(KVLayout(1, 2, 80, 32, dtype), lens=((600, 130),), group=3)
    out = whole.step(pool).attend(0, whole.q, sliding_window=sliding_window)
    for begin in range(0, 130, chunk):
        end = min(begin + chunk, 130)
        step = AttentionStep(
            pool, whole.pages, query_begin=[0, end - begin],
            kv_len=[470 + end], block_table=whole.block_table, num_heads=6, scale=whole.scale,
        )  # fmt: skip
        assert torch.equal(step.attend(0, whole.q[begin:end], sliding_window=sliding_window), out[begin:end])


def test_several_submitted_attentions_give_what_attend_gives(pool: AttentionPool) -> None:
    batch = Batch(KVLayout(2, 2, 64, 32, torch.bfloat16), lens=((1600, 1), (70, 30), (0, 1)), group=3)
    step = batch.step(pool)
    expected = {
        (layer, window): step.attend(layer, batch.q, sliding_window=window, return_lse=True)
        for layer in (0, 1)
        for window in (0, 40)
    }
    tickets = {key: step.submit(key[0], batch.q, sliding_window=key[1]) for key in expected}
    step.submit(0, batch.q)  # dropped at once
    for key, ticket in reversed(tickets.items()):
        out, lse = ticket.wait()
        assert ticket.is_done()
        assert torch.equal(out.nan_to_num(7), expected[key][0].nan_to_num(7))
        assert torch.equal(lse.nan_to_num(7), expected[key][1].nan_to_num(7))


def test_pages_move_between_tiers(pool: AttentionPool, dtype: torch.dtype) -> None:
    layout = KVLayout(2, 2, 8, 16, dtype)
    source, target = allocate_pages(layout, 5), allocate_pages(layout, 3)
    source.k.normal_()
    source.v.normal_()
    copy_pages(pool, source, [4, 1], target, [0, 2])
    assert torch.equal(target.k[[0, 2]], source.k[[4, 1]])
    assert torch.equal(target.v[[0, 2]], source.v[[4, 1]])
    assert not target.k[1].any()
    with pytest.raises(ValueError, match=r"page 3 is not in \[0, 3\)"):
        copy_pages(pool, source, [0], target, [3])


@pytest.mark.parametrize("isa", [isa for isa in supported_isas() if isa != "scalar"])
def test_every_path_agrees_with_the_scalar_one(isa: str, dtype: torch.dtype) -> None:
    batch = Batch(KVLayout(1, 2, 64, 32, dtype), group=4)
    with AttentionPool(1, isa=isa) as fast, AttentionPool(1, isa="scalar") as scalar:
        (out, lse), (scalar_out, scalar_lse) = attend_all(batch, fast), attend_all(batch, scalar)
    torch.testing.assert_close(out, scalar_out, atol=2 * out_tolerance(isa, dtype), rtol=0)
    torch.testing.assert_close(lse, scalar_lse, atol=8e-6, rtol=4e-6)


def test_two_python_threads_can_share_a_pool(pool: AttentionPool) -> None:
    layout = KVLayout(1, 1, 64, 32, torch.bfloat16)
    batches = [Batch(layout, lens=((700, 1), (40, 40)), seed=seed, group=2) for seed in range(2)]
    expected = [attend_all(batch, pool)[0] for batch in batches]
    right: list[bool] = []

    def work(index: int) -> None:
        step = batches[index].step(pool)
        outs = [step.attend(0, batches[index].q, return_lse=True)[0] for _ in range(10)]
        right.extend(torch.equal(out, expected[index]) for out in outs)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == [True] * 20


def test_a_closed_pool_works_in_the_calling_thread() -> None:
    batch = Batch(KVLayout(1, 2, 64, 32, torch.float32), group=2)
    pool = AttentionPool(2)
    expected = attend_all(batch, pool)[0]
    pool.close()
    pool.close()
    assert torch.equal(attend_all(batch, pool)[0], expected)


def test_idle_threads_sleep() -> None:
    with AttentionPool(4) as pool:
        batch = Batch(KVLayout(1, 2, 64, 32, torch.float32), group=2)
        attend_all(batch, pool)
        # user + system time of the whole process while this thread waits
        before = sum(os.times()[:2])
        threading.Event().wait(0.3)
        assert sum(os.times()[:2]) - before < 0.1


def test_a_fresh_cache_costs_no_memory() -> None:
    layout = KVLayout(32, 8, 128, 32, torch.bfloat16)
    num_pages = (4 << 30) // layout.page_bytes
    pages = allocate_pages(layout, num_pages)
    assert pages.k.shape == pages.v.shape == layout.shape(num_pages)
    assert pages.k.nbytes + pages.v.nbytes == num_pages * layout.page_bytes
    assert pages.k.data_ptr() % (2 << 20) == 0
    assert not pages.k[-1].any()
    assert not pages.v[0].any()
    pages.k[-1] = 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kv_len": [33]}, "kv_len 33 needs 2 pages but block_table has 1"),
        ({"block_table": [[4]]}, r"page 4 is not in \[0, 4\)"),
        ({"block_table": [[-1]]}, r"page -1 is not in \[0, 4\)"),
        ({"kv_len": [-1]}, "kv_len must not be negative"),
        ({"query_begin": [1, 2]}, "query_begin must begin with 0"),
        ({"query_begin": [0, -1]}, "query_begin must not decrease"),
        ({"query_begin": [0, 1, 2]}, "query_begin has 3 entries for 1 sequences"),
        ({"num_heads": 3}, "3 query heads do not share 2 KV heads evenly"),
        ({"scale": 0.0}, "scale must be positive"),
    ],
)
def test_a_step_that_does_not_fit_is_refused_with_the_numbers(
    change: dict[str, object], message: str
) -> None:
    layout = KVLayout(1, 2, 8, 32, torch.float32)
    pages = allocate_pages(layout, 4)
    arguments = {
        "query_begin": [0, 1],
        "kv_len": [1],
        "block_table": [[0]],
        "num_heads": 2,
        "scale": 1.0,
    } | change
    with AttentionPool(1) as pool, pytest.raises(ValueError, match=message):
        AttentionStep(pool, pages, **arguments)  # type: ignore[arg-type]


def test_tensors_of_the_wrong_shape_dtype_or_stride_are_refused() -> None:
    batch = Batch(KVLayout(1, 2, 8, 32, torch.float32), lens=((3, 2),))
    with AttentionPool(1) as pool:
        step = batch.step(pool)
        for q in (
            batch.q[:1],
            batch.q.double(),
            batch.q.transpose(0, 1),
            torch.empty(2, 8, 2).transpose(1, 2),
        ):
            with pytest.raises(ValueError, match="expected torch"):
                step.attend(0, q)
        with pytest.raises(ValueError, match=r"layer 1 is not in \[0, 1\)"):
            step.attend(1, batch.q)
        with pytest.raises(ValueError, match="expected torch"):
            step.store(0, batch.q, batch.q[:1])


@pytest.mark.parametrize(
    "change",
    [{"page_size": 24}, {"head_dim": 7}, {"head_dim": 514}, {"dtype": torch.int8}, {"num_layers": 0}],
)
def test_a_layout_that_no_kernel_takes_is_refused(change: dict[str, object]) -> None:
    arguments = {"num_layers": 1, "num_kv_heads": 1, "head_dim": 64, "page_size": 32, "dtype": torch.float32}
    with pytest.raises(ValueError, match=str(next(iter(change.values())))):
        KVLayout(**(arguments | change))  # type: ignore[arg-type]
