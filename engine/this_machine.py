"""What this machine does, measured in a few seconds for planning: reading, attention, products."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from hybridgen.configs.settings import MemoryTier
from hybridgen.engine.kv_store import available_host_bytes
from hybridgen.engine.machine import describe_memory, memory_nodes
from hybridgen.kernels.attention import AttentionStep, KVLayout, KVPages, allocate_pages
from hybridgen.kernels.index import build_index
from hybridgen.kernels.linear import Linear
from hybridgen.kernels.policies.base import Policy
from hybridgen.kernels.policies.hybridgen import HybridGenPolicy
from hybridgen.kernels.policies.mass import MIN_TOKENS, MassPolicy
from hybridgen.kernels.pool import AttentionPool
from hybridgen.scheduler.cost import CostFactors, ModelShape
from hybridgen.scheduler.machine import Machine, MemoryNode, Tier

PAGE_SIZE = 32
CACHED_TOKENS = 512  # K and V of a KV head of 128 dims: 256 KiB


def cpu_name() -> str:
    """The CPU's model name, as the kernel says it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return "unknown CPU"


def measure_machine(
    shape: ModelShape,
    *,
    num_threads: int | None = None,
    tiers: Mapping[int, MemoryTier] | None = None,
    policies: tuple[str, ...] = (),
    key_scale: float = 1.0,
    num_bytes: int = 256 << 20,
    turn_s: float = 0.12,
) -> tuple[Machine, CostFactors]:
    """This machine as the attention of a model sees it, without a device. Takes 2 to 5 seconds, and where there are
    several memory nodes up to 3 more to measure each, once.

    Args:
        num_threads: of the pool; default: one for each core.
        tiers: the settings' `memory_tiers`.
        policies: of "mass" and "hybridgen", those whose own factors are to be measured too, on random keys.
        num_bytes: that are read of memory; to be larger than the last cache.
        turn_s: for each of the about ten measurements.
        key_scale: standard deviation of those keys: of the logits, where queries have unit variance.
    """
    with AttentionPool(num_threads=num_threads) as pool:
        bandwidth = _plain_read_rate(pool, num_bytes, turn_s)
        core_flops, not_growing = _core_rates(pool.isa, shape.head_dim, turn_s)
        nodes = _several_nodes(tiers or {}) or (
            MemoryNode(0, "dram", Tier.DRAM, bandwidth, 100e-9, available_host_bytes()),
        )
        machine = Machine(
            name=f"{cpu_name()}, {pool.num_threads} threads",
            device=None,
            nodes=nodes,
            num_cores=pool.num_threads,
            core_flops=core_flops,
            source="measured",
        )
        stream, flops = _product_rates(pool, shape, num_bytes // 2, turn_s)
        factors = replace(
            CostFactors(),
            core_fixed_share=not_growing,
            cores_matmul_flops=flops,
            linear_share=stream / bandwidth,
            # A layer of torch and the pool, a step of Python: `python -m bench.simulator_honesty` measures them.
            layer_s=60e-6,
            step_s=500e-6,
            sequence_s=20e-6,
            handover_s=30e-6,
        )
        return machine, _with_attention(pool, machine, factors, shape, policies, key_scale, num_bytes, turn_s)


def _several_nodes(tiers: Mapping[int, MemoryTier]) -> tuple[MemoryNode, ...]:
    """The nodes that may hold KV, as `hybridgen topology` measures them; empty where there is only one."""
    topology, _ = describe_memory(tiers, measured=False)
    if len(topology.usable) < 2:
        return ()
    return memory_nodes(*describe_memory(tiers, measured=True))


def _typical(fn: Callable[[], object], seconds: float) -> float:
    """Seconds of a call: the median, since a plan is about typical steps, after one that is not counted."""
    fn()
    times: list[float] = []
    end_s = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end_s:
        begin_s = time.perf_counter()
        fn()
        times.append(time.perf_counter() - begin_s)
    return statistics.median(times)


def _plain_read_rate(pool: AttentionPool, num_bytes: int, turn_s: float) -> float:
    buffer = torch.ones(num_bytes // 8, dtype=torch.int64)
    return buffer.nbytes / _typical(lambda: pool.plain_read(buffer), turn_s)


def core_rate(isa: str, head_dim: int, group: int, turn_s: float = 0.12) -> float:
    """Floating-point operations a second of one core that attends to keys and values in its cache."""
    layout = KVLayout(1, 1, head_dim, PAGE_SIZE, torch.bfloat16)
    with AttentionPool(num_threads=1, isa=isa) as pool:
        pages = _random_pages(layout, CACHED_TOKENS // PAGE_SIZE, 1.0)
        step = _step(pool, pages, CACHED_TOKENS, group)
        q = torch.randn(1, group, head_dim).to(layout.dtype)
        out = torch.empty_like(q)
        took = _typical(lambda: step.attend(0, q, out=out), turn_s)
    return 4 * group * head_dim * CACHED_TOKENS / took


def fixed_share(at_1: float, at_4: float, at_8: float) -> float:
    """Of the time at 4 query heads a KV head, what does not grow with their number: by rates at 1, 4 and 8."""
    # Seconds for `group` operations are fixed + group * each; a line through the ends.
    each = max(0.0, (8 / at_8 - 1 / at_1) / 7)
    return min(1.0, max(0.0, 1 - each * at_4))


def _core_rates(isa: str, head_dim: int, turn_s: float) -> tuple[float, float]:
    """The rate at 4 query heads a KV head, and the fixed share."""
    at_1, at_4, at_8 = (core_rate(isa, head_dim, group, turn_s) for group in (1, 4, 8))
    return at_4, fixed_share(at_1, at_4, at_8)


def _product_rates(
    pool: AttentionPool, shape: ModelShape, num_bytes: int, turn_s: float
) -> tuple[float, float]:
    """Bytes of weights a second with one row, and operations a second with as many as a batch of decodes may have.

    The matrices are as wide as the model and a quarter of a layer each: a layer has four.
    """
    outputs = min(1 << 15, max(64, shape.linear_parameters // shape.num_layers // shape.hidden_size // 4))
    num_layers = max(1, num_bytes // (2 * outputs * shape.hidden_size))
    layers = [Linear(torch.randn(outputs, shape.hidden_size).to(torch.bfloat16)) for _ in range(num_layers)]
    took: list[float] = []
    for rows in (1, 16):
        x = torch.randn(rows, shape.hidden_size).to(torch.bfloat16)

        def multiply(x: torch.Tensor = x) -> None:
            for layer in layers:
                layer(x, pool=pool)

        took.append(_typical(multiply, turn_s))
    parameters = num_layers * outputs * shape.hidden_size
    return 2 * parameters / took[0], 2 * parameters * 16 / took[1]


def _with_attention(
    pool: AttentionPool,
    machine: Machine,
    factors: CostFactors,
    shape: ModelShape,
    policies: tuple[str, ...],
    key_scale: float,
    num_bytes: int,
    turn_s: float,
) -> CostFactors:
    """The factors of attention in memory, with the heads and layers of the model: pages lie as they decide."""
    layers = shape.num_layers
    layout = KVLayout(layers, shape.num_kv_heads, shape.head_dim, PAGE_SIZE, torch.bfloat16)
    num_pages = max(2 * MIN_TOKENS // PAGE_SIZE, -(-num_bytes // layout.page_bytes))
    num_tokens = num_pages * PAGE_SIZE
    bandwidth = machine.nodes[0].read_bandwidth
    half = num_pages * layout.page_bytes / 2
    flops = 16 * layers * shape.num_kv_heads * shape.head_dim * num_tokens
    fixed = factors.core_fixed_share
    core_s = flops / (machine.num_cores * machine.core_flops) * (fixed + (1 - fixed) * shape.group / 4)
    pages = _random_pages(layout, num_pages, key_scale, with_index=pool if "mass" in policies else None)
    step = _step(pool, pages, num_tokens, shape.group)
    q = torch.randn(1, shape.num_heads, shape.head_dim).to(layout.dtype)
    out = torch.empty_like(q)

    def attend() -> None:
        for layer in range(layers):
            step.attend(layer, q, out=out)

    took = _typical(attend, turn_s)
    factors = replace(factors, scan_share=2 * half / took / bandwidth)
    if "mass" in policies:
        scan_s, _ = _policy_seconds(MassPolicy(layers, mass=0.02), step, q, turn_s)
        whole = MassPolicy(layers)
        whole_s, selected = _policy_seconds(whole, step, q, turn_s)
        gather_s = max(1e-9, whole_s - scan_s)
        factors = replace(
            factors,
            index_speed=core_s / scan_s,
            selected_share=selected,
            gather_share=selected * 2 * half / gather_s / bandwidth,
        )
    if "hybridgen" in policies:
        took, _ = _policy_seconds(
            HybridGenPolicy(layers, ratio=factors.top_k_ratio, adapt=False), step, q, turn_s
        )
        union = min(1.0, shape.group * factors.top_k_ratio)
        gather_s = half * union / (bandwidth * factors.gather_share)
        # Whatever is not gathering values counts as scoring and ranking.
        factors = replace(factors, logits_speed=core_s / max(1e-9, took - gather_s))
    return factors


def _policy_seconds(
    policy: Policy, step: AttentionStep, q: torch.Tensor, turn_s: float
) -> tuple[float, float]:
    """Of all layers; and the share of the tokens whose values it read."""
    layers = step.pages.layout.num_layers

    def attend() -> None:
        for layer in range(layers):
            policy.submit(step, layer, q).wait()
        policy.end_step()

    took = _typical(attend, turn_s)
    assert isinstance(policy, MassPolicy | HybridGenPolicy)
    stats = policy.stats()
    return took, sum(layer.attended for layer in stats) / max(1, sum(layer.scanned for layer in stats))


def _random_pages(
    layout: KVLayout, num_pages: int, key_scale: float, with_index: AttentionPool | None = None
) -> KVPages:
    pages = allocate_pages(layout, num_pages, with_index=with_index is not None)
    fill_pages(pages, key_scale)
    if with_index is not None and pages.index is not None:
        build_index(with_index, layout, pages.k, pages.v, pages.index, range(num_pages))
    return pages


def fill_pages(pages: KVPages, key_scale: float) -> None:
    """Normal keys and values; they repeat after a million elements, since drawing is slow."""
    noise = torch.randn((1 << 20) + 37).to(pages.layout.dtype)
    for half, scale in ((pages.k, key_scale), (pages.v, 1.0)):
        flat, scaled = half.view(-1), noise * scale
        for begin in range(0, flat.numel(), noise.numel()):
            end = min(begin + noise.numel(), flat.numel())
            flat[begin:end] = scaled[: end - begin]


def _step(pool: AttentionPool, pages: KVPages, num_tokens: int, group: int) -> AttentionStep:
    layout = pages.layout
    generator = torch.Generator().manual_seed(0)
    return AttentionStep(
        pool,
        pages,
        query_begin=[0, 1],
        kv_len=[num_tokens],
        block_table=torch.randperm(pages.num_pages, generator=generator, dtype=torch.int32)[None],
        num_heads=layout.num_kv_heads * group,
        scale=layout.head_dim**-0.5,
    )
