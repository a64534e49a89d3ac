"""What a step costs on a machine: bytes over bandwidths, operations over rates, overlapped as the engine does.

A *part* is some work with its seconds and what bounds it. Parts done one after the other add up, parts done side by
side take as long as the longest; what bounds a step is what its critical path is made of. Every factor that is not in
the machine's description or the model's shape is a field of `CostFactors`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from hybridgen.scheduler.machine import Machine, Role
from hybridgen.scheduler.placements import INDEX_FIRST, K_FIRST, ROLES, PageShape, ReadPattern

DEVICE_COMPUTE = "device compute"
DEVICE_BANDWIDTH = "device bandwidth"
LINK = "link"
CORES = "host cores"
FIXED = "fixed times"


def node_bandwidth(name: str) -> str:
    """What bounds work that waits for a node's memory."""
    return f"bandwidth of {name}"


class System(StrEnum):
    """Ways to serve contexts that exceed the device: ours, the paper's, and those that they are compared with."""

    EXACT = "exact"  # ours, both tiers, everything read
    MASS = "mass"  # ours, both tiers, index and the tokens that hold the mass
    HYBRIDGEN = "hybridgen"  # all keys, the top-k values summed where they lie
    HYBRIDGEN_PUBLISHED = (
        "hybridgen-published"  # all keys a layer ahead, the top-k values of each head sent to the device
    )
    CPU_EXACT = "cpu-exact"  # all KV on the host, all attention by its cores
    STREAM = "stream"  # host pages copied to the device layer by layer (FlexGen)
    STREAM_INT4 = "stream-int4"  # the same with 4-bit KV
    H2O = "h2o"  # heavy hitters and recent tokens kept, the rest lost
    INFINIGEN = "infinigen"  # top-k rows speculated a layer ahead and fetched
    DEVICE_ONLY = "device-only"  # nothing on the host; what does not fit waits

    @property
    def attends_on_host(self) -> bool:
        return self in _HOST_ATTENTION

    @property
    def uses_device_pages(self) -> bool:
        return self not in (System.CPU_EXACT, System.INFINIGEN)

    @property
    def uses_host_pages(self) -> bool:
        return self is not System.DEVICE_ONLY

    @property
    def looks_ahead(self) -> bool:
        """Whether the host may work on a layer while the device is at the one before."""
        return self in (System.MASS, System.HYBRIDGEN, System.HYBRIDGEN_PUBLISHED)

    @property
    def selects(self) -> bool:
        """Whether the host reads less than everything of sequences that have enough there."""
        return self.looks_ahead

    @property
    def loses_quality(self) -> str:
        """In what way answers differ from exact attention's; empty: they do not."""
        return _LOSSES.get(self, "")


_HOST_ATTENTION = (
    System.EXACT,
    System.MASS,
    System.HYBRIDGEN,
    System.HYBRIDGEN_PUBLISHED,
    System.CPU_EXACT,
)
_LOSSES = {
    System.MASS: "bounded: the mass left out is measured and kept under a floor",
    System.HYBRIDGEN: "unbounded: top-k only",
    System.HYBRIDGEN_PUBLISHED: "unbounded: top-k only, logits of foretold queries",
    System.STREAM_INT4: "4-bit keys and values",
    System.H2O: "evicted tokens are gone for ever",
    System.INFINIGEN: "unbounded: top-k only, by foretold queries",
}


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A model as far as its costs go. Layers with a sliding window count as others.

    Attributes:
        parameters: that must be in memory.
        linear_parameters: of the layers' matrices, each read once a step.
        head_parameters: of the matrix that gives the logits.
    """

    name: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    parameters: int
    linear_parameters: int
    head_parameters: int
    weight_bytes: int = 2  # of one parameter
    kv_bytes: int = 2  # of one element of K or V

    @property
    def weights_bytes(self) -> int:
        return self.parameters * self.weight_bytes

    @property
    def group(self) -> int:
        """Query heads a KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def token_bytes(self) -> int:
        """K and V of a token, all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.kv_bytes

    @property
    def index_token_bytes(self) -> int:
        """The 8-bit index of a token's K, all layers: a code a dim and 2 bytes of scale for 32 dims. In groups of
        16 tokens, whose scales are padded to 64 bytes."""
        dims = -(-self.head_dim // 32) * 32
        scales = -(-(dims // 32 * 16 * 2) // 64) * 64
        return self.num_layers * self.num_kv_heads * (dims * 16 + scales) // 16

    def v_sums_page_bytes(self) -> int:
        """float32 sums of V over a page."""
        return self.num_layers * self.num_kv_heads * self.head_dim * 4

    def page_shape(self, page_size: int, *, with_index: bool) -> PageShape:
        half = page_size * self.token_bytes // 2
        return PageShape(
            index_bytes=page_size * self.index_token_bytes if with_index else 0,
            v_sums_bytes=self.v_sums_page_bytes() if with_index else 0,
            k_bytes=half,
            v_bytes=half,
        )


@dataclass(frozen=True, slots=True)
class CostFactors:
    """What is neither in the data sheet nor in the model's shape. Defaults are for planning and say where they come
    from; `engine/this_machine.py` measures those of a CPU.

    Attributes:
        step_s: of a step, whatever is in it: scheduling, sampling, the server. Assumption.
        layer_s: of a layer, whatever is in it: launches of a captured graph, small kernels. Assumption: ten of 1 us.
        sequence_s: of each sequence in a step: block tables, sampling. Assumption.
        handover_s: of a layer with host pages: queries over, flags, the merge. 15 to 20 us are lower bounds of
            copies (5 to 8 us each way), flags (2 us) and a kernel (3 to 4 us). Assumption.
        cores_matmul_flops: dense products by all cores together; only where linear layers run on them.
        linear_share: of a node's bandwidth that streaming weights reaches; only where linear layers run on the cores.
        scan_share: of a node's bandwidth that attention over scattered pages reaches: 0.88 at best by
            docs/cpu-attention.md.
        gather_share: the same when single rows are read. Assumption: 0.5 to 0.7 for rows of 256 bytes.
        core_fixed_share: of the time of attention in cache at 4 query heads a KV head that does not grow with their
            number.
        index_speed: tokens of the index scanned by a core in the time of one that is attended. Assumption; two
            cores of a Zen 4 are slower (docs/simulator.md).
        logits_speed: keys scored and ranked by a core for `hybridgen`, in the same time: half of the arithmetic is
            left, and ranking is free. Assumption; this repository's own policy is slower (docs/simulator.md).
        selected_share: of the tokens on the host whose K and V `mass` reads; 0.33 at 0.99 on text of 2k and 4k tokens
            (docs/accuracy.md), on a small model. Larger models and longer contexts are likely to need less.
        v_sums_share: of the sums of V that `mass` reads for its tail term.
        top_k_ratio: of the host's tokens, that each query head of `hybridgen` attends to; its default.
        int4_share: of 16 bits that FlexGen's 4 bits take: groups of 64 with a 16-bit scale and minimum.
        h2o_share: of the tokens that H2O keeps, in all layers but two, which keep all.
        infinigen_share: of the tokens that InfiniGen fetches, in all layers but two, which fetch all. Assumption,
            between the less than 10 % that its authors report on average and its limit of 20 %.
        infinigen_partial: of the columns of K that InfiniGen keeps on the device to speculate with.
        scan_min_tokens: host tokens of a sequence below which a selecting policy attends to all.
    """

    step_s: float = 500e-6
    layer_s: float = 10e-6
    sequence_s: float = 2e-6
    handover_s: float = 18e-6
    cores_matmul_flops: float = 0.0
    linear_share: float = 0.85
    scan_share: float = 0.85
    gather_share: float = 0.6
    core_fixed_share: float = 0.5
    index_speed: float = 3.0
    logits_speed: float = 2.0
    selected_share: float = 0.33
    v_sums_share: float = 0.125
    top_k_ratio: float = 0.05
    int4_share: float = 4.5 / 16
    h2o_share: float = 0.2
    infinigen_share: float = 0.1
    infinigen_partial: float = 0.2
    scan_min_tokens: int = 1024


@dataclass(frozen=True, slots=True)
class Part:
    """Some work.

    Attributes:
        seconds: from its start to its end.
        critical: resource -> seconds of these that it bounds; they add up to `seconds`.
        busy: resource -> seconds that it works, waiting not counted.
    """

    seconds: float = 0.0
    critical: Mapping[str, float] = field(default_factory=dict[str, float])
    busy: Mapping[str, float] = field(default_factory=dict[str, float])

    def times(self, count: int) -> "Part":
        return Part(
            self.seconds * count,
            {name: seconds * count for name, seconds in self.critical.items()},
            {name: seconds * count for name, seconds in self.busy.items()},
        )

    def counted_elsewhere(self) -> "Part":
        """The same time, whose work some other part has counted."""
        return Part(self.seconds, self.critical)


def work(resource: str, seconds: float) -> Part:
    return Part(seconds, {resource: seconds}, {resource: seconds}) if seconds else Part()


def in_turn(*parts: Part) -> Part:
    return Part(
        sum(part.seconds for part in parts),
        _sum([part.critical for part in parts]),
        _sum([part.busy for part in parts]),
    )


def side_by_side(*parts: Part) -> Part:
    longest = max(parts, key=lambda part: part.seconds)
    return Part(longest.seconds, longest.critical, _sum([part.busy for part in parts]))


def interleaved(*parts: Part) -> Part:
    """Work of many independent items, each of which does its parts in turn: as long as the busiest resource works."""
    busy = _sum([part.busy for part in parts])
    if not busy:
        return Part()
    longest = max(busy, key=lambda name: busy[name])
    return Part(busy[longest], {longest: busy[longest]}, busy)


def _sum(times: Sequence[Mapping[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for one in times:
        for name, seconds in one.items():
            total[name] = total.get(name, 0.0) + seconds
    return total


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens of a prompt that a step computes, and the context before them on either tier."""

    num_tokens: int
    num_device_before: int
    num_host_before: int


@dataclass(frozen=True, slots=True)
class StepWork:
    """What a step has to do, sums over its sequences.

    Attributes:
        num_decodes: sequences that compute one token.
        num_host_decodes: of these, with host pages.
        device_tokens: context of the decodes on the device.
        scanned_tokens: context of the decodes on the host, of those with enough of it to select from.
        short_tokens: the rest of it.
        host_shares: role -> for each node the share of the role's bytes that lies there.
        chunks: of prompts.
        num_sampled: rows of logits.
        moved_bytes: copied between device and host before the step.
        num_threads: of the pool; 0: one for each core.
        layer_ahead: whether the host works a layer ahead.
    """

    num_decodes: int
    num_host_decodes: int
    device_tokens: int
    scanned_tokens: int
    short_tokens: int
    host_shares: Mapping[Role, Sequence[float]]
    chunks: Sequence[Chunk] = ()
    num_sampled: int = 0
    moved_bytes: int = 0
    num_threads: int = 0
    layer_ahead: bool = True

    @property
    def host_tokens(self) -> int:
        return self.scanned_tokens + self.short_tokens

    @property
    def num_tokens(self) -> int:
        return self.num_decodes + sum(chunk.num_tokens for chunk in self.chunks)


@dataclass(frozen=True, slots=True)
class StepCost:
    """A step's time, and what the controller would be told of it.

    Attributes:
        total: the whole step.
        device_s: what goes on while the host attends, all layers.
        host_s: the host's part as the device sees it, link and hand-over included, all layers.
        moved_s: that the step is longer for its moves.
        node_bytes: read by the host's threads, in the order of the machine's nodes.
        device_bytes: of KV, read by the device.
        link_bytes: over the link, both ways.
    """

    total: Part
    device_s: float
    host_s: float
    moved_s: float
    node_bytes: tuple[float, ...]
    device_bytes: float
    link_bytes: float


@dataclass(frozen=True, slots=True)
class _HostAttention:
    """The host's part of one layer: what it can do before the true query is there, what not, and all of it."""

    early: Part
    late: Part
    both: Part
    node_bytes: tuple[float, ...]
    to_host_bytes: float
    to_device_bytes: float


class CostModel:
    """Times of steps of one system.

    Args:
        machine: without a device, linear layers and the pages of the device tier are work of the cores and of the
            first node.
    """

    def __init__(self, machine: Machine, shape: ModelShape, factors: CostFactors, system: System) -> None:
        if machine.device is None and not (system.attends_on_host and factors.cores_matmul_flops > 0):
            raise ValueError(
                f"{machine.name} has no device: {system} cannot run on it, or its cores' rate is unknown"
            )
        self.machine = machine
        self.shape = shape
        self.factors = factors
        self.system = system

    # -- how much memory a token takes --

    @property
    def kv_share(self) -> float:
        """Of K and V in 16 bits, that the system keeps of a token on average."""
        layers = self.shape.num_layers
        if self.system is System.STREAM_INT4:
            return self.factors.int4_share
        if self.system is System.H2O:
            return (min(2, layers) + max(0, layers - 2) * self.factors.h2o_share) / layers
        return 1.0

    def device_page_bytes(self, page_size: int) -> int:
        return round(page_size * self.shape.token_bytes * self.kv_share)

    def page_shape(self, page_size: int) -> PageShape:
        """Of a host page."""
        shape = self.shape.page_shape(page_size, with_index=self.system is System.MASS)
        if self.kv_share == 1.0:
            return shape
        half = round(shape.k_bytes * self.kv_share)
        return PageShape(0, 0, half, half)

    def beside_device_bytes(self, page_size: int) -> int:
        """Device memory that a host page takes besides."""
        if self.system is not System.INFINIGEN:
            return 0
        return round(page_size * self.shape.token_bytes / 2 * self.factors.infinigen_partial)

    def pattern(self) -> ReadPattern:
        """What a reader reads of each role of a host page."""
        factors = self.factors
        if self.system is System.MASS:
            selected = factors.selected_share
            return ReadPattern(1.0, factors.v_sums_share, selected, selected, phases=INDEX_FIRST)
        if self.system in (System.HYBRIDGEN, System.HYBRIDGEN_PUBLISHED):
            return ReadPattern(0.0, 0.0, 1.0, self._union_share(), phases=K_FIRST)
        if self.system is System.INFINIGEN:
            return ReadPattern(0.0, 0.0, self._fetched_share(), self._fetched_share())
        return ReadPattern(0.0, 0.0, 1.0, 1.0)

    def _union_share(self) -> float:
        """Of the rows of V that some query head of a KV head selects: as if no two selected the same."""
        return min(1.0, self.shape.group * self.factors.top_k_ratio)

    def _fetched_share(self) -> float:
        layers = self.shape.num_layers
        return (min(2, layers) + max(0, layers - 2) * self.factors.infinigen_share) / layers

    # -- a step --

    def step(self, load: StepWork) -> StepCost:
        layers = self.shape.num_layers
        linear = self._linear(load.num_tokens)
        chunks = in_turn(*(self._chunk(chunk) for chunk in load.chunks)) if load.chunks else Part()
        fixed = work(FIXED, self.factors.layer_s)
        if self.machine.device is None:
            layer, device_s, host = self._layer_on_cores(load, linear)
        elif self.system.attends_on_host:
            layer, device_s, host = self._hybrid_layer(load, linear)
        else:
            layer, device_s, host = self._fetching_layer(load, linear)
        layer = in_turn(layer, chunks, fixed)
        head = self._products(self.shape.head_parameters, load.num_sampled)
        fixed = work(FIXED, self.factors.step_s + self.factors.sequence_s * load.num_decodes)
        total = in_turn(layer.times(layers), head, fixed)
        total, moved_s = self._with_moves(total, load.moved_bytes)
        host_s = host.both.seconds
        if self.machine.device is not None and self.system.attends_on_host and load.num_host_decodes:
            link = self._link(host.to_host_bytes + host.to_device_bytes)
            host_s += link.seconds + self.factors.handover_s
        return StepCost(
            total=total,
            device_s=device_s * layers,
            host_s=host_s * layers,
            moved_s=moved_s,
            node_bytes=tuple(num_bytes * layers for num_bytes in host.node_bytes),
            device_bytes=load.device_tokens * self.shape.token_bytes * self.kv_share,
            link_bytes=layers * (host.to_host_bytes + host.to_device_bytes) + load.moved_bytes,
        )

    def _hybrid_layer(self, load: StepWork, linear: Part) -> tuple[Part, float, _HostAttention]:
        """Device and host attend to their own pages; the host ahead of the device where it may be."""
        device = self._device_attention(load.device_tokens)
        host = self._host_attention(load)
        if not load.num_host_decodes:
            return in_turn(linear, device), device.seconds, host
        there, back = self._link(host.to_host_bytes), self._link(host.to_device_bytes)
        handover = work(FIXED, self.factors.handover_s)
        if not (load.layer_ahead and self.system.looks_ahead):
            path = in_turn(there, handover, host.both, back)
            return in_turn(linear, side_by_side(device, path)), device.seconds, host
        own = in_turn(linear, device)
        if self.system is not System.MASS:
            # Everything of the host's is about foretold queries: it goes on beside the whole layer.
            pipeline = side_by_side(host.both, in_turn(there, back))
            return in_turn(side_by_side(own, pipeline), handover), own.seconds, host
        # The selection goes on beside the whole layer, what it selected is attended to with the true query.
        path = in_turn(there, handover, host.late.counted_elsewhere(), back)
        layer = side_by_side(host.both, in_turn(linear, side_by_side(device, path)))
        return layer, own.seconds, host

    def _layer_on_cores(self, load: StepWork, linear: Part) -> tuple[Part, float, _HostAttention]:
        """One processor does everything, one after the other; `device` pages are the first node's."""
        host = self._host_attention(load)
        device = self._attend(
            load.device_tokens,
            [load.device_tokens * self._layer_token_bytes] + [0.0] * (len(self.machine.nodes) - 1),
            load.num_threads,
        )
        handover = (
            work(FIXED, self.factors.handover_s) if load.num_host_decodes and load.device_tokens else Part()
        )
        return in_turn(linear, device, host.both, handover), device.seconds, host

    def _fetching_layer(self, load: StepWork, linear: Part) -> tuple[Part, float, _HostAttention]:
        """The device attends to everything; what lies on the host is copied, a layer ahead."""
        token_bytes, factors = self._layer_token_bytes, self.factors
        host_tokens, share = load.host_tokens, self.kv_share
        fetched = host_tokens * token_bytes * share
        own = load.device_tokens * token_bytes * share
        node_factor = 1.0
        extra = 0.0  # device memory traffic beside reading K and V once
        if self.system is System.STREAM_INT4:
            extra = 2 * (load.device_tokens + host_tokens) * token_bytes  # written in 16 bits, and read again
        if self.system is System.INFINIGEN:
            fetched *= self._fetched_share()
            extra = host_tokens * token_bytes / 2 * factors.infinigen_partial
            node_factor = (
                3 / factors.gather_share
            )  # rows gathered, written to a pinned buffer, read by the link
        # What is fetched is written to the device's memory and read again.
        device = self._device_bytes(own + 2 * fetched + extra)
        nodes = [
            fetched / 2 * (k + v) * node_factor
            for k, v in zip(load.host_shares[Role.K], load.host_shares[Role.V], strict=True)
        ]
        copies = side_by_side(self._link(fetched), *self._node_parts(nodes, 1.0))
        layer = side_by_side(copies, in_turn(linear, device))
        return layer, device.seconds, _HostAttention(Part(), copies, copies, tuple(nodes), 0.0, fetched)

    # -- parts of a layer --

    @property
    def _layer_token_bytes(self) -> float:
        return self.shape.token_bytes / self.shape.num_layers

    def _host_attention(self, load: StepWork) -> _HostAttention:
        """One layer of all decodes, without the link."""
        shape, factors, system = self.shape, self.factors, self.system
        half = self._layer_token_bytes / 2
        threads, shares = load.num_threads, load.host_shares
        k_shares, v_shares = shares[Role.K], shares[Role.V]
        rows = load.num_host_decodes
        to_host = rows * shape.num_heads * shape.head_dim * 2.0
        to_device = rows * shape.num_heads * (shape.head_dim + 1) * 4.0  # output and log-sum-exp in float32
        scanned, short = load.scanned_tokens, load.short_tokens
        if system in (System.EXACT, System.CPU_EXACT):
            scanned, short = 0, scanned + short
        whole = [short * half * (k + v) for k, v in zip(k_shares, v_shares, strict=True)]
        late = self._attend(short, whole, threads)
        early, nodes = Part(), whole
        if scanned and system is System.MASS:
            index = scanned * shape.index_token_bytes / shape.num_layers
            sums = scanned / 32 * shape.v_sums_page_bytes() / shape.num_layers * factors.v_sums_share
            scan = [
                index * i + sums * s for i, s in zip(shares[Role.INDEX], shares[Role.V_SUMS], strict=True)
            ]
            early = self._on_cores(
                scan, factors.scan_share, self._core_s(scanned, threads) / factors.index_speed
            )
            selected = scanned * factors.selected_share
            gathered = [selected * half * (k + v) for k, v in zip(k_shares, v_shares, strict=True)]
            late = in_turn(
                late, self._on_cores(gathered, factors.gather_share, self._core_s(selected, threads))
            )
            nodes = [a + b + c for a, b, c in zip(nodes, scan, gathered, strict=True)]
        elif scanned:
            keys = [scanned * half * k for k in k_shares]
            early = self._on_cores(
                keys, factors.scan_share, self._core_s(scanned, threads) / factors.logits_speed
            )
            union = self._union_share()
            values = [scanned * half * union * v for v in v_shares]
            late = in_turn(
                late, self._on_cores(values, factors.gather_share, self._core_s(scanned * union, threads) / 2)
            )
            nodes = [a + b + c for a, b, c in zip(nodes, keys, values, strict=True)]
            if system is System.HYBRIDGEN_PUBLISHED:
                # Values and logits of what each query head selected.
                selected = scanned * factors.top_k_ratio * shape.num_heads
                to_device = selected * (shape.head_dim * shape.kv_bytes + 4.0)
        # Sequences and KV heads are independent: while some scan one node, others gather from another. Where there
        # is one node, every thread waits for it in either phase.
        both = interleaved(early, late) if len(self.machine.nodes) > 1 else in_turn(early, late)
        return _HostAttention(early, late, both, tuple(nodes), to_host, to_device)

    def _attend(self, num_tokens: float, nodes: Sequence[float], num_threads: int) -> Part:
        return self._on_cores(nodes, self.factors.scan_share, self._core_s(num_tokens, num_threads))

    def _core_s(self, num_tokens: float, num_threads: int) -> float:
        """Seconds of arithmetic for one layer's attention of one query to so many tokens."""
        shape, machine = self.shape, self.machine
        threads = min(num_threads, machine.num_cores) or machine.num_cores
        flops_at_4 = 4 * 4 * shape.num_kv_heads * shape.head_dim * num_tokens
        fixed = self.factors.core_fixed_share
        return flops_at_4 / (threads * machine.core_flops) * (fixed + (1 - fixed) * shape.group / 4)

    def _on_cores(self, nodes: Sequence[float], bandwidth_share: float, core_s: float) -> Part:
        return side_by_side(work(CORES, core_s), *self._node_parts(nodes, bandwidth_share))

    def _node_parts(self, nodes: Sequence[float], bandwidth_share: float) -> list[Part]:
        return [
            work(node_bandwidth(node.name), num_bytes / (node.read_bandwidth * bandwidth_share))
            for node, num_bytes in zip(self.machine.nodes, nodes, strict=True)
        ]

    def _linear(self, num_tokens: int) -> Part:
        """The matrices of one layer."""
        return self._products(self.shape.linear_parameters / self.shape.num_layers, num_tokens)

    def _products(self, parameters: float, num_tokens: int) -> Part:
        if not num_tokens:
            return Part()
        flops, num_bytes = 2 * parameters * num_tokens, parameters * self.shape.weight_bytes
        device = self.machine.device
        if device is not None:
            return side_by_side(
                work(DEVICE_COMPUTE, flops / device.matmul_flops),
                work(DEVICE_BANDWIDTH, num_bytes / device.memory.read_bandwidth),
            )
        node = self.machine.nodes[0]
        return side_by_side(
            work(CORES, flops / self.factors.cores_matmul_flops),
            work(node_bandwidth(node.name), num_bytes / (node.read_bandwidth * self.factors.linear_share)),
        )

    def _device_attention(self, num_tokens: int) -> Part:
        return self._device_bytes(num_tokens * self._layer_token_bytes * self.kv_share)

    def _device_bytes(self, num_bytes: float) -> Part:
        device = self.machine.device
        assert device is not None
        return work(DEVICE_BANDWIDTH, num_bytes / device.memory.read_bandwidth)

    def _link(self, num_bytes: float) -> Part:
        device = self.machine.device
        assert device is not None
        return work(LINK, num_bytes / device.link_bandwidth)

    def _chunk(self, chunk: Chunk) -> Part:
        """One layer's attention of a chunk of a prompt. Pages on the host are copied to the device beside it."""
        shape, machine = self.shape, self.machine
        before = chunk.num_device_before + chunk.num_host_before
        num_pairs = chunk.num_tokens * (before + (chunk.num_tokens + 1) / 2)
        flops = 4 * shape.num_heads * shape.head_dim * num_pairs
        token_bytes = self._layer_token_bytes * self.kv_share
        if machine.device is None:
            # Many queries share each key, so only the part of the arithmetic that grows with them counts.
            growing = max(1 - self.factors.core_fixed_share, 0.25)
            return work(CORES, flops * growing / (machine.num_cores * machine.core_flops))
        return side_by_side(
            work(DEVICE_COMPUTE, flops / machine.device.matmul_flops),
            self._device_bytes((before + chunk.num_tokens) * token_bytes),
            self._link(chunk.num_host_before * token_bytes),
        )

    def _with_moves(self, total: Part, num_bytes: int) -> tuple[Part, float]:
        """Copies share the link with the step on a device; on the cores they come before it."""
        if not num_bytes:
            return total, 0.0
        if self.machine.device is None:
            node = self.machine.nodes[0]
            copies = work(
                node_bandwidth(node.name), 2 * num_bytes / (node.read_bandwidth * self.factors.linear_share)
            )
            return in_turn(total, copies), copies.seconds
        copies = self._link(num_bytes)
        link = work(LINK, total.busy.get(LINK, 0.0) + copies.seconds)
        longer = max(0.0, link.seconds - total.seconds)
        if longer:
            return Part(link.seconds, link.critical, {**total.busy, **link.busy}), longer
        return Part(total.seconds, total.critical, {**total.busy, **link.busy}), 0.0


def even_shares(role_nodes: Mapping[Role, int], num_nodes: int) -> dict[Role, tuple[float, ...]]:
    """Shares where each role lies whole on one node, given by its place in the machine's list."""
    return {
        role: tuple(float(place == role_nodes.get(role, 0)) for place in range(num_nodes)) for role in ROLES
    }
