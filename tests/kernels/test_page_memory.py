"""What is counted of pages that are read, and nodes that are emulated."""

import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from hybridgen.kernels.attention import AttentionPool, KVLayout, KVPages
from hybridgen.kernels.index import KVIndex
from hybridgen.kernels.page_memory import NodeSpeed, PageMemory
from hybridgen.kernels.policies.exact import ExactPolicy
from hybridgen.kernels.policies.hybridgen import HybridGenPolicy
from hybridgen.kernels.policies.mass import MassPolicy
from tests.kernels.paged import Batch
from tests.kernels.test_mass import Context, make_context, store

LAYOUT = KVLayout(2, 2, 64, 32, torch.bfloat16)
INDEX, V_SUMS, K, V = range(4)


def labelled(context: Context, speeds: int | list[NodeSpeed]) -> PageMemory:
    """Memory for the context's pages, which are put on its nodes in turn, each role beginning with another node."""
    num_pages = context.pages.num_pages
    memory = PageMemory(num_pages, [NodeSpeed()] * speeds if isinstance(speeds, int) else speeds)
    for role in range(4):
        memory.labels[role] = (np.arange(num_pages) + role) % memory.num_nodes
    context.pages = replace(context.pages, memory=memory)
    return memory


def tokens_of_pages(context: Context) -> np.ndarray:
    """[num_pages]  how many tokens of the sequences each page holds."""
    tokens = np.zeros(context.pages.num_pages, dtype=np.int64)
    for length, table in zip(context.lens, context.block_table, strict=True):
        for begin, page in zip(range(0, length, context.layout.page_size), table, strict=False):
            tokens[page] = min(context.layout.page_size, length - begin)
    return tokens


def test_exact_attention_reads_every_token_where_it_lies(pool: AttentionPool) -> None:
    context = make_context(pool, LAYOUT, (1500, 333, 1))
    expected, _ = ExactPolicy().submit(context.step(pool), 1, context.q).wait()
    memory = labelled(context, 3)
    out, _ = ExactPolicy().submit(context.step(pool), 1, context.q).wait()
    assert torch.equal(out, expected)
    tokens, reads = tokens_of_pages(context), memory.take_reads()
    row_bytes = LAYOUT.num_kv_heads * LAYOUT.head_dim * 2
    for node in range(3):
        on_node = sum(tokens[memory.labels[role] == node].sum() for role in (K, V))
        assert reads.bytes[node] == on_node * row_bytes
    assert not reads.delayed_s.any()
    assert not memory.take_reads().bytes.any()  # they were taken


def test_queries_of_a_prompt_read_their_keys_once_for_each_tile(pool: AttentionPool) -> None:
    context = make_context(pool, LAYOUT, (700,), num_queries=(700,))
    memory = labelled(context, 1)
    context.step(pool).submit(1, context.q).wait()
    row_bytes = LAYOUT.num_kv_heads * LAYOUT.head_dim * 2
    num_bytes = memory.take_reads().bytes[0]
    assert num_bytes % row_bytes == 0
    assert 2 * 700 * row_bytes < num_bytes < 2 * 700 * 700 * row_bytes  # of keys [0, end) of every tile


@pytest.mark.parametrize("tail", [False, True])
def test_mass_reads_the_index_in_full_and_what_it_selects(pool: AttentionPool, tail: bool) -> None:
    context = make_context(pool, LAYOUT, (6000, 3000), size=5.0, correlated=0.98)
    memory = labelled(context, 1)
    memory.labels[INDEX], memory.labels[V_SUMS] = 0, 0
    policy = MassPolicy(2, mass=0.95, tail=tail)
    policy.submit(context.step(pool), 1, context.q).wait()
    stats, reads = policy.stats()[1], memory.take_reads()
    assert 0 < stats.attended < 0.5 * stats.scanned
    scanned = 2 * (6000 + 3000) * (64 + 4)
    selected = 2 * stats.attended * 64 * 2
    sums = 2 * 2 * 32 * 64 * 4 if tail else 0  # of each sequence, of up to 32 pages
    assert scanned + selected <= reads.bytes[0] <= scanned + selected + sums
    assert memory.tokens.sum() == stats.attended


def test_heat_is_the_mass_that_was_retained(pool: AttentionPool) -> None:
    context = make_context(pool, LAYOUT, (5000,), size=5.0, correlated=0.98)
    memory = labelled(context, 1)
    policy = MassPolicy(2, mass=0.95)
    policy.submit(context.step(pool), 1, context.q).wait()
    stats = policy.stats()[1]
    # Both KV heads' masses, by the estimates: a weight is off by up to 4 %.
    assert memory.mass.sum() == pytest.approx(2 * stats.mean, rel=0.05)
    probabilities = context.probabilities(0).view(2, -1, 5000).mean(1).sum(0)
    by_page = torch.zeros(context.pages.num_pages, dtype=torch.float64)
    pages = torch.tensor(context.block_table[0])[torch.arange(5000) // 32]
    by_page.index_add_(0, pages, probabilities)
    heat = torch.from_numpy(memory.mass).double()
    assert (heat <= by_page * 1.1 + 1e-3).all()
    assert torch.corrcoef(torch.stack([heat, by_page]))[0, 1] > 0.99
    memory.clear_heat()
    assert not memory.mass.any()
    assert not memory.tokens.any()


def test_heat_of_a_head_that_reads_everything_is_one(pool: AttentionPool) -> None:
    context = make_context(pool, LAYOUT, (3000,), size=0.1)
    memory = labelled(context, 1)
    policy = MassPolicy(2, mass=0.99)
    policy.submit(context.step(pool), 1, context.q).wait()
    assert policy.stats()[1].full == 2
    assert memory.mass.sum() == pytest.approx(2, rel=0.05)
    assert memory.tokens.sum() == 2 * 3000


def test_the_published_scheme_reads_all_keys_and_few_values(pool: AttentionPool) -> None:
    batch = Batch(LAYOUT, lens=((2000, 1),), group=4, layer=1)
    memory = PageMemory(batch.pages.num_pages, [NodeSpeed()] * 2)
    memory.labels[V] = 1
    batch.pages = replace(batch.pages, memory=memory)
    policy = HybridGenPolicy(2, ratio=0.1, adapt=False, min_tokens=1)
    policy.submit(batch.step(pool), 1, batch.q).wait()
    keys, values = memory.take_reads().bytes
    assert keys == 2 * 2000 * 64 * 2
    assert values == 8 * 200 * 64 * 2  # of each query head's own
    assert memory.tokens.sum() == pytest.approx(2 * 200)
    assert 0 < memory.mass.sum() == pytest.approx(2 * policy.stats()[1].mean, rel=0.02)


def apart(pages: Tensor, gap: int) -> Tensor:
    """The same pages, with `gap` elements between each and the next."""
    packed = pages[0].numel()
    wide = torch.full((len(pages), packed + gap), 99, dtype=pages.dtype)
    wide[:, :packed] = pages.reshape(len(pages), packed)
    return wide[:, :packed].unflatten(1, pages.shape[1:])


@pytest.mark.parametrize("policy", [ExactPolicy(), MassPolicy(2, mass=0.95)], ids=["exact", "mass"])
def test_pages_may_be_apart(pool: AttentionPool, policy: ExactPolicy | MassPolicy) -> None:
    lens, num_queries = (3000, 97), (1, 5)
    packed = make_context(pool, LAYOUT, lens, num_queries=num_queries, size=5.0, correlated=0.98)
    spread = make_context(pool, LAYOUT, lens, num_queries=num_queries, size=5.0, correlated=0.98)
    index = packed.pages.index
    assert index is not None
    spread.pages = KVPages(
        LAYOUT,
        apart(torch.zeros_like(packed.pages.k), 64),
        apart(torch.zeros_like(packed.pages.v), 64),
        KVIndex(apart(torch.zeros_like(index.k), 192), apart(torch.zeros_like(index.v_sum), 16)),
    )
    store(pool, spread)
    expected, expected_lse = policy.submit(packed.step(pool), 1, packed.q).wait()
    out, lse = policy.submit(spread.step(pool), 1, packed.q).wait()
    assert torch.equal(out, expected)
    assert torch.equal(lse, expected_lse)
    for tensor, gap in ((spread.pages.k, 64), (spread.pages.v, 64)):
        between = tensor.as_strided((len(tensor), gap), (tensor.stride(0), 1), tensor[0].numel())
        assert (between == 99).all()


def seconds(context: Context, pool: AttentionPool) -> float:
    begin_s = time.perf_counter()
    context.step(pool).submit(1, context.q).wait()
    return time.perf_counter() - begin_s


def test_an_emulated_node_is_as_slow_as_it_says() -> None:
    with AttentionPool(2) as pool:
        context = make_context(pool, LAYOUT, (4096,))
        num_bytes = 4096 * LAYOUT.num_kv_heads * LAYOUT.head_dim * 2 * 2
        memory = labelled(context, [NodeSpeed(), NodeSpeed(bandwidth=num_bytes / 0.2)])
        for role in range(4):
            memory.labels[role] = 1
        # Not less than all bytes at its bandwidth, however many threads read; more where the machine is busy.
        assert seconds(context, pool) >= 0.2
        reads = memory.take_reads()
        assert reads.bytes.tolist() == [0, num_bytes]
        assert reads.delayed_s[1] > 0.1
        memory.labels[:] = 0
        seconds(context, pool)
        assert memory.take_reads().delayed_s.tolist() == [0, 0]


def test_an_emulated_latency_is_added_to_each_item() -> None:
    with AttentionPool(1) as pool:
        context = make_context(pool, LAYOUT, (600,))
        labelled(context, [NodeSpeed(latency_s=0.05)])
        assert seconds(context, pool) >= 2 * 0.05  # an item for each KV head at least


def test_sequences_too_short_to_scan_count_as_read_in_full(pool: AttentionPool) -> None:
    context = make_context(pool, LAYOUT, (500, 3000), size=5.0, correlated=0.98)
    memory = labelled(context, 1)
    policy = MassPolicy(2, mass=0.95)
    policy.submit(context.step(pool), 1, context.q).wait()
    short = context.block_table[0][: -(-500 // 32)]
    assert memory.tokens[short].sum() == 2 * 500
    assert not memory.mass[short].any()  # nobody knows
    assert memory.tokens.sum() == 2 * 500 + policy.stats()[1].attended


@pytest.mark.parametrize("num_nodes", [0, 33])
def test_a_number_of_nodes_that_labels_cannot_name_is_refused(num_nodes: int) -> None:
    with pytest.raises(ValueError, match=f"{num_nodes} memory nodes"):
        PageMemory(4, [NodeSpeed()] * num_nodes)


def test_labels_of_other_pages_are_refused(pool: AttentionPool) -> None:
    context = make_context(pool, LAYOUT, (40,))
    with pytest.raises(ValueError, match="labels for 7 of"):
        replace(context.pages, memory=PageMemory(7))
