"""GET /metrics: vLLM's names and buckets where it has them, so that its dashboards and autoscalers work.

The engine counts and the server times: counters come from `EngineStats`, durations are what a client sees.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import inf

from prometheus_client import (
    CollectorRegistry,
    GCCollector,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.registry import Collector

from hybridgen.engine.request import BalanceStats, EngineStats, FinishReason

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# The bounds are vLLM's (seconds), so that quantiles of both line up.
TIME_TO_FIRST_TOKEN = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
TIME_PER_TOKEN = (
    # vLLM begins at 10 ms, too coarse for small models: these two are ours.
    *(0.0025, 0.005),
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
REQUEST_LATENCY = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)


class Histogram:
    """Counts per bucket. prometheus_client's own takes a lock and microseconds, once per streamed token."""

    def __init__(self, name: str, documentation: str, bounds: Sequence[float]) -> None:
        self.name = name
        self.documentation = documentation
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)  # the last: above every bound
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def collect(self, labels: dict[str, str]) -> Metric:
        total = 0
        buckets: list[tuple[str, float]] = []
        for bound, count in zip((*self._bounds, inf), self._counts, strict=True):
            total += count
            buckets.append(("+Inf" if bound == inf else str(bound), total))
        family = HistogramMetricFamily(self.name, self.documentation, labels=list(labels))
        family.add_metric(list(labels.values()), buckets, self._sum)
        return family


class MonotonicStats:
    """Adds up `EngineStats` totals across engines: a new one counts from 0, and a counter must not fall."""

    def __init__(self) -> None:
        self._base: dict[str, float] = {}
        self._last: dict[str, float] = {}

    def total(self, stats: EngineStats | BalanceStats, name: str) -> float:
        value: float = getattr(stats, name)
        last = self._last.get(name, 0)
        if value < last:
            self._base[name] = self._base.get(name, 0) + last
        self._last[name] = value
        return self._base.get(name, 0) + value


@dataclass(frozen=True, slots=True)
class _EngineMetric:
    kind: type[CounterMetricFamily] | type[GaugeMetricFamily]
    name: str
    documentation: str
    value: Callable[[EngineStats, MonotonicStats], float]


_ENGINE_METRICS = (
    _EngineMetric(
        GaugeMetricFamily,
        "vllm:num_requests_running",
        "Sequences in the batch of the last step.",
        lambda stats, _: stats.num_running,
    ),
    _EngineMetric(
        GaugeMetricFamily,
        "vllm:num_requests_waiting",
        "Sequences waiting for a place in the batch.",
        lambda stats, _: stats.num_waiting,
    ),
    _EngineMetric(
        GaugeMetricFamily,
        "hybridgen:num_requests_parked",
        "Of the sequences waiting, preempted ones that keep their pages.",
        lambda stats, _: stats.num_parked,
    ),
    _EngineMetric(
        GaugeMetricFamily,
        "hybridgen:lowest_retained_mass",
        "Least softmax mass that a query head attended to in the last step that measured it.",
        lambda stats, _: stats.lowest_retained_mass,
    ),
    _EngineMetric(
        GaugeMetricFamily,
        "vllm:kv_cache_usage_perc",
        "Share of KV pages, over both tiers, that sequences hold; 1 is all. Cached prefixes count as free.",
        lambda stats, _: _num_held_pages(stats) / max(stats.num_pages, 1),
    ),
    _EngineMetric(
        CounterMetricFamily,
        "vllm:prompt_tokens",
        "Prompt tokens computed, or found in the prefix cache.",
        lambda stats, totals: totals.total(stats, "num_prompt_tokens_total"),
    ),
    _EngineMetric(
        CounterMetricFamily,
        "vllm:generation_tokens",
        "Tokens generated.",
        lambda stats, totals: totals.total(stats, "num_generated_tokens_total"),
    ),
    _EngineMetric(
        CounterMetricFamily,
        "vllm:prefix_cache_queries",
        "Prompt tokens looked up in the prefix cache.",
        lambda stats, totals: totals.total(stats, "num_prefix_queries_total"),
    ),
    _EngineMetric(
        CounterMetricFamily,
        "vllm:prefix_cache_hits",
        "Prompt tokens found in the prefix cache.",
        lambda stats, totals: totals.total(stats, "num_prefix_hits_total"),
    ),
    _EngineMetric(
        CounterMetricFamily,
        "vllm:num_preemptions",
        "Sequences preempted because pages ran out.",
        lambda stats, totals: totals.total(stats, "num_preemptions_total"),
    ),
    _EngineMetric(
        CounterMetricFamily,
        "hybridgen:index_tokens_scanned",
        "Tokens looked up in the index of the host pages, per layer and KV head.",
        lambda stats, totals: totals.total(stats, "num_scanned_tokens_total"),
    ),
    _EngineMetric(
        CounterMetricFamily,
        "hybridgen:index_tokens_selected",
        "Of these the tokens attended to.",
        lambda stats, totals: totals.total(stats, "num_selected_tokens_total"),
    ),
    _EngineMetric(
        CounterMetricFamily,
        "hybridgen:failed_migrations",
        "Pieces of host pages that the kernel would not move to another memory node.",
        lambda stats, totals: totals.total(stats, "num_failed_migrations_total"),
    ),
    _EngineMetric(
        CounterMetricFamily,
        "hybridgen:steps",
        "Forward passes.",
        lambda stats, totals: totals.total(stats, "num_steps_total"),
    ),
)


def _num_held_pages(stats: EngineStats) -> int:
    return stats.num_pages - stats.num_free_pages - stats.num_cached_pages


def _pages_by_tier(stats: EngineStats) -> dict[str, dict[str, int]]:
    device = {"free": stats.num_free_device_pages, "cached": stats.num_cached_device_pages}
    device["held"] = stats.num_device_pages - sum(device.values())
    both = {"free": stats.num_free_pages, "cached": stats.num_cached_pages, "held": _num_held_pages(stats)}
    return {"device": device, "host": {state: both[state] - device[state] for state in both}}


class Metrics(Collector):
    """What one server exports, in a registry of its own; `stats` is read at each scrape."""

    def __init__(self, model_name: str, stats: Callable[[], EngineStats]) -> None:
        self.time_to_first_token = Histogram(
            "vllm:time_to_first_token_seconds",
            "From a request's arrival to its first token.",
            TIME_TO_FIRST_TOKEN,
        )
        self.inter_token_latency = Histogram(
            "vllm:inter_token_latency_seconds", "Between two outputs of a choice.", TIME_PER_TOKEN
        )
        self.time_per_output_token = Histogram(
            "vllm:request_time_per_output_token_seconds",
            "Mean time per token after the first, per finished choice.",
            TIME_PER_TOKEN,
        )
        self.e2e_latency = Histogram(
            "vllm:e2e_request_latency_seconds",
            "From a request's arrival to the end of a choice.",
            REQUEST_LATENCY,
        )
        self._finished: dict[FinishReason, int] = {"stop": 0, "length": 0, "abort": 0, "error": 0}
        self._labels = {"model_name": model_name, "engine": "0"}
        self._stats = stats
        self._totals = MonotonicStats()
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)
        GCCollector(registry=self._registry)

    def count_finished(self, reason: FinishReason) -> None:
        self._finished[reason] += 1

    def exposition(self) -> bytes:
        """The text format of Prometheus."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        names, values = list(self._labels), list(self._labels.values())
        for metric in _ENGINE_METRICS:
            family = metric.kind(metric.name, metric.documentation, labels=names)
            family.add_metric(values, metric.value(stats, self._totals))
            yield family

        pages = GaugeMetricFamily(
            "hybridgen:kv_pages", "KV pages by tier and state.", labels=[*names, "tier", "state"]
        )
        for tier, counts in _pages_by_tier(stats).items():
            for state, count in counts.items():
                pages.add_metric([*values, tier, state], count)
        yield pages

        moves = CounterMetricFamily(
            "hybridgen:kv_page_moves", "KV pages moved, by the tier they went to.", labels=[*names, "to"]
        )
        moves.add_metric([*values, "host"], self._totals.total(stats, "num_demoted_pages_total"))
        moves.add_metric([*values, "device"], self._totals.total(stats, "num_promoted_pages_total"))
        yield moves

        attended = CounterMetricFamily(
            "hybridgen:attended_tokens",
            "Keys attended, each once a step for its sequence, by the tier they lay on.",
            labels=[*names, "tier"],
        )
        for tier in ("device", "host"):
            attended.add_metric([*values, tier], self._totals.total(stats, f"num_{tier}_tokens_total"))
        yield attended

        retained = SummaryMetricFamily(
            "hybridgen:retained_mass",
            "Softmax mass of a sequence's host pages that a query head attended to, where it was measured.",
            labels=names,
        )
        retained.add_metric(
            values,
            count_value=int(self._totals.total(stats, "num_measured_heads_total")),
            sum_value=self._totals.total(stats, "retained_mass_total"),
        )
        yield retained

        yield from self._balance_metrics(stats.balance, names, values)
        yield from self._node_metrics(stats, names, values)

        finished = CounterMetricFamily(
            "vllm:request_success", "Finished choices by reason.", labels=[*names, "finished_reason"]
        )
        for reason, count in self._finished.items():
            finished.add_metric([*values, reason], count)
        yield finished

        yield self.time_to_first_token.collect(self._labels)
        yield self.inter_token_latency.collect(self._labels)
        yield self.time_per_output_token.collect(self._labels)
        yield self.e2e_latency.collect(self._labels)

    def _balance_metrics(
        self, balance: BalanceStats | None, names: list[str], values: list[str]
    ) -> Iterator[Metric]:
        """Of the split between device and host; none where one pool attends both."""
        if balance is None:
            return
        seconds = CounterMetricFamily(
            "hybridgen:attention_seconds",
            "Time that each side's part of attention took.",
            labels=[*names, "side"],
        )
        waits = CounterMetricFamily(
            "hybridgen:attention_wait_seconds",
            "Time that a side had its part of attention and waited for the other's.",
            labels=[*names, "side"],
        )
        for side in ("device", "host"):
            seconds.add_metric([*values, side], self._totals.total(balance, f"{side}_s_total"))
            waits.add_metric([*values, side], self._totals.total(balance, f"{side}_wait_s_total"))
        yield seconds
        yield waits
        share = GaugeMetricFamily(
            "hybridgen:device_share",
            "Share of the running sequences' KV pages that is to be on the device, and that is.",
            labels=[*names, "kind"],
        )
        share.add_metric([*values, "target"], balance.target_share)
        share.add_metric([*values, "actual"], balance.actual_share)
        yield share
        why = GaugeMetricFamily(
            "hybridgen:device_share_reason",
            "1 for the reason of the last decision.",
            labels=[*names, "reason"],
        )
        why.add_metric([*values, balance.reason], 1)
        yield why
        changes = CounterMetricFamily(
            "hybridgen:device_share_changes", "Changes of the share aimed at.", labels=[*names, "reason"]
        )
        for reason, count in sorted(balance.num_changes_total.items()):
            changes.add_metric([*values, reason], count)
        yield changes
        limit = GaugeMetricFamily(
            "hybridgen:max_running_sequences",
            "Sequences that may run, and why not more.",
            labels=[*names, "reason"],
        )
        limit.add_metric([*values, balance.limit_reason], balance.max_running)
        yield limit

    def _node_metrics(self, stats: EngineStats, names: list[str], values: list[str]) -> Iterator[Metric]:
        """Of the memory nodes that hold host pages; emulated ones say so."""
        labels = [*names, "node", "tier", "emulated"]
        read = CounterMetricFamily(
            "hybridgen:node_read_bytes", "KV read by the host's threads.", labels=labels
        )
        bandwidth = GaugeMetricFamily(
            "hybridgen:node_bandwidth_bytes",
            "Bytes a second that the node can be read at; as measured, or as emulated.",
            labels=labels,
        )
        delayed = CounterMetricFamily(
            "hybridgen:node_delayed_seconds", "Time that emulation held threads up.", labels=labels
        )
        pieces = GaugeMetricFamily(
            "hybridgen:node_pieces", "Pieces of host pages on the node, by role.", labels=[*labels, "role"]
        )
        for node in stats.nodes:
            of_node = [*values, node.name, node.tier, str(node.emulated).lower()]
            read.add_metric(of_node, node.read_bytes_total)
            if len(stats.nodes) > 1:  # one alone is not measured
                bandwidth.add_metric(of_node, node.bandwidth)
            delayed.add_metric(of_node, node.delayed_s_total)
            for role, count in zip(("index", "v_sums", "k", "v"), node.num_pieces, strict=True):
                pieces.add_metric([*of_node, role], count)
        yield from (read, bandwidth, delayed, pieces)
        migrated = CounterMetricFamily(
            "hybridgen:migrated_pieces",
            "Pieces of host pages moved between memory nodes.",
            labels=[*names, "source", "target", "reason"],
        )
        for move in stats.migrations:
            migrated.add_metric([*values, move.source, move.target, move.reason], move.num_total)
        yield migrated
