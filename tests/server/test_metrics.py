"""GET /metrics: names, labels, buckets, and counters that never fall."""

import asyncio

import pytest
from prometheus_client.parser import text_string_to_metric_families

from hybridgen.engine.client import EngineDead
from hybridgen.engine.request import BalanceStats, EngineStats, MigrationStats, NodeStats
from hybridgen.server.metrics import Histogram, Metrics
from tests.server.conftest import MakeClient
from tests.server.fakes import FakeEngine, say, until

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]
LABELS = frozenset({("model_name", "tiny"), ("engine", "0")})


def parse(text: str) -> Samples:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples[name, LABELS | frozenset(labels.items())]


STATS = EngineStats(
    num_running=3,
    num_waiting=2,
    num_pages=100,
    num_free_pages=50,
    num_cached_pages=30,
    num_parked=1,
    num_device_pages=20,
    num_free_device_pages=4,
    num_cached_device_pages=5,
    num_demoted_pages_total=7,
    num_promoted_pages_total=2,
    num_device_tokens_total=600,
    num_host_tokens_total=900,
    num_measured_heads_total=8,
    retained_mass_total=7.5,
    lowest_retained_mass=0.875,
    num_scanned_tokens_total=4000,
    num_selected_tokens_total=500,
    num_steps_total=11,
    num_preemptions_total=1,
    num_prefix_queries_total=40,
    num_prefix_hits_total=16,
    num_prompt_tokens_total=500,
    num_generated_tokens_total=70,
)


async def test_engine_counts_have_vllms_names(make_client: MakeClient) -> None:
    engine = FakeEngine()
    engine.stats = STATS
    reply = await make_client(engine).get("/metrics")
    assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
    samples = parse(reply.text)
    expected = {
        "vllm:num_requests_running": 3,
        "vllm:num_requests_waiting": 2,
        "vllm:kv_cache_usage_perc": 0.2,
        "vllm:prompt_tokens_total": 500,
        "vllm:generation_tokens_total": 70,
        "vllm:prefix_cache_queries_total": 40,
        "vllm:prefix_cache_hits_total": 16,
        "vllm:num_preemptions_total": 1,
        "hybridgen:steps_total": 11,
        "hybridgen:num_requests_parked": 1,
        "hybridgen:retained_mass_count": 8,
        "hybridgen:retained_mass_sum": 7.5,
        "hybridgen:lowest_retained_mass": 0.875,
        "hybridgen:index_tokens_scanned_total": 4000,
        "hybridgen:index_tokens_selected_total": 500,
    }
    assert {name: value(samples, name) for name in expected} == expected
    pages = {
        (tier, state): value(samples, "hybridgen:kv_pages", tier=tier, state=state)
        for tier in ("device", "host")
        for state in ("free", "cached", "held")
    }
    assert [pages["device", state] for state in ("free", "cached", "held")] == [4, 5, 11]
    assert [pages["host", state] for state in ("free", "cached", "held")] == [46, 25, 9]
    assert [value(samples, "hybridgen:kv_page_moves_total", to=tier) for tier in ("host", "device")] == [7, 2]
    assert [value(samples, "hybridgen:attended_tokens_total", tier=t) for t in ("device", "host")] == [
        600,
        900,
    ]
    assert ("process_resident_memory_bytes", frozenset()) in samples


async def test_a_request_is_timed(make_client: MakeClient) -> None:
    client = make_client(FakeEngine(lambda _: [0.03, *say("abc", finish="length")]))
    await client.post("/v1/completions", json={"prompt": "x"})
    samples = parse((await client.get("/metrics")).text)
    assert value(samples, "vllm:time_to_first_token_seconds_count") == 1
    assert value(samples, "vllm:time_to_first_token_seconds_sum") >= 0.03
    assert value(samples, "vllm:time_to_first_token_seconds_bucket", le="0.02") == 0
    assert value(samples, "vllm:inter_token_latency_seconds_count") == 2
    assert value(samples, "vllm:request_time_per_output_token_seconds_count") == 1
    assert value(samples, "vllm:e2e_request_latency_seconds_count") == 1
    assert value(samples, "vllm:e2e_request_latency_seconds_bucket", le="+Inf") == 1
    assert value(samples, "vllm:request_success_total", finished_reason="length") == 1
    assert value(samples, "vllm:request_success_total", finished_reason="stop") == 0


async def test_hung_up_and_failed_requests_are_counted_as_such(make_client: MakeClient) -> None:
    engine = FakeEngine(lambda _: [60.0])
    client = make_client(engine)
    task = asyncio.create_task(client.post("/v1/completions", json={"prompt": "x"}))
    await until(lambda: engine.num_open == 1)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    engine.script = lambda _: [EngineDead("gone")]
    await client.post("/v1/completions", json={"prompt": "x", "n": 2})
    samples = parse((await client.get("/metrics")).text)
    assert value(samples, "vllm:request_success_total", finished_reason="abort") == 1
    assert value(samples, "vllm:request_success_total", finished_reason="error") == 2


def test_counters_do_not_fall_when_the_engine_starts_again() -> None:
    stats = EngineStats(num_generated_tokens_total=70)
    metrics = Metrics("tiny", lambda: stats)
    name = "vllm:generation_tokens_total"
    seen = []
    for total in (70, 90, 5, 5, 8):
        stats = EngineStats(num_generated_tokens_total=total)
        seen.append(value(parse(metrics.exposition().decode()), name))
    assert seen == [70, 90, 95, 95, 98]


@pytest.mark.parametrize(
    ("observed", "counts"), [(0.5, [1, 1, 1]), (1.0, [1, 1, 1]), (1.5, [0, 1, 1]), (9.0, [0, 0, 1])]
)
def test_a_bucket_holds_what_is_at_most_its_bound(observed: float, counts: list[int]) -> None:
    histogram = Histogram("name", "help", (1.0, 2.0))
    histogram.observe(observed)
    buckets = [s.value for s in histogram.collect({}).samples if s.name == "name_bucket"]
    assert buckets == counts


async def test_the_buckets_are_vllms(make_client: MakeClient) -> None:
    samples = parse((await make_client().get("/metrics")).text)

    def bounds(name: str) -> list[float]:
        return sorted(float(dict(labels)["le"]) for sample, labels in samples if sample == f"{name}_bucket")

    ttft = "0.001 0.005 0.01 0.02 0.04 0.06 0.08 0.1 0.25 0.5 0.75 1 2.5 5 7.5 10 20 40 80 160 640 2560 inf"
    itl = "0.0025 0.005 0.01 0.025 0.05 0.075 0.1 0.15 0.2 0.3 0.4 0.5 0.75 1 2.5 5 7.5 10 20 40 80 inf"
    e2e = "0.3 0.5 0.8 1 1.5 2 2.5 5 10 15 20 30 40 50 60 120 240 480 960 1920 7680 inf"
    assert bounds("vllm:time_to_first_token_seconds") == [float(bound) for bound in ttft.split()]
    assert bounds("vllm:inter_token_latency_seconds") == [float(bound) for bound in itl.split()]
    assert bounds("vllm:request_time_per_output_token_seconds") == [float(bound) for bound in itl.split()]
    assert bounds("vllm:e2e_request_latency_seconds") == [float(bound) for bound in e2e.split()]


def node(name: str, tier: str, read: int, *, emulated: bool = False) -> NodeStats:
    return NodeStats(
        name=name,
        tier=tier,
        emulated=emulated,
        bandwidth=2e9,
        capacity_bytes=1 << 30,
        read_bytes_total=read,
        delayed_s_total=0.5,
        num_pieces=(1, 2, 3, 4),
    )


async def test_memory_nodes_and_migrations_are_exported_and_emulated_ones_say_so(
    make_client: MakeClient,
) -> None:
    engine = FakeEngine()
    engine.stats = EngineStats(
        nodes=(node("dram0", "dram", 700), node("cxl0", "cxl", 300, emulated=True)),
        migrations=(MigrationStats(source="dram0", target="cxl0", reason="oldest", num_total=6),),
    )
    samples = parse((await make_client(engine).get("/metrics")).text)
    dram = {"node": "dram0", "tier": "dram", "emulated": "false"}
    cxl = {"node": "cxl0", "tier": "cxl", "emulated": "true"}
    assert value(samples, "hybridgen:node_read_bytes_total", **dram) == 700
    assert value(samples, "hybridgen:node_read_bytes_total", **cxl) == 300
    assert value(samples, "hybridgen:node_bandwidth_bytes", **cxl) == 2e9
    assert value(samples, "hybridgen:node_delayed_seconds_total", **cxl) == 0.5
    assert [value(samples, "hybridgen:node_pieces", **cxl, role=role) for role in ("index", "v")] == [1, 4]
    moved = {"source": "dram0", "target": "cxl0", "reason": "oldest"}
    assert value(samples, "hybridgen:migrated_pieces_total", **moved) == 6


async def test_the_split_is_exported_with_its_reasons(make_client: MakeClient) -> None:
    engine = FakeEngine()
    engine.stats = EngineStats(
        balance=BalanceStats(
            device_s_total=1.5,
            host_s_total=2.5,
            device_wait_s_total=1.0,
            host_wait_s_total=0.25,
            target_share=0.75,
            actual_share=0.5,
            max_running=7,
            limit_reason="step_time",
            reason="host_slower",
            message="",
            num_changes_total={"host_slower": 3, "predicted": 1},
        )
    )
    client = make_client(engine)
    samples = parse((await client.get("/metrics")).text)
    assert value(samples, "hybridgen:attention_seconds_total", side="host") == 2.5
    assert value(samples, "hybridgen:attention_wait_seconds_total", side="device") == 1.0
    assert value(samples, "hybridgen:device_share", kind="target") == 0.75
    assert value(samples, "hybridgen:device_share", kind="actual") == 0.5
    assert value(samples, "hybridgen:device_share_reason", reason="host_slower") == 1
    assert value(samples, "hybridgen:device_share_changes_total", reason="host_slower") == 3
    assert value(samples, "hybridgen:max_running_sequences", reason="step_time") == 7
    engine.stats = EngineStats()  # one pool attends both tiers
    assert "hybridgen:device_share" not in (await client.get("/metrics")).text
